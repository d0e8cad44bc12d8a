"""A plain Django project behind aiohttp: the fast way.

Rules:

1. A request whose view is synchronous enters one thread of the pool, runs there from
   ``request_started`` to its complete response, and leaves once.
2. A request whose view is asynchronous runs the same synchronous middleware on a *home
   thread*, in a greenlet. Where the chain reaches the view it is suspended: the view runs on the
   event loop, in the request's own `contextvars.Context`, and the thread is free. Then
   the chain is resumed on its thread. Home threads do not run synchronous views.
3. Which of the two it will be is told beforehand by resolving the path against ROOT_URLCONF;
   Django takes over that match if nothing has changed until then. Where the guess was wrong the
   request is answered all the same: an asynchronous view on a pool thread by Django's own
   ``async_to_sync``, a synchronous one on its home thread, after which requests for what
   had been guessed go to the pool.
4. ``sync_to_async`` and the asynchronous ORM run on the request's home thread, one job at a
   time. A home thread lives as long as the bridge, so it keeps its database connections
   (CONN_MAX_AGE), and there are no more connections than threads.
5. A transaction belongs to one request. While a suspended chain, or a job that it left behind, has
   one open, its home thread works for that request alone; the others wait. What is
   still open at the end of the request is rolled back.
6. A connection is not closed for its age while another request of the same thread is under way:
   that one may have a server-side cursor open. A broken one is closed at once.
7. What else lives in a database session (``SET``, advisory locks, temporary tables) or in a
   ``threading.local`` is shared by the asynchronous requests of a home thread. Where the
   database backend keeps a tenant in the connection, where a middleware keeps something of the
   request in a ``threading.local`` of its module, and where there is middleware that
   cannot run synchronously, rule 1 holds for all requests: Django's own way.
8. A client that leaves cancels the asynchronous view; CancelledError then unwinds the chain.
   ``close()`` of a response is called exactly once, on a pool thread or the home thread.
9. No exception of a view, be it SystemExit, ends anything but its request.
10. What somebody has put around ``WSGIHandler.__call__``, as monitoring agents do, sees every
    request: there the chain begins, and there it ends. Of the answer it sees what WSGI has:
    status, headers and the chunks that are iterated over synchronously.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import io
import logging
import os
import stat
import sys
import threading
import traceback
from copy import copy
from functools import partial
from types import FunctionType
from typing import IO, TYPE_CHECKING, Any, cast

from aiohttp import web
from asgiref.sync import iscoroutinefunction
from django.conf import settings
from django.conf.urls.i18n import is_language_prefix_patterns_used
from django.core.cache import caches, close_caches
from django.core.cache.backends.base import BaseCache
from django.core.handlers import wsgi
from django.core.handlers.base import reset_urlconf
from django.core.handlers.exception import response_for_exception
from django.core.handlers.wsgi import WSGIHandler, WSGIRequest, get_path_info, get_script_name
from django.core.signals import request_finished, request_started
from django.db import close_old_connections, connections, reset_queries
from django.http import HttpResponse, HttpResponseBadRequest, HttpResponseServerError
from django.http.response import HttpResponseBase
from django.urls import URLResolver, converters, get_resolver, set_script_prefix
from django.utils import translation
from django.utils.functional import SimpleLazyObject
from django.utils.module_loading import import_string
from greenlet import getcurrent

from django_aioserve.bridge.body import read_body
from django_aioserve.bridge.environ import request_meta
from django_aioserve.bridge.home import (
    Chain,
    Guest,
    Home,
    Homes,
    Within,
    keeping_connections,
    open_caches,
    open_connections,
    rehome,
    retire,
    watch_connections,
)
from django_aioserve.bridge.stream import (
    SERVER_LINE,
    BridgeResponse,
    Channel,
    ClientGone,
    can_send_file,
    date_line,
    pump,
)
from django_aioserve.bridge.threads import QueueFull, carry_over
from django_aioserve.bridge.wsgi import parse_status, wire_headers
from django_aioserve.keys import CANCELLABLE

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from aiohttp.abc import AbstractStreamWriter
    from django.dispatch import Signal
    from django.urls import ResolverMatch
    from multidict import CIMultiDict

    from django_aioserve.bridge.body import Body
    from django_aioserve.bridge.home import Outcome
    from django_aioserve.bridge.threads import Callback, ThreadPool, Work
    from django_aioserve.conf import Config

__all__ = ["DjangoBridge", "is_plain", "known_receivers"]

logger = logging.getLogger("django_aioserve")
request_logger = logging.getLogger("django.request")

#: Seconds after which a client may try again when all threads are busy.
_RETRY_AFTER = "1"

#: A smaller file is read at once; more would be gained by sendfile than it costs.
_SMALL_FILE = 64 << 10

#: Database wrappers that have one of these keep a tenant in the connection.
_TENANT_METHODS = ("set_tenant", "set_schema")


class DjangoBridge:
    """An aiohttp handler that serves a Django project on a pool's threads and on the loop.

    ``handler`` is what ``get_wsgi_application()`` gave; it can still be called as a WSGI
    application, too. Made while the loop runs.
    To be mounted on a route with ``{path_info}``, as `WSGIBridge` is.

    .. versionadded:: 0.1
    """

    def __init__(self, handler: WSGIHandler, config: Config, pool: ThreadPool) -> None:
        # Its middleware is loaded already: a handler of our own would load it once more, with
        # whatever time, memory and threads that takes. So these two methods are replaced.
        replaced: Any = handler
        replaced.resolve_request = partial(_resolve_request, handler)
        replaced.make_view_atomic = partial(_make_view_atomic, handler)
        self.handler = handler
        self.is_wrapped = not _is_djangos(vars(WSGIHandler)["__call__"])
        self.lasting: set[_Lasting] = set()
        watch_connections()
        pool.at_exit(connections.close_all)
        self.pool = pool
        self.loop = asyncio.get_running_loop()
        self.write_timeout = config.write_timeout
        self.life = _Life()
        self.forecast = _Forecast()
        self._config = config
        self._meta = request_meta(config)
        #: Native handlers of the same application live there, too.
        self.homes = Homes(config, pool)

    async def prepare(self) -> None:
        """Import ROOT_URLCONF with all its views now, so that the first request need not.

        Raises QueueFull.
        """
        await self.pool.run(self._survey)

    async def close(self, timeout: float) -> bool:
        """End the home threads; tell whether what they do was finished in ``timeout`` seconds.

        To be called when no more requests come, and before the pool is closed.
        """
        return await self.homes.close(timeout)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer ``request``.

        Raises HTTPException for a request that does not get as far as Django, among them
        503 with Retry-After when too many wait for a thread.
        """
        config = self._config
        body = await read_body(request, limit=config.max_body_size, timeout=config.body_timeout)
        exchange = None
        try:
            exchange = _Exchange(self, request, self._environ(request, body))
            if get_resolver() is not self.forecast.resolver:
                await self.prepare()
            if self.forecast.is_async(exchange):
                await self._visit(self.homes.choose(), request, exchange)
            else:
                exchange.start()
                await exchange.answered
            if exchange.reply is not None:
                return exchange.reply
            return await self._stream(request, exchange)
        except QueueFull:
            raise web.HTTPServiceUnavailable(headers={"Retry-After": _RETRY_AFTER}) from None
        finally:
            if exchange is None or not exchange.begun:
                body.file.close()
            else:
                exchange.let_go()

    def _survey(self) -> None:
        self.life.survey()
        self.forecast.survey()

    def _environ(self, request: web.BaseRequest, body: Body) -> dict[str, Any]:
        meta = self._meta
        environ = meta.environ(request, meta.script_name(request))
        body.enter(environ)
        environ["aiohttp.request"] = request
        return environ

    async def _visit(self, home: Home, request: web.BaseRequest, exchange: _Exchange) -> None:
        """Run the chain on ``home`` and its view here."""
        request[CANCELLABLE] = True
        exchange.lodge(home)
        with _CancelWhenLost(request):
            exchange.submit(exchange.begin)
            await exchange.answered
            while (awaitable := exchange.awaitable) is not None:
                exchange.expect_answer()
                try:
                    outcome: Outcome = (None, await Within(exchange.context, awaitable))
                except BaseException as error:
                    outcome = (error, None)
                    if isinstance(error, asyncio.CancelledError) and _is_cancelled():
                        exchange.abandon()
                        raise
                finally:
                    del awaitable
                exchange.submit(partial(exchange.resume, outcome))
                del outcome
                await exchange.answered

    async def close_streams(self, within: float) -> None:
        """End all event streams, spread over ``within`` seconds.

        Their clients shall not all come back at the same moment.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + within
        while self.lasting:
            left = max(end - loop.time(), 0.0)
            count = len(self.lasting)
            self.lasting.pop().end()
            await asyncio.sleep(left / count)

    async def _stream(self, request: web.BaseRequest, exchange: _Exchange) -> web.StreamResponse:
        """Send a response that did not come as a whole."""
        request[CANCELLABLE] = True
        if exchange.kind is _ASYNC and exchange.home is None:
            # What the stream calls synchronously needs a thread that stays.
            home, guest = self.homes.choose(), Guest()
            home.take_in(guest, exchange.context)
            try:
                return await self._send(request, exchange)
            finally:
                home.let_out(guest)
        if exchange.kind is _ITERATE:
            # The chain is back from its home, which is no place for a slow iterator.
            exchange.start_iteration()
            await exchange.answered
            if exchange.reply is not None:
                return exchange.reply
        return await self._send(request, exchange)

    async def _send(self, request: web.BaseRequest, exchange: _Exchange) -> web.StreamResponse:
        with _CancelWhenLost(request):
            try:
                return await exchange.send(request)
            except ConnectionError:
                # The client has left, so there is nothing to tell and nobody to tell it to.
                return web.Response(status=499, reason="Client Closed Request")


class _Life:
    """The signals at the beginning and the end of a request.

    While nobody but Django itself has connected to them, what its receivers do is done
    directly: each of them would look up the connections of the thread anew.
    """

    def __init__(self) -> None:
        self._started: list[Any] | None = None
        self._finished: list[Any] | None = None
        self._close_caches = True

    def survey(self) -> None:
        """Look at who is connected, and at the caches."""
        self._started = known_receivers(request_started, reset_queries, close_old_connections)
        self._finished = known_receivers(
            request_finished, close_old_connections, close_caches, reset_urlconf
        )
        self._close_caches = any(type(cache).close is not BaseCache.close for cache in caches.all())

    def start(self, environ: dict[str, Any], home: Home | None) -> None:
        """Send ``request_started``; ``home`` is the home thread that this may be (rule 6)."""
        keep = home is not None and home.is_shared()
        if request_started.receivers == self._started:
            for connection in open_connections():
                connection.queries_log.clear()
                retire(connection, keep=keep)
            return
        with keeping_connections() if keep else _NOTHING:
            request_started.send(sender=WSGIHandler, environ=environ)

    def ends_quickly(self, response: HttpResponseBase) -> bool:
        """Whether nothing but Django itself has to do with the end of this response."""
        return (
            request_finished.receivers == self._finished
            and _closes_plainly(response)
            # The request's own close() is one.
            and len(response._resource_closers) <= 1  # type: ignore[attr-defined]  # noqa: SLF001
            and not self._close_caches
        )

    def finish(self, response: HttpResponseBase, home: Home | None) -> None:
        """Close ``response``, which sends ``request_finished``."""
        keep = home is not None and home.is_shared()
        if request_finished.receivers == self._finished and _closes_plainly(response):
            _close_resources(response)
            response.closed = True
            for connection in open_connections():
                retire(connection, keep=keep)
            if self._close_caches:
                caches.close_all()
            # The URLconf need not be reset: it is in a context that ends here.
            return
        with keeping_connections() if keep else _NOTHING:
            response.close()


def _close_resources(response: HttpResponseBase) -> None:
    """Close what belongs to ``response``, as its ``close()`` does."""
    closers = response._resource_closers  # type: ignore[attr-defined]  # noqa: SLF001
    for closer in closers:
        with contextlib.suppress(Exception):
            closer()
    closers.clear()


def _closes_plainly(response: HttpResponseBase) -> bool:
    """Whether ``close()`` is Django's own, neither overridden nor wrapped for this response."""
    kind: Any = type(response)
    return getattr(kind, "close", None) is HttpResponseBase.close and "close" not in vars(response)


def known_receivers(signal: Signal, *functions: Callable[..., None]) -> list[Any] | None:
    """The receivers of ``signal`` if they are just these functions, else None."""
    receivers = list(signal.receivers)
    # An entry begins with the identities of the receiver and of the sender that it wants.
    found = {entry[0] for entry in receivers}
    return receivers if found == {(id(function), id(None)) for function in functions} else None


class _Forecast:
    """Tells beforehand whether a view is asynchronous (rules 3 and 7)."""

    def __init__(self) -> None:
        self.resolver: URLResolver | None = None
        """What was surveyed; another one asks for a new survey."""
        self._possible = False
        self._prefixed = False
        #: Whether a path may mean something else after the middleware.
        self._varies = False
        #: Of each view whether it is worth a home thread.
        self._asynchronous: dict[Callable[..., Any], bool] = {}

    def survey(self) -> None:
        """Look at all views, middleware and database backends. For a pool thread."""
        resolver = get_resolver()
        try:
            self._possible = (
                _has_async_views(resolver)
                and all(map(_fits_a_home_thread, settings.MIDDLEWARE))
                and not _has_tenants()
            )
            self._prefixed = (
                self._possible and is_language_prefix_patterns_used(settings.ROOT_URLCONF)[0]
            )
            self._varies = self._possible and _has_own_converters(resolver)
        except Exception:  # noqa: BLE001 - a project's own code
            # What is wrong with the URLs Django says in answer to each request.
            self._possible = False
        self.resolver = resolver

    def is_async(self, exchange: _Exchange) -> bool:
        """Whether the view of this request is asynchronous, as far as can be seen now."""
        resolver = self.resolver
        if not self._possible or resolver is None:
            return False
        try:
            if self._prefixed:
                match = contextvars.copy_context().run(
                    _resolve_prefixed, resolver, exchange.path_info
                )
            else:
                match = resolver.resolve(exchange.path_info)
                if not self._varies:
                    exchange.match = match
        except Exception:  # noqa: BLE001 - a project's own code
            # No such page, or a converter that fails here: Django will find out by itself.
            return False
        view = exchange.forecast = match.func
        found = self._asynchronous.get(view)
        if found is None:
            found = self._asynchronous[view] = iscoroutinefunction(view)
        return found

    def refute(self, view: Callable[..., Any]) -> None:
        """Take note that a request for ``view`` has got a synchronous one."""
        self._asynchronous[view] = False


def _resolve_prefixed(resolver: URLResolver, path_info: str) -> ResolverMatch:
    language = translation.get_language_from_path(path_info) or settings.LANGUAGE_CODE
    with translation.override(language):
        return resolver.resolve(path_info)


def _has_async_views(resolver: URLResolver) -> bool:
    return any(
        _has_async_views(pattern)
        if isinstance(pattern, URLResolver)
        else iscoroutinefunction(pattern.callback)
        for pattern in resolver.url_patterns
    )


def _has_own_converters(resolver: URLResolver) -> bool:
    """Whether any path has a converter of the project's: it may look at what middleware sets."""
    return any(
        any(
            type(converter).__module__ != converters.__name__
            for converter in pattern.pattern.converters.values()
        )
        or (isinstance(pattern, URLResolver) and _has_own_converters(pattern))
        for pattern in resolver.url_patterns
    )


def _fits_a_home_thread(path: str) -> bool:
    """Whether middleware runs synchronously, and keeps nothing on its thread for others to find."""
    middleware = import_string(path)
    if not getattr(middleware, "sync_capable", True):
        return False
    module = sys.modules.get(middleware.__module__)
    # Its type, for whoever asks a lazy object for its class has it evaluated.
    kinds = map(type, vars(module or object).values())
    return not any(issubclass(kind, threading.local) for kind in kinds)


def _has_tenants() -> bool:
    return any(
        hasattr(connection, method)
        for connection in connections.all()
        for method in _TENANT_METHODS
    )


class DjangoRequest(WSGIRequest):
    """Django's request, made of an environ without looking at anything twice."""

    def __init__(
        self, environ: dict[str, Any], path_info: str, match: ResolverMatch | None
    ) -> None:
        script_name = environ["SCRIPT_NAME"]
        if script_name or settings.FORCE_SCRIPT_NAME is not None:
            script_name = get_script_name(environ)
            environ["SCRIPT_NAME"] = script_name
        environ["PATH_INFO"] = path_info
        self.environ = self.META = environ
        self.path_info = path_info
        # Only the first slash: "//" is not "/" (RFC 3986, 3.3).
        self.path = f"{script_name.rstrip('/')}/{path_info.replace('/', '', 1)}"
        self.method = environ["REQUEST_METHOD"].upper()
        if "CONTENT_TYPE" in environ:
            self._set_content_type_params(environ)  # type: ignore[attr-defined]
        else:
            self.content_type = ""
            self.content_params = {}
        self._stream = environ["wsgi.input"]
        self._read_started = False
        self.resolver_match = None
        self.forecast = match
        """What path_info resolved to before the middleware ran."""
        self.forecast_path = path_info


def _resolve_request(handler: WSGIHandler, request: Any) -> Any:
    """``BaseHandler.resolve_request``, for which a forecast will do if it still holds."""
    match = getattr(request, "forecast", None)
    if (
        match is None
        or request.path_info != request.forecast_path
        or hasattr(request, "urlconf")
        # Paths may be translated; the forecast was made in the default language.
        or translation.get_language() != settings.LANGUAGE_CODE
    ):
        return type(handler).resolve_request(handler, request)
    # A match belongs to one request: views get its kwargs.
    request.forecast = None
    request.resolver_match = match
    return match


def _make_view_atomic(handler: WSGIHandler, view: Any) -> Any:
    """``BaseHandler.make_view_atomic``, behind which Django calls the view.

    On a home thread it gives, for an asynchronous view, a function that waits for it.
    """
    view = type(handler).make_view_atomic(handler, view)
    chain = getcurrent()
    if isinstance(chain, Chain):
        if view is chain.view or iscoroutinefunction(view):
            return partial(_wait_for_view, chain, view)
        chain.astray = True
    return view


def is_plain(application: object) -> bool:
    """Whether this is Django's own handler, and its requests are Django's own.

    A subclass may override anything that this bridge leaves out, and so may a library that
    replaces what makes a request (Datadog). What is around ``__call__`` is seen to (rule 10).
    """
    return (
        type(application) is WSGIHandler
        and application.request_class is WSGIRequest
        and _is_djangos(WSGIRequest.__init__)
    )


def _is_djangos(method: object) -> bool:
    # A wrapper may give out all else of what it wraps, its class and its code included.
    return type(method) is FunctionType and method.__globals__ is vars(wsgi)


def _wait_for_view(
    chain: Chain, view: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any
) -> Any:
    __traceback_hide__ = True  # Django's debug page leaves this frame out.
    return chain.wait(view(*args, **kwargs))


# How a response that is not whole is to be sent.
_ASYNC, _FILE, _CHANNEL, _ITERATE = "async", "file", "channel", "iterate"

#: Whether Django has made its caches for this thread.
_OPENED: contextvars.ContextVar[bool] = contextvars.ContextVar("django_aioserve.opened")


class _Exchange:
    """One request of Django's and its response.

    A thread fills it in; `_deliver` tells the loop, which then reads it.
    """

    #: Whether a thread has got it: from then on Django's response gets closed.
    begun = False
    #: The way of an asynchronous request: its thread, and what the loop is to await for it.
    home: Home | None = None
    awaitable: Awaitable[Any] | None = None
    _guest: Guest | None = None
    _chain: Chain | None = None
    #: What its path resolved to, and the view that is expected to answer.
    match: ResolverMatch | None = None
    forecast: Callable[..., Any] | None = None
    #: The answer: whole, or else of a kind that has to be sent bit by bit.
    reply: BridgeResponse | _Whole | None = None
    kind = ""
    _status = (500, "")
    _headers: Sequence[tuple[str, str]] = ()
    _length: int | None = None
    _channel: Channel | None = None
    _failed = False
    _file = (-1, 0, 0)
    #: Whether the loop has to see to it that the response gets closed.
    _close_due = False
    #: Whether the handler has returned.
    _gone = False
    _abandoned = False
    _response: HttpResponseBase
    #: Django's request, until the response is closed.
    _django: DjangoRequest | None = None
    #: By rule 10: what start_response() was given, what to iterate over and what to close.
    _started: tuple[str, list[tuple[str, str]]] | None = None
    _chunks: Iterable[bytes] | None = None
    _outer: Any = None

    def __init__(
        self, bridge: DjangoBridge, request: web.BaseRequest, environ: dict[str, Any]
    ) -> None:
        self._bridge = bridge
        self._request = request
        self._pool = bridge.pool
        self._environ = environ
        self._input: IO[bytes] = environ["wsgi.input"]
        self.context = contextvars.copy_context()
        path = environ["PATH_INFO"]
        self.path_info = path if path and path.isascii() else get_path_info(environ) or "/"
        self.answered: asyncio.Future[None] = bridge.loop.create_future()

    # On a pool thread.

    def run(self) -> Callback | None:
        """Have Django answer; gives what has to run on the loop."""
        if _OPENED.get(None) is None:
            _OPENED.set(True)
            open_caches(shared=False)
        outer, self.context = self.context, contextvars.copy_context()
        return self.context.run(self._run, outer)

    def iterate(self) -> Callback | None:
        """Send the chunks of a response whose chain has ended; gives what runs on the loop."""
        return self.context.run(self._iterate_guest)

    # On the home thread.

    def begin(self) -> Callback | None:
        """Run the chain up to its view; gives what has to run on the loop."""
        home, guest = cast("Home", self.home), cast("Guest", self._guest)
        outer, self.context = self.context, home.begin(guest)
        chain = self._chain = home.chain(self.context)
        chain.view = self.forecast
        return self._proceed(chain, (self._run, outer))

    def resume(self, outcome: Outcome) -> Callback | None:
        """Run the chain on behind its view; gives what has to run on the loop."""
        return self._proceed(cast("Chain", self._chain), outcome)

    def _proceed(self, chain: Chain, value: object) -> Callback | None:
        passed = chain.switch(value)
        if not chain.ended:
            self.awaitable = passed
            return self._deliver
        self._chain = None
        if chain.astray and self.forecast is not None:
            self._bridge.forecast.refute(self.forecast)
        callback: Callback | None = chain.result
        cast("Home", self.home).give_back(chain)
        return callback

    # On either.

    def _run(self, outer: contextvars.Context) -> Callback | None:
        # What aiohttp's middleware has set is seen by Django, too.
        carry_over(outer)
        response = self._response = self._respond()
        # Django's handlers say this to their responses: it is the sender of request_finished.
        response._handler_class = WSGIHandler  # noqa: SLF001
        try:
            if not response.streaming:
                self._answer(response.content if self._chunks is None else b"".join(self._chunks))
            elif _is_bodiless(self._request, response.status_code):
                self._answer(b"")
            elif getattr(response, "is_async", False):
                self._announce(_ASYNC)
            elif not self._take_file(response):
                if self.home is None:
                    return self._iterate()
                self._announce(_ITERATE)
        except BaseException:  # noqa: BLE001 - rule 9
            self._answer_error("Invalid response")
        if self.reply is None:
            self._close_due = True
            return self._deliver
        if self._outer is None and self._bridge.life.ends_quickly(response):
            # So soon that it is cheaper for the loop to be woken afterwards.
            self._close()
            return self._deliver
        self._pool.call_soon(self._deliver)
        self._close()
        return None

    def _respond(self) -> Any:
        environ = self._environ
        try:
            if self._bridge.is_wrapped:
                return self._respond_within()
            # The prefix of a new context is "/" already.
            if environ["SCRIPT_NAME"] or settings.FORCE_SCRIPT_NAME is not None:
                set_script_prefix(get_script_name(environ))
            self._bridge.life.start(environ, self.home)
            request = self._django = DjangoRequest(environ, self.path_info, self.match)
        except UnicodeDecodeError:
            self._log("Bad Request (UnicodeDecodeError)", logging.WARNING, 400)
            return HttpResponseBadRequest()
        except BaseException:  # noqa: BLE001 - rule 9
            self._log("Error before the request")
            return HttpResponseServerError(_ERROR)
        return self._get_response(request)

    def _respond_within(self) -> Any:
        """Have ``WSGIHandler.__call__`` answer, with all that is around it."""
        handler: Any = copy(self._bridge.handler)
        found: list[Any] = []
        keeping = contextlib.ExitStack()

        def make_request(environ: dict[str, Any]) -> DjangoRequest:
            keeping.close()
            request = self._django = DjangoRequest(environ, self.path_info, self.match)
            return request

        def get_response(request: DjangoRequest) -> Any:
            response = self._get_response(request)
            found.append(response)
            return response

        handler.request_class = make_request
        handler.get_response = get_response
        with keeping:
            if self.home is not None and self.home.is_shared():
                # While request_started is sent (rule 6).
                keeping.enter_context(keeping_connections())
            outer = handler(self._environ, self._start_response)
        if found:
            response = found[0]
            if outer is response:
                return response
            self._chunks = outer
        else:
            # It answers by itself, or calls Django only when it is iterated over.
            self._chunks = (b"".join(outer),)
            response = HttpResponse()
        if hasattr(outer, "close"):
            self._outer = outer
        return response

    def _start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None
    ) -> Callable[[bytes], object]:
        self._started = status, list(headers)
        return _refuse_write

    def _get_response(self, request: DjangoRequest) -> Any:
        try:
            return self._bridge.handler.get_response(request)
        except BaseException as error:  # noqa: BLE001 - rule 9
            response = self._response_for(request, error)
            # As get_response() does it.
            response._resource_closers.append(request.close)  # noqa: SLF001
            return response

    def _response_for(self, request: DjangoRequest, error: BaseException) -> Any:
        """The response for an exception that Django lets pass: it is none of its Exceptions."""
        if self._abandoned and isinstance(error, asyncio.CancelledError):
            return HttpResponse(status=499)
        try:
            return response_for_exception(request, cast("Exception", error))
        except BaseException:  # noqa: BLE001 - rule 9
            # With DEBUG_PROPAGATE_EXCEPTIONS, or when handler500 fails, too.
            self._log("Internal Server Error")
            return HttpResponseServerError(_ERROR)

    def _answer(self, body: bytes) -> None:
        """Answer with ``body`` as a whole. Raises ValueError for headers that are not valid."""
        response = self._response
        if len(body) > _WHOLE_LIMIT or self._started is not None or _is_seen(self._request):
            self._announce("")
            self.reply = BridgeResponse(
                *self._status, self._headers, write_timeout=self._bridge.write_timeout, body=body
            )
        else:
            self.reply = _Whole(response, self._request, body, self._bridge.write_timeout)

    def _answer_error(self, message: str) -> None:
        self._log(message)
        self.reply = _server_error(self._bridge)

    def _announce(self, kind: str) -> None:
        """Settle the head of an answer of that kind. Raises ValueError as `_answer` does."""
        response = self._response
        if self._started is not None:
            status, headers = self._started
        else:
            status = f"{response.status_code} {response.reason_phrase}"
            headers = list(response.items())
            headers += [
                ("Set-Cookie", morsel.output(header="")) for morsel in response.cookies.values()
            ]
        self._status = parse_status(status)
        self._headers, self._length = wire_headers(headers)
        self.kind = kind

    def _take_file(self, response: Any) -> bool:
        """Whether a file can be answered with otherwise than by iterating."""
        file = getattr(response, "file_to_stream", None)
        if file is None:
            return False
        response.block_size = max(response.block_size, _SMALL_FILE)
        # sendfile() must give the bytes that read() would: the object whose method
        # that is has to be a plain file, and not a wrapper that decompresses, for example.
        plain: Any = getattr(file.read, "__self__", None)
        if type(plain) not in {io.BufferedReader, io.BufferedRandom, io.FileIO}:
            return False
        try:
            if isinstance(plain, io.BufferedRandom):
                plain.flush()
            descriptor = plain.fileno()
            status = os.fstat(descriptor)
            offset = plain.tell()
        except (OSError, ValueError):
            return False
        if not stat.S_ISREG(status.st_mode):
            return False
        count = max(status.st_size - offset, 0)
        if response.has_header("Content-Length"):
            count = min(count, int(response["Content-Length"]))
        if count <= _SMALL_FILE:
            self._answer(file.read(count))
        elif can_send_file(self._request):
            self._file = (descriptor, offset, count)
            self._announce(_FILE)
            if self._length is None:
                self._headers = [*self._headers, ("Content-Length", str(count))]
        else:
            return False
        return True

    def _iterate(self) -> Callback | None:
        channel = self._consume()
        if channel is None:
            self._pool.call_soon(self._deliver)
        else:
            self._pool.call_soon(channel.finish(failed=self._failed))
        self._close()
        return None

    def _iterate_guest(self) -> Callback | None:
        rehome(self.context)
        self._tend_thread()
        channel = self._consume()
        finish = None if channel is None else channel.finish(failed=self._failed)
        self._tend_thread(closing=self._response)
        self._close_due = True
        return partial(self._iterated, finish)

    def _tend_thread(self, closing: HttpResponseBase | None = None) -> None:
        """Do for this thread's connections what the signals do for the home thread's."""
        try:
            if closing is not None:
                # A transaction that an iterator has open is this thread's as well.
                _close_resources(closing)
            for connection in open_connections():
                connection.queries_log.clear()
                retire(connection, keep=False)
        except BaseException:  # noqa: BLE001 - rule 9
            self._log("Error at the ends of a stream")

    def _consume(self) -> Channel | None:
        """Send all chunks; give the channel, if any was opened."""
        channel = None
        try:
            self._announce(_CHANNEL)
            left = sys.maxsize if self._length is None else self._length
            chunks = self._chunks
            for chunk in cast("Iterable[bytes]", self._response) if chunks is None else chunks:
                if not chunk:
                    continue
                if channel is None:
                    channel = Channel(self._bridge.loop, self._pool, chunk)
                    self._channel = channel
                    # let_go() sets the flag before it looks for the channel: one sees the other.
                    if self._gone:
                        break
                    self._pool.call_soon(self._deliver)
                else:
                    channel.send(chunk)
                left -= len(chunk)
                if left <= 0:
                    break
            if channel is None:
                self._answer(b"")
        except ClientGone:
            self._failed = True
        except BaseException:  # noqa: BLE001 - rule 9
            self._failed = True
            if channel is None:
                self._answer_error("Error in a streaming response")
            else:
                self._log("Error in a streaming response")
        return channel

    def _close(self) -> None:
        """Close Django's response, which sends request_finished, and all that goes with it."""
        try:
            closing = self._response if self._outer is None else self._outer
            self._bridge.life.finish(closing, self.home)
        except BaseException:  # noqa: BLE001 - rule 9
            self._log("Error while closing a response")
        finally:
            if self.home is not None and self._guest is not None:
                self.home.end(self._guest)
            self._input.close()
            if self._django is not None:
                held: list[Any] = [self._django]
                self._django = None
                _dissolve(held)

    def _close_late(self) -> None:
        # What was sent meanwhile may have run on another thread.
        rehome(self.context)
        self._close()

    def _log(self, message: str, level: int = logging.ERROR, status: int = 500) -> None:
        """Log the exception that is being handled."""
        try:
            request_logger.log(
                level,
                "%s: %s",
                message,
                self.path_info,
                exc_info=sys.exception(),
                extra={"status_code": status},
            )
        except BaseException:  # noqa: BLE001 - rule 9
            # A project's own logging may fail: nobody shall wait for an answer for that.
            traceback.print_exc()

    # On the loop.

    def start(self) -> None:
        """Have it answered on a pool thread. Raises QueueFull."""
        self._pool.submit(self.run)
        self.begun = True

    def lodge(self, home: Home) -> None:
        """Have it answered on ``home``."""
        self.home = home
        self._guest = Guest()

    def submit(self, work: Work) -> None:
        """Run ``work()`` on the home thread, and here what it returns."""
        cast("Home", self.home).submit(self._guest, work)
        self.begun = True

    def expect_answer(self) -> None:
        """Expect one more answer: the awaitable of this one is being taken care of."""
        self.awaitable = None
        self.answered = self._bridge.loop.create_future()

    def start_iteration(self) -> None:
        """Have a response of a home thread iterated on a pool thread. Raises QueueFull."""
        self.expect_answer()
        self._close_due = False
        try:
            self._pool.submit(self.iterate)
        except QueueFull:
            self._close_due = True
            raise

    def abandon(self) -> None:
        """Have the suspended chain unwind: its view is cancelled, or will not run at all."""
        self._abandoned = True
        close = getattr(self.awaitable, "close", None)
        if close is not None:
            close()
        self.awaitable = None
        self.submit(partial(self.resume, (asyncio.CancelledError(), None)))

    def let_go(self) -> None:
        """Say that the handler returns, for whatever reason."""
        self._gone = True
        if self._channel is not None:
            self._channel.abort()
        self._settle()

    async def send(self, request: web.BaseRequest) -> web.StreamResponse:
        """Send an answer that is not whole. Raises ConnectionError when the client left."""
        channel = self._channel
        chunks: list[bytes] = []
        if channel is not None:
            chunks = await channel.receive()
            if channel.finished:
                chunks += await channel.receive()
                return (
                    _server_error(self._bridge) if channel.failed else self._head(b"".join(chunks))
                )
        reply = self._head(None)
        await reply.prepare(request)
        kind = reply.headers.get("Content-Type", "").lower()
        lasts = kind.startswith("text/event-stream")
        with _Lasting(self._bridge.lasting) if lasts else contextlib.nullcontext():
            if channel is not None:
                await pump(channel, reply, chunks)
            elif self.kind is _FILE:
                await reply.send_file(*self._file)
            else:
                await Within(self.context, self._send_stream(reply))
        await reply.write_eof()
        return reply

    def _head(self, body: bytes | None) -> BridgeResponse:
        return BridgeResponse(
            *self._status, self._headers, write_timeout=self._bridge.write_timeout, body=body
        )

    async def _send_stream(self, reply: BridgeResponse) -> None:
        response: Any = self._response
        # The first chunk may be long in coming, and an EventSource waits for the head.
        await reply.write_many(())
        stream = aiter(response)
        unyielding = 0
        try:
            while True:
                try:
                    chunk = await anext(stream)
                except StopAsyncIteration:
                    return
                except BaseException as error:
                    if _is_ours(error):
                        raise
                    self._log("Error in a streaming response")
                    reply.cut_off()
                    return
                if chunk:
                    await reply.write_many((chunk,))
                    unyielding += len(chunk)
                    if unyielding >= _FAIR_SHARE:
                        # A stream that never waits, for a client that takes all of it.
                        unyielding = 0
                        await asyncio.sleep(0)
        finally:
            # The outer generator does not close the inner one, the view's, whose only name is
            # private; without this the garbage collector would do it, some time later.
            for iterator in (stream, response._iterator):  # noqa: SLF001
                close = getattr(iterator, "aclose", None)
                if close is None:
                    continue
                try:
                    await close()
                except BaseException as error:
                    if _is_ours(error):
                        raise
                    self._log("Error while closing a stream")

    def _deliver(self) -> None:
        if self._gone:
            self._settle()
        elif not self.answered.done():
            self.answered.set_result(None)

    def _iterated(self, finish: Callback | None) -> None:
        if finish is not None:
            finish()
        self._deliver()

    def _settle(self) -> None:
        """See to what nobody waits for any more."""
        if self.awaitable is not None:
            self.abandon()
        elif self._close_due:
            self._close_due = False
            close = partial(self.context.run, self._close_late)
            if self.home is not None:
                self.submit(close)
                return
            try:
                self._pool.submit(close)
            except QueueFull:
                self._bridge.loop.run_in_executor(None, close)


def _dissolve(request: list[Any]) -> None:
    """Let go of a request that nobody else holds, the only item of ``request``.

    The lazy user and the messages that Django's middleware puts on it refer to it in turn.
    Such a ring waits for the garbage collector, which under load is at work for a fifth of all
    processor time. If anybody holds the request or one of these, all stays as it is.
    """
    attributes = vars(request[0])
    rings: list[tuple[str, list[Any]]] = []
    links = 0
    if type(attributes.get("user")) is SimpleLazyObject:
        rings.append(("user", [attributes.pop("user")]))
        links += 1
    if type(attributes.get("auser")) is partial:
        rings.append(("auser", [attributes.pop("auser")]))
        links += 1
    if "_messages" in attributes:
        rings.append(("_messages", [attributes.pop("_messages")]))
        links += 1 + len(getattr(rings[-1][1][0], "storages", ()))
    if _holders(request) != links or any(_holders(ring) for _, ring in rings):
        for name, ring in rings:
            attributes[name] = ring[0]


def _holders(item: list[Any]) -> int:
    """Count the references to the only item of a list, besides that of the list."""
    return sys.getrefcount(item[0]) - _ALONE


_ALONE = 0
_ALONE = _holders([object()])


def _refuse_write(_: bytes) -> None:
    raise RuntimeError("write() is not for what is around Django's handler here")


def _server_error(bridge: DjangoBridge) -> BridgeResponse:
    return BridgeResponse(
        500,
        "Internal Server Error",
        [("Content-Type", "text/html; charset=utf-8")],
        write_timeout=bridge.write_timeout,
        body=_ERROR,
    )


class _Whole(web.StreamResponse):
    """A small complete response that only the server gets to see: the bytes that go out.

    ``response`` is Django's, ``body`` its content. Raises ValueError for a status or
    header that would break the message (RFC 9112).
    """

    def __init__(
        self,
        response: HttpResponseBase,
        request: web.BaseRequest,
        body: bytes,
        write_timeout: float,
    ) -> None:
        status, reason = response.status_code, response.reason_phrase
        if not 200 <= status <= 999:
            raise ValueError(f"invalid status {status!r}")
        super().__init__(status=status, reason=reason)
        self._source = response
        self._write_timeout = write_timeout
        self._sent = False
        self._persistent = True
        version = "HTTP/1.1" if request.version >= (1, 1) else "HTTP/1.0"
        lines = [f"{version} {status} {reason}"]
        special = {}
        # items() would look up one by one what is all here.
        for lower, (name, value) in response.headers._store.items():  # noqa: SLF001
            if lower in _SPECIAL:
                special[lower] = value
                if lower == "content-length":
                    continue
            elif name not in _known_names:
                _learn_name(name)
            lines.append(f"{name}: {value}")
        if response.cookies:
            lines += [
                f"Set-Cookie:{morsel.output(header='')}" for morsel in response.cookies.values()
            ]
        length = self._fit(body, special.get("content-length"), _is_bodiless(request, status))
        if length:
            lines.append(f"Content-Length: {length}")
        if "date" not in special:
            lines.append(date_line())
        if "server" not in special:
            lines.append(SERVER_LINE)
        lines.append("")
        head = "\r\n".join(lines).encode("latin-1")
        # Without the characters that are allowed only the ends of the lines are left.
        if head.translate(None, _ALLOWED) != b"\r\n" * (len(lines) - 1):
            raise ValueError("control character in the head of a response")
        self._head = head

    def _fit(self, body: bytes, declared: str | None, bodiless: bool) -> str | None:
        """Settle what is sent as body; give what is to be told as its length."""
        length = str(len(body))
        if declared is not None and declared != length:
            _check_length(declared)
        if bodiless:
            self._content = b""
            if self.status in _LENGTHLESS:
                return None
            # In answer to HEAD nothing is no statement about the length.
            return declared or (length if body else None)
        self._content = body
        if declared is None or declared == length:
            return length
        missing = int(declared) - len(body)
        if missing > 0:
            logger.warning("A response is %d bytes short of its Content-Length", missing)
            self._persistent = False
        self._content = body[: int(declared)]
        return declared

    @property
    def headers(self) -> CIMultiDict[str]:
        """Django's headers, for the access log."""
        headers = super().headers
        if not headers:
            headers.extend(self._source.items())
        return headers

    @property
    def prepared(self) -> bool:
        """Whether it was sent."""
        return self._sent

    @property
    def keep_alive(self) -> bool | None:
        """Whether the connection outlives this response."""
        return self._persistent

    def force_close(self) -> None:
        """Close the connection after this response."""
        self._persistent = False

    @property
    def body_length(self) -> int:
        """The number of bytes in the body."""
        return len(self._content)

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter:
        """Send everything at once. Raises ConnectionResetError when the client left."""
        writer = request.writer
        if self._sent:
            return writer
        self._sent = True
        if not (self._persistent and request.keep_alive):
            self._persistent = False
            end = b"Connection: close\r\n\r\n"
        elif request.version < (1, 1):
            end = b"Connection: keep-alive\r\n\r\n"
        else:
            end = b"\r\n"
        transport = request.transport
        if transport is None or transport.is_closing():
            raise ClientGone
        data = b"".join((self._head, end, self._content))
        transport.write(data)
        # From now on aiohttp cannot answer with an error in its place.
        writer.output_size += len(data)
        if request.protocol.writing_paused:
            try:
                async with asyncio.timeout(self._write_timeout):
                    await writer.drain()
            except TimeoutError:
                transport.abort()
                raise ClientGone from None
        return writer

    async def write_eof(self, data: bytes = b"") -> None:
        """Do nothing: the end was sent with the beginning."""


_ERROR = b"<h1>Server Error (500)</h1>"

#: A longer response is framed by `BridgeResponse`, which does not copy it behind its head.
_WHOLE_LIMIT = 32 << 10

#: How much a stream may send before it has to let others have their turn.
_FAIR_SHARE = 256 << 10

#: Statuses whose responses never have a body, and those for which a length would be wrong:
#: Django gives the one of the body that is not sent (RFC 9110, 8.6).
_LENGTHLESS = frozenset({204, 304})

#: Headers of Django's that are not just passed on.
_SPECIAL = frozenset({"content-length", "date", "server"})

#: The bytes that may stand in a head (RFC 9110, 5.5).
_ALLOWED = bytes([9, *range(32, 127), *range(128, 256)])

_NOTHING = contextlib.nullcontext()

#: Names of headers that were found valid.
_known_names: set[str] = set()
_MOST_NAMES = 1024


def _learn_name(name: str) -> None:
    """Remember a header's name as one that may be sent. Raises ValueError if it may not."""
    wire_headers([(name, "")])
    if len(_known_names) < _MOST_NAMES:
        _known_names.add(name)


def _check_length(value: str) -> None:
    """Raise ValueError for a Content-Length that is not valid."""
    wire_headers([("Content-Length", value)])


def _is_bodiless(request: web.BaseRequest, status: int) -> bool:
    return status in _LENGTHLESS or request.method == "HEAD"


def _is_seen(request: web.BaseRequest) -> bool:
    """Whether middleware or signal handlers of aiohttp get to see the response."""
    return isinstance(request, web.Request) and any(
        app.middlewares or app.on_response_prepare for app in request.match_info.apps
    )


def _is_ours(error: BaseException) -> bool:
    """Whether what came out of a stream is meant for the task that sends it."""
    return isinstance(error, GeneratorExit) or (
        isinstance(error, asyncio.CancelledError) and _is_cancelled()
    )


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class _Lasting:
    """While it is entered, what the running task sends can be brought to a clean end."""

    __slots__ = ("_open", "_task", "_told")

    def __init__(self, open_: set[_Lasting]) -> None:
        self._open = open_
        self._task = cast("asyncio.Task[Any]", asyncio.current_task())
        self._told = False

    def end(self) -> None:
        """End it; the client gets what was sent so far, as a whole response."""
        self._told = True
        self._task.cancel()

    def __enter__(self) -> None:
        self._open.add(self)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        self._open.discard(self)
        if not self._told or kind is None or not issubclass(kind, asyncio.CancelledError):
            return False
        return not self._task.uncancel()  # else somebody has cancelled the task as well


class _CancelWhenLost:
    """Cancels the running task when the client leaves.

    aiohttp does that only where the whole server runs with ``handler_cancellation``; what it
    always does is to call a method of the request, for which there is no public name.
    """

    __slots__ = ("_request", "_task")

    def __init__(self, request: web.BaseRequest) -> None:
        self._request = request
        self._task = cast("asyncio.Task[Any]", asyncio.current_task())

    def __enter__(self) -> None:
        # In debug mode aiohttp warns of attributes that are set on a request.
        object.__setattr__(self._request, "_cancel", self._lost)

    def __exit__(self, *exc_info: object) -> None:
        object.__delattr__(self._request, "_cancel")

    def _lost(self, error: BaseException) -> None:
        request = self._request
        type(request)._cancel(request, error)  # noqa: SLF001
        self._task.get_loop().call_soon(self._cancel)

    def _cancel(self) -> None:
        # A second cancellation would disturb the view while it cleans up after the first.
        if not self._task.done() and not self._task.cancelling():
            self._task.cancel()

"""What a native request has of Django's while it runs: its thread, its caches, its state.

Rules:

1. A native handler pays for what it uses: Django's request is made, a session loaded, a
   thread occupied only when it asks for that.
2. ``sync_to_async`` and the asynchronous ORM run on a home thread
   (`django_aioserve.bridge.home`), one of those that asynchronous views have, always the
   same one for one request. It lives as long as the worker and keeps its database
   connections. What the request left open is rolled back there when it ends. A handler
   that works for hours, such as that of a WebSocket, counts as absent while it has not
   used the database for `ABSENCE` seconds.
3. Django's ``caches`` on the event loop are one set of objects for the application's life,
   with the connections that they keep. Django itself would make them, and connect them,
   anew for each request. Those that two threads may not use at a time are made anew.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, Future
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from aiohttp import web
from asgiref.sync import SyncToAsync, ThreadSensitiveContext

from django_aioserve.bridge.environ import RequestMeta, request_meta
from django_aioserve.bridge.home import (
    Guest,
    Home,
    Homes,
    open_caches,
    watch_connections,
)
from django_aioserve.bridge.threads import QueueFull, harmless
from django_aioserve.keys import CONFIG, HOMES

if TYPE_CHECKING:
    from django.core.handlers.wsgi import WSGIRequest

__all__ = ["SHARED", "STATE", "Shared", "State", "current_state", "setup"]

T = TypeVar("T")

ABSENCE: Final = 30.0
"""Seconds without use after which a handler's claim on its database connections ends."""


class Shared:
    """What the native handlers of one application share; complete once it has started."""

    meta: RequestMeta

    def __init__(self, app: web.Application) -> None:
        self.app = app
        #: Where the application is mounted in another one, without a slash at its end.
        self.script_name = ""
        self._context = contextvars.Context()
        #: What is set in the context of each request.
        self.variables: tuple[tuple[contextvars.ContextVar[Any], Any], ...] = ()
        #: Makes the `State` of a request: a class of its own spares each an ``__init__``.
        self.state: Callable[[], State] = type("State", (State,), {"shared": self})

    @property
    def homes(self) -> Homes:
        """The home threads of the application, which native handlers and views have in common."""
        return self.app[HOMES]

    def start(self) -> None:
        """Begin to serve, on the running loop."""
        watch_connections()
        self.meta = request_meta(self.app[CONFIG])
        self._context.run(self._fill_context)
        self.variables = tuple(self._context.items())

    def _fill_context(self) -> None:
        from django.conf import settings
        from django.urls import set_script_prefix

        # One for all requests: which thread it is, the executor tells for each.
        threads = ThreadSensitiveContext()
        SyncToAsync.context_to_thread_executor[threads] = _HomeExecutor()
        SyncToAsync.thread_sensitive_context.set(threads)
        open_caches(shared=True)
        forced = settings.FORCE_SCRIPT_NAME
        prefix = self.script_name if forced is None else forced
        if prefix:
            set_script_prefix(prefix)

    def stop(self) -> None:
        """Close the connections of the caches."""
        from django.core.cache import caches

        self._context.run(caches.close_all)


class State:
    """What Django knows of one native request. Made for each: it costs nothing until it is used."""

    shared: Shared
    django: WSGIRequest | None = None
    is_loaded = False
    """Whether the session is."""
    is_watched = False
    """Whether `_watch_head` was called."""
    response: web.StreamResponse | None = None
    """The response whose head has left, if that was watched."""
    settled = False
    language: str | None = None
    on_head: Callable[[web.Request, web.StreamResponse], object] | None = None
    """Called before the head of a response leaves."""
    on_end: Callable[[], object] | None = None
    """Called when the handler has ended."""
    guest: Guest | None = None
    """Stands for the request on its home thread, while it has work there."""
    _lock: asyncio.Lock | None = None
    _home: Home | None = None
    _timer: asyncio.TimerHandle | None = None
    _used = 0.0

    @property
    def lock(self) -> asyncio.Lock:
        """Of two tasks of one handler the first loads session and user."""
        if self._lock is None:
            self._lock = asyncio.Lock()
        return self._lock

    def submit(self, future: Any, call: Callable[[], Any]) -> None:
        """Run ``call()`` on the home thread of this request; ``future`` gets what it gives."""
        loop = asyncio.get_running_loop()
        self._used = loop.time()
        if self._home is None:
            self._home = self.shared.homes.choose()
        elif self._home.is_full:
            raise QueueFull
        if self.guest is None:
            self.guest = Guest()
            self._home.submit(self.guest, self._home.arrive)
            self._timer = loop.call_later(ABSENCE, self._leave_if_absent, loop)
        self._home.submit(self.guest, partial(_run, future, call))

    def leave(self) -> None:
        """End the stay on the home thread; what was left open there is undone."""
        if self.guest is not None and self._home is not None:
            self._home.submit(self.guest, partial(self._home.depart, self.guest))
            self.guest = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _leave_if_absent(self, loop: asyncio.AbstractEventLoop) -> None:
        if loop.time() - self._used >= ABSENCE:
            self.leave()
        else:
            self._timer = loop.call_at(self._used + ABSENCE, self._leave_if_absent, loop)


class _HomeExecutor(Executor):
    """Takes asgiref's thread-sensitive calls to the home thread of the current request."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()

    def submit(self, function: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        state = STATE.get()
        call = partial(function, *args, **kwargs)
        if asyncio.get_running_loop() is self._loop:
            # run_in_executor() takes a future of asyncio's as it is.
            future: Any = self._loop.create_future()
            state.submit(future, call)
        else:
            future = Future()
            self._loop.call_soon_threadsafe(_submit_or_fail, state, future, call)
        return cast("Future[T]", future)


STATE: contextvars.ContextVar[State] = contextvars.ContextVar("django_aioserve.native")
"""Set while a native handler runs, in its task and in those that it starts."""

SHARED: web.AppKey[Shared] = web.AppKey("native", Shared)


def _run(future: Any, call: Callable[[], Any]) -> Callable[[], object] | None:
    if future.cancelled():
        return None
    try:
        result = call()
    except BaseException as error:  # noqa: BLE001  # whatever it is, it belongs to the handler
        failure = harmless(error)
        return lambda: future.done() or future.set_exception(failure)
    return lambda: future.done() or future.set_result(result)


def _submit_or_fail(state: State, future: Future[Any], call: Callable[[], Any]) -> None:
    try:
        state.submit(future, call)
    except QueueFull as error:
        future.set_exception(error)


def setup(app: web.Application) -> Shared:
    """Prepare ``app`` for native handlers."""
    shared = app[SHARED] = Shared(app)
    app.cleanup_ctx.append(_context)
    return shared


async def _context(app: web.Application) -> AsyncIterator[None]:
    shared = app[SHARED]
    shared.start()
    yield
    shared.stop()


def current_state() -> State:
    """Give the state of the running native handler. Raises RuntimeError outside of one."""
    try:
        return STATE.get()
    except LookupError:
        raise RuntimeError(
            "This works only in native handlers of django-aioserve: aio_path, AIOSERVE_ROUTES."
        ) from None

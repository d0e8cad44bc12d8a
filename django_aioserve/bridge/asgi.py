"""Any ASGI 3 application behind aiohttp: HTTP, WebSocket and lifespan.

The standard is https://asgi.readthedocs.io: HTTP & WebSocket 2.5, Lifespan 2.0. How a call of
the application goes is in `asgi_exchange` and `asgi_websocket`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web

from django_aioserve.bridge.asgi_exchange import PATHSEND, HTTPExchange, Service, list_items
from django_aioserve.bridge.asgi_websocket import (
    WebSocketExchange,
    asks_for_websocket,
    check_handshake,
)
from django_aioserve.bridge.environ import ProxyTrust, RequestMeta, split_target
from django_aioserve.bridge.stream import can_send_file

if TYPE_CHECKING:
    from django_aioserve.bridge.asgi_exchange import Application, Message, Scope
    from django_aioserve.bridge.threads import ThreadPool
    from django_aioserve.conf import Config

__all__ = ["ASGIBridge", "LifespanFailed"]

logger = logging.getLogger("django_aioserve")

#: While a server drains, WebSockets are closed in steps of so many seconds.
_DRAIN_STEP: Final = 0.05

#: Seconds that a lifespan may go on after it was cancelled.
_CANCEL_TIMEOUT: Final = 1.0


class LifespanFailed(RuntimeError):
    """The application said that its start-up failed; the text is the application's.

    .. versionadded:: 0.1
    """


class ASGIBridge:
    """An aiohttp handler that serves an ASGI 3 application.

    To be mounted on a route with ``{path_info}``, also within a sub-application: what precedes
    is the ``root_path``. `lifespan` must surround its use.

    .. versionadded:: 0.1
    """

    def __init__(
        self,
        application: Application,
        config: Config,
        pool: ThreadPool,  # unused: all bridges are made alike
    ) -> None:
        if not callable(application):
            raise TypeError(f"an ASGI application must be callable: {application!r}")
        self._service = Service(application, config)
        self._meta = RequestMeta(ProxyTrust(config.forwarded_allow_ips), {})
        self._state: dict[str, Any] = {}
        #: When the server's end began.
        self._leaving: float | None = None

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer ``request``.

        Raises HTTPException for a request that does not get as far as the application.
        """
        if asks_for_websocket(request):
            check_handshake(request)
            scope = self._websocket_scope(request)
            return await WebSocketExchange(self._service, request, scope).run()
        length, limit = request.content_length, self._service.config.max_body_size
        if length is not None and length > limit:
            refusal = web.HTTPRequestEntityTooLarge(limit, length)
            refusal.force_close()
            raise refusal
        return await HTTPExchange(self._service, request, self._http_scope(request)).run()

    @contextlib.asynccontextmanager
    async def lifespan(
        self,
        app: web.Application | None = None,  # unused: cleanup_ctx passes it
    ) -> AsyncIterator[None]:
        """Start the application up and shut it down (ASGI's Lifespan protocol).

        May be an item of ``cleanup_ctx`` as it is. An application that knows nothing of
        the protocol is served without. Raises LifespanFailed when its start-up failed;
        its shutdown has ``graceful_timeout`` seconds, once all of its calls have ended.
        """
        lifespan = _Lifespan(self._service.application, self._state)
        await lifespan.start()
        try:
            yield
        finally:
            try:
                await self._finish()
            except asyncio.CancelledError:
                await lifespan.stop(_CANCEL_TIMEOUT)
                raise
            await lifespan.stop(self._service.config.graceful_timeout)

    async def close_streams(self, within: float) -> None:
        """End all WebSockets (1012, service restart) and event streams, spread over ``within`` s.

        Their clients shall not all come back at the same moment. Returns when all have been told.
        """
        loop = asyncio.get_running_loop()
        lasting = self._service.lasting
        self._leaving = loop.time()
        end = loop.time() + within
        while lasting:
            left = max(end - loop.time(), 0.0)
            count = len(lasting)
            batch = math.ceil(count * _DRAIN_STEP / left) if left > _DRAIN_STEP else count
            for _ in range(batch):
                lasting.pop().end()
            if lasting:
                await asyncio.sleep(left * batch / count)

    async def _finish(self) -> None:
        """Give what goes on after its response ``graceful_timeout`` since the end began."""
        working = self._service.working
        if not working:
            return
        now = asyncio.get_running_loop().time()
        began = now if self._leaving is None else self._leaving
        left = began + self._service.config.graceful_timeout - now
        try:
            await asyncio.wait(working, timeout=max(left, 0.0))
        finally:
            late = [*working]
            for call in late:
                call.cancel()
        if late:
            logger.error("The ASGI application did not end its work after %d responses", len(late))
            await asyncio.wait(late, timeout=_CANCEL_TIMEOUT)

    def _http_scope(self, request: web.BaseRequest) -> Scope:
        scope = self._scope(request)
        scope["type"] = "http"
        scope["method"] = request.method.upper()
        scope["extensions"] = {PATHSEND: {}} if can_send_file(request) else {}
        return scope

    def _websocket_scope(self, request: web.BaseRequest) -> Scope:
        scope = self._scope(request)
        scope["type"] = "websocket"
        scope["scheme"] = "wss" if scope["scheme"] == "https" else "ws"
        scope["subprotocols"] = list_items(request, "Sec-WebSocket-Protocol")
        scope["extensions"] = {"websocket.http.response": {}}
        return scope

    def _scope(self, request: web.BaseRequest) -> Scope:
        meta = self._meta
        environ = meta.environ(request, meta.script_name(request))
        client, root_path = environ["REMOTE_ADDR"], environ["SCRIPT_NAME"]
        return {
            "asgi": {"version": "3.0", "spec_version": "2.5"},
            "http_version": "1.1" if request.version >= (1, 1) else "1.0",
            "scheme": environ["wsgi.url_scheme"],
            "path": _decoded(root_path + environ["PATH_INFO"]),
            "raw_path": split_target(request.raw_path).path.encode("utf-8", "surrogateescape"),
            "query_string": environ["QUERY_STRING"].encode("latin-1"),
            "root_path": _decoded(root_path),
            "headers": _with_one_cookie(
                meta.headers(request, trusted=meta.origin(request).trusted)
            ),
            "client": (client, int(environ["REMOTE_PORT"])) if client else None,
            "server": (environ["SERVER_NAME"], int(environ["SERVER_PORT"])),
            "state": self._state.copy(),
        }


class _Lifespan:
    """The application's one call for its start-up and shutdown."""

    def __init__(self, application: Application, state: dict[str, Any]) -> None:
        self._application = application
        self._state = state
        self._task: asyncio.Task[None] | None = None
        self._asked = False
        self._started = asyncio.Event()
        self._stopping = asyncio.Event()
        self._stopped = asyncio.Event()
        self._failure: str | None = None

    async def start(self) -> None:
        """Wait for the start-up. Raises LifespanFailed."""
        self._task = asyncio.create_task(self._run(), name="asgi-lifespan")
        try:
            await self._started.wait()
        except asyncio.CancelledError:
            await self._cancel()
            raise
        if self._failure is not None:
            await self._cancel()
            raise LifespanFailed(self._failure or "The ASGI application's start-up failed.")

    async def stop(self, timeout: float) -> None:
        """Have the application shut down, for at most ``timeout`` seconds."""
        self._stopping.set()
        try:
            async with asyncio.timeout(timeout):
                await self._stopped.wait()
        except TimeoutError:
            logger.error("The ASGI application's shutdown took more than %g s", timeout)
        finally:
            await self._cancel()

    async def _cancel(self) -> None:
        task = self._task
        if task is not None:
            # What only returns after its last message may do so.
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait({task}, timeout=_CANCEL_TIMEOUT)

    async def _run(self) -> None:
        scope = {
            "type": "lifespan",
            "asgi": {"version": "3.0", "spec_version": "2.0"},
            "state": self._state,
        }
        try:
            await self._application(scope, self._receive, self._send)
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            if self._failure is not None:
                pass  # it said so before
            elif self._started.is_set():
                logger.error("The ASGI application's lifespan ended with an error", exc_info=error)
            elif self._asked:
                # The specification wants it to be served all the same.
                logger.warning("The ASGI application's start-up raised %r", error)
            else:
                logger.debug("The ASGI application has no lifespan: %r", error)
        finally:
            self._started.set()
            self._stopped.set()

    async def _receive(self) -> dict[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "lifespan.startup"}
        await self._stopping.wait()
        if self._stopped.is_set():
            await asyncio.Event().wait()
        return {"type": "lifespan.shutdown"}

    async def _send(self, message: Message) -> None:
        kind = message["type"]
        started = self._started.is_set()
        if kind in {"lifespan.startup.complete", "lifespan.startup.failed"} and not started:
            if kind == "lifespan.startup.failed":
                self._failure = str(message.get("message", ""))
            self._started.set()
        elif kind in {"lifespan.shutdown.complete", "lifespan.shutdown.failed"} and started:
            if kind == "lifespan.shutdown.failed":
                logger.error(
                    "The ASGI application's shutdown failed: %s", message.get("message", "")
                )
            self._stopped.set()
        else:
            raise ValueError(f"unexpected message {kind!r}")


def _decoded(text: str) -> str:
    """A path of PEP 3333, which is bytes shown as latin-1, as ASGI wants it."""
    return text if text.isascii() else text.encode("latin-1").decode("utf-8", "replace")


def _with_one_cookie(pairs: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Join repeated cookies (RFC 6265, 5.4): Django would join them with a comma."""
    cookies = [value for name, value in pairs if name == b"cookie"]
    if len(cookies) < 2:
        return pairs
    joined = [pair for pair in pairs if pair[0] != b"cookie"]
    joined.append((b"cookie", b"; ".join(cookies)))
    return joined

"""WebSockets and event streams: who may open them, their limits, and their end.

Rules:

1. A handler uses `aiohttp.web.WebSocketResponse` (RFC 6455) as anywhere; what follows holds
   without its help.
2. A browser tells the Origin of the page that opens a WebSocket, and nothing else keeps
   other sites' pages from acting in their visitors' names: a foreign one is refused.
3. Size limit and heartbeat are those of the configuration, unless the handler gave its own.
   Whoever sends faster than the client reads waits: ``send_str()`` returns when no
   more than 64 KiB wait for the client.
4. Every open socket and stream is registered. A worker that leaves closes them, a few at
   a time, so that their clients do not all come back in one instant.
5. A handler learns of the end by what it waits for: ``receive()`` tells it, ``send_str()``
   raises, the block of an `EventStream` is left. One that waits for something else is
   cancelled `CLOSING_SECONDS` later.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self
from urllib.parse import urlsplit

from aiohttp import WSCloseCode, hdrs, web

from django_aioserve.auth import django_request
from django_aioserve.keys import CANCELLABLE, CONFIG
from django_aioserve.state import STATE, current_state

if TYPE_CHECKING:
    from django_aioserve.conf import Config

__all__ = ["EventStream", "admit", "begin", "close_all", "open_count", "setup"]

logger = logging.getLogger("django_aioserve")

AIOHTTP_PRIVATE: Final = ("_heartbeat", "_pong_heartbeat", "_max_msg_size")
"""aiohttp has no public way to give a WebSocketResponse limits that its handler did not.
tests/test_websocket.py fails where a new aiohttp has not got these."""

AIOHTTP_MAX_SIZE: Final = 4 << 20
"""What aiohttp takes for ``max_msg_size`` where the handler names none."""

CLOSING_SECONDS: Final = 2.0
"""Time for a client to answer that a WebSocket is closed, and for a handler to notice."""

SWEEP_SECONDS: Final = 5.0
"""Interval at which handlers are looked for whose client is gone."""

_DEFAULT_PORTS: Final = {"http": 80, "https": 443}


@dataclass(eq=False, slots=True)
class _Open:
    """An open WebSocket or event stream, and the task of its handler."""

    request: web.Request
    response: web.WebSocketResponse | EventStream
    task: asyncio.Task[Any]
    lost: bool = False

    async def close(self) -> None:
        """Tell the client to come back later and elsewhere; see that the handler ends."""
        if isinstance(self.response, EventStream):
            self.response.end()
        else:
            # aiohttp's close() would not wait for the client's answer where the handler is
            # receiving, and a reset after that may destroy what was said.
            reason = struct.pack("!H", WSCloseCode.SERVICE_RESTART) + b"service restart"
            with contextlib.suppress(ConnectionError):
                await self.response.send_frame(reason, web.WSMsgType.CLOSE)
        if await self._ends():
            return
        if isinstance(self.response, web.WebSocketResponse):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSING_SECONDS):
                    await self.response.close(code=WSCloseCode.SERVICE_RESTART)
        if not await self._ends():
            self.task.cancel()

    async def _ends(self) -> bool:
        await asyncio.wait((self.task,), timeout=CLOSING_SECONDS)
        return self.task.done()


@dataclass(slots=True)
class _Registry:
    """The open WebSockets and event streams of one application."""

    open: set[_Open] = field(default_factory=set)
    leaving: bool = False


_REGISTRY: web.AppKey[_Registry] = web.AppKey("sockets", _Registry)


def setup(app: web.Application, config: Config) -> None:  # noqa: ARG001  # as all modules have it
    """Keep count of the native WebSockets and event streams of ``app``."""
    app[_REGISTRY] = _Registry()
    app.cleanup_ctx.append(_sweeping)


def begin(request: web.Request, response: web.StreamResponse) -> None:
    """Give a WebSocket its limits before the head of its handshake leaves, and count it."""
    if isinstance(response, web.WebSocketResponse):
        _limit(response, STATE.get().shared.app[CONFIG])
        _register(request, response)


def _limit(response: web.WebSocketResponse, config: Config) -> None:
    limited: Any = response
    if limited._heartbeat is None and config.websocket_heartbeat:  # noqa: SLF001
        limited._heartbeat = config.websocket_heartbeat  # noqa: SLF001
        limited._pong_heartbeat = config.websocket_heartbeat / 2  # noqa: SLF001
    if limited._max_msg_size == AIOHTTP_MAX_SIZE:  # noqa: SLF001
        size = config.websocket_max_size
        # aiohttp refuses a message of exactly its limit, and with 0 none.
        limited._max_msg_size = size + 1 if size else 0  # noqa: SLF001


def _register(request: web.Request, response: web.WebSocketResponse | EventStream) -> None:
    """Count a WebSocket or an event stream as open until its handler has ended."""
    task = asyncio.current_task()
    state = STATE.get()
    if task is None or state.on_end is not None:
        raise RuntimeError("A handler opens one WebSocket or event stream, in its own task.")
    registry = state.shared.app[_REGISTRY]
    entry = _Open(request, response, task)
    registry.open.add(entry)
    state.on_end = partial(registry.open.discard, entry)


def open_count(app: web.Application) -> int:
    """Count the native WebSockets and event streams that are open."""
    return len(app[_REGISTRY].open)


async def close_all(app: web.Application, within: float) -> None:
    """Close all native WebSockets (1012, service restart) and event streams.

    They are closed one after the other, evenly over ``within`` seconds; new ones are
    refused with 503 from now on. Takes three times `CLOSING_SECONDS` more at most,
    for clients that do not answer and handlers that do not notice.
    """
    registry = app[_REGISTRY]
    registry.leaving = True
    entries = list(registry.open)
    closing = []
    for entry in entries:
        if entry in registry.open:
            closing.append(asyncio.ensure_future(entry.close()))
            await asyncio.sleep(within / len(entries))
    await asyncio.gather(*closing, return_exceptions=True)


async def _sweeping(app: web.Application) -> AsyncIterator[None]:
    """Cancel handlers whose client is gone and who do not notice."""
    registry = app[_REGISTRY]

    async def sweep() -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            for entry in [*registry.open]:
                if entry.lost:
                    entry.task.cancel()
                elif entry.request.transport is None:
                    entry.lost = True
                    if isinstance(entry.response, EventStream):
                        entry.response.end()

    task = asyncio.create_task(sweep())
    yield
    task.cancel()


# --------------------------------------------------------------------------- handshake


def admit(request: web.Request) -> None:
    """Refuse a WebSocket handshake that is none of ours; pass any other request.

    Raises HTTPUpgradeRequired (426) for another version than 13 (RFC 6455, 4.4),
    HTTPForbidden for a foreign Origin, HTTPServiceUnavailable in a worker that leaves.
    """
    headers = request.headers
    if not any("websocket" in value.lower() for value in headers.getall(hdrs.UPGRADE, ())):
        return
    if STATE.get().shared.app[_REGISTRY].leaving:
        raise web.HTTPServiceUnavailable(headers={hdrs.RETRY_AFTER: "1"})
    if headers.get(hdrs.SEC_WEBSOCKET_VERSION) != "13":
        raise web.HTTPUpgradeRequired(
            headers={
                hdrs.CONNECTION: "Upgrade",
                hdrs.UPGRADE: "websocket",
                hdrs.SEC_WEBSOCKET_VERSION: "13",
            }
        )
    if hdrs.ORIGIN in headers and not _is_admitted(request, ",".join(headers.getall(hdrs.ORIGIN))):
        logger.warning(
            "WebSocket %s refused: its Origin %s is foreign",
            ascii(request.path)[1:-1],
            ascii(headers[hdrs.ORIGIN][:200]),
        )
        raise web.HTTPForbidden(text="403: this origin may not open WebSockets here")


def _is_admitted(request: web.Request, origin: str) -> bool:
    from django.conf import settings
    from django.core.exceptions import DisallowedHost
    from django.utils.http import is_same_domain

    listed = (*STATE.get().shared.app[CONFIG].websocket_origins, *settings.CSRF_TRUSTED_ORIGINS)
    if "*" in listed:
        return True
    asked = _split(origin)
    if asked is None:
        return False
    django = django_request(request)
    with contextlib.suppress(DisallowedHost):
        # ALLOWED_HOSTS keeps out a foreign name that leads here (DNS rebinding).
        if asked == _split(f"{django.scheme}://{django.get_host()}"):
            return True
    scheme, host, port = asked
    for allowed in listed:
        pattern = _split(allowed)
        if (
            pattern is not None
            and pattern[0] == scheme
            and pattern[2] == port
            and is_same_domain(host, pattern[1].removeprefix("*"))
        ):
            return True
    return False


def _split(origin: str) -> tuple[str, str, int] | None:
    """Give scheme, host and port of an origin (RFC 6454, 4); None for "null" and the like."""
    try:
        parts = urlsplit(origin)
        port = parts.port
    except ValueError:
        return None
    if not parts.scheme or not parts.hostname or parts.path.strip("/") or parts.query:
        return None
    return parts.scheme, parts.hostname, port or _DEFAULT_PORTS.get(parts.scheme, 0)


# --------------------------------------------------------------------------- event streams


class EventStream(web.StreamResponse):
    """A stream of server-sent events (HTML Living Standard, 9.2), for a native handler::

        async def events(request):
            async with EventStream(request) as stream:
                async for change in changes(since=stream.last_event_id):
                    await stream.send(change.text, event="change", id=str(change.pk))
            return stream

    ``heartbeat`` is the interval in seconds of comments that keep proxies from closing a
    silent stream and that find out whether the client is still there (0: none; the
    default is AIOSERVE_WEBSOCKET_HEARTBEAT). ``retry`` is the time in seconds after which the
    browser is to come back when the stream ends.

    When the client leaves, or the worker, the block is left at whatever it waits for,
    and nothing is raised; `ended` then tells so.

    .. versionadded:: 0.1
    """

    def __init__(
        self,
        request: web.Request,
        *,
        heartbeat: float | None = None,
        retry: float | None = None,
    ) -> None:
        super().__init__(
            headers={
                hdrs.CONTENT_TYPE: "text/event-stream",
                hdrs.CACHE_CONTROL: "no-cache",
                # nginx would keep the events back until its buffer is full.
                "X-Accel-Buffering": "no",
            }
        )
        self._request = request
        self._app = current_state().shared.app
        config = self._app[CONFIG]
        self._interval = config.websocket_heartbeat if heartbeat is None else heartbeat
        self._retry = retry
        self._until = asyncio.timeout(None)
        self._heart: asyncio.Task[None] | None = None
        self._written = 0.0
        self._is_open = False
        self.ended = False
        """Whether the client is gone or was sent away."""
        self.last_event_id = request.headers.get("Last-Event-ID", "")
        """The ``id`` of the last event that the client got on an earlier stream, or ""."""

    async def __aenter__(self) -> Self:
        if self._app[_REGISTRY].leaving:
            raise web.HTTPServiceUnavailable(headers={hdrs.RETRY_AFTER: "1"})
        await self.prepare(self._request)
        _register(self._request, self)
        STATE.get().response = self
        # Nobody else waits for the answer of a stream whose client has closed its side.
        self._request[CANCELLABLE] = True
        await self._until.__aenter__()
        self._is_open = True
        try:
            head = ":\n\n" if self._retry is None else f"retry: {self._retry * 1000:.0f}\n\n"
            await self._send(head)
        except ConnectionError:
            self.end()
        if self._interval:
            self._heart = asyncio.create_task(self._beat())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        self._is_open = False
        if self._heart is not None:
            self._heart.cancel()
        try:
            await self._until.__aexit__(kind, error, traceback)
        except TimeoutError:
            return self._until.expired()
        return self.ended and isinstance(error, ConnectionError)

    async def send(
        self,
        data: str,
        *,
        event: str | None = None,
        id: str | None = None,  # noqa: A002
    ) -> None:
        """Send one event; wait while the client is slow.

        ``data`` may have several lines. Raises ValueError where ``event`` or ``id`` has
        one of its own, ConnectionResetError when the stream has ended.
        """
        fields = []
        for name, value in (("event", event), ("id", id)):
            if value is not None:
                if any(character in value for character in "\r\n\0"):
                    raise ValueError(f"{name} {value!r} has a line break or a NUL in it")
                fields.append(f"{name}: {value}\n")
        lines = data.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        fields += [f"data: {line}\n" for line in lines]
        try:
            await self._send("".join(fields) + "\n")
        except ConnectionError:
            self.ended = True
            raise

    def end(self) -> None:
        """End the stream from outside: the handler leaves its block now, if it is in there."""
        if self._is_open and not self.ended:
            self.ended = True
            self._until.reschedule(0)

    async def _send(self, text: str) -> None:
        if self.ended:
            raise ConnectionResetError("The event stream has ended.")
        self._written = asyncio.get_running_loop().time()
        await self.write(text.encode())

    async def _beat(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                due = self._written + self._interval
                if loop.time() < due:
                    await asyncio.sleep(due - loop.time())
                else:
                    await self._send(":\n\n")
        except ConnectionError:
            self.end()

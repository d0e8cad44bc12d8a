"""One client's connection: aiohttp's protocol, with what a server in the open needs besides.

Rules:

1. aiohttp parses and answers. What is added here bounds a connection in time and
   sees to its end: nothing on the way of an ordinary request is done twice.
2. A connection is *idle* while aiohttp waits for a request on it. A header that
   has begun to arrive on an idle connection is complete within ``header_timeout``.
3. A client that takes nothing for ``write_timeout`` is cut off; a body of which nothing comes
   for ``body_timeout`` is waited for twice as long at the most, whoever reads it.
4. After the last answer the connection is half-closed and read until the client
   closes its side (RFC 9112, section 9.6): a reset would destroy the answer.
   What arrives in that time is thrown away. So is a short body that nobody has read, and
   then the connection goes on.
5. A client that closed its side first (a FIN after its request) is answered all
   the same. Over TLS there is no half-closed connection.
6. What follows a malformed request is never parsed; what came before it is answered.
7. What HTTP forbids and aiohttp's parser lets through is refused.
8. Whoever is *leaving* says so: each answer carries ``Connection: close``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import lru_cache
from http import HTTPStatus
from ipaddress import IPv6Address
from itertools import islice
from typing import Any, TypeVar, cast

import aiohttp
from aiohttp import hdrs, http_exceptions, web
from aiohttp.http import (
    HttpRequestParser,
    HttpVersion10,
    HttpVersion11,
    RawRequestMessage,
    StreamWriter,
    WebSocketReader,
)
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from aiohttp.web_protocol import ERROR, _ErrInfo
from multidict import CIMultiDict, CIMultiDictProxy

from django_aioserve.bridge.frames import StrictReader
from django_aioserve.keys import CANCELLABLE, ShortWay

__all__ = ["Connection", "Front", "Limits", "require_aiohttp"]

# aiohttp has no public way to know whether a connection is idle or what waits on it, and
# none to answer a request without a task of its own. A worker does not start, and
# tests/test_connection.py fails, where a new aiohttp has not got these.
AIOHTTP_PRIVATE = (
    "_buffer_paused",
    "_close",
    "_current_request",
    "_force_close",
    "_handle_request",
    "_keepalive_handle",
    "_keepalive_timeout",
    "_logging_enabled",
    "_loop",
    "_make_error_handler",
    "_manager",
    "_message_tail",
    "_messages",
    "_msg_queue_resume_size",
    "_next_keepalive_close_time",
    "_parser",
    "_process_keepalive",
    "_request_count",
    "_resume_reading_if_drained",
    "_task_handler",
    "_upgraded",
    "_waiter",
)

HALF_CLOSED_GRACE = 3.0
"""Seconds until a client that sent a FIN while an asynchronous handler works for it is
held to have left altogether: the two look the same until something is written."""

LINGER_SECONDS = 2.0
"""Seconds that a closed connection is read until the client closes its side too, and that the
rest of a body is waited for which nobody has read."""

LINGER_BYTES = 1 << 20
"""Bytes that are thrown away in that time, at most."""


FALSE_ENDS = 8
"""How often the content of a packet may look like the end of its body; behind more of them nothing
is answered."""


# No path is plain where every path begins like another's.
_NO_SHORT_WAY = ShortWay(cast("Any", None), ("",))

_T = TypeVar("_T")

_PAYLOAD_IS_GONE = web.PayloadAccessError()

# What reading a body may raise; RuntimeError is aiohttp's where the connection is closed.
_BROKEN_BODY = (
    *(TimeoutError, ConnectionError, RuntimeError),
    *(web.RequestPayloadError, http_exceptions.HttpProcessingError),
)

_VERSIONS = {HttpVersion10, HttpVersion11}

# What stands for a malformed request: RFC 9110, section 6.2, wants our version in its answer.
_NO_MESSAGE = ERROR._replace(version=HttpVersion11)

# RFC 9110, section 7.2, and RFC 3986, section 3.2.2, without the comma: a list is no host.
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|[A-Za-z0-9._~%!$&'()*+;=-]+)(?::0*([0-9]{0,5}))?")

# The end of a chunked body without trailers: a line before the last that is only "0" can
# be no trailer, for that has a colon.
_NO_TRAILERS = b"\n0\r\n\r\n"


def _start_task(
    loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, _T]
) -> asyncio.Task[_T]:
    """Run in a task of its own, and so in a context of its own; from Python 3.12 on at once."""
    if sys.version_info >= (3, 12):
        return asyncio.Task(coroutine, loop=loop, eager_start=True)
    return loop.create_task(coroutine)


def _is_plain(message: RawRequestMessage, others: tuple[str, ...]) -> bool:
    """Tell whether a request is the bridge's without a look at the routes.

    Where it is not plain, for its path is escaped or absolute, for example, aiohttp's
    router decides.
    """
    path = message.path
    return (
        path[0] == "/"
        and not path.startswith(others)
        and "%" not in path
        and message.version == HttpVersion11
        and not message.upgrade
        and hdrs.EXPECT not in message.headers
    )


@lru_cache(maxsize=1024)
def _is_host(value: str) -> bool:
    match = _HOST.fullmatch(value)
    if match is None:
        return False
    address, port = match.groups()
    # aiohttp would make an error of the handler's own of these, once it asks for the URL.
    return (address is None or _is_ipv6(address)) and int(port or 0) < 1 << 16


def _is_ipv6(text: str) -> bool:
    try:
        IPv6Address(text)
    except ValueError:
        return False
    return True


def _refusal(message: RawRequestMessage, payload: StreamReader) -> _ErrInfo | None:
    """Tell what is wrong with a request that aiohttp's parser lets through."""
    headers = message.headers
    host, coding = headers.get(hdrs.HOST), headers.get(hdrs.TRANSFER_ENCODING)
    broken = payload.exception()
    error: BaseException
    if broken is not None:
        error = broken
    elif host is not None and not _is_host(host):
        error = http_exceptions.BadHttpMessage("Invalid Host")
    elif coding is not None and not message.chunked:
        error = http_exceptions.BadHttpMessage("Invalid Transfer-Encoding")
    elif coding is not None and coding.lower() != "chunked":
        error = http_exceptions.HttpProcessingError(code=501, message="Unsupported coding")
    elif message.version not in _VERSIONS:
        error = http_exceptions.HttpProcessingError(code=505, message="Unsupported version")
    elif message.method == hdrs.METH_CONNECT:
        error = http_exceptions.HttpProcessingError(code=501, message="Unsupported method CONNECT")
    else:
        return None
    # The status is `Connection._refuse`'s to choose.
    return _ErrInfo(HTTPStatus.BAD_REQUEST, error, str(error))


def _with_host_of_target(message: RawRequestMessage) -> RawRequestMessage:
    """Let the Host be what an absolute-form target says (RFC 9112, section 3.2.2).

    The target stays as it is, but for an empty path, which is ``/`` (RFC 9110, section 4.2.3).
    """
    target, mark, query = message.path.partition("?")
    authority, slash, _ = target.partition("://")[2].partition("/")
    headers = CIMultiDict(message.headers)
    headers[hdrs.HOST] = authority
    raw_headers = [pair for pair in message.raw_headers if pair[0].lower() != b"host"]
    raw_headers.append((b"Host", authority.encode("utf-8", "surrogateescape")))
    message = message._replace(headers=CIMultiDictProxy(headers), raw_headers=tuple(raw_headers))
    if slash:
        return message
    url = message.url.with_path("/", keep_query=True)
    return message._replace(path=f"{target}/{mark}{query}", url=url)


def _is_short(request: web.BaseRequest) -> bool:
    """Tell whether the rest of a body may be skipped; of a chunked one nobody knows yet.

    A client that expects 100 (Continue) may send its body or leave it (RFC 9110, 10.1.1).
    """
    length = request.content_length
    return (length is None or length <= LINGER_BYTES) and hdrs.EXPECT not in request.headers


async def _answer_for_all(_: web.BaseRequest) -> web.StreamResponse:
    """Answer ``OPTIONS *``, which is about the server, not about a page (RFC 9110, 9.3.7)."""
    return web.Response()


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one connection; durations in seconds, sizes in bytes."""

    header_timeout: float
    body_timeout: float
    write_timeout: float
    line_size: int = 8190
    field_size: int = 8190
    fields: int = 100


@dataclass(slots=True)
class Front:
    """What all connections of one worker share.

    ``answered`` is called after each answer; ``leaving`` is set once by the worker
    when it wants its clients to go elsewhere. ``after`` is called with each request
    and its answer where somebody asks for it.
    """

    limits: Limits
    log: logging.Logger
    answered: Callable[[], None]
    after: Callable[[web.BaseRequest, web.StreamResponse], None] | None = None
    short_way: ShortWay | None = None
    leaving: bool = False
    connections: set[Connection] = field(default_factory=set)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set whenever a connection was closed or has become idle."""


def require_aiohttp() -> None:
    """Raise RuntimeError where this aiohttp is not the one that `Connection` was written for."""
    missing = [name for name in AIOHTTP_PRIVATE if not hasattr(web.RequestHandler, name)]
    if missing:
        raise RuntimeError(
            f"aiohttp {aiohttp.__version__} has no RequestHandler.{missing[0]}; "
            "expected a version that django-aioserve supports (pip check tells)."
        )


class _StalledError(web.RequestPayloadError):
    code = HTTPStatus.REQUEST_TIMEOUT


class Connection(web.RequestHandler):
    """aiohttp's protocol for one connection of ``front``; the rules are in the module's head."""

    __slots__ = (
        "_amid",
        "_begun",
        "_body",
        "_body_timer",
        "_discarded",
        "_front",
        "_half_closed",
        "_header_timer",
        "_last_body",
        "_open_body",
        "_peer_closed",
        "_tail",
        "_write_timer",
    )

    def __init__(self, server: web.Server, front: Front, **options: Any) -> None:
        limits = front.limits
        super().__init__(
            server,
            max_line_size=limits.line_size,
            max_field_size=limits.field_size,
            max_headers=limits.fields,
            lingering_time=0,
            auto_decompress=False,
            **options,
        )
        self._front = front
        self._half_closed = False
        # The body of the request that was taken last: read, waited for or skipped.
        self._body = EMPTY_PAYLOAD
        # The chunked body that is arriving, the last bytes of it, and the first one that
        # may have ended with trailers.
        self._open_body: StreamReader | None = None
        self._tail = b""
        self._last_body: StreamReader | None = None
        # Whether data has ever begun elsewhere than where a request may begin.
        self._amid = False
        # The parts of a header that is not complete yet, while the connection is idle.
        self._begun: list[bytes] = []
        self._header_timer: asyncio.TimerHandle | None = None
        self._body_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        # None until this side has said its last word; then the count of bytes thrown away.
        self._discarded: int | None = None
        self._peer_closed: asyncio.Event | None = None

    @property
    def idle(self) -> bool:
        """Whether nothing is asked of this connection: no request runs, waits or has begun."""
        waits = self._waiter is not None or not self._request_count
        return waits and not self._messages and not self._begun

    # ------------------------------------------------------------------ arrival and end

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._front.connections.add(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        for timer in (self._header_timer, self._body_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        task = self._task_handler
        super().connection_lost(exc)
        if self._peer_closed is not None:
            self._peer_closed.set()
        if task is None or self._current_request is None:
            self._leave()
        else:
            # A handler may have something to do for a client that left: a worker waits for it.
            task.add_done_callback(self._leave)

    def _leave(self, _: object = None) -> None:
        self._front.connections.discard(self)
        self._front.changed.set()

    def eof_received(self) -> bool | None:  # type: ignore[override]
        if self._peer_closed is not None:
            self._peer_closed.set()
            return None
        waits = self.idle or self._begun
        if self.ssl_context is not None or self._upgraded or waits or self._body_missing():
            return None
        self._half_closed = True
        if not self._messages:
            self.close()  # after the answer that is under way, even if it is written already
        self._loop.call_later(HALF_CLOSED_GRACE, self._half_closed_expired)
        return True

    def _body_missing(self) -> bool:
        if not self._body.is_eof():
            return True
        return any(not payload.is_eof() for _, payload in self._messages)

    def _half_closed_expired(self) -> None:
        request = self._current_request
        if self.transport is not None and request is not None and CANCELLABLE in request:
            self.transport.abort()

    # ------------------------------------------------------------------ requests

    async def start(self) -> None:
        """Answer the requests of this connection, one after another.

        It is aiohttp's loop, with a way for requests that are plainly Django's: they
        need neither a task of their own, for the bridge gives each its own context, nor
        the router.
        """
        manager = self._manager
        if manager is None:
            return
        front, loop, messages = self._front, self._loop, self._messages
        short_way = front.short_way or _NO_SHORT_WAY
        bridge, others = short_way.handler, short_way.others
        task = cast("asyncio.Task[None]", asyncio.current_task())
        while not self._force_close:
            if not messages:
                self._waiter = loop.create_future()
                try:
                    await self._waiter
                except asyncio.CancelledError:
                    if task.cancelling():
                        raise
                    break  # the connection is closed; an exception would leave a ring behind
                finally:
                    self._waiter = None
            message, payload = self._take_message()
            began = loop.time() if self._logging_enabled else None
            manager.requests_count += 1
            writer = StreamWriter(self, loop)
            try:
                if isinstance(message, _ErrInfo):
                    request = web.BaseRequest(_NO_MESSAGE, payload, self, writer, task, loop)
                    handler = self._make_error_handler(message)
                    response, lost = await self._handle_request(request, began, handler)
                elif _is_plain(message, others):
                    request = web.BaseRequest(message, payload, self, writer, task, loop)
                    response, lost = await self._handle_request(request, began, bridge)
                elif message.path == "*":
                    request = web.BaseRequest(message, payload, self, writer, task, loop)
                    response, lost = await self._handle_request(request, began, _answer_for_all)
                else:
                    self._watch_body(payload)
                    request = manager.request_factory(message, payload, self, writer, task)
                    handling = self._handle_request(request, began, manager.request_handler)
                    response, lost = await _start_task(loop, handling)
            except ConnectionError:
                break
            except asyncio.CancelledError:
                self.force_close()
                raise
            except Exception:  # noqa: BLE001  # as aiohttp's loop does; the server lives on
                self.log_exception("Unhandled exception")
                self.force_close()
                break
            front.answered()
            if front.after is not None:
                front.after(request, response)
            persists = response.keep_alive and (payload.is_eof() or await self._skip(payload))
            last = lost or not persists or payload is self._last_body
            if last and not lost and not self._upgraded:
                await self._linger(payload)
            if last or self._close or self._force_close:
                break
            payload.set_exception(_PAYLOAD_IS_GONE)
            # Nothing of it is kept while the connection is idle.
            del message, payload, writer, request, response
            self._expect_next(loop.time() + self._keepalive_timeout)
        self._close_at_last()

    def _close_at_last(self) -> None:
        if not self._force_close:
            self._task_handler = None
            if self.transport is not None:
                self.transport.close()

    def _take_message(self) -> tuple[RawRequestMessage | _ErrInfo, StreamReader]:
        message, payload = self._messages.popleft()
        self._body = payload
        if self._parser is not None:
            self._parser.message_consumed()
        if self._buffer_paused and len(self._messages) <= self._msg_queue_resume_size:
            self._resume_reading_if_drained()
        if isinstance(message, _ErrInfo):
            return message, payload
        if payload is self._last_body or (self._front.leaving and not self._messages):
            # As if the client had asked for it: the answer says so whoever makes its head.
            message = message._replace(should_close=True)
        headers = message.headers
        if (
            payload is EMPTY_PAYLOAD
            and message.path[0] == "/"
            and message.version is HttpVersion11
            and hdrs.TRANSFER_ENCODING not in headers
            and _is_host(headers.get(hdrs.HOST, ""))
        ):
            return message, payload  # most are so; the rest is looked at closely
        if message.path[0] not in "/*" and message.method != hdrs.METH_CONNECT:
            message = _with_host_of_target(message)
        return _refusal(message, payload) or message, payload

    def _expect_next(self, close_time: float) -> None:
        self._next_keepalive_close_time = close_time
        if self._keepalive_handle is None:
            self._keepalive_handle = self._loop.call_at(close_time, self._process_keepalive)

    # ------------------------------------------------------------------ reading

    def data_received(self, data: bytes) -> None:
        if self._open_body is not None:
            data = self._receive_ends(data)
        if self._discarded is not None:
            self._discard(data)
            return
        messages = self._messages
        queued = len(messages)
        amid = queued > 0 or (self._waiter is None and self._request_count > 0)
        if amid:
            self._amid = True
        super().data_received(data)
        if messages:
            if self._header_timer is not None:
                self._header_timer.cancel()
                self._header_timer = None
            message = messages[-1][0]
            if isinstance(message, _ErrInfo):
                self._malformed(data)
            else:
                if message.upgrade and not self._upgraded and len(messages) > queued:
                    self._decline_upgrade(b"" if amid else b"".join((*self._begun, data)))
                self._begun.clear()
                if self._open_body is not None or message.chunked or len(messages) > queued + 1:
                    self._watch_trailers(data, queued)
        elif self._open_body is not None:
            self._watch_trailers(data, queued)
        elif data and not self._upgraded and (self._waiter is not None or not self._request_count):
            self._begun.append(data)
            if self._header_timer is None:
                self._header_timer = self._loop.call_later(
                    self._front.limits.header_timeout, self._header_late
                )

    def _receive_ends(self, data: bytes) -> bytes:
        """Receive ``data`` up to where the open body may end without trailers; give the rest.

        The answer may have left already: what follows such an end shall be answered, too.
        """
        length = len(_NO_TRAILERS)
        for _ in range(FALSE_ENDS):
            known = len(self._tail)
            found = (self._tail + data).find(_NO_TRAILERS, max(known - length + 1, 0))
            end = found + length - known
            if self._open_body is None or found < 0 or end == len(data):
                break
            self.data_received(data[:end])
            data = data[end:]
        return data

    def _watch_trailers(self, data: bytes, queued: int) -> None:
        """Let a request be the connection's last if its body may have ended with trailers.

        aiohttp's parser keeps the last trailer, and makes it a header of the request that
        follows (RFC 9110, section 6.5.1: it is to be discarded).
        """
        arrived = [(True, self._open_body)] if self._open_body is not None else []
        arrived += [
            (message.chunked, body)
            for message, body in islice(self._messages, queued, None)
            if isinstance(message, RawRequestMessage)
        ]
        self._tail = (self._tail + data)[-len(_NO_TRAILERS) :]
        self._open_body = None
        for position, (chunked, body) in enumerate(arrived, 1):
            if not chunked:
                continue
            if not body.is_eof():
                self._open_body = body
            elif self._last_body is None:
                # The end of what has arrived is the end of this body, unless more follows.
                ends = position == len(arrived) and not self._buffer_paused
                if not ends or self._tail != _NO_TRAILERS:
                    self._last_body = body

    def _decline_upgrade(self, arrived: bytes) -> None:
        """Let a request for another protocol be the last, unless it is all that has ``arrived``.

        aiohttp's parser forgets what follows such a request in the same data; after the
        body of a WebSocket's handshake it reads nothing more as a request.
        """
        message, payload = self._messages[-1]
        # What begins with the end of a line may be the rest of another head.
        alone = arrived[:1] not in b"\r\n" and arrived.find(b"\r\n\r\n") == len(arrived) - 4
        if not (alone and payload is EMPTY_PAYLOAD):
            message = cast("RawRequestMessage", message)._replace(should_close=True)
            self._messages[-1] = message, payload

    def _header_late(self) -> None:
        transport = self.transport
        if transport is not None and self._begun and self._waiter is not None:
            transport.write(
                b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            )
            self.force_close()

    def _discard(self, data: bytes) -> None:
        self._discarded = (self._discarded or 0) + len(data)
        if self._discarded > LINGER_BYTES and self._peer_closed is not None:
            self._peer_closed.set()

    def _malformed(self, data: bytes) -> None:
        """Answer what came before the fault; see that nothing after it is read."""
        self._discarded = 0
        fault = cast("_ErrInfo", self._messages.pop()[0])
        if not self._body.is_eof():
            # The fault is in the body that the handler waits for.
            self._fail_body(web.RequestPayloadError(fault.message))
        for _, payload in self._messages:
            if not payload.is_eof():
                payload.set_exception(web.RequestPayloadError(fault.message))
        # What may have begun within a body must never be read as a request.
        closed = not self._amid and self._recover(b"".join((*self._begun, data)))
        self._begun.clear()
        if not closed:
            self._messages.append((fault, EMPTY_PAYLOAD))
        if self._messages and self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail_body(self, error: Exception) -> None:
        self._body.set_exception(error)
        # aiohttp's reader, once the end of a chunk has woken it, waits on without a look.
        self._loop.call_soon(self._body.set_exception, error)

    def _watch_body(self, body: StreamReader, arrived: int | None = None) -> None:
        """Fail a body of which nothing has come since ``arrived`` bytes of it were there.

        Django's, and an ASGI application's, is read with a clock of its own: so that this one is
        never sooner it looks twice. A client that may not send, for what it sent is not read,
        does not stall.
        """
        transport = self.transport
        if transport is None or body is not self._body or body.is_eof():
            return
        if body.total_bytes == arrived and cast("asyncio.ReadTransport", transport).is_reading():
            self._fail_body(_StalledError("the body has stalled"))
            return
        known = -1 if arrived is None else body.total_bytes
        self._body_timer = self._loop.call_later(
            self._front.limits.body_timeout, self._watch_body, body, known
        )

    def _recover(self, data: bytes) -> bool:
        """Queue the good requests that stood before the fault in the same data.

        aiohttp's parser gives none of them when it fails. Tells whether the fault was
        only that something follows a request which closes the connection.
        """
        limits = self._front.limits
        parser = HttpRequestParser(
            self,
            self._loop,
            1 << 16,
            max_line_size=limits.line_size,
            max_field_size=limits.field_size,
            max_headers=limits.fields,
            payload_exception=web.RequestPayloadError,
            auto_decompress=False,
        )
        good: list[Any] = []
        for line in data.splitlines(keepends=True)[: 2 * limits.fields]:
            if good and good[-1][0].should_close and good[-1][1].is_eof():
                break
            try:
                messages, upgraded, _ = parser.feed_data(line)
            except http_exceptions.HttpProcessingError as error:
                if good and not good[-1][1].is_eof():
                    good[-1][1].set_exception(web.RequestPayloadError(str(error)))
                break
            good.extend(messages)
            if upgraded:
                break
        self._messages.extend(good)
        return bool(good and good[-1][0].should_close and good[-1][1].is_eof())

    def set_parser(
        self, parser: WebSocketReader, data_received_cb: Callable[[], None] | None = None
    ) -> None:
        if isinstance(parser, WebSocketReader):  # else it is the ASGI bridge, which is strict
            parser = cast("WebSocketReader", StrictReader(parser))
        super().set_parser(parser, data_received_cb)

    # ------------------------------------------------------------------ writing

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writing(-1)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _watch_writing(self, waiting: int) -> None:
        """Cut off a client that has taken nothing since ``waiting`` bytes waited for it."""
        transport = self.transport
        if transport is None:
            return
        now = transport.get_write_buffer_size()
        if now == waiting:
            transport.abort()
            return
        self._write_timer = self._loop.call_later(
            self._front.limits.write_timeout, self._watch_writing, now
        )

    # ------------------------------------------------------------------ answering

    def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> Coroutine[Any, Any, tuple[web.StreamResponse, bool]]:
        content = request.content
        if self._upgraded and self._message_tail and not self._messages:
            # What was buffered behind an upgrade that was declined is not watched.
            self._last_body = content
        ends = (self._front.leaving or self._half_closed) and not self._messages
        # An unread body must not become the next request: what is short is skipped afterwards.
        last = ends or content is self._last_body or not (content.is_eof() or _is_short(request))
        # A handler that returned nothing has no answer yet: aiohttp makes one.
        if last and not getattr(resp, "prepared", True):
            resp.force_close()
        return super().finish_response(request, resp, start_time)

    async def _skip(self, payload: StreamReader) -> bool:
        """Throw away what is left of a body that nobody read; tell whether it has come to its end.

        A client that sends head and body one after the other need not open a new connection
        because it was answered in between.
        """
        left = LINGER_BYTES
        with contextlib.suppress(*_BROKEN_BODY):
            async with asyncio.timeout(LINGER_SECONDS):
                while left > 0 and (data := await payload.readany()):
                    left -= len(data)
        self._front.changed.set()
        return payload.is_eof() and payload.exception() is None

    async def _linger(self, payload: StreamReader) -> None:
        transport = self.transport
        if transport is None or transport.is_closing():
            return
        # A fault is behind the end of what can be known of what the client sends.
        silent = payload.is_eof() and not self._messages and self._discarded is None
        self._discarded = 0
        self._peer_closed = asyncio.Event()
        self._messages.clear()
        if self._half_closed:
            return
        if transport.can_write_eof():
            with contextlib.suppress(OSError):  # the client has reset it unnoticed
                transport.write_eof()
        elif silent:
            # TLS says the end with its own message, and then waits for the client's; whoever is
            # still sending would be answered with a reset.
            transport.close()
        with contextlib.suppress(RuntimeError):  # was not paused
            transport.resume_reading()
        try:
            async with asyncio.timeout(LINGER_SECONDS):
                await self._peer_closed.wait()
        except TimeoutError:
            pass

    def say_goodbye(self) -> None:
        """Close an idle connection: half-close it, and fully once the client has done so too."""
        transport = self.transport
        if transport is None or transport.is_closing():
            return
        self._discarded = 0
        self._peer_closed = asyncio.Event()
        if transport.can_write_eof():
            with contextlib.suppress(OSError):  # the client has reset it unnoticed
                transport.write_eof()
        else:
            transport.close()
        self._loop.call_later(LINGER_SECONDS, self.force_close)

    # ------------------------------------------------------------------ errors

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if isinstance(exc, (http_exceptions.HttpProcessingError, web.RequestPayloadError)):
            return self._refuse(request, exc)
        return super().handle_error(request, status, exc, message)

    def _refuse(self, request: web.BaseRequest, error: Exception) -> web.StreamResponse:
        """Answer a malformed request: one line in the log, no traceback, nothing echoed."""
        status = HTTPStatus(getattr(error, "code", 0) or HTTPStatus.BAD_REQUEST)
        if isinstance(error, http_exceptions.LineTooLong):
            status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        said = getattr(error, "message", "") or str(error)
        cause = next(iter(said.splitlines()), type(error).__name__)
        peer = request.remote or "a Unix socket"
        self._front.log.warning("Malformed request from %s: %s", peer, ascii(cause)[1:-1][:200])
        # Not even a phrase: it may be HEAD that is answered (RFC 9110, section 9.3.2).
        response = web.Response(status=status)
        response.force_close()
        return response

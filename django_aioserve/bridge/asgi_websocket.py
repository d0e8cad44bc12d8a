"""One WebSocket of an ASGI application (RFC 6455).

Rules:

1. Pings are answered at once, whatever the application does. Messages that it does not take
   stay on the wire beyond `_INBOX` bytes.
2. An error of the application is a 500 as long as nothing has answered the handshake; an open
   WebSocket it closes with 1011.
3. The client's close frame, or its fault, is answered when the application has dealt with the
   messages before it, and at the latest after `_PATIENCE` seconds. What the client sends after a
   close frame of either side is thrown away.
4. A closing handshake, a client that takes nothing and one that is silent have their time;
   then the connection is aborted.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
from collections import deque
from typing import TYPE_CHECKING, Any, Final, cast

from aiohttp import web
from aiohttp.http import WS_KEY, ws_ext_gen, ws_ext_parse

from django_aioserve.bridge.asgi_exchange import (
    Answer,
    Exchange,
    client_left,
    list_items,
    plain_response,
    response_headers,
)
from django_aioserve.bridge.frames import (
    BINARY,
    CLOSE,
    FAIL,
    PING,
    PONG,
    TEXT,
    Deflater,
    FrameReader,
    close_payload,
    frame_header,
)
from django_aioserve.bridge.stream import BridgeResponse, ClientGone

if TYPE_CHECKING:
    from django_aioserve.bridge.asgi_exchange import Message, Scope, Service
    from django_aioserve.bridge.frames import Event

__all__ = ["WebSocketExchange", "asks_for_websocket", "check_handshake"]

_RESERVED: Final = "sec-websocket-"

#: How many bytes of messages may wait for the application, each with an overhead; then the
#: client has to wait, too.
_INBOX: Final = 64 << 10
_MESSAGE_OVERHEAD: Final = 128

#: How many frames are taken at a time, that a flood of small ones does not hold up the loop.
_BATCH: Final = 256

#: Messages outside these sizes are sent as they are: smaller ones would hardly become
#: shorter, larger ones would hold up the loop for more than about a millisecond.
_COMPRESS_FROM: Final = 64
_COMPRESS_TO: Final = 128 << 10

#: The window of what is sent compressed: 32 KiB of memory for a WebSocket instead of 256.
_WINDOW_BITS: Final = 12

#: A larger payload is not copied behind its header.
_COPY_LIMIT: Final = 16 << 10

#: Seconds that a close frame of the client may wait for the application.
_PATIENCE: Final = 1.0

#: Seconds that a client has to answer a close frame.
_CLOSE_TIMEOUT: Final = 5.0

#: Seconds that are read, and thrown away, after a close frame for a broken protocol: a reset
#: would destroy that frame (RFC 6455, 7.1.1).
_LINGER: Final = 2.0


class WebSocketExchange(Exchange):
    """One WebSocket (RFC 6455)."""

    def __init__(self, service: Service, request: web.BaseRequest, scope: Scope) -> None:
        super().__init__(service, request, scope)
        self._loop = asyncio.get_running_loop()
        self._connecting = True
        #: What answers the handshake: 101 or a refusal.
        self._response: web.StreamResponse | None = None
        self._denial: Answer | None = None
        self._frames: FrameReader | None = None
        self._deflater: Deflater | None = None
        self._inbox: deque[tuple[dict[str, Any], int]] = deque()
        self._waiting = 0
        #: The client waits until the application has taken something.
        self._stalled = False
        self._parses_soon = False
        self._pings: list[bytes] = []
        #: How many wait for a message: whoever does has answered those before it.
        self._idle = 0
        #: A close frame, or a fault, that is due once the messages before it were dealt with.
        self._ending: Event | None = None
        #: What the application is told at the end; None as long as the WebSocket is open.
        self._disconnect: dict[str, Any] | None = None
        self._gone = asyncio.Event()
        self._heard = self._asked = False
        self._beat: asyncio.TimerHandle | None = None
        self._deadline: asyncio.TimerHandle | None = None

    # What the application sees.

    async def receive(self) -> dict[str, Any]:
        if self._connecting:
            self._connecting = False
            return {"type": "websocket.connect"}
        while not self._inbox:
            self._obey()
            if self._disconnect is not None:
                return await self._tell(self._disconnect)
            self._changed.clear()
            self._idle += 1
            try:
                await self._changed.wait()
            finally:
                self._idle -= 1
        event, size = self._inbox.popleft()
        self._waiting -= size
        if self._stalled and self._waiting <= _INBOX // 2:
            self._parse_soon()
        return event

    async def send(self, message: Message) -> None:
        kind = message["type"]
        if self._disconnect is not None:
            raise ClientGone
        try:
            if self._frames is not None:
                if kind == "websocket.send":
                    await self._send(message)
                elif kind == "websocket.close":
                    code = message.get("code")
                    self._close(1000 if code is None else code, message.get("reason") or "")
                    self._inbox.clear()
                else:
                    raise ValueError(f"unexpected message {kind!r} on an open WebSocket")
            elif kind == "websocket.http.response.start" and self._denial is None:
                denial = Answer(self._request, self._config.write_timeout, last=True)
                denial.start(message)
                self._denial = denial
            elif kind == "websocket.http.response.body" and self._denial is not None:
                await self._deny(self._denial, message)
            elif kind == "websocket.accept" and self._denial is None:
                await self._accept(message)
            elif kind == "websocket.close" and self._denial is None:
                await self._refuse(403)
            else:
                raise ValueError(f"unexpected message {kind!r} before a WebSocket is open")
        except ConnectionError:
            if self._disconnect is None:
                self.lost()
            raise ClientGone from None

    # The handshake.

    async def _accept(self, message: Message) -> None:
        request = self._request
        headers, length, *_ = response_headers(message.get("headers", ()))
        if length is not None or any(name.lower().startswith(_RESERVED) for name, _ in headers):
            raise ValueError("Content-Length and Sec-WebSocket-* are not the application's to send")
        for _, value in headers:
            value.encode()  # aiohttp would silently leave out what is no UTF-8
        subprotocol = message.get("subprotocol")
        if subprotocol is not None and subprotocol not in list_items(
            request, "Sec-WebSocket-Protocol"
        ):
            raise ValueError(f"the client did not offer the subprotocol {subprotocol!r}")
        response = web.StreamResponse(status=101, headers=headers)
        response.headers.setdefault("Server", "django-aioserve")
        response.headers["Upgrade"] = "websocket"
        response.headers["Connection"] = "Upgrade"
        response.headers["Sec-WebSocket-Accept"] = _accept_key(request)
        if subprotocol is not None:
            response.headers["Sec-WebSocket-Protocol"] = subprotocol
        bits, alone = ws_ext_parse(
            ", ".join(request.headers.getall("Sec-WebSocket-Extensions", ())), isserver=True
        )
        if bits:
            bits = min(bits, _WINDOW_BITS)
            self._deflater = Deflater(bits, takeover=not alone)
            response.headers["Sec-WebSocket-Extensions"] = ws_ext_gen(
                bits, isserver=True, server_notakeover=alone
            )
        response.force_close()
        await response.prepare(request)
        if self._disconnect is not None:
            raise ClientGone
        self._response = response
        self._frames = FrameReader(self._config.websocket_max_size, compressed=bool(bits))
        self._lasting.add(self)
        protocol = request.protocol
        protocol.keep_alive(False)
        protocol.set_parser(cast("Any", self))
        if self._config.websocket_heartbeat:
            self._beat = self._loop.call_later(self._config.websocket_heartbeat, self._on_beat)

    async def _deny(self, denial: Answer, message: Message) -> None:
        try:
            await denial.body(message)
        finally:
            self._response = denial.response
            if denial.complete:
                self._disconnected(1006)
                self._be_over()

    async def _refuse(self, status: int) -> None:
        answer = Answer(self._request, self._config.write_timeout)
        self._response = await answer.plain(status)
        self._disconnected(1006)
        self._be_over()

    # The client's bytes. aiohttp calls the first two, as it would those of its own parser.

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        """Take what the client sent."""
        self._heard = True
        if self._frames is not None:
            self._frames.feed(bytes(data))
            self._parse()
        return False, b""

    def feed_eof(self) -> None:
        """Note that the connection is gone."""
        self.lost()

    def _parse_soon(self) -> None:
        """Parse in the loop's next round: others are to have their turn in between."""
        if not self._parses_soon:
            self._parses_soon = True
            self._loop.call_soon(self._parse)

    def _parse(self) -> None:
        """Take events from the frames, as many as there is room for."""
        self._parses_soon = False
        frames = self._frames
        if frames is None:
            return
        for _ in range(_BATCH):
            if self._waiting >= _INBOX and self._disconnect is None:
                break
            event = frames.next()
            if event is None:
                self._send_pongs()
                if self._stalled:
                    self._stalled = False
                    self._request.protocol.resume_reading()
                return
            self._take(event)
        else:
            self._parse_soon()
        self._send_pongs()
        if not self._stalled:
            self._stalled = True
            self._request.protocol.pause_reading()

    def _take(self, event: Event) -> None:
        opcode, payload = event
        if self._disconnect is not None:
            if opcode in (CLOSE, FAIL):
                self._end_transport()
        elif opcode == TEXT:
            self._put({"type": "websocket.receive", "text": payload}, len(payload))
        elif opcode == BINARY:
            self._put({"type": "websocket.receive", "bytes": payload}, len(payload))
        elif opcode == PING:
            self._pings.append(payload)
        elif opcode in (CLOSE, FAIL):
            self._send_pongs()
            self._ending = event
            self._stop_timers()
            self._deadline = self._loop.call_later(_PATIENCE, self._obey)
            if self._idle and not self._inbox:
                self._obey()

    def _put(self, event: dict[str, Any], size: int) -> None:
        size += _MESSAGE_OVERHEAD
        self._inbox.append((event, size))
        self._waiting += size
        self._changed.set()

    def _obey(self) -> None:
        """End it as the client wants it, or because of what the client sent."""
        ending, self._ending = self._ending, None
        if ending is None or self._disconnect is not None:
            return
        opcode, (code, reason) = ending
        if opcode == CLOSE:
            self._begin_end(close_payload(code), code, reason, _CLOSE_TIMEOUT)
            self._end_transport()
        else:
            self._begin_end(close_payload(code, reason), code, reason, _LINGER)
            transport = self._request.transport
            if transport is not None and transport.can_write_eof():
                transport.write_eof()

    def _end_transport(self) -> None:
        transport = self._request.transport
        if transport is not None:
            transport.close()

    # What goes to the client.

    async def _send(self, message: Message) -> None:
        text, data = message.get("text"), message.get("bytes")
        if (text is None) == (data is None):
            raise ValueError("exactly one of text and bytes has to be given")
        if text is not None:
            if not isinstance(text, str):
                raise TypeError(f"text must be a str, not {type(text).__name__}")
            self._write(TEXT, text.encode())
        elif isinstance(data, (bytes, bytearray, memoryview)):
            self._write(BINARY, bytes(data))
        else:
            raise TypeError(f"bytes must be bytes, not {type(data).__name__}")
        if self._request.protocol.writing_paused:
            await self._drain()

    def _write(self, opcode: int, payload: bytes) -> None:
        transport = self._request.transport
        if transport is None or transport.is_closing():
            raise ClientGone
        compressed = (
            self._deflater is not None
            and opcode in (TEXT, BINARY)
            and _COMPRESS_FROM <= len(payload) <= _COMPRESS_TO
        )
        if compressed and self._deflater is not None:
            payload = self._deflater.compress(payload)
        header = frame_header(opcode, len(payload), compressed=compressed)
        if len(payload) <= _COPY_LIMIT:
            transport.write(header + payload)
        else:
            transport.write(header)
            transport.write(payload)

    async def _drain(self) -> None:
        """Wait until the client has taken enough; abort when it takes nothing any more."""
        request = self._request
        while request.protocol.writing_paused:
            transport = request.transport
            if transport is None:
                raise ClientGone
            waiting = transport.get_write_buffer_size()
            try:
                async with asyncio.timeout(self._config.write_timeout):
                    # All who wait share one future, which a cancellation would cancel for all.
                    await asyncio.shield(request.writer.drain())
            except TimeoutError:
                if transport.get_write_buffer_size() >= waiting:
                    transport.abort()
                    raise ClientGone from None
        if self._disconnect is not None:
            raise ClientGone
        self._send_pongs()

    def _send_pongs(self) -> None:
        """Answer the pings; only the latest, and later, when the client does not read.

        RFC 6455, 5.5.3, allows for that.
        """
        if not self._pings or self._disconnect is not None:
            return
        if self._request.protocol.writing_paused:
            del self._pings[:-1]
            return
        pongs = b"".join(frame_header(PONG, len(ping)) + ping for ping in self._pings)
        self._pings.clear()
        transport = self._request.transport
        if transport is not None and not transport.is_closing():
            transport.write(pongs)

    def _on_beat(self) -> None:
        """Ping a client that has been silent; abort when it had been pinged before."""
        transport = self._request.transport
        if transport is None:
            return
        if self._heard or self._stalled:
            self._asked = False
        elif self._asked:
            self._disconnected(1006)
            transport.abort()
            return
        else:
            self._asked = True
            with contextlib.suppress(ClientGone):
                self._write(PING, b"")
        self._heard = False
        self._send_pongs()
        self._beat = self._loop.call_later(self._config.websocket_heartbeat, self._on_beat)

    # The end.

    def end(self) -> None:
        if self._frames is not None and self._disconnect is None:
            self._close(1012, "service restart")

    def lost(self) -> None:
        # The client may have said why, and not have waited for an answer.
        code, reason = (1006, "") if self._ending is None else self._ending[1]
        self._disconnected(code, reason)
        self._stop_timers()
        self._gone.set()

    def _close(self, code: int, reason: str) -> None:
        """Begin the closing handshake. Raises ValueError for a code that cannot be sent."""
        payload = close_payload(code, reason)
        if self._ending is not None:
            self._obey()
            return
        self._begin_end(payload, code, reason, _CLOSE_TIMEOUT)
        # The client's close frame may stand behind much that nobody will take.
        self._parse()

    def _begin_end(self, payload: bytes, code: int, reason: str, seconds: float) -> None:
        """Send a close frame, tell the application, and give the client some time."""
        with contextlib.suppress(ClientGone):
            self._write(CLOSE, payload)
        self._disconnected(code, reason)
        self._stop_timers()
        self._deadline = self._loop.call_later(seconds, self._abort)

    def _disconnected(self, code: int, reason: str = "") -> None:
        if self._disconnect is None:
            self._disconnect = {"type": "websocket.disconnect", "code": code, "reason": reason}
            self._changed.set()

    def _abort(self) -> None:
        transport = self._request.transport
        if transport is not None:
            transport.abort()

    def _stop_timers(self) -> None:
        for timer in (self._beat, self._deadline):
            if timer is not None:
                timer.cancel()

    async def _returned(self) -> web.StreamResponse:
        if self._frames is None and self._disconnect is None:
            self._complain("returned without answering a WebSocket's handshake")
            return await self._failed()
        return await self._finish(1000)

    async def _failed(self) -> web.StreamResponse:
        if self._frames is None and self._response is None:
            return plain_response(500, self._config.write_timeout)
        return await self._finish(1011)

    async def _finish(self, code: int) -> web.StreamResponse:
        """Close what is open, and wait for the client to have done so."""
        response = self._response
        if response is None:
            return client_left()
        if self._frames is None:
            if isinstance(response, BridgeResponse) and self._disconnect is None:
                response.cut_off()  # a denial that is not complete
            return response
        if self._disconnect is None:
            self._close(code, "")
        try:
            await self._gone.wait()
        except asyncio.CancelledError:
            self._abort()
            raise
        return response


def asks_for_websocket(request: web.BaseRequest) -> bool:
    """Whether this is an opening handshake (RFC 6455, 4.2.1), be it a valid one or not."""
    return (
        request.headers.get("Upgrade", "").strip().lower() == "websocket"
        and request.method == "GET"
        and request.version >= (1, 1)
        and any(item.lower() == "upgrade" for item in list_items(request, "Connection"))
    )


def check_handshake(request: web.BaseRequest) -> None:
    """Raise HTTPException for an opening handshake that is not valid (RFC 6455, 4.2.2)."""
    headers = request.headers
    if headers.getall("Sec-WebSocket-Version", []) != ["13"]:
        # RFC 9110, 15.5.22: with 426 goes what to upgrade to.
        raise web.HTTPUpgradeRequired(
            headers={
                "Sec-WebSocket-Version": "13",
                "Upgrade": "websocket",
                "Connection": "Upgrade",
            }
        )
    keys = headers.getall("Sec-WebSocket-Key", [])
    try:
        valid = len(keys) == 1 and len(base64.b64decode(keys[0], validate=True)) == 16
    except (binascii.Error, ValueError):
        valid = False
    if not valid:
        raise web.HTTPBadRequest(text="400: invalid Sec-WebSocket-Key")


def _accept_key(request: web.BaseRequest) -> str:
    key = request.headers["Sec-WebSocket-Key"].encode("ascii")
    return base64.b64encode(hashlib.sha1(key + WS_KEY, usedforsecurity=False).digest()).decode()

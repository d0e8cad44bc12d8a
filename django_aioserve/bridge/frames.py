"""The frames of RFC 6455, between the bytes of a connection and whole messages; no input or output.

aiohttp's reader lets pass what the RFC forbids (frames without a mask, a second message
within a fragmented one, close codes that never go over the wire, compressed control
frames), and it gives pings only to those who ask for messages. `StrictReader` stands before
it where aiohttp's WebSockets are served. `FrameReader` is for all others; it

1. fails the connection at the first byte that is wrong, after everything that was
   right before it (section 7.1.7), and takes nothing thereafter;
2. checks UTF-8 as it arrives, also in the middle of a message (section 8.1);
3. holds no more of a message than the largest one may have, compressed or not, and
   refuses it before its payload has come where the header gives it away;
4. parses as far as it is asked to: what was not asked for stays bytes.
"""

from __future__ import annotations

import codecs
import struct
import zlib
from typing import Any, cast

from aiohttp._websocket.helpers import websocket_mask

__all__ = [
    "BINARY",
    "CLOSE",
    "FAIL",
    "PING",
    "PONG",
    "TEXT",
    "Deflater",
    "FrameReader",
    "StrictReader",
    "close_payload",
    "frame_header",
    "is_close_code",
]

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA

FAIL = -1
"""No opcode: what the client sent is wrong; to be answered with a close frame."""

_CONTROL = frozenset({CLOSE, PING, PONG})
_DATA = frozenset({CONTINUATION, TEXT, BINARY})

_FIN, _COMPRESSED, _MASKED = 0x80, 0x40, 0x80

_LONGEST_REASON = 123

_FLUSHED = b"\x00\x00\xff\xff"
"""What ends each compressed message and is left out of it (RFC 7692, 7.2.1)."""

_MOST_BLOCKS = 64
"""How often a client may end its compressed stream within one message (RFC 7692, 7.2.3.4)."""

_UNLIMITED = 1 << 60

_FAULT = b"\xf0\x80"
"""The header of a frame with reserved bits, which aiohttp's reader does refuse."""

_UTF8 = codecs.getincrementaldecoder("utf-8")

#: ``(opcode, payload)``: str with TEXT, bytes with BINARY, PING and PONG, and
#: ``(code, reason)`` with CLOSE and FAIL.
Event = tuple[int, Any]


def is_close_code(code: int) -> bool:
    """Whether a close frame may carry ``code`` (RFC 6455, 7.4, and IANA's registry)."""
    return 1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999


def close_payload(code: int, reason: str = "") -> bytes:
    """Give the payload of a close frame; the reason is cut to the 123 bytes there are for it.

    1005 stands for a frame without a code. Raises ValueError for a code that must not be sent.
    """
    if code == 1005:
        return b""
    if not is_close_code(code):
        raise ValueError(f"{code} is not a code to close a WebSocket with (RFC 6455, 7.4)")
    cut = reason.encode("utf-8", "replace")[:_LONGEST_REASON].decode("utf-8", "ignore")
    return struct.pack("!H", code) + cut.encode()


def frame_header(opcode: int, length: int, *, compressed: bool = False) -> bytes:
    """Give the header of an unfragmented frame of a server, whose payload has ``length`` bytes."""
    first = _FIN | opcode | (_COMPRESSED if compressed else 0)
    if length < 126:
        return bytes((first, length))
    if length < 1 << 16:
        return struct.pack("!BBH", first, 126, length)
    return struct.pack("!BBQ", first, 127, length)


class Deflater:
    """Compresses messages (RFC 7692) with a window of ``2 ** window_bits`` bytes, 9 to 15.

    ``takeover`` tells whether a message may refer to those before it. It takes
    memory only once something was compressed: 32 KiB with 12 bits.
    """

    def __init__(self, window_bits: int, *, takeover: bool) -> None:
        self._window_bits = window_bits
        self._takeover = takeover
        self._compressor: Any = None

    def compress(self, message: bytes) -> bytes:
        """Give the payload of the frame for a message that is not empty."""
        compressor = self._compressor
        if compressor is None:
            compressor = zlib.compressobj(
                zlib.Z_BEST_SPEED, zlib.DEFLATED, -self._window_bits, min(self._window_bits - 7, 8)
            )
            if self._takeover:
                self._compressor = compressor
        data: bytes = compressor.compress(message) + compressor.flush(zlib.Z_SYNC_FLUSH)
        return data.removesuffix(_FLUSHED)


class _Violation(Exception):
    """What the client sent is to be answered with this close code."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class FrameReader:
    """Takes bytes from a client and gives events; the rules are in the module's head.

    ``max_size`` is the most bytes of a message (0: any number), ``compressed`` tells
    whether permessage-deflate was agreed upon.
    """

    __slots__ = (
        "_blocks",
        "_compressed",
        "_data",
        "_ended",
        "_final",
        "_in_frame",
        "_inflater",
        "_left",
        "_mask",
        "_max_size",
        "_message",
        "_opcode",
        "_position",
        "_size",
        "_squeezed",
        "_utf8",
    )

    def __init__(self, max_size: int, *, compressed: bool) -> None:
        self._max_size = max_size or _UNLIMITED
        self._compressed = compressed
        self._data = b""
        self._position = 0
        self._ended = False
        # The message under way: its opcode (0 where there is none), whether it is
        # compressed, its bytes on the wire and what they have come to so far.
        self._opcode = 0
        self._squeezed = False
        self._size = 0
        self._message = bytearray()
        self._utf8 = _UTF8()
        self._inflater: Any = None
        self._blocks = 0
        # The data frame under way.
        self._in_frame = False
        self._final = False
        self._left = 0
        self._mask = b""

    def feed(self, data: bytes) -> None:
        """Take what the client sent."""
        if self._ended:
            return
        if self._position < len(self._data):
            data = self._data[self._position :] + data
        self._data, self._position = data, 0

    def next(self) -> Event | None:
        """Give the next event, or None until more is fed. After CLOSE and FAIL there is none."""
        if self._ended:
            return None
        try:
            event = self._next()
        except _Violation as violation:
            event = FAIL, (violation.code, violation.reason)
        except UnicodeDecodeError:
            event = FAIL, (1007, "invalid UTF-8")
        except zlib.error:
            event = FAIL, (1007, "invalid compressed data")
        if event is not None and event[0] in (CLOSE, FAIL):
            self._ended = True
            self._data = b""
            self._message = bytearray()
            self._inflater = None
        return event

    def _next(self) -> Event | None:
        while True:
            if not self._in_frame:
                event = self._begin_frame()
                if event is not None or not self._in_frame:
                    return event
            if self._left and not self._take_payload():
                return None
            event = self._end_frame()
            if event is not None:
                return event

    def _begin_frame(self) -> Event | None:
        """Take a header; with it a control frame, or a message that is there in one piece."""
        data, start = self._data, self._position
        end = len(data)
        if end - start < 2:
            return None
        first, second = data[start], data[start + 1]
        opcode, length = first & 0x0F, second & 0x7F
        self._check(first, second, opcode, length)
        start += 2
        if length > 125:
            size = 2 if length == 126 else 8
            if end - start < size:
                return None
            length = int.from_bytes(data[start : start + size], "big")
            if length < (126 if size == 2 else 1 << 16) or length >> 63:
                raise _Violation(1002, "a length that is not in its shortest form")
            start += size
        if opcode not in _CONTROL and self._size + length > self._most(first, opcode):
            raise _Violation(1009, f"more than {self._max_size} bytes")
        if end - start < 4:
            return None
        mask = data[start : start + 4]
        start += 4
        if end - start >= length:
            if opcode in _CONTROL:
                self._position = start + length
                return _control(opcode, _unmasked(data[start : start + length], mask))
            if opcode and first & (_FIN | _COMPRESSED) == _FIN:
                self._position = start + length
                payload = _unmasked(data[start : start + length], mask)
                return opcode, payload.decode() if opcode == TEXT else bytes(payload)
        elif opcode in _CONTROL:
            return None
        if opcode:
            self._opcode = opcode
            self._squeezed = bool(first & _COMPRESSED)
            self._blocks = 0
        self._position = start
        self._size += length
        self._in_frame = True
        self._final = bool(first & _FIN)
        self._left = length
        self._mask = mask
        return None

    def _check(self, first: int, second: int, opcode: int, length: int) -> None:
        """Refuse a frame for what its first two bytes tell."""
        if not second & _MASKED:
            raise _Violation(1002, "a frame without a mask")
        if opcode not in _CONTROL and opcode not in _DATA:
            raise _Violation(1002, f"unknown opcode {opcode}")
        allowed = _COMPRESSED if self._compressed and opcode in (TEXT, BINARY) else 0
        if first & 0x70 & ~allowed:
            raise _Violation(1002, "a reserved bit is set")
        if opcode in _CONTROL:
            if not first & _FIN:
                raise _Violation(1002, "a fragmented control frame")
            if length > 125:
                raise _Violation(1002, "a control frame of more than 125 bytes")
        elif (opcode == CONTINUATION) != bool(self._opcode):
            if self._opcode:
                raise _Violation(1002, "a message within a fragmented one")
            raise _Violation(1002, "a continuation of nothing")

    def _most(self, first: int, opcode: int) -> int:
        """How many bytes on the wire the message may have to which a frame belongs."""
        if first & _COMPRESSED or (opcode == CONTINUATION and self._squeezed):
            # What cannot be compressed becomes a little longer; its size is told when inflated.
            return self._max_size + (self._max_size >> 8) + 64
        return self._max_size

    def _take_payload(self) -> bool:
        """Take what there is of the data frame's payload; tell whether that was the rest of it."""
        start = self._position
        chunk = self._data[start : start + self._left]
        if not chunk:
            return False
        self._collect(_unmasked(chunk, self._mask))
        self._position = start + len(chunk)
        self._left -= len(chunk)
        turn = len(chunk) % 4
        if turn:
            self._mask = self._mask[turn:] + self._mask[:turn]
        return self._left == 0

    def _end_frame(self) -> Event | None:
        self._in_frame = False
        if not self._final:
            return None
        if self._squeezed:
            self._collect(_FLUSHED)
        opcode, message = self._opcode, self._message
        self._opcode = self._size = 0
        self._message = bytearray()
        if opcode == TEXT:
            self._utf8.decode(b"", True)
            return TEXT, message.decode()
        return BINARY, bytes(message)

    def _collect(self, data: bytes | bytearray) -> None:
        if self._squeezed:
            data = self._inflate(data)
        if self._opcode == TEXT:
            # What it decodes is thrown away: many small fragments are held best as bytes.
            self._utf8.decode(data)
        self._message += data

    def _inflate(self, data: bytes | bytearray) -> bytes:
        inflated = b""
        # One byte more than there may be: that it is there tells that there is too much.
        room = self._max_size - len(self._message) + 1
        while True:
            inflater = self._inflater
            if inflater is None:
                inflater = self._inflater = zlib.decompressobj(-zlib.MAX_WBITS)
            piece: bytes = inflater.decompress(data, room)
            inflated = inflated + piece if inflated else piece
            room -= len(piece)
            if not room:
                raise _Violation(1009, f"more than {self._max_size} bytes")
            if not inflater.eof:
                return inflated
            self._inflater = None
            self._blocks += 1
            if self._blocks > _MOST_BLOCKS:
                raise _Violation(1009, "too many compressed streams in one message")
            data = inflater.unused_data


class StrictReader:
    """Has aiohttp's ``reader`` refuse with 1002 what it would let pass of a client's frames.

    It looks at nothing but their headers and the codes of close frames. To be given to
    ``set_parser`` in place of ``reader``.
    """

    def __init__(self, reader: Any) -> None:
        self._reader = reader
        self._held = b""
        # How many bytes are to come until the next header.
        self._left = 0
        self._in_message = False
        self._failed = False

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        """Take what the client sent."""
        if self._failed:
            return True, b""
        if self._held:
            data, self._held = self._held + data, b""
        position, end = self._left, len(data)
        while position < end:
            size = self._frame_size(data, position)
            if size is None:
                self._held = data[position:]
                data, position = data[:position], end
                break
            if size < 0:
                self._failed = True
                return cast("tuple[bool, bytes]", self._reader.feed_data(data[:position] + _FAULT))
            position += size
        self._left = position - end
        return cast("tuple[bool, bytes]", self._reader.feed_data(data)) if data else (False, b"")

    def feed_eof(self) -> None:
        """Note that the connection is gone."""
        self._reader.feed_eof()

    def _frame_size(self, data: bytes, start: int) -> int | None:
        """Give how long a frame is; None while that is not known, -1 where it is forbidden."""
        there = len(data) - start
        if there < 2:
            return None
        first, second = data[start], data[start + 1]
        opcode, length = first & 0x0F, second & 0x7F
        if not second & _MASKED:
            return -1
        header = 6
        if opcode in _CONTROL:
            if first & _COMPRESSED:
                return -1
            if opcode == CLOSE and 2 <= length <= 125:
                if there < 8:
                    return None
                code = _unmasked(data[start + 6 : start + 8], data[start + 2 : start + 6])
                if not is_close_code(int.from_bytes(code, "big")):
                    return -1
        elif opcode != CONTINUATION and self._in_message:
            return -1
        if length > 125:
            header = 8 if length == 126 else 14
            if there < header - 4:
                return None
            length = int.from_bytes(data[start + 2 : start + header - 4], "big")
            if length < (126 if header == 8 else 1 << 16):
                return -1
        if opcode in _DATA:
            self._in_message = not first & _FIN
        return header + length


def _unmasked(data: bytes, mask: bytes) -> bytearray:
    payload = bytearray(data)
    if payload:
        websocket_mask(mask, payload)
    return payload


def _control(opcode: int, payload: bytearray) -> Event:
    if opcode != CLOSE:
        return opcode, bytes(payload)
    if not payload:
        return CLOSE, (1005, "")
    code = int.from_bytes(payload[:2], "big")
    if len(payload) == 1 or not is_close_code(code):
        raise _Violation(1002, "an invalid close code")
    return CLOSE, (code, payload[2:].decode())

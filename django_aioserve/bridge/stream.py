"""The way of a response from a pool thread to the client.

Rules:

1. Head and body leave together: what is complete leaves in one write.
2. A `Channel` carries the chunks of a synchronous iterable. Its sender is a pool thread,
   its receiver the loop. A chunk that comes after a pause is on the wire at once; of
   chunks that come fast, as many as fit are carried over together.
3. Memory is bounded: once `WINDOW` bytes wait in the channel the sender waits, too, until they
   are written and the client's socket takes more.
4. A client that takes nothing for ``write_timeout`` seconds is disconnected. From then on,
   and when it left by itself, the sender gets `ClientGone`: the thread is free.
5. The body has the length that was declared: what is beyond is not sent; when
   something is missing the connection is closed, so that nobody takes it for complete.
6. Header texts follow aiohttp's convention, UTF-8 with surrogate escapes; on the wire they are
   the bytes that the application meant.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
import sys
import threading
import time
from email.utils import formatdate
from typing import TYPE_CHECKING, Final

from aiohttp import hdrs, web

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from aiohttp.abc import AbstractStreamWriter

    from django_aioserve.bridge.threads import ThreadPool

__all__ = [
    "SERVER_LINE",
    "WINDOW",
    "BridgeResponse",
    "Channel",
    "ClientGone",
    "can_send_file",
    "date_line",
    "pump",
]

logger = logging.getLogger("django_aioserve")

#: How many bytes may wait in a channel; from there on its sender waits. Each time costs some
#: switches between threads, so that half of it costs a tenth more processor time.
WINDOW: Final = 2 << 20

#: For how many seconds chunks that follow each other fast are gathered.
_GATHER: Final = 0.001

#: A larger body is not copied behind its head.
_COPY_LIMIT: Final = 64 << 10

#: In some versions writelines() knows no backpressure (CVE-2024-12254).
_UNBOUNDED_WRITELINES: Final = any(
    first <= sys.version_info < fixed
    for first, fixed in (((3, 12), (3, 12, 9)), ((3, 13), (3, 13, 2)))
)

#: How much of a file is handed to the kernel before others get their turn.
_FILE_BLOCK: Final = 1 << 20

#: The Server header of responses that bring none.
SERVER_LINE: Final = "Server: django-aioserve"


class ClientGone(ConnectionResetError):
    """The client left or stopped reading: nothing more can be sent to it."""


class Channel:
    """Carries the chunks of one response body from a pool thread to the loop.

    Made on either side, with the ``first`` chunk in it, before the receiver knows of it: only
    `send` may have to wait for the receiver. ``loop`` and ``pool`` are those of the request.

    .. versionadded:: 0.1
    """

    __slots__ = (
        "_aborted",
        "_call_soon",
        "_chunks",
        "_finished",
        "_full",
        "_gathering",
        "_lock",
        "_loop",
        "_room",
        "_size",
        "_waiter",
        "_wake_at",
        "failed",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, pool: ThreadPool, first: bytes) -> None:
        self._loop = loop
        self._call_soon = pool.call_soon
        self._lock = threading.Lock()
        # The sender waits for this one, which it gets when the receiver wants more. A
        # condition would do, too, but takes a Python call more for each chunk.
        self._room = threading.Lock()
        self._room.acquire()
        self._full = False
        self._chunks = [first]
        self._size = len(first)
        #: The receiver wants to be woken when so many bytes wait; 0 when it is busy.
        self._wake_at = 0
        self._gathering = False
        self._waiter: asyncio.Future[None] | None = None
        self._finished = False
        self._aborted = False
        self.failed = False
        """Whether the body ended before it was complete."""

    # The sender's side.

    def send(self, chunk: bytes) -> None:
        """Hand over ``chunk``; wait while the channel is full. Raises ClientGone."""
        with self._lock:
            if self._aborted:
                raise ClientGone
            self._chunks.append(chunk)
            size = self._size = self._size + len(chunk)
            full = self._full = size >= WINDOW
            wake = self._wake_at and size >= self._wake_at
            if wake:
                self._wake_at = 0
        if wake:
            self._call_soon(self._wake)
        if full:
            self._room.acquire()

    def finish(self, *, failed: bool = False) -> Callable[[], None]:
        """Say that nothing more comes; ``failed`` when something is missing.

        Gives what has to be run on the loop afterwards.
        """
        with self._lock:
            self._finished = True
            self.failed = failed
        return self._wake

    # The receiver's side.

    async def receive(self) -> list[bytes]:
        """The chunks that wait, at least one; an empty list at the end."""
        while True:
            chunks = self._take()
            if chunks or self._finished:
                return chunks
            await self._wait()

    @property
    def finished(self) -> bool:
        """Whether everything was handed over, though perhaps not yet received."""
        return self._finished

    def abort(self) -> None:
        """Take nothing more: the sender gets `ClientGone` and goes on."""
        with self._lock:
            self._aborted = True
            self._empty()
            self._make_room()

    def _empty(self) -> list[bytes]:
        chunks, self._chunks = self._chunks, []
        self._size = 0
        return chunks

    def _make_room(self) -> None:
        if self._full:
            self._full = False
            self._room.release()

    def _take(self) -> list[bytes]:
        with self._lock:
            enough = self._size >= WINDOW or self._finished
            if not enough and (self._gathering or not self._chunks):
                self._wake_at = WINDOW if self._gathering else 1
                # Not before: the sender would only wake to wait for the interpreter, and what
                # it sent would wait besides what the transport holds.
                self._make_room()
                return []
            self._wake_at = 0
            self._gathering = not self._finished
            return self._empty()

    async def _wait(self) -> None:
        self._waiter = self._loop.create_future()
        timer = self._loop.call_later(_GATHER, self._wake) if self._gathering else None
        try:
            await self._waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()
                # Time is up: whatever is there now goes, else the next chunk goes at once.
                self._gathering = False

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class BridgeResponse(web.StreamResponse):
    """An aiohttp response that is framed for a body out of Django.

    ``headers`` are in aiohttp's convention (rule 6). With ``body`` the response is
    complete and may be returned from a handler as it is. Without, the handler calls
    ``prepare``, then `write_many` or `send_file`, then ``write_eof``. A body is never sent in
    answer to HEAD and with 204 and 304. Compression is left to Django and to the proxy.

    .. versionadded:: 0.1
    """

    def __init__(
        self,
        status: int,
        reason: str,
        headers: Iterable[tuple[str, str]],
        *,
        write_timeout: float,
        body: bytes | None = None,
    ) -> None:
        super().__init__(status=status, reason=reason, headers=headers)
        self._write_timeout = write_timeout
        self._whole = body
        self._request: web.BaseRequest | None = None
        self._head = b""
        self._bodiless = False
        self._persistent = False
        self._closing = False
        self._framed = False
        self._remaining: int | None = None
        self._sent = 0
        self._ended = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.status} {self.reason}>"

    @property
    def prepared(self) -> bool:
        """Whether the head is settled."""
        return self._request is not None

    @property
    def keep_alive(self) -> bool | None:
        """Whether the connection outlives this response."""
        return self._persistent

    def force_close(self) -> None:
        """Close the connection after this response."""
        self._closing = True
        self._persistent = False

    @property
    def body_length(self) -> int:
        """The number of bytes sent as body, without framing."""
        return self._sent

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter:
        """Settle the head, after the ``on_response_prepare`` signals. Nothing is sent yet.

        Raises ValueError when a header would break the message.
        """
        if self._request is None:
            if isinstance(request, web.Request):
                for app in request.match_info.apps:
                    if app.on_response_prepare:
                        await app.on_response_prepare.send(request, self)
            self._settle(request)
            self._request = request
        return request.writer

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send a piece of the body; see `write_many`."""
        await self.write_many((bytes(data),))

    async def write_many(self, chunks: Sequence[bytes]) -> None:
        """Send ``chunks``, and the head if that was not sent; wait while the client is slow.

        Raises ConnectionResetError when the client left or takes nothing any more.
        """
        request = self._bound()
        self._send(request, self._frame(chunks, last=False))
        await self._drain(request)

    async def write_eof(self, data: bytes = b"") -> None:
        """Send what is left. Raises as `write_many` does."""
        await self.write_last((data if self._whole is None else self._whole,))

    async def write_last(self, chunks: Sequence[bytes]) -> None:
        """Send ``chunks`` and the end of the body at once. Raises as `write_many` does."""
        if self._ended:
            return
        self._ended = True
        request = self._bound()
        self._send(request, self._frame(chunks, last=True))
        if self._remaining and not self._bodiless:
            logger.warning("A response ended %d bytes before its Content-Length", self._remaining)
            self.force_close()
        await self._drain(request)

    def cut_off(self) -> None:
        """End the response as it is, incomplete; the connection will be closed."""
        self._ended = True
        self.force_close()

    async def send_file(self, descriptor: int, offset: int, count: int) -> None:
        """Send ``count`` bytes of a regular file, from ``offset``, by sendfile(2).

        For a request for which `can_send_file` holds, with Content-Length set. Raises
        as `write_many` does.

        Reading blocks and sending them costs twice as much processor time; larger blocks, and
        a writer that stays registered during the whole file, save nothing.
        """
        request = self._bound()
        transport = request.transport
        if transport is None:
            raise ClientGone
        # uvloop has no sendfile(), and asyncio's forbids add_writer() for a socket that a
        # transport owns; a duplicate of the descriptor serves on both.
        out = os.dup(transport.get_extra_info("socket").fileno())
        try:
            # What the transport still holds has to be on the wire first.
            transport.set_write_buffer_limits(high=0)
            await self.write_many(())
            while transport.get_write_buffer_size():
                await asyncio.sleep(0)
                await self._drain(request)
            transport.set_write_buffer_limits()
            if not self._bodiless:
                await self._copy_file(transport, out, descriptor, offset, count)
        finally:
            os.close(out)

    async def _copy_file(
        self, transport: asyncio.Transport, out: int, descriptor: int, offset: int, count: int
    ) -> None:
        if self._remaining is not None:
            count = min(count, self._remaining)
        end = offset + count
        while offset < end:
            if transport.is_closing():
                raise ClientGone
            try:
                sent = os.sendfile(out, descriptor, offset, min(end - offset, _FILE_BLOCK))
            except BlockingIOError:
                await self._writable(transport, out)
                continue
            if sent == 0:
                break
            offset += sent
            self._count(sent)
            await asyncio.sleep(0)

    async def _writable(self, transport: asyncio.Transport, out: int) -> None:
        loop = asyncio.get_running_loop()
        ready = loop.create_future()
        loop.add_writer(out, _resolve, ready)
        try:
            async with asyncio.timeout(self._write_timeout):
                await ready
        except TimeoutError:
            _disconnect(transport)
            raise ClientGone from None
        finally:
            loop.remove_writer(out)

    def _settle(self, request: web.BaseRequest) -> None:
        """Make the head; decide how the body is framed (RFC 9112, 6)."""
        headers = self.headers
        status = self.status
        version = request.version
        bodiless = self._bodiless = request.method == "HEAD" or status in {204, 304}
        persistent = not self._closing and request.keep_alive
        length = headers.get(hdrs.CONTENT_LENGTH)
        if status == 204:
            headers.pop(hdrs.CONTENT_LENGTH, None)
        elif length is not None:
            self._remaining = int(length)
        elif self._whole is not None:
            # In answer to HEAD, and with 304, nothing is no statement about the length.
            if self._whole or not bodiless:
                headers[hdrs.CONTENT_LENGTH] = str(len(self._whole))
        elif not bodiless:
            if version >= (1, 1):
                self._framed = True
                headers[hdrs.TRANSFER_ENCODING] = "chunked"
            else:
                persistent = False
        self._persistent = persistent
        lines = [f"HTTP/{version[0]}.{version[1]} {status} {self.reason}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if hdrs.DATE not in headers:
            lines.append(date_line())
        if hdrs.SERVER not in headers:
            lines.append(SERVER_LINE)
        if not persistent:
            lines.append("Connection: close")
        elif version < (1, 1):
            lines.append("Connection: keep-alive")
        lines += [f"Set-Cookie:{morsel.output(header='')}" for morsel in self.cookies.values()]
        if not "".join(lines).isprintable():
            _check(lines)
        lines.append("\r\n")
        self._head = "\r\n".join(lines).encode("utf-8", "surrogateescape")

    def _frame(self, chunks: Sequence[bytes], *, last: bool) -> list[bytes]:
        """What to send for ``chunks``: the head, if that is still due, body and framing."""
        parts = [self._head]
        self._head = b""
        if self._bodiless:
            return parts
        size = sum(map(len, chunks))
        remaining = self._remaining
        if remaining is not None and size > remaining:
            chunks, size = (b"".join(chunks)[:remaining],), remaining
        if self._framed and size:
            parts.append(b"%x\r\n" % size)
            parts += chunks
            parts.append(b"\r\n")
        else:
            parts += chunks
        if self._framed and last:
            parts.append(b"0\r\n\r\n")
        self._count(size)
        return parts

    def _count(self, size: int) -> None:
        self._sent += size
        if self._remaining is not None:
            self._remaining -= size

    def _bound(self) -> web.BaseRequest:
        if self._request is None:
            raise RuntimeError("The response is not prepared")
        return self._request

    def _send(self, request: web.BaseRequest, parts: list[bytes]) -> None:
        transport = request.transport
        if transport is None or transport.is_closing():
            raise ClientGone
        size = sum(map(len, parts))
        if size > _COPY_LIMIT and not _UNBOUNDED_WRITELINES:
            transport.writelines(parts)
        elif size:
            transport.write(b"".join(parts))
        # From now on aiohttp cannot answer with an error in its place.
        request.writer.output_size += size

    async def _drain(self, request: web.BaseRequest) -> None:
        if not request.protocol.writing_paused:
            return
        transport = request.transport
        if transport is None:
            raise ClientGone
        watch = _Watch(transport, self._write_timeout)
        try:
            await request.writer.drain()
        finally:
            watch.cancel()
        if transport.is_closing():
            raise ClientGone


async def pump(channel: Channel, response: BridgeResponse, chunks: list[bytes]) -> None:
    """Send what comes out of ``channel``, to its end, as the body of a prepared response.

    ``chunks`` is what was received from it before. Raises as `BridgeResponse.write_many` does.
    """
    while not channel.finished:
        await response.write_many(chunks)
        chunks = await channel.receive()
    # Between the last two steps of the sender more may have come.
    chunks += await channel.receive()
    if channel.failed:
        await response.write_many(chunks)
        response.cut_off()
    else:
        await response.write_last(chunks)


class _Watch:
    """Aborts a connection whose client takes nothing for ``timeout`` seconds."""

    def __init__(self, transport: asyncio.Transport, timeout: float) -> None:
        self._transport = transport
        self._timeout = timeout
        self._loop = asyncio.get_running_loop()
        self._look()

    def cancel(self) -> None:
        self._handle.cancel()

    def _look(self) -> None:
        self._left = self._transport.get_write_buffer_size()
        self._handle = self._loop.call_later(self._timeout, self._judge)

    def _judge(self) -> None:
        if self._transport.get_write_buffer_size() < self._left:
            self._look()
        else:
            _disconnect(self._transport)


def can_send_file(request: web.BaseRequest) -> bool:
    """Whether `BridgeResponse.send_file` works for ``request``: not through TLS."""
    return hasattr(os, "sendfile") and request.protocol.ssl_context is None


def _disconnect(transport: asyncio.Transport) -> None:
    """Reset a connection, so that the kernel, too, drops what the client does not read."""
    with socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno())) as duplicate:
        duplicate.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _check(lines: Iterable[str]) -> None:
    for line in lines:
        if any((char < " " and char != "\t") or char == "\x7f" for char in line):
            raise ValueError(f"control character in the head of a response: {line!r}")


class _DateLine:
    """Makes the Date header of a response, once a second."""

    def __init__(self) -> None:
        self._second = 0
        self._text = ""

    def __call__(self) -> str:
        now = int(time.time())
        if now != self._second:
            self._text = "Date: " + formatdate(now, usegmt=True)
            self._second = now
        return self._text


#: Gives the Date header of now.
date_line: Final = _DateLine()

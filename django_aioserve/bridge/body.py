"""The body of a request, complete, before any thread is occupied with it.

Rules:

1. A refusal that the headers alone decide comes before ``100 Continue``.
2. What has arrived already is taken without waiting; what is small stays in memory and
   is copied once; what is large goes to an unnamed temporary file, and no bytes are written to it
   on the loop's thread nor on one of those that run Django.
3. Whatever goes wrong, the file is gone: it never has a name.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import tempfile
from typing import IO, TYPE_CHECKING, Any

from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["MEMORY_LIMIT", "Body", "expect_handler", "grant_continue", "read_body"]

logger = logging.getLogger("django_aioserve")

#: A longer body goes to a temporary file. So far does Django, too, hold uploads in memory
#: (FILE_UPLOAD_MAX_MEMORY_SIZE is 2.5 MB); the bytes of a usual upload are never written.
MEMORY_LIMIT = 2 << 20

#: How many bytes are handed to the thread that writes the temporary file, at least.
_BLOCK = 512 << 10

_CONTINUE = web.RequestKey("continue", bool)


class Body:
    """A complete request body.

    ``file`` is a binary file at its beginning, ``length`` the number of bytes in it.
    ``inflated`` tells that aiohttp has undone the Content-Encoding, which its own worker
    and ``run_app`` do and which cannot be turned off for one request.
    """

    __slots__ = ("file", "inflated", "length")

    def __init__(self, file: IO[bytes], length: int, *, inflated: bool) -> None:
        self.file = file
        self.length = length
        self.inflated = inflated

    def enter(self, environ: dict[str, Any]) -> None:
        """Be the input of a WSGI environ, whose CONTENT_LENGTH is the length that is there."""
        if self.inflated:
            environ.pop("HTTP_CONTENT_ENCODING", None)
            environ["CONTENT_LENGTH"] = str(self.length)
        elif "HTTP_TRANSFER_ENCODING" in environ:
            environ["CONTENT_LENGTH"] = str(self.length)
        environ["wsgi.input"] = self.file


async def expect_handler(request: web.Request) -> None:
    """Put off ``100 Continue`` until `read_body` wants the body (RFC 9110, 10.1.1).

    For ``expect_handler=`` of a route whose handler calls `read_body`. Raises
    HTTPExpectationFailed for any other expectation.
    """
    if request.headers["Expect"].strip().lower() != "100-continue":
        refusal = web.HTTPExpectationFailed()
        refusal.force_close()
        raise refusal
    # RFC 9110, 10.1.1: a client of HTTP/1.0 does not know of it.
    if request.version >= (1, 1):
        request[_CONTINUE] = True


async def grant_continue(request: web.BaseRequest) -> None:
    """Send the ``100 Continue`` that `expect_handler` has put off, if it did; once."""
    if request.get(_CONTINUE):
        request[_CONTINUE] = False
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        # It is not the answer: aiohttp may still send an error in its place.
        request.writer.output_size = 0


async def read_body(request: web.BaseRequest, *, limit: int, timeout: float) -> Body:
    """The whole body of ``request``.

    Raises HTTPRequestEntityTooLarge for a body of more than ``limit`` bytes (as it came, or as
    aiohttp inflated it), HTTPRequestTimeout when ``timeout`` seconds pass without a byte,
    HTTPBadRequest when the body is malformed or the client left before its end, and
    HTTPInternalServerError when it cannot be stored. All of them close the connection.
    """
    content = request.content
    if content.at_eof():
        return Body(io.BytesIO(), 0, inflated=False)
    length = request.content_length
    if length is not None and length > limit:
        raise _too_large(limit, length)
    try:
        if content.is_eof():
            data = content.read_nowait()
            size = len(data)
            file: IO[bytes] = io.BytesIO(data)
            if size > limit:
                raise _too_large(limit, size)
        else:
            await grant_continue(request)
            file, size = await _Reader(request, limit, timeout, length).read()
    except TimeoutError:
        # Else aiohttp would go on to wait for the rest, to throw it away.
        content.feed_eof()
        raise _closing(web.HTTPRequestTimeout()) from None
    except web.RequestPayloadError:
        raise _closing(web.HTTPBadRequest(text="400: malformed request body")) from None
    except (OSError, RuntimeError):
        # aiohttp raises RuntimeError when the connection is closed before a read.
        if request.transport is not None:
            raise
        raise _closing(web.HTTPBadRequest(text="400: the client left")) from None
    return Body(file, size, inflated=content.total_compressed_bytes is not None)


class _Reader:
    """Reads one body that is still on its way."""

    def __init__(
        self, request: web.BaseRequest, limit: int, timeout: float, length: int | None
    ) -> None:
        self._content = request.content
        self._limit = limit
        self._timeout = timeout
        self._length = length
        self._room = MEMORY_LIMIT if length is None or length <= MEMORY_LIMIT else _BLOCK
        self._loop = asyncio.get_running_loop()
        self._file: IO[bytes] | None = None

    async def read(self) -> tuple[IO[bytes], int]:
        try:
            return await self._read()
        except BaseException:
            if self._file is not None:
                self._loop.run_in_executor(None, _discard, self._file)
            raise

    async def _read(self) -> tuple[IO[bytes], int]:
        chunks: list[bytes] = []
        size = held = 0
        async with asyncio.timeout(self._timeout) as clock:
            while chunk := await self._next():
                chunks.append(chunk)
                held += len(chunk)
                size += len(chunk)
                if size > self._limit:
                    raise _too_large(self._limit, size)
                if held > self._room:
                    # The clock is the client's: the disk may take its time.
                    clock.reschedule(None)
                    await self._store(chunks)
                    chunks, held = [], 0
                clock.reschedule(self._loop.time() + self._timeout)
        if self._file is None:
            return io.BytesIO(b"".join(chunks)), size
        await self._store(chunks, last=True)
        return self._file, size

    async def _next(self) -> bytes:
        if self._length is None:
            return await self._content.readany()
        # readany() would copy what it joins. Of a chunked body this gives each chunk by itself.
        return (await self._content.readchunk())[0]

    async def _store(self, chunks: list[bytes], *, last: bool = False) -> None:
        try:
            if self._file is None:
                self._file = await self._loop.run_in_executor(None, _open)
                self._room = _BLOCK
            await self._loop.run_in_executor(None, _write, self._file, chunks, last)
        except OSError as error:
            logger.error("A request body could not be stored: %s", error)
            raise _closing(web.HTTPInternalServerError()) from None


def _open() -> IO[bytes]:
    return tempfile.TemporaryFile(prefix="aioserve-")


def _write(file: IO[bytes], chunks: Iterable[bytes], last: bool) -> None:
    file.write(b"".join(chunks))
    if last:
        file.seek(0)


def _discard(file: IO[bytes]) -> None:
    # A full disk makes even close() fail, for it tries to write what is left.
    with contextlib.suppress(OSError):
        file.close()


def _too_large(limit: int, size: int) -> web.HTTPException:
    return _closing(web.HTTPRequestEntityTooLarge(limit, size))


def _closing(answer: web.HTTPException) -> web.HTTPException:
    answer.force_close()
    return answer

"""Any WSGI callable (PEP 3333) behind aiohttp.

Rules:

1. The loop reads the whole request, then one pool thread calls the application, iterates and
   closes what it gave. A result that is complete crosses back once.
2. The head is settled by the first bytes of the body, or by its end; up to then
   ``start_response`` with ``exc_info`` replaces it. An error up to then is a 500; an error after
   it closes the connection, so that nobody takes a part for the whole.
3. Whatever the application raises, be it SystemExit, ends its request and nothing else.
4. ``close()`` of the iterable is called exactly once, on a pool thread, whatever happened.
5. A regular file in ``wsgi.file_wrapper`` is sent by the kernel and occupies no thread.
6. Each call has a context of its own: a copy of the thread's, in which Django's caches, if there
   are any, were made once, with what aiohttp's middleware has set.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import io
import logging
import os
import re
import stat
import sys
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from aiohttp import web
from aiohttp_wsgi import WSGIHandler

from django_aioserve.bridge.body import Body, read_body
from django_aioserve.bridge.environ import ProxyTrust, RequestMeta
from django_aioserve.bridge.stream import (
    BridgeResponse,
    Channel,
    ClientGone,
    can_send_file,
    pump,
)
from django_aioserve.bridge.threads import QueueFull, carry_over

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType
    from typing import Protocol
    from wsgiref.types import WSGIApplication

    from django_aioserve.bridge.threads import Callback, ThreadPool
    from django_aioserve.conf import Config

    ExcInfo = tuple[type[BaseException], BaseException, TracebackType] | tuple[None, None, None]

    class Readable(Protocol):
        """What `FileWrapper` needs of a file."""

        def read(self, size: int, /) -> bytes: ...


__all__ = ["FileWrapper", "WSGIBridge", "parse_status", "wire_headers"]

logger = logging.getLogger("django_aioserve")

_STATUS = re.compile(r"[2-9][0-9]{2}(?: [ \t\x21-\x7e\x80-\xff]*)?")
_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_LENGTH = re.compile(r"[0-9]{1,18}")

#: RFC 9110, 7.6.1; PEP 3333 forbids them to applications.
_HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "trailer",
        "trailers",
        "transfer-encoding",
        "upgrade",
    }
)

#: What may surround the value of a header (OWS, RFC 9110, 5.6.3).
_SPACE = " \t"

#: A smaller file is read at once; more would be gained by sendfile than it costs.
_SMALL_FILE = 64 << 10

#: Seconds after which a client may try again when all threads are busy.
_RETRY_AFTER = "1"


class WSGIBridge(WSGIHandler):
    """An aiohttp handler that serves a WSGI callable on the threads of a pool.

    To be mounted on a route with ``{path_info}``, such as ``/{path_info:(?s:.*)}``, also within
    a sub-application. ``environ["aiohttp.request"]`` is the aiohttp request.

    .. versionadded:: 0.1
    """

    def __init__(self, application: WSGIApplication, config: Config, pool: ThreadPool) -> None:
        if not callable(application):
            raise TypeError(f"a WSGI application must be callable: {application!r}")
        # mypy: aiohttp-wsgi's type of start_response() has no exc_info.
        super().__init__(application, max_request_body_size=config.max_body_size)  # type: ignore[arg-type]
        self._wsgi = application
        self._config = config
        self._pool = pool
        self._meta = RequestMeta(
            ProxyTrust(config.forwarded_allow_ips),
            {
                "SERVER_SOFTWARE": "django-aioserve",
                "wsgi.version": (1, 0),
                "wsgi.multithread": True,
                "wsgi.multiprocess": True,
                "wsgi.run_once": False,
                "wsgi.input_terminated": True,
                "wsgi.file_wrapper": FileWrapper,
                # aiohttp-wsgi promises this key; None is the loop's default executor.
                "asyncio.executor": None,
            },
        )

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer ``request``.

        Raises HTTPException for a request that does not get as far as the application, among
        them 503 with Retry-After when too many wait for a thread.
        """
        config = self._config
        body = await read_body(request, limit=config.max_body_size, timeout=config.body_timeout)
        try:
            environ = self._environ(request, body)
            exchange = _Exchange(self._wsgi, environ, body, self._pool, can_send_file(request))
            self._pool.submit(exchange.start)
        except BaseException as error:
            body.file.close()
            if isinstance(error, QueueFull):
                raise web.HTTPServiceUnavailable(headers={"Retry-After": _RETRY_AFTER}) from None
            raise
        try:
            await exchange.answered
            return await self._respond(request, exchange)
        except ConnectionError:
            # The client has left: this goes to the access log, and to nobody else.
            if request.transport is not None:
                request.transport.abort()
            return web.Response(status=499, reason="Client Closed Request")
        finally:
            exchange.let_go()

    # aiohttp-wsgi's names for it; there, every response is a web.Response.
    handle_request = handle  # type: ignore[assignment]
    __call__ = handle  # type: ignore[assignment]

    def _environ(self, request: web.BaseRequest, body: Body) -> dict[str, Any]:
        meta = self._meta
        environ = meta.environ(request, meta.script_name(request))
        body.enter(environ)
        environ["wsgi.errors"] = sys.stderr
        environ["aiohttp.request"] = request
        return environ

    async def _respond(self, request: web.BaseRequest, exchange: _Exchange) -> web.StreamResponse:
        channel = exchange.channel
        chunks = await channel.receive() if channel is not None else []
        if exchange.failed:
            return self._response(500, "Internal Server Error", _ERROR_HEADERS, _ERROR_BODY)
        if exchange.file is not None:
            return await self._send_file(request, exchange, exchange.file)
        if channel is None:
            return self._response(*exchange.status, exchange.headers, exchange.body)
        response = self._response(*exchange.status, exchange.headers, None)
        await response.prepare(request)
        await pump(channel, response, chunks)
        return response

    async def _send_file(
        self, request: web.BaseRequest, exchange: _Exchange, file: _File
    ) -> web.StreamResponse:
        headers = exchange.headers
        if exchange.length is None:
            headers = [*headers, ("Content-Length", str(file.count))]
        response = self._response(*exchange.status, headers, None)
        await response.prepare(request)
        await response.send_file(file.descriptor, file.offset, file.count)
        await response.write_eof()
        return response

    def _response(
        self, status: int, reason: str, headers: list[tuple[str, str]], body: bytes | None
    ) -> BridgeResponse:
        return BridgeResponse(
            status, reason, headers, body=body, write_timeout=self._config.write_timeout
        )


_ERROR_HEADERS = [("Content-Type", "text/plain; charset=utf-8")]
_ERROR_BODY = b"500: Internal Server Error"


class FileWrapper:
    """The ``wsgi.file_wrapper`` of PEP 3333.

    ``blksize`` is a suggestion that only a larger size than ours outbids.
    """

    def __init__(self, filelike: Readable, blksize: int = 8192) -> None:
        self.filelike = filelike
        self._size = max(blksize, _SMALL_FILE)
        close = getattr(filelike, "close", None)
        if close is not None:
            self.close = close

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        data = self.filelike.read(self._size)
        if not data:
            raise StopIteration
        return data


class _File:
    """What is left to send of an open regular file."""

    __slots__ = ("count", "descriptor", "offset")

    def __init__(self, descriptor: int, offset: int, count: int) -> None:
        self.descriptor = descriptor
        self.offset = offset
        self.count = count


class _Exchange:
    """One call of the application.

    The pool thread fills it in; the loop reads it once ``answered`` is done. What is
    then in it is a failure, a complete body, a file, or a channel.
    """

    def __init__(
        self,
        application: WSGIApplication,
        environ: dict[str, Any],
        body: Body,
        pool: ThreadPool,
        sendfile: bool,
    ) -> None:
        self._application = application
        self._environ = environ
        self._input = body.file
        self._pool = pool
        self._sendfile = sendfile
        self._loop = asyncio.get_running_loop()
        # Of the loop until the thread has made its own of it.
        self._context = contextvars.copy_context()
        self.answered: asyncio.Future[None] = self._loop.create_future()
        self._started = False
        self._committed = False
        self._gone = False
        self._iterable: Any = None
        self._sent = 0
        self.status = (0, "")
        self.headers: list[tuple[str, str]] = []
        self.length: int | None = None
        self.failed = False
        self.body = b""
        self.file: _File | None = None
        self.channel: Channel | None = None

    # On the pool's thread.

    def start(self) -> Callback | None:
        """Call the application; give what has to be run on the loop afterwards."""
        try:
            if _OPENED.get(None) is None:
                _open_caches()
            outer, self._context = self._context, contextvars.copy_context()
            return self._context.run(self._run, outer)
        except BaseException:
            # Whatever else fails, nobody shall wait for an answer that never comes.
            self._fail()
            self._pool.call_soon(self._deliver)
            raise

    def _run(self, outer: contextvars.Context) -> Callback | None:
        try:
            carry_over(outer)
            self._iterable = self._application(self._environ, self._start_response)
            self._consume(self._iterable)
        except ClientGone:
            self._fail()
        except BaseException as error:  # noqa: BLE001 - rule 3
            _log("Error in the WSGI application", self._environ, error)
            self._fail()
        channel = self.channel
        answer = self._deliver if channel is None else channel.finish(failed=self.failed)
        if self.file is not None:
            return answer
        if type(self._iterable) is list:
            self._iterable = None
            self._input.close()
            return answer
        # The client does not wait for close(), which may do work of its own.
        self._pool.call_soon(answer)
        self._close()
        return None

    def _fail(self) -> None:
        self.failed = True
        self.file = None

    def _consume(self, iterable: Iterable[bytes]) -> None:
        if self.channel is None:
            if isinstance(iterable, (list, tuple)):
                self.body = b"".join(iterable)
                self._require_start()
                return
            if type(iterable) is FileWrapper and self._take_file(iterable):
                return
        for chunk in iterable:
            if not isinstance(chunk, bytes):
                raise TypeError(f"a WSGI application must give bytes, not {type(chunk).__name__}")
            if not chunk:
                continue
            self._require_start()
            if self._environ["REQUEST_METHOD"] == "HEAD" or self.status[0] in {204, 304}:
                # Nothing of the body is sent, and it may have no end.
                return
            self._sent += len(chunk)
            if self.length is not None and self._sent >= self.length:
                if self.channel is None:
                    self.body = chunk
                else:
                    self._send(chunk)
                return
            self._send(chunk)
        self._require_start()

    def _require_start(self) -> None:
        if not self._started:
            raise RuntimeError("the WSGI application did not call start_response()")

    def _send(self, chunk: bytes) -> None:
        channel = self.channel
        if channel is not None:
            channel.send(chunk)
            return
        self._committed = True
        channel = self.channel = Channel(self._loop, self._pool, chunk)
        # let_go() sets the flag before it looks for the channel: one of us sees the other.
        if self._gone:
            channel.abort()
            raise ClientGone
        self._pool.call_soon(self._deliver)

    def _take_file(self, wrapper: FileWrapper) -> bool:
        """Whether the file can be answered with as a whole."""
        self._require_start()
        # sendfile() must give the bytes that read() would: the object whose method
        # that is has to be a plain file, and not a wrapper that decompresses, for example.
        file: Any = getattr(wrapper.filelike.read, "__self__", None)
        if type(file) not in {io.BufferedReader, io.BufferedRandom, io.FileIO}:
            return False
        try:
            file.flush()
            descriptor = file.fileno()
            status = os.fstat(descriptor)
            offset = file.tell()
        except (OSError, ValueError):
            return False
        count = status.st_size - offset
        # Some files, such as those of /proc, are longer than they tell.
        if not stat.S_ISREG(status.st_mode) or count <= 0:
            return False
        if self.length is not None:
            count = min(count, self.length)
        if count <= _SMALL_FILE:
            self.body = wrapper.filelike.read(count)
        elif self._sendfile:
            self.file = _File(descriptor, offset, count)
        else:
            return False
        return True

    def _start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: ExcInfo | None = None
    ) -> Callable[[bytes], object]:
        if exc_info:
            try:
                if self._committed:
                    raise exc_info[1] or RuntimeError("the response has begun")
            finally:
                exc_info = None
        elif self._started:
            raise RuntimeError("start_response() was called twice without exc_info")
        line, fields = parse_status(status), wire_headers(headers)
        self.status = line
        self.headers, self.length = fields
        self._started = True
        return self._write

    def _write(self, data: bytes) -> None:
        """The ``write()`` of PEP 3333."""
        if not isinstance(data, bytes):
            raise TypeError(f"write() takes bytes, not {type(data).__name__}")
        if data:
            self._sent += len(data)
            self._send(data)

    def _close(self) -> None:
        iterable, self._iterable = self._iterable, None
        try:
            close = getattr(iterable, "close", None)
            if close is not None:
                close()
        except BaseException as error:  # noqa: BLE001 - rule 3
            _log("Error in close() of the WSGI application", self._environ, error)
        self._input.close()

    # On the loop.

    def _deliver(self) -> None:
        if not self.answered.done():
            self.answered.set_result(None)
        elif self._gone:
            self._close_file()

    def let_go(self) -> None:
        """Say that the request is over, however it ended."""
        self._gone = True
        if self.channel is not None:
            self.channel.abort()
        self._close_file()

    def _close_file(self) -> None:
        if self.file is None:
            return
        self.file = None
        close = partial(self._context.run, self._close)
        try:
            self._pool.submit(close)
        except QueueFull:
            self._loop.run_in_executor(None, close)


#: Whether `_open_caches` was done for the current thread.
_OPENED: contextvars.ContextVar[bool] = contextvars.ContextVar("django_aioserve.wsgi.opened")


def _open_caches() -> None:
    """Make Django's caches in the current context, if this process uses Django.

    Django keeps them in a context variable; what is made in the context of one call
    would be made again, with new connections, for the next one.
    """
    module = sys.modules.get("django.core.cache")
    if module is None:
        return
    _OPENED.set(True)
    caches = module.caches
    with contextlib.suppress(Exception):
        # Without settings there are none.
        for alias in caches:
            with contextlib.suppress(Exception):
                # A cache that cannot be made fails where it is used.
                caches[alias]


@lru_cache(maxsize=256)
def parse_status(status: Any) -> tuple[int, str]:
    """Code and reason phrase of a status such as ``"200 OK"``; the phrase may be empty.

    Raises TypeError when it is not a str, ValueError when it is not a final status
    line (RFC 9112, 4): an application cannot answer 1xx.
    """
    if not isinstance(status, str):
        raise TypeError(f"the status must be a str, not {type(status).__name__}")
    if not _STATUS.fullmatch(status):
        raise ValueError(f"invalid status {status!r}")
    return int(status[:3]), _aiohttp_text(status[4:])


def wire_headers(headers: Iterable[tuple[Any, Any]]) -> tuple[list[tuple[str, str]], int | None]:
    """An application's headers as aiohttp holds them, and the Content-Length among them.

    Raises TypeError for what is not str, ValueError for a name or value that is not allowed on
    the wire (RFC 9110, 5), for a hop-by-hop header and for a Content-Length that is no
    number or is repeated.
    """
    result = []
    length = None
    for name, value in headers:
        if not isinstance(name, str) or not isinstance(value, str):
            raise TypeError(f"name and value of a header must be str: {name!r}")
        is_length = _is_length(name)
        text = value.strip(_SPACE)
        if not (text.isascii() and text.isprintable()):
            # The value stays out of the message: it may be a secret.
            if not _VALUE.fullmatch(text):
                raise ValueError(f"invalid value of header {name!r}")
            text = _aiohttp_text(text)
        if is_length:
            if length is not None or not _LENGTH.fullmatch(text):
                raise ValueError("invalid or repeated Content-Length")
            length = int(text)
        result.append((name, text))
    return result, length


@lru_cache(maxsize=1024)
def _is_length(name: str) -> bool:
    """Whether a header is Content-Length. Raises ValueError when it must not be sent at all."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"invalid header name {name!r}")
    lower = name.lower()
    if lower in _HOP_BY_HOP:
        raise ValueError(f"hop-by-hop header {name!r} is not the application's to send")
    return lower == "content-length"


def _aiohttp_text(text: str) -> str:
    """Latin-1, as WSGI has it, as UTF-8 with surrogate escapes, as aiohttp has it."""
    return text if text.isascii() else text.encode("latin-1").decode("utf-8", "surrogateescape")


def _log(message: str, environ: dict[str, Any], error: BaseException) -> None:
    method, target = environ["REQUEST_METHOD"], environ["RAW_URI"]
    logger.error("%s: %s %s", message, method, target, exc_info=error)

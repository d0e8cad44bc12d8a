"""One call of an ASGI application, and the HTTP request that it answers.

Rules:

1. The application runs in a task, and so in a context, of its own. ``receive`` and ``send`` make
   no tasks and no queues.
2. A body is read as it is asked for; ``100 Continue`` is granted by the first ``receive`` that
   has to wait. A body that is too large, stalls or is malformed is answered with 413, 408 or 400
   at once if nothing was answered yet, else the connection is cut; the application is
   told ``http.disconnect``.
3. Nothing is on the wire before the first ``http.response.body``. An error up to then, also a
   head that is not allowed on the wire, is a 500; one after it cuts the connection.
4. A client that left is told by ``receive``, and by ClientGone (an OSError) of ``send``. The
   application may take its time; it is cancelled with the server's end only.
5. What the application does after its response holds up neither the connection nor the client:
   the exchange is over. The server's end waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import stat
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aiohttp import web

from django_aioserve.bridge.body import grant_continue
from django_aioserve.bridge.stream import BridgeResponse, ClientGone
from django_aioserve.bridge.wsgi import wire_headers
from django_aioserve.keys import CANCELLABLE

if TYPE_CHECKING:
    from django_aioserve.conf import Config

__all__ = [
    "PATHSEND",
    "Answer",
    "Application",
    "Exchange",
    "HTTPExchange",
    "Message",
    "Scope",
    "Service",
    "client_left",
    "list_items",
    "plain_response",
    "response_headers",
]

logger = logging.getLogger("django_aioserve")

Scope = dict[str, Any]
Message = Mapping[str, Any]
Application = Callable[
    [Scope, Callable[[], Awaitable[dict[str, Any]]], Callable[[Message], Awaitable[None]]],
    Awaitable[Any],
]

_REASONS: Final = {status.value: status.phrase for status in HTTPStatus}

#: Headers that are the server's affair.
_FRAMING: Final = frozenset({"connection", "keep-alive", "transfer-encoding"})

_DISCONNECT: Final[dict[str, Any]] = {"type": "http.disconnect"}

PATHSEND: Final = "http.response.pathsend"

#: How often an application is told of its client's end at once; it is told again after so many
#: seconds each, for one that asks on and on would hold up the loop.
_TELL_AT_ONCE: Final = 100
_TELL_AGAIN: Final = 1.0


@dataclass(frozen=True, slots=True)
class Service:
    """What all calls of one application share."""

    application: Application
    config: Config
    lasting: set[Exchange] = field(default_factory=set)
    """What does not end by itself: event streams and open WebSockets."""
    working: set[asyncio.Task[Any]] = field(default_factory=set)
    """Calls that go on after their response."""


class Exchange:
    """One call of the application, for one request."""

    def __init__(self, service: Service, request: web.BaseRequest, scope: Scope) -> None:
        self._application = service.application
        self._config = service.config
        self._lasting = service.lasting
        self._working = service.working
        self._request = request
        self._scope = scope
        self._changed = asyncio.Event()
        #: Done with the call, or with what it is for.
        self._over = asyncio.get_running_loop().create_future()
        self._told = 0

    async def run(self) -> web.StreamResponse:
        """Call the application; give the response, which may have been sent already."""
        request = self._request
        cancel = request._cancel  # noqa: SLF001

        def cancelled(error: BaseException) -> None:
            cancel(ConnectionResetError("Connection lost"))
            if isinstance(error, asyncio.CancelledError):
                self.end()  # the server's time is up, not the client's
            else:
                self.lost()

        # aiohttp has no public way to tell a handler that its client left, but to cancel it.
        attributes = vars(request)
        attributes["_cancel"] = cancelled
        if request.transport is None:
            self.lost()
        try:
            error = await self._call()
            if error is not None:
                return await self._crashed(error)
            return await self._returned()
        finally:
            attributes.pop("_cancel", None)
            self._lasting.discard(self)

    async def _call(self) -> BaseException | None:
        """Call the application in a task of its own; give what it raised until it was over."""
        call = asyncio.create_task(self._call_here())
        call.add_done_callback(self._be_over)
        try:
            await self._over
        except asyncio.CancelledError:
            self.end()
            call.cancel()
            await asyncio.wait({call})
            raise
        if not call.done():
            self._working.add(call)
            call.add_done_callback(self._worked)
            return None
        try:
            return call.result()
        except asyncio.CancelledError as error:
            return error

    def _be_over(self, _: object = None) -> None:
        if not self._over.done():
            self._over.set_result(None)

    def _worked(self, call: asyncio.Task[BaseException | None]) -> None:
        self._working.discard(call)
        error = None if call.cancelled() else call.result()
        if error is not None:
            self._report(error)

    async def _call_here(self) -> BaseException | None:
        try:
            await self._application(self._scope, self.receive, self.send)
        except (Exception, BaseExceptionGroup, KeyboardInterrupt, SystemExit) as error:  # noqa: BLE001
            # Raised in a task the last two would end the worker.
            return error
        return None

    async def receive(self) -> dict[str, Any]:
        """The ``receive`` of ASGI."""
        raise NotImplementedError

    async def send(self, message: Message) -> None:
        """The ``send`` of ASGI."""
        raise NotImplementedError

    async def _tell(self, event: dict[str, Any]) -> dict[str, Any]:
        """Give the event that says that it is over, as often as it is asked for."""
        self._told += 1
        if self._told > _TELL_AT_ONCE:
            await asyncio.sleep(_TELL_AGAIN)
        return event.copy()

    def lost(self) -> None:
        """The client has left."""
        raise NotImplementedError

    def end(self) -> None:
        """The server wants this to end."""
        raise NotImplementedError

    async def _crashed(self, error: BaseException) -> web.StreamResponse:
        self._report(error)
        if _is_client_gone(error):
            return await self._returned()
        return await self._failed()

    def _report(self, error: BaseException) -> None:
        if _is_client_gone(error):
            logger.debug("The client left: %s", self._request.raw_path, exc_info=error)
        else:
            self._complain("raised an exception", error)

    def _complain(self, what: str, error: BaseException | None = None) -> None:
        request = self._request
        logger.error(
            "The ASGI application %s: %s %s", what, request.method, request.raw_path, exc_info=error
        )

    async def _returned(self) -> web.StreamResponse:
        raise NotImplementedError

    async def _failed(self) -> web.StreamResponse:
        raise NotImplementedError


class Answer:
    """An HTTP response as an application's messages make it, in their order.

    ``last`` tells that the connection is to be closed after it.
    """

    def __init__(
        self, request: web.BaseRequest, write_timeout: float, *, last: bool = False
    ) -> None:
        self._request = request
        self._write_timeout = write_timeout
        self._last = last
        self._status = 0
        self._headers: list[tuple[str, str]] = []
        self._left: int | None = None
        self._bodiless = False
        #: None until something is on the wire.
        self.response: BridgeResponse | None = None
        self.complete = False

    def start(self, message: Message) -> str:
        """Take ``…response.start``; give the Content-Type. Raises for what cannot be sent."""
        if self._status:
            raise RuntimeError("the response has been started already")
        status = message["status"]
        if not isinstance(status, int) or isinstance(status, bool):
            raise TypeError(f"the status must be an int, not {type(status).__name__}")
        if not 200 <= status <= 999:
            raise ValueError(f"{status} is not the status of a final response")
        head = response_headers(message.get("headers", ()))
        self._headers, self._left = head.pairs, head.length
        self._last = self._last or head.last
        self._bodiless = self._request.method == "HEAD" or status in {204, 304}
        self._status = status
        return head.kind

    async def body(self, message: Message) -> None:
        """Send ``…response.body``. Raises RuntimeError for more than the Content-Length."""
        if not self._status:
            raise RuntimeError("the response has not been started")
        body = message.get("body", b"")
        if not isinstance(body, (bytes, bytearray, memoryview)):
            raise TypeError(f"the body must be bytes, not {type(body).__name__}")
        body = bytes(body)
        last = not message.get("more_body", False)
        response = self.response
        if response is None:
            short = self._left is not None and len(body) < self._left
            whole = body if last and not short else None
            response = await self._open(whole)
        if last:
            self.complete = True
            await response.write_eof(body)
        else:
            await response.write_many((body,))
        if self._left is not None and not self._bodiless:
            self._left -= len(body)
            if self._left < 0:
                raise RuntimeError("the body is longer than its Content-Length")

    async def file(self, message: Message) -> None:
        """Send ``http.response.pathsend``. Raises RuntimeError for what is no regular file."""
        if not self._status or self.response is not None:
            raise RuntimeError("a path is sent after the start and instead of any body")
        loop = asyncio.get_running_loop()
        try:
            descriptor, size = await loop.run_in_executor(None, _open_file, message["path"])
        except OSError as error:
            # An OSError would be taken for a client that left.
            raise RuntimeError(f"the file cannot be sent: {error}") from error
        try:
            if self._left is None:
                self._headers.append(("Content-Length", str(size)))
            response = await self._open(None)
            self.complete = True
            await response.send_file(descriptor, 0, size)
            await response.write_eof()
        finally:
            os.close(descriptor)

    async def plain(self, status: int) -> BridgeResponse:
        """Send a response of the server's own and close the connection."""
        self.response = response = plain_response(status, self._write_timeout)
        response.force_close()
        with contextlib.suppress(ConnectionError):
            await response.prepare(self._request)
            await response.write_eof()
        return response

    async def _open(self, whole: bytes | None) -> BridgeResponse:
        response = BridgeResponse(
            self._status,
            _REASONS.get(self._status, ""),
            self._headers,
            body=whole,
            write_timeout=self._write_timeout,
        )
        if self._last or not self._request.content.is_eof():
            # What was not read of the body must not become the next request.
            response.force_close()
        await response.prepare(self._request)
        self.response = response
        return response


class HTTPExchange(Exchange):
    """One request over HTTP."""

    def __init__(self, service: Service, request: web.BaseRequest, scope: Scope) -> None:
        super().__init__(service, request, scope)
        self._answer = Answer(request, self._config.write_timeout)
        self._pathsend = PATHSEND in scope["extensions"]
        self._body_due = True
        self._received = 0
        # The application has been told, or is to be told, that the client is gone.
        self._gone = False
        # It was this side that ended it: what was sent is all there is.
        self._ended = False
        request[CANCELLABLE] = True

    async def receive(self) -> dict[str, Any]:
        while not self._gone and not self._answer.complete:
            if self._body_due:
                event = await self._receive_body()
                if event is not None:
                    return event
            else:
                await self._changed.wait()
        return await self._tell(_DISCONNECT)

    async def send(self, message: Message) -> None:
        kind = message["type"]
        answer = self._answer
        if answer.complete:
            return  # "any further messages on the channel will be ignored"
        if self._gone:
            raise ClientGone
        try:
            if kind == "http.response.body":
                await answer.body(message)
            elif kind == "http.response.start":
                if answer.start(message).lower().startswith("text/event-stream"):
                    self._lasting.add(self)
            elif kind == PATHSEND and self._pathsend:
                await answer.file(message)
            else:
                raise ValueError(f"unknown message {kind!r}")
        except ConnectionError:
            self.lost()
            raise ClientGone from None
        finally:
            if self._answer.complete:
                self._changed.set()
                self._be_over()

    def lost(self) -> None:
        self._gone = True
        self._changed.set()

    def end(self) -> None:
        if not self._gone:
            self._ended = True
            self.lost()

    async def _receive_body(self) -> dict[str, Any] | None:
        content = self._request.content
        try:
            if content.is_eof():
                data = content.read_nowait()
            else:
                data = await self._wait_for_body()
        except TimeoutError:
            await self._refuse(408)
        except web.RequestPayloadError:
            await self._refuse(400)
        except ConnectionError:
            self.lost()
        except RuntimeError:
            # aiohttp raises it when the connection is closed, and when two wait at a time.
            if self._request.transport is not None:
                raise
            self.lost()
        else:
            self._received += len(data)
            if self._received <= self._config.max_body_size:
                self._body_due = not content.at_eof()
                return {"type": "http.request", "body": data, "more_body": self._body_due}
            await self._refuse(413)
        return None

    async def _wait_for_body(self) -> bytes:
        if self._answer.response is None:
            await grant_continue(self._request)
        async with asyncio.timeout(self._config.body_timeout):
            return await self._request.content.readany()

    async def _refuse(self, status: int) -> None:
        """Answer a body that is not acceptable; the application is told that the client left."""
        self.lost()
        if self._answer.response is None:
            await self._answer.plain(status)
        else:
            self._answer.response.cut_off()

    async def _returned(self) -> web.StreamResponse:
        answer = self._answer
        response = answer.response
        if answer.complete or not self._gone:
            if not answer.complete:
                self._complain("returned without a complete response")
            return await self._failed()
        if response is None:
            return client_left()
        if self._ended:
            response.force_close()
            with contextlib.suppress(ConnectionError):
                await response.write_eof()
        else:
            response.cut_off()
        return response

    async def _failed(self) -> web.StreamResponse:
        response = self._answer.response
        if response is None:
            return client_left() if self._gone else plain_response(500, self._config.write_timeout)
        if not self._answer.complete:
            response.cut_off()
        return response


def list_items(request: web.BaseRequest, name: str) -> list[str]:
    """The items of a header that is a list, wherever it was split."""
    values = request.headers.getall(name, ())
    return [item for value in values for part in value.split(",") if (item := part.strip())]


class Head(NamedTuple):
    """The headers of an application's response, and what they say to the server."""

    #: As aiohttp holds them.
    pairs: list[tuple[str, str]]
    #: Content-Length.
    length: int | None
    #: Content-Type, or "".
    kind: str
    #: Whether the connection is to be closed after the response.
    last: bool


def response_headers(headers: Iterable[Any]) -> Head:
    """Take an application's headers. Raises TypeError and ValueError as `wire_headers` does.

    Transfer-Encoding is left out: the specification wants it to be ignored, for framing is
    the server's affair. So are Connection and Keep-Alive, which applications send under
    other servers, often with event streams; of them ``close`` is obeyed.
    """
    pairs: list[tuple[str, str]] = []
    length = None
    kind = ""
    last = False
    for name, value in headers:
        if type(name) is not bytes or type(value) is not bytes:
            raise TypeError(f"name and value of a header must be bytes: {name!r}")
        text, lower = _header_name(name)
        shown = value.decode("latin-1")
        if not shown.isascii() or not shown.isprintable() or lower == "content-length":
            ((_, shown),), number = wire_headers([(text, shown)])
            if number is not None and length is not None:
                raise ValueError("repeated Content-Length")
            length = length if number is None else number
        elif lower in _FRAMING:
            options = shown.lower().split(",") if lower == "connection" else ()
            last = last or any(option.strip() == "close" for option in options)
            continue
        elif lower == "content-type":
            kind = shown
        pairs.append((text, shown))
    return Head(pairs, length, kind, last)


@lru_cache(maxsize=1024)
def _header_name(name: bytes) -> tuple[str, str]:
    """The name of a header as it is sent and in lower case. Raises as `wire_headers` does."""
    text = name.decode("latin-1")
    lower = text.lower()
    if lower != "content-length" and lower not in _FRAMING:
        wire_headers([(text, "")])
    return text, lower


def plain_response(status: int, write_timeout: float) -> BridgeResponse:
    """Give a response of the server's own."""
    reason = _REASONS[status]
    return BridgeResponse(
        status,
        reason,
        [("Content-Type", "text/plain; charset=utf-8")],
        body=f"{status}: {reason}".encode(),
        write_timeout=write_timeout,
    )


def client_left() -> web.Response:
    """Give what stands in the access log for a response that nobody will read."""
    return web.Response(status=499, reason="Client Closed Request")


def _open_file(path: str) -> tuple[int, int]:
    """Open a regular file; give its descriptor and its size."""
    # Without O_NONBLOCK a named pipe would hold the thread until somebody writes to it.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise OSError(f"not a regular file: {path}")
    return descriptor, status.st_size


def _is_client_gone(error: BaseException) -> bool:
    """Whether an exception is ours, or was raised by a framework in place of ours."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        found: BaseException | None = waiting.pop()
        # Frameworks that raise an exception anew make circles of these.
        while found is not None and id(found) not in seen and not isinstance(found, ClientGone):
            seen.add(id(found))
            if isinstance(found, BaseExceptionGroup):
                waiting.extend(found.exceptions)
                break
            found = found.__context__ if found.__cause__ is None else found.__cause__
        else:
            if not isinstance(found, ClientGone):
                return False
    return True

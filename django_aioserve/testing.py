"""For the tests of a project: the combined application as a live server, and a client for it.

::

    class ChatTests(AioLiveServerTestCase):
        def test_what_one_says_the_other_hears(self):
            self.aio_client.force_login(User.objects.create_user("ann"))
            with self.aio_client.websocket("/chat/") as websocket:
                websocket.send_json({"text": "Hello"})
                self.assertEqual(websocket.receive_json()["text"], "Hello")

The server runs the aiohttp application that `runaio` would run, with its routes,
WebSockets, groups and static files and with Django behind them, in a thread of the
test process and against the test database, in-memory SQLite included. It takes the
``AIOSERVE_*`` settings and the middleware as they are when it starts: override them for
the class. (Where the project wraps Django's handler in WSGI middleware, the wrapped
one is served as it was imported.) Other settings may be overridden in a test as well.

With pytest there are the fixtures ``aio_live_server`` and ``aio_client``; see
`django_aioserve.pytest_plugin`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import string
import threading
import weakref
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self, TypeAlias, TypeVar

import aiohttp
from aiohttp import web
from django.conf import settings
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.wsgi import WSGIHandler
from django.db import connections
from django.test import Client, LiveServerTestCase, modify_settings
from django.test.testcases import LiveServerThread
from django.utils.crypto import get_random_string
from yarl import URL

from django_aioserve import conf
from django_aioserve.application import build_application, get_aio_application

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Mapping

    from django.contrib.auth.base_user import AbstractBaseUser
    from django.db.backends.base.base import BaseDatabaseWrapper
    from multidict import CIMultiDictProxy

__all__ = [
    "AioClient",
    "AioLiveServer",
    "AioLiveServerTestCase",
    "AioResponse",
    "AioStream",
    "AioWebSocket",
    "WebSocketClosed",
]

T = TypeVar("T")
_ClientWebSocket: TypeAlias = "aiohttp.ClientWebSocketResponse[bool]"

_SHUTDOWN_SECONDS = 2.0
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})


# --------------------------------------------------------------------------- server


class _LiveServerThread(LiveServerThread):
    """Django's live server thread, with the aiohttp application in it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self) -> None:
        try:
            with _database_for_all_threads(self.connections_override or {}):
                asyncio.run(self._serve())
        except BaseException as error:  # noqa: BLE001  # raised by whoever waits for the start
            self.error = error  # type: ignore[assignment]
        finally:
            self.is_ready.set()
            connections.close_all()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        runner = web.AppRunner(
            _application(),
            access_log=None,
            handle_signals=False,
            shutdown_timeout=_SHUTDOWN_SECONDS,
        )
        await runner.setup()
        try:
            listener = socket.create_server((self.host, self.port))
            self.port = listener.getsockname()[1]
            await web.SockSite(runner, listener).start()
            self.is_ready.set()
            await self._stopped.wait()
        finally:
            await runner.cleanup()

    def terminate(self) -> None:
        """Stop serving, and wait for the end of the thread."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended already
                self._loop.call_soon_threadsafe(self._stopped.set)
        self.join()


def _application() -> web.Application:
    """Build the application anew: Django's handlers keep the middleware of their making."""
    config = conf.resolve()
    asgi = config.interface == "asgi"
    path = getattr(settings, "ASGI_APPLICATION" if asgi else "WSGI_APPLICATION", None)
    if path and type(conf.import_dotted(path)) not in {WSGIHandler, ASGIHandler}:
        return get_aio_application()
    if asgi:
        return build_application(config, asgi_application=ASGIHandler())
    return build_application(config, WSGIHandler())


@contextlib.contextmanager
def _database_for_all_threads(shared: Mapping[str, BaseDatabaseWrapper]) -> Iterator[None]:
    """Let every new thread use the ``shared`` connections, and close all others at the end.

    An in-memory database lives in one connection; and a connection that is left open
    keeps the test database from being destroyed.
    """
    original = connections.create_connection
    made: weakref.WeakSet[BaseDatabaseWrapper] = weakref.WeakSet()

    def create_connection(alias: str) -> BaseDatabaseWrapper:
        if alias in shared:
            return shared[alias]
        connection = original(alias)
        made.add(connection)
        return connection

    connections.create_connection = create_connection  # type: ignore[method-assign]
    try:
        yield
    finally:
        del connections.create_connection
        for connection in list(made):
            connection.inc_thread_sharing()
            connection.close()
            connection.dec_thread_sharing()


class AioLiveServer:
    """The combined application, served at ``url`` from `start` to `stop`; a context manager.

    For what is no `AioLiveServerTestCase`. The test database must be set up, and what the
    server shall see must be committed (``TransactionTestCase``, ``transactional_db``).

    .. versionadded:: 0.1
    """

    def __init__(self, host: str = "localhost", port: int = 0) -> None:
        self.host = host
        self._port = port
        self._thread: _LiveServerThread | None = None
        self._allowed = modify_settings(ALLOWED_HOSTS={"append": host})
        self._shared: dict[str, BaseDatabaseWrapper] = {}

    @property
    def url(self) -> str:
        """Where it serves, without a slash at the end."""
        if self._thread is None:
            raise RuntimeError("The live server has not been started.")
        return f"http://{self.host}:{self._thread.port}"

    def start(self) -> None:
        """Serve; returns when connections are accepted. Raises what kept it from that."""
        for connection in connections.all():
            if connection.vendor == "sqlite" and connection.is_in_memory_db():  # type: ignore[attr-defined]
                connection.inc_thread_sharing()
                self._shared[connection.alias] = connection
        self._allowed.enable()
        self._thread = _LiveServerThread(
            self.host,
            None,  # static files are the application's own affair
            connections_override=self._shared,
            port=self._port,
        )
        self._thread.daemon = True
        self._thread.start()
        self._thread.is_ready.wait()
        if self._thread.error is not None:
            error = self._thread.error
            self.stop()
            raise error

    def stop(self) -> None:
        """Stop serving."""
        if self._thread is None:
            return
        self._thread.terminate()
        self._thread = None
        self._allowed.disable()
        while self._shared:
            self._shared.popitem()[1].dec_thread_sharing()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class AioLiveServerTestCase(LiveServerTestCase):
    """Django's `LiveServerTestCase` with the combined aiohttp application as its server.

    ``live_server_url``, ``host`` and ``port`` are as there; as there, the database is
    flushed after each test.

    .. versionadded:: 0.1
    """

    server_thread_class = _LiveServerThread

    @cached_property
    def aio_client(self) -> AioClient:
        """A client of the live server, a new one for each test."""
        client = AioClient(self.live_server_url)
        self.addCleanup(client.close)
        return client


# --------------------------------------------------------------------------- client


class WebSocketClosed(Exception):
    """The server has closed the WebSocket; ``code`` is that of RFC 6455, section 7.4.

    .. versionadded:: 0.1
    """

    def __init__(self, code: int | None, reason: str) -> None:
        super().__init__(f"closed with {code} {reason}".rstrip())
        self.code = code
        self.reason = reason


@dataclass(frozen=True, slots=True)
class AioResponse:
    """A response, with the names that the responses of Django's test client have.

    .. versionadded:: 0.1
    """

    status_code: int
    headers: CIMultiDictProxy[str]
    content: bytes
    url: str
    charset: str

    @property
    def text(self) -> str:
        """The content, decoded."""
        return self.content.decode(self.charset)

    def json(self) -> Any:
        """The content as JSON. Raises ValueError."""
        return json.loads(self.content)


class _LoopThread:
    """An event loop in a thread of its own, for synchronous callers."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="aio-client", daemon=True
        )
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        waiting = asyncio.wait_for(coroutine, self._timeout)
        return asyncio.run_coroutine_threadsafe(waiting, self._loop).result()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class AioClient:
    """A synchronous client of a live server: HTTP, event streams and WebSockets, with cookies.

    ``base_url`` is the server's address. ``timeout`` is in seconds, for each operation;
    `TimeoutError` is raised after it. As with Django's test client, requests pass the
    CSRF check unless ``enforce_csrf_checks`` (the token goes in a cookie and a header,
    which ``CSRF_USE_SESSIONS`` does not know). It works on an event loop in a
    thread of its own; call `close` at the end, or use it as a context manager.

    .. versionadded:: 0.1
    """

    def __init__(
        self, base_url: str, *, enforce_csrf_checks: bool = False, timeout: float = 10.0
    ) -> None:
        self.base_url = base_url
        self._enforce_csrf_checks = enforce_csrf_checks
        self._django = Client()
        self._loop = _LoopThread(timeout)
        self._session = self._loop.run(self._open())

    def close(self) -> None:
        """Close every connection."""
        if not self._session.closed:
            self._loop.run(self._session.close())
            self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # HTTP

    def get(self, path: str, **options: Any) -> AioResponse:
        """Send a GET request; see `request`."""
        return self.request("GET", path, **options)

    def head(self, path: str, **options: Any) -> AioResponse:
        """Send a HEAD request; see `request`."""
        return self.request("HEAD", path, **options)

    def post(self, path: str, data: Any = None, **options: Any) -> AioResponse:
        """Send a POST request; see `request`."""
        return self.request("POST", path, data=data, **options)

    def put(self, path: str, data: Any = None, **options: Any) -> AioResponse:
        """Send a PUT request; see `request`."""
        return self.request("PUT", path, data=data, **options)

    def patch(self, path: str, data: Any = None, **options: Any) -> AioResponse:
        """Send a PATCH request; see `request`."""
        return self.request("PATCH", path, data=data, **options)

    def delete(self, path: str, **options: Any) -> AioResponse:
        """Send a DELETE request; see `request`."""
        return self.request("DELETE", path, **options)

    def request(
        self, method: str, path: str, *, follow: bool = False, **options: Any
    ) -> AioResponse:
        """Send a request and read the whole response.

        ``follow`` follows redirections. ``options`` are those of
        `aiohttp.ClientSession.request`: ``params``, ``headers``, ``json``, ``data`` (bytes, a
        dictionary for a form, with an open file in it for an upload), ...
        """
        return self._loop.run(self._request(method, path, follow, options))

    def stream(self, path: str, *, method: str = "GET", **options: Any) -> AioStream:
        """Send a request whose response is read bit by bit: ``with client.stream(...) as s:``."""
        return AioStream(self._loop, lambda: self._send(method, path, False, options))

    # WebSockets

    def websocket(self, path: str, **options: Any) -> AioWebSocket:
        """Open a WebSocket: ``with client.websocket("/chat/") as websocket:``.

        It says to come from the server's own origin unless ``options`` (those of
        `aiohttp.ClientSession.ws_connect`) say otherwise. Entering raises
        `aiohttp.WSServerHandshakeError`, with a ``status``, where the server refuses.
        """
        return AioWebSocket(self._loop, lambda: self._connect(path, options))

    # Cookies and users

    @property
    def cookies(self) -> dict[str, str]:
        """The cookies that the next request will carry."""
        jar = self._session.cookie_jar.filter_cookies(URL(self.base_url))
        return {name: morsel.value for name, morsel in jar.items()}

    def set_cookie(self, name: str, value: str) -> None:
        """Set a cookie."""
        self._loop.run(self._set_cookie(name, value))

    def force_login(self, user: AbstractBaseUser, backend: str | None = None) -> None:
        """Log a user in, without a password; as Django's test client does."""
        self._django.force_login(user, backend)
        self._take_session()

    def login(self, **credentials: Any) -> bool:
        """Log in with ``credentials``, and tell whether they were right."""
        if not self._django.login(**credentials):
            return False
        self._take_session()
        return True

    def logout(self) -> None:
        """Log out: the session is removed."""
        name = settings.SESSION_COOKIE_NAME
        if name in self.cookies:
            self._django.cookies[name] = self.cookies[name]
        self._django.logout()
        self.set_cookie(name, "")

    def _take_session(self) -> None:
        name = settings.SESSION_COOKIE_NAME
        self.set_cookie(name, self._django.cookies[name].value)

    # Inside

    async def _open(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            self.base_url,
            cookie_jar=aiohttp.CookieJar(unsafe=True),  # "unsafe" takes them from IP addresses
            timeout=aiohttp.ClientTimeout(),
        )

    async def _set_cookie(self, name: str, value: str) -> None:
        self._session.cookie_jar.update_cookies({name: value}, URL(self.base_url))

    async def _request(
        self, method: str, path: str, follow: bool, options: dict[str, Any]
    ) -> AioResponse:
        async with await self._send(method, path, follow, options) as response:
            content = await response.read()
            return AioResponse(
                response.status,
                response.headers,
                content,
                str(response.url),
                response.charset or "utf-8",
            )

    async def _send(
        self, method: str, path: str, follow: bool, options: dict[str, Any]
    ) -> aiohttp.ClientResponse:
        options = {**options, "headers": dict(options.get("headers") or {})}
        if method.upper() not in _SAFE_METHODS and not self._enforce_csrf_checks:
            await self._add_csrf_token(options["headers"])
        return await self._session.request(method, path, allow_redirects=follow, **options)

    async def _connect(self, path: str, options: dict[str, Any]) -> _ClientWebSocket:
        options = {"origin": self.base_url, **options}
        websocket: _ClientWebSocket = await self._session.ws_connect(path, **options)
        return websocket

    async def _add_csrf_token(self, headers: dict[str, str]) -> None:
        name = settings.CSRF_COOKIE_NAME
        token = self.cookies.get(name)
        if token is None:
            token = get_random_string(32, string.ascii_letters + string.digits)
            await self._set_cookie(name, token)
        header = settings.CSRF_HEADER_NAME.removeprefix("HTTP_").replace("_", "-")
        headers.setdefault(header, token)


class AioStream:
    """A response that is still coming; made by `AioClient.stream`, a context manager.

    .. versionadded:: 0.1
    """

    def __init__(
        self, loop: _LoopThread, send: Callable[[], Coroutine[Any, Any, aiohttp.ClientResponse]]
    ) -> None:
        self._loop = loop
        self._send = send
        self._response: aiohttp.ClientResponse | None = None

    def __enter__(self) -> Self:
        self._response = self._loop.run(self._send())
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.run(self._close())

    @property
    def status_code(self) -> int:
        """The response's status."""
        return self._open.status

    @property
    def headers(self) -> CIMultiDictProxy[str]:
        """The response's headers."""
        return self._open.headers

    def readline(self) -> str:
        """Wait for the next line and give it with its end; "" when the response has ended."""
        return self._loop.run(self._open.content.readline()).decode()

    def read(self) -> bytes:
        """Wait for the end of the response, and give what is left of it."""
        return self._loop.run(self._open.content.read())

    @property
    def _open(self) -> aiohttp.ClientResponse:
        if self._response is None:
            raise RuntimeError("Enter the stream first: with client.stream(...) as stream")
        return self._response

    async def _close(self) -> None:
        # It may never end by itself: close the connection rather than wait.
        self._open.close()


class AioWebSocket:
    """A WebSocket; made by `AioClient.websocket`, a context manager.

    What receives waits for the next message, and raises `WebSocketClosed` where there is
    none to come, and TypeError where it is of another kind.

    .. versionadded:: 0.1
    """

    def __init__(
        self, loop: _LoopThread, connect: Callable[[], Coroutine[Any, Any, _ClientWebSocket]]
    ) -> None:
        self._loop = loop
        self._connect = connect
        self._websocket: _ClientWebSocket | None = None

    def __enter__(self) -> Self:
        self._websocket = self._loop.run(self._connect())
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def protocol(self) -> str | None:
        """The subprotocol that the server has chosen."""
        return self._open.protocol

    @property
    def close_code(self) -> int | None:
        """The code with which it was closed, None while it is open."""
        return self._open.close_code

    def send_text(self, text: str) -> None:
        """Send a text message."""
        self._loop.run(self._open.send_str(text))

    def send_bytes(self, data: bytes) -> None:
        """Send a binary message."""
        self._loop.run(self._open.send_bytes(data))

    def send_json(self, value: Any) -> None:
        """Send a value as JSON in a text message."""
        self.send_text(json.dumps(value))

    def receive_text(self) -> str:
        """Receive a text message."""
        return self._loop.run(self._receive(str))

    def receive_bytes(self) -> bytes:
        """Receive a binary message."""
        return self._loop.run(self._receive(bytes))

    def receive_json(self) -> Any:
        """Receive a text message that is JSON. Raises ValueError where it is not."""
        return json.loads(self.receive_text())

    def close(self, code: int = 1000) -> None:
        """Close it, and wait for the server's answer."""
        self._loop.run(self._open.close(code=code))

    @property
    def _open(self) -> _ClientWebSocket:
        if self._websocket is None:
            raise RuntimeError("Enter it first: with client.websocket(...) as websocket")
        return self._websocket

    async def _receive(self, kind: type[T]) -> T:
        message = await self._open.receive()
        if message.type in {aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY}:
            if not isinstance(message.data, kind):
                raise TypeError(f"The message is no {kind.__name__}: {message.data!r}")
            return message.data
        if message.type is aiohttp.WSMsgType.ERROR:
            raise message.data
        code = self._open.close_code
        reason = message.extra if message.type is aiohttp.WSMsgType.CLOSE else ""
        raise WebSocketClosed(code, reason or "")

"""The ASGI bridge over real sockets: HTTP, WebSocket, lifespan, Django, Channels."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import json
import logging
import os
import struct
import threading
import time
import zlib
from functools import partial
from pathlib import Path

import pytest
import uvloop
from aiohttp import web
from django.core.asgi import get_asgi_application
from django.http import FileResponse, JsonResponse, StreamingHttpResponse
from django.test import override_settings
from django.urls import path
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect as ws_connect

from django_aioserve.bridge import asgi_websocket
from django_aioserve.bridge.asgi import ASGIBridge, LifespanFailed
from django_aioserve.bridge.body import expect_handler
from django_aioserve.bridge.threads import ThreadPool
from django_aioserve.conf import Config
from django_aioserve.keys import ShortWay
from django_aioserve.server.connection import Connection, Front, Limits
from tests.support import AppServer, wait_until
from tests.test_bridge_frames import client_frame, deflate

BRIDGE = web.AppKey("BRIDGE", ASGIBridge)


# --- what the tests stand on --------------------------------------------------------------


def lint(application):
    """`application`, with the types of all that the server gives it checked strictly."""

    async def linted(scope, receive, send):
        check_scope(scope)

        async def checked_receive():
            event = await receive()
            check_event(scope["type"], event)
            return event

        async def checked_send(message):
            result = await send(message)
            assert result is None

        await application(scope, checked_receive, checked_send)

    return linted


def check_scope(scope):
    assert type(scope) is dict
    assert set(scope["asgi"]) == {"version", "spec_version"}
    assert scope["asgi"]["version"] == "3.0"
    assert type(scope["state"]) is dict
    if scope["type"] == "lifespan":
        assert scope["asgi"]["spec_version"] == "2.0"
        assert set(scope) == {"type", "asgi", "state"}
        return
    assert scope["asgi"]["spec_version"] == "2.5"
    keys = {
        "type",
        "asgi",
        "http_version",
        "scheme",
        "path",
        "raw_path",
        "query_string",
        "root_path",
        "headers",
        "client",
        "server",
        "state",
        "extensions",
    }
    if scope["type"] == "http":
        assert set(scope) == keys | {"method"}
        assert scope["method"] == scope["method"].upper()
        assert scope["scheme"] in {"http", "https"}
    else:
        assert scope["type"] == "websocket"
        assert set(scope) == keys | {"subprotocols"}
        assert scope["scheme"] in {"ws", "wss"}
        assert all(type(item) is str for item in scope["subprotocols"])
    assert scope["http_version"] in {"1.0", "1.1"}
    for name in ("path", "root_path"):
        assert type(scope[name]) is str
    for name in ("raw_path", "query_string"):
        assert type(scope[name]) is bytes
    assert type(scope["headers"]) is list
    for name, value in scope["headers"]:
        assert type(name) is bytes
        assert name == name.lower()
        assert type(value) is bytes
    for name in ("client", "server"):
        if scope[name] is not None:
            host, port = scope[name]
            assert type(host) is str
            assert type(port) is int
    assert type(scope["extensions"]) is dict
    assert all(type(value) is dict for value in scope["extensions"].values())


EVENTS = {
    "http.request": {"body": bytes, "more_body": bool},
    "http.disconnect": {},
    "websocket.connect": {},
    "websocket.receive": {},
    "websocket.disconnect": {"code": int, "reason": str},
    "lifespan.startup": {},
    "lifespan.shutdown": {},
}


def check_event(kind, event):
    assert type(event) is dict
    assert event["type"].startswith(kind + ".")
    fields = dict(EVENTS[event["type"]])
    if event["type"] == "websocket.receive":
        given = {name for name in ("text", "bytes") if event.get(name) is not None}
        assert len(given) == 1
        fields[given.pop()] = str if "text" in event else bytes
    assert set(event) == {"type", *fields}
    for name, expected in fields.items():
        assert type(event[name]) is expected


class OwnServer(AppServer):
    """As `AppServer`, with the connections and the loop of our own worker.

    With `short` it calls the bridge as the worker does where nothing else is asked for.
    """

    def __init__(self, factory, config, *, short, **options):
        super().__init__(factory, loop_factory=uvloop.new_event_loop, **options)
        self._config = config
        self._short = short

    async def _start(self):
        self.app = await self._factory()
        self._runner = web.AppRunner(self.app, shutdown_timeout=1.0)
        await self._runner.setup()
        config = self._config
        limits = Limits(config.header_timeout, config.body_timeout, config.write_timeout)
        front = Front(limits, logging.getLogger("front"), answered=lambda: None)
        if self._short:
            front.short_way = ShortWay(self.app[BRIDGE].handle, ())
        connect = partial(Connection, self._runner.server, front, loop=self.loop, access_log=None)
        if self._unix is not None:
            self._listener = await self.loop.create_unix_server(connect, self._unix)
            return self._unix
        self._listener = await self.loop.create_server(connect, "127.0.0.1", 0)
        return self._listener.sockets[0].getsockname()

    def stop(self):
        self.loop.call_soon_threadsafe(self._listener.close)
        super().stop()


@pytest.fixture(params=["aiohttp", "aioserve", "short"])
def serve(request):
    """`serve(application, **config)` gives a server with that application behind the bridge."""
    with contextlib.ExitStack() as stack:

        def start(application, *, route="/{path_info:.*}", unix=None, allow_errors=False, **config):
            config = Config(**config)

            async def factory():
                app = web.Application()
                app[BRIDGE] = bridge = ASGIBridge(lint(application), config, ThreadPool(1, 1))
                app.cleanup_ctx.append(bridge.lifespan)
                app.router.add_route("*", route, bridge.handle, expect_handler=expect_handler)
                return app

            options = {"unix": unix, "allow_errors": allow_errors}
            if request.param != "aiohttp":
                short = request.param == "short" and route == "/{path_info:.*}"
                server = OwnServer(factory, config, short=short, **options)
            else:
                # Else it waits ten seconds for the rest of a body that nobody wants.
                server = AppServer(factory, lingering_time=0.5, shutdown_timeout=1.0, **options)
            return stack.enter_context(server)

        yield start


class Recorder:
    """Collects what an application tells of itself, for the test's thread to wait for."""

    def __init__(self):
        self.items = []
        self._changed = threading.Condition()

    def add(self, item):
        with self._changed:
            self.items.append(item)
            self._changed.notify_all()

    def wait(self, count=1, deadline=10):
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.items) >= count, deadline), self.items
            return self.items[:]

    def settle(self, quiet=0.3):
        """Wait until nothing has been told for `quiet` seconds; give how much there was."""
        with self._changed:
            while self._changed.wait(quiet):
                pass
            return len(self.items)


@pytest.fixture
def told():
    return Recorder()


async def read_all(receive):
    pieces = []
    while True:
        event = await receive()
        if event["type"] == "http.disconnect":
            raise ConnectionAbortedError
        pieces.append(event["body"])
        if not event["more_body"]:
            return b"".join(pieces)


def send_until_blocked(connection, data):
    """Send `data` until the server takes no more for half a second; tell how much it took."""
    connection.socket.settimeout(0.5)
    sent = 0
    with contextlib.suppress(TimeoutError):
        while sent < len(data):
            sent += connection.socket.send(data[sent : sent + (1 << 20)])
    connection.socket.settimeout(10)
    assert sent < len(data)
    return sent


def start(status=200, headers=()):
    return {"type": "http.response.start", "status": status, "headers": list(headers)}


def body(data=b"", more_body=False):
    return {"type": "http.response.body", "body": data, "more_body": more_body}


def http(function):
    """An application for HTTP only, as most are: it raises for any other scope."""

    async def application(scope, receive, send):
        if scope["type"] != "http":
            raise NotImplementedError(scope["type"])
        await function(scope, receive, send)

    return application


def answering(*messages):
    @http
    async def application(scope, receive, send):
        for message in messages:
            await send(message)

    return application


def scope_of(serve, told, data, **config):
    """The scope that the application gets for the request `data`."""

    @http
    async def application(scope, receive, send):
        told.add(scope)
        await send(start())
        await send(body())

    server = serve(application, **config)
    with server.connect() as connection:
        connection.send(data)
        connection.read_response()
    return told.items[-1]


def request(target="/", *lines, version="1.1"):
    return "\r\n".join(
        [f"GET {target} HTTP/{version}", "Host: example.com", *lines, "", ""]
    ).encode("latin-1")


# --- the scope of HTTP --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "path", "raw_path", "query"),
    [
        ("/", "/", b"/", b""),
        ("/a/b?x=%20&y", "/a/b", b"/a/b", b"x=%20&y"),
        ("/caf%C3%A9", "/café", b"/caf%C3%A9", b""),
        ("/a%2Fb//c%25", "/a/b//c%", b"/a%2Fb//c%25", b""),
        ("/%FF", "/\ufffd", b"/%FF", b""),
        ("/a%00b", "/a\0b", b"/a%00b", b""),
        ("/?", "/", b"/", b""),
        ("/?a?b", "/", b"/", b"a?b"),
        ("http://other.example/x?y", "/x", b"/x", b"y"),
    ],
)
def test_the_path(serve, told, target, path, raw_path, query):
    scope = scope_of(serve, told, request(target))
    assert (scope["path"], scope["raw_path"], scope["query_string"]) == (path, raw_path, query)
    assert scope["root_path"] == ""


def test_the_root_path_is_where_the_bridge_is_mounted(serve, told):
    scope = scope_of(serve, told, request("/m/%C3%A9/y"), route="/m/{path_info:.*}")
    assert scope["root_path"] == "/m"
    assert scope["path"] == "/m/é/y"
    assert scope["raw_path"] == b"/m/%C3%A9/y"


def test_method_version_and_ends(serve, told):
    scope = scope_of(serve, told, request(version="1.0"))
    assert (scope["method"], scope["http_version"], scope["scheme"]) == ("GET", "1.0", "http")
    assert scope["client"][0] == scope["server"][0] == "127.0.0.1"
    assert scope["client"][1] > 0
    assert scope["server"][1] > 0


def test_headers_are_lower_case_in_order_and_repeated(serve, told):
    scope = scope_of(serve, told, request("/", "X-B: 1", "X-A: ä", "x-b: 2", "X-Empty:"))
    assert scope["headers"] == [
        (b"host", b"example.com"),
        (b"x-b", b"1"),
        (b"x-a", b"\xe4"),
        (b"x-b", b"2"),
        (b"x-empty", b""),
    ]


def test_headers_that_could_pass_for_others_are_dropped(serve, told):
    data = request("/", "X_Auth_User: root", "Proxy: http://evil", "X-Fine: 1")
    names = [name for name, _ in scope_of(serve, told, data)["headers"]]
    assert names == [b"host", b"x-fine"]


def test_repeated_cookies_become_one(serve, told):
    scope = scope_of(serve, told, request("/", "Cookie: a=1", "X: y", "Cookie: b=2"))
    assert (b"cookie", b"a=1; b=2") in scope["headers"]
    assert [name for name, _ in scope["headers"]].count(b"cookie") == 1


def test_a_trusted_proxy_tells_client_and_scheme(serve, told):
    data = request("/", "X-Forwarded-For: 203.0.113.7", "X-Forwarded-Proto: https")
    scope = scope_of(serve, told, data, forwarded_allow_ips=("127.0.0.1",))
    assert scope["client"] == ("203.0.113.7", 0)
    assert scope["scheme"] == "https"


def test_forwarded_headers_of_others_are_stripped(serve, told):
    data = request("/", "X-Forwarded-For: 203.0.113.7", "X-Forwarded-Proto: https")
    scope = scope_of(serve, told, data, forwarded_allow_ips=())
    assert scope["client"][0] == "127.0.0.1"
    assert scope["scheme"] == "http"
    assert [name for name, _ in scope["headers"]] == [b"host"]


def test_on_a_unix_socket_the_ends_are_valid(serve, told, tmp_path):
    scope = scope_of(serve, told, request(), unix=str(tmp_path / "socket"))
    assert scope["client"] == ("127.0.0.1", 0)
    assert scope["server"] == ("example.com", 80)


# --- the body of a request ----------------------------------------------------------------


@http
async def echo(scope, receive, send):
    data = await read_all(receive)
    await send(start())
    await send(body(data))


@pytest.mark.parametrize("size", [0, 1, 70_000, 3_000_000])
def test_a_body_arrives_whole(serve, size):
    data = os.urandom(size)
    assert serve(echo).request("POST", "/", body=data).body == data


def test_a_chunked_body_arrives_without_its_framing(serve):
    with serve(echo).connect() as connection:
        connection.send(
            b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"3\r\nabc\r\n4;x=y\r\ndefg\r\n0\r\nX-Trailer: 1\r\n\r\n"
        )
        assert connection.read_response().body == b"abcdefg"


def test_a_body_arrives_as_it_comes(serve, told):
    @http
    async def application(scope, receive, send):
        while True:
            event = await receive()
            told.add((event["body"], event["more_body"]))
            if not event["more_body"]:
                break
        await send(start())
        await send(body())

    with serve(application).connect() as connection:
        connection.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nab")
        assert told.wait(1) == [(b"ab", True)]
        connection.send(b"cd")
        connection.read_response()
    assert told.items == [(b"ab", True), (b"cd", False)]


def test_a_body_that_is_not_asked_for_stays_with_the_client(serve):
    release = asyncio.Event()

    @http
    async def application(scope, receive, send):
        await release.wait()
        data = await read_all(receive)
        await send(start())
        await send(body(str(len(data)).encode()))

    server = serve(application)
    size = 24 << 20
    with server.connect() as connection:
        connection.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size)
        sent = send_until_blocked(connection, bytes(size))
        server.loop.call_soon_threadsafe(release.set)
        while sent < size:
            sent += connection.socket.send(bytes(min(1 << 20, size - sent)))
        assert connection.read_response().body == b"%d" % size


def test_a_body_that_is_declared_too_large_is_refused_before_the_application(serve, told):
    @http
    async def application(scope, receive, send):
        told.add("called")

    server = serve(application, max_body_size=10)
    with server.connect() as connection:
        connection.send(
            b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 11\r\nExpect: 100-continue\r\n\r\n"
        )
        response = connection.read_response()
    assert response.status == 413
    assert response.header("Connection") == "close"
    assert told.items == []


CHUNKED = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture
def reading(told):
    """An application that tells how the reading of its body ended, and what send() then does."""

    @http
    async def application(scope, receive, send):
        if scope["path"] == "/started":
            await send(start())
            await send(body(b"some", more_body=True))
        told.add("called")
        try:
            await read_all(receive)
        except ConnectionAbortedError:
            told.add(await receive())
            try:
                await send(start())
            except OSError as error:
                told.add(isinstance(error, OSError))

    return application


DISCONNECTED = ["called", {"type": "http.disconnect"}, True]


@pytest.mark.parametrize(
    ("data", "config", "status"),
    [
        pytest.param(b"b\r\nhello world\r\n", {"max_body_size": 10}, 413, id="too large"),
        pytest.param(b"1\r\n", {"body_timeout": 0.2}, 408, id="stalls"),
        pytest.param(b"1\r\nab\r\n", {"body_timeout": 0.2}, 400, id="malformed"),
    ],
)
def test_a_body_that_is_not_acceptable_is_answered_for_the_application(
    serve, told, reading, data, config, status
):
    with serve(reading, allow_errors=status == 400, **config).connect() as connection:
        connection.send(CHUNKED)
        told.wait(1)
        connection.send(data)
        response = connection.read_response()
        # aiohttp's own connection does not tell what is malformed: the body stalls.
        assert response.status in ({400, 408} if status == 400 else {status})
        assert connection.at_eof()
    assert told.wait(3) == DISCONNECTED


def test_such_a_body_cuts_a_response_that_was_begun(serve, told, reading):
    with serve(reading, max_body_size=10).connect() as connection:
        connection.send(CHUNKED.replace(b"/", b"/started", 1) + b"b\r\nhello world\r\n")
        received = connection.recv_to_eof()
    assert received.endswith(b"4\r\nsome\r\n")
    assert told.wait(3) == DISCONNECTED


def test_a_client_that_leaves_within_its_body_is_disconnected(serve, told, reading):
    with serve(reading).connect() as connection:
        connection.send(CHUNKED + b"1\r\na\r\n")
    assert told.wait(3) == DISCONNECTED


def test_an_unread_body_is_not_the_next_request(serve):
    server = serve(answering(start(), body(b"ok")))
    with server.connect() as connection:
        connection.send(
            b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nGET /x HTTP/1.1\r\n\r\n"
        )
        assert connection.read_response().header("Connection") == "close"
        assert connection.at_eof()


def test_100_continue_is_granted_when_the_body_is_asked_for(serve, told):
    gate = asyncio.Event()

    @http
    async def application(scope, receive, send):
        told.add("called")
        await gate.wait()
        await send(start(headers=[(b"x-length", b"%d" % len(await read_all(receive)))]))
        await send(body())

    server = serve(application)
    with server.connect() as connection:
        connection.send(
            b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n"
        )
        told.wait()
        connection.socket.settimeout(0.2)
        with pytest.raises(TimeoutError):
            connection.recv_exactly(1)
        connection.socket.settimeout(5)
        server.loop.call_soon_threadsafe(gate.set)
        assert connection.read_response().status == 100
        connection.send(b"abc")
        assert connection.read_response().header("x-length") == "3"
        assert connection.request("GET", "/").status == 200


def test_100_continue_is_not_granted_when_the_body_is_not_wanted(serve):
    server = serve(answering(start(403), body(b"no")))
    with server.connect() as connection:
        connection.send(
            b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n"
        )
        response = connection.read_response()
        assert (response.status, response.header("Connection")) == (403, "close")
        assert connection.at_eof()


# --- the response -------------------------------------------------------------------------


def test_a_response_has_what_the_application_gave(serve):
    headers = [(b"x-a", b"1"), (b"set-cookie", b"a=1"), (b"set-cookie", b"b=2"), (b"x-a", b"\xe4")]
    with serve(answering(start(201, headers), body(b"hello"))).connect() as connection:
        connection.send(request())
        head = connection.recv_until(b"\r\n\r\n")
        assert connection.recv_exactly(5) == b"hello"
    lines = head.split(b"\r\n")
    assert lines[0] == b"HTTP/1.1 201 Created"
    assert lines[1:5] == [b"x-a: 1", b"set-cookie: a=1", b"set-cookie: b=2", b"x-a: \xe4"]
    assert b"Content-Length: 5" in lines
    assert not any(line.lower().startswith(b"content-type") for line in lines)


def test_a_response_of_one_piece_is_followed_by_others_on_its_connection(serve):
    with serve(answering(start(), body(b"hello"))).connect() as connection:
        for _ in range(3):
            assert connection.request("GET", "/").body == b"hello"


def test_a_response_streams(serve):
    gate = asyncio.Semaphore(0)

    @http
    async def application(scope, receive, send):
        await send(start())
        await send(body(b"", more_body=True))
        await gate.acquire()
        await send(body(b"a", more_body=True))
        await gate.acquire()
        await send(body(b"b"))

    server = serve(application)
    with server.connect() as connection:
        for _ in range(2):
            connection.send(request())
            assert b"Transfer-Encoding: chunked" in connection.recv_until(b"\r\n\r\n")
            server.loop.call_soon_threadsafe(gate.release)
            assert connection.recv_until(b"a\r\n") == b"1\r\na\r\n"
            server.loop.call_soon_threadsafe(gate.release)
            assert connection.recv_until(b"0\r\n\r\n") == b"1\r\nb\r\n0\r\n\r\n"


def test_nothing_is_sent_before_the_first_body(serve):
    @http
    async def application(scope, receive, send):
        await send(start(200))
        raise ValueError("too late for the status, too early for the wire")

    assert serve(application).get("/").status == 500


def test_http_10_streams_to_the_end_of_the_connection(serve):
    server = serve(answering(start(), body(b"a", more_body=True), body(b"b")))
    with server.connect() as connection:
        connection.send(request("/", "Connection: keep-alive", version="1.0"))
        response = connection.read_response()
    assert response.body == b"ab"
    assert response.header("Transfer-Encoding") is None
    assert response.header("Connection") == "close"


@pytest.mark.parametrize("more", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("method", "status", "headers", "length"),
    [
        ("HEAD", 200, [(b"content-length", b"5")], "5"),
        ("GET", 204, [], None),
        ("GET", 204, [(b"content-length", b"5")], None),
        ("GET", 304, [(b"content-length", b"5")], "5"),
    ],
)
def test_a_response_without_a_body_leaves_the_connection_aligned(
    serve, method, status, headers, length, more
):
    messages = [body(b"he", more_body=True), body(b"llo")] if more else [body(b"hello")]
    with serve(answering(start(status, headers), *messages)).connect() as connection:
        for _ in range(2):
            response = connection.request(method, "/")
            assert response.status == status
            assert response.header("Content-Length") == length
            assert response.header("Transfer-Encoding") is None


@pytest.mark.parametrize("more", [False, True], ids=["whole", "streamed"])
def test_a_body_longer_than_its_content_length_is_cut_and_an_error(serve, caplog, more):
    head = start(headers=[(b"content-length", b"3")])
    messages = [body(b"he", more_body=True), body(b"llo")] if more else [body(b"hello")]
    with serve(answering(head, *messages)).connect() as connection:
        response = connection.request("GET", "/")
        assert response.body == b"hel"
        assert connection.request("GET", "/").body == b"hel"
    assert "longer than its Content-Length" in caplog.text


@pytest.mark.parametrize("more", [False, True], ids=["whole", "streamed"])
def test_a_body_shorter_than_its_content_length_closes_the_connection(serve, more):
    head = start(headers=[(b"content-length", b"9")])
    messages = [body(b"he", more_body=True), body(b"llo")] if more else [body(b"hello")]
    with serve(answering(head, *messages)).connect() as connection:
        connection.send(request() + request())
        received = connection.recv_to_eof()
    assert received.endswith(b"\r\n\r\nhello")
    assert received.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize(
    "header",
    [
        (b"x-a", b"1\r\nx-evil: 1"),
        (b"x-a", b"1\nx-evil: 1"),
        (b"x-a", b"1\rx-evil: 1"),
        (b"x-a", b"1\0"),
        (b"x-a\r\nx-evil", b"1"),
        (b"x a", b"1"),
        (b"x-a:", b"1"),
        (b"", b"1"),
        (b"connection", b"close\r\nx-evil: 1"),
        (b"upgrade", b"h2c"),
        (b"te", b"trailers"),
        (b"content-length", b"-1"),
        (b"content-length", b"+1"),
        (b"content-length", b"1, 1"),
        ("x-a", "1"),
        (b"x-a", 1),
        (b"x-a",),
    ],
    ids=repr,
)
def test_a_header_that_is_not_allowed_is_a_500_with_nothing_of_it(serve, header):
    server = serve(answering(start(headers=[(b"x-before", b"1"), header]), body(b"hello")))
    with server.connect() as connection:
        connection.send(request("/", "Connection: close"))
        received = connection.recv_to_eof()
    assert received.startswith(b"HTTP/1.1 500 ")
    assert b"x-before" not in received
    assert b"evil" not in received


def test_transfer_encoding_of_the_application_is_ignored(serve):
    server = serve(answering(start(headers=[(b"transfer-encoding", b"chunked")]), body(b"hello")))
    response = server.get("/")
    assert (response.body, response.header("Content-Length")) == (b"hello", "5")


@pytest.mark.parametrize("value", [b"close", b"keep-alive, Close"])
def test_the_application_may_have_the_connection_closed(serve, value):
    server = serve(answering(start(headers=[(b"connection", value)]), body(b"hello")))
    with server.connect() as connection:
        connection.send(request() + request())
        received = connection.recv_to_eof()
    assert received.startswith(b"HTTP/1.1 200 ")
    assert received.count(b"HTTP/1.1") == received.lower().count(b"connection:") == 1
    assert b"\r\nConnection: close\r\n" in received


def test_keep_alive_of_the_application_is_ignored(serve):
    headers = [(b"Connection", b"keep-alive"), (b"Keep-Alive", b"timeout=5")]
    with serve(answering(start(headers=headers), body(b"hello"))).connect() as connection:
        for _ in range(2):
            response = connection.request("GET", "/")
            assert (response.status, response.body) == (200, b"hello")
            assert response.header("Connection") is None
            assert response.header("Keep-Alive") is None


@pytest.mark.parametrize(
    "messages",
    [
        [body(b"hello")],
        [start(), start()],
        [start("200")],
        [start(True)],
        [start(99)],
        [start(101)],
        [start(1000)],
        [start(), {"type": "http.response.body", "body": "text"}],
        [start(), {"type": "http.response.trailers", "headers": []}],
        [{"type": "http.response.pathsend", "path": "/"}],
        [start(), {"type": "http.response.zerocopysend", "file": None}],
        [{"type": "websocket.accept"}],
        [{"type": "http.request"}],
        [{}],
        [start()],
        [],
    ],
    ids=repr,
)
def test_a_message_that_is_not_allowed_is_a_500(serve, caplog, messages):
    server = serve(answering(*messages))
    with server.connect() as connection:
        assert connection.request("GET", "/").status == 500
        assert connection.request("GET", "/").status == 500
    assert "The ASGI application" in caplog.text


def test_a_repeated_content_length_is_a_500(serve):
    headers = [(b"content-length", b"5"), (b"content-length", b"5")]
    assert serve(answering(start(headers=headers), body(b"hello"))).get("/").status == 500


def test_two_cannot_wait_for_the_body_at_a_time(serve, told):
    @http
    async def application(scope, receive, send):
        first = asyncio.ensure_future(receive())
        await asyncio.sleep(0)
        try:
            await receive()
        except RuntimeError:
            told.add("refused")
        told.add((await first)["body"])
        await send(start())
        await send(body())

    with serve(application).connect() as connection:
        connection.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n")
        told.wait(1)
        connection.send(b"abc")
        connection.read_response()
    assert told.items == ["refused", b"abc"]


def test_the_application_may_answer_after_a_message_that_was_not_allowed(serve):
    @http
    async def application(scope, receive, send):
        with contextlib.suppress(ValueError):
            await send(start(200, [(b"x", b"\n")]))
        await send(start(418))
        await send(body(b"short and stout"))

    assert serve(application).get("/").status == 418


def test_optional_keys_have_their_defaults(serve):
    server = serve(
        answering(
            {"type": "http.response.start", "status": 200, "more": "is ignored"},
            {"type": "http.response.body"},
        )
    )
    response = server.get("/")
    assert (response.status, response.body) == (200, b"")


def test_what_is_sent_after_the_response_is_ignored(serve, told):
    @http
    async def application(scope, receive, send):
        await send(start())
        await send(body(b"hello"))
        await send(body(b"more"))
        await send(start(500))
        told.add(await receive())
        told.add(await receive())

    with serve(application).connect() as connection:
        assert connection.request("GET", "/").body == b"hello"
        assert told.wait(2) == [{"type": "http.disconnect"}] * 2
        assert connection.request("GET", "/").body == b"hello"


@pytest.mark.parametrize(
    "error",
    [
        ValueError(),
        SystemExit(3),
        KeyboardInterrupt(),
        asyncio.CancelledError(),
        TimeoutError(),
        OSError("disk"),
        MemoryError(),
        RecursionError(),
        BaseExceptionGroup("several", [SystemExit()]),
    ],
    ids=repr,
)
def test_an_exception_before_the_response_is_a_500(serve, caplog, error):
    @http
    async def application(scope, receive, send):
        raise error

    with serve(application).connect() as connection:
        response = connection.request("GET", "/secret")
        assert (response.status, response.body) == (500, b"500: Internal Server Error")
        assert connection.request("GET", "/").status == 500
    assert caplog.records[-1].exc_info[1] is error


def test_an_exception_within_the_response_cuts_it(serve, caplog):
    @http
    async def application(scope, receive, send):
        await send(start())
        await send(body(b"hello", more_body=True))
        raise ValueError("oh")

    with serve(application).connect() as connection:
        connection.send(request())
        assert connection.recv_to_eof().endswith(b"5\r\nhello\r\n")
    assert "oh" in caplog.text


def test_a_response_that_is_not_completed_is_cut(serve, caplog):
    with serve(answering(start(), body(b"hello", more_body=True))).connect() as connection:
        connection.send(request())
        assert connection.recv_to_eof().endswith(b"5\r\nhello\r\n")
    assert "returned without a complete response" in caplog.text


def test_a_path_is_sent(serve, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(os.urandom(3_000_000))

    @http
    async def application(scope, receive, send):
        assert "http.response.pathsend" in scope["extensions"]
        await send(start(headers=[(b"content-type", b"x/y")]))
        await send({"type": "http.response.pathsend", "path": str(file)})

    with serve(application).connect() as connection:
        response = connection.request("GET", "/")
        assert response.body == file.read_bytes()
        assert response.header("Content-Length") == "3000000"
        assert connection.request("HEAD", "/").header("Content-Length") == "3000000"
        assert connection.request("GET", "/").status == 200


@pytest.mark.parametrize("path", ["/no/such/file", "/", 3])
def test_a_path_that_cannot_be_sent_is_a_500(serve, caplog, path):
    server = serve(answering(start(), {"type": "http.response.pathsend", "path": path}))
    assert server.get("/").status == 500


# --- clients that leave, or do not read ---------------------------------------------------


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_client_that_leaves_is_told_by_receive_and_by_send(serve, told, caplog, how):
    caplog.set_level(logging.INFO)

    @http
    async def application(scope, receive, send):
        assert (await receive())["type"] == "http.request"
        told.add("waiting")
        told.add(await receive())
        await asyncio.sleep(0.05)  # there is time for some work
        try:
            await send(start())
        except OSError as error:
            told.add(type(error).__mro__[1:2])
            raise

    server = serve(application)
    connection = server.connect()
    connection.send(request())
    told.wait(1)
    getattr(connection, how)()
    assert told.wait(3)[1:] == [{"type": "http.disconnect"}, (ConnectionResetError,)]
    assert not [record for record in caplog.records if record.name == "django_aioserve"]


def test_a_client_that_leaves_within_a_stream_is_told_by_send(serve, told, caplog):
    caplog.set_level(logging.INFO)

    class Framework(Exception):
        pass

    @http
    async def application(scope, receive, send):
        await send(start())
        try:
            while True:
                await send(body(b"x" * 1000, more_body=True))
                told.add("sent")
                await asyncio.sleep(0)
        except OSError:
            told.add("gone")
            raise Framework  # noqa: B904 - as Starlette's ClientDisconnect is raised

    with serve(application).connect() as connection:
        connection.send(request())
        connection.recv_until(b"x\r\n")
    wait_until(lambda: "gone" in told.items)
    assert not [record for record in caplog.records if record.name == "django_aioserve"]


def test_an_error_that_only_looks_like_a_client_that_left_is_logged(serve, caplog):
    @http
    async def application(scope, receive, send):
        first, second = ValueError("first"), ValueError("second")
        first.__context__, second.__context__ = second, first
        raise BaseExceptionGroup("both", [ConnectionResetError("a database"), first])

    assert serve(application).get("/").status == 500
    assert "both" in caplog.text


def test_a_group_of_errors_over_a_client_that_left_is_not_logged(serve, told, caplog):
    @http
    async def application(scope, receive, send):
        await receive()
        told.add("waiting")
        await receive()
        try:
            await send(start())
        except OSError as error:
            told.add("gone")
            raise ExceptionGroup("in tasks", [error]) from None

    with serve(application).connect() as connection:
        connection.send(request())
        told.wait(1)
    told.wait(2)
    assert not caplog.records


def test_a_client_that_reads_nothing_holds_up_the_application(serve, told):
    @http
    async def application(scope, receive, send):
        await send(start())
        for _ in range(300):
            await send(body(bytes(1 << 20), more_body=True))
            told.add("sent")

    server = serve(application)
    with server.connect() as connection:
        connection.send(request())
        told.wait(1)
        assert told.settle() < 30


def test_a_client_that_reads_nothing_for_too_long_is_cut_off(serve, told):
    @http
    async def application(scope, receive, send):
        await send(start())
        try:
            while True:
                await send(body(bytes(1 << 20), more_body=True))
        except OSError:
            told.add(await receive())

    with serve(application, write_timeout=0.3).connect() as connection:
        connection.send(request())
        assert told.wait(1) == [{"type": "http.disconnect"}]


def test_receive_may_be_cancelled_and_called_again(serve, told):
    @http
    async def application(scope, receive, send):
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(receive(), 0.05)
        told.add("cancelled")
        told.add(await read_all(receive))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(receive(), 0.05)
        both = await asyncio.gather(receive(), receive())
        told.add(both)

    with serve(application).connect() as connection:
        connection.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n")
        told.wait(1)
        connection.send(b"abc")
        told.wait(2)
    assert told.wait(3) == ["cancelled", b"abc", [{"type": "http.disconnect"}] * 2]


def test_an_application_that_asks_on_and_on_holds_up_nobody(serve, told):
    @http
    async def application(scope, receive, send):
        if scope["path"] != "/endless":
            await send(start())
            await send(body(b"served"))
            return
        while True:
            told.add((await receive())["type"])

    server = serve(application)
    with server.connect() as connection:
        connection.send(request("/endless"))
        told.wait(1)
    told.wait(3)
    with server.connect() as connection:
        assert connection.request("GET", "/").body == b"served"
    assert told.items[1:3] == ["http.disconnect"] * 2


# --- contexts, concurrency and the end ----------------------------------------------------


def test_each_request_has_a_context_of_its_own(serve):
    variable = contextvars.ContextVar("variable", default=b"none")

    @http
    async def application(scope, receive, send):
        before = variable.get()
        variable.set(scope["raw_path"])
        await asyncio.sleep(0.01)
        await send(start())
        await send(body(before + variable.get()))

    with serve(application).connect() as connection:
        assert connection.request("GET", "/a").body == b"none/a"
        assert connection.request("GET", "/b").body == b"none/b"


def test_a_long_poll_is_told_and_then_cancelled_when_the_server_ends(serve, told):
    @http
    async def application(scope, receive, send):
        await receive()
        told.add("waiting")
        told.add(await receive())
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            told.add("cancelled")
            raise

    server = serve(application)
    with server.connect() as connection:
        connection.send(request())
        told.wait(1)
        server.stop()
        assert told.wait(3)[1:] == [{"type": "http.disconnect"}, "cancelled"]
    server.start()


def test_work_after_the_response_holds_up_nobody(serve, told):
    released = asyncio.Event()

    @http
    async def application(scope, receive, send):
        await send(start())
        await send(body(b"done"))
        if scope["path"] == "/work":
            told.add(await receive())
            await released.wait()
            told.add("worked")

    server = serve(application)
    with server.connect() as connection:
        assert connection.request("GET", "/work").body == b"done"
        assert connection.request("GET", "/next").body == b"done"
    with server.connect() as connection:
        assert connection.request("GET", "/work", [("Connection", "close")]).body == b"done"
        assert connection.at_eof()
    assert told.items == [{"type": "http.disconnect"}] * 2
    server.loop.call_soon_threadsafe(released.set)
    assert told.wait(4)[2:] == ["worked"] * 2


def test_an_exception_after_the_response_is_logged(serve, caplog):
    failing = asyncio.Event()

    @http
    async def application(scope, receive, send):
        await send(start())
        await send(body(b"done"))
        await failing.wait()
        raise RuntimeError("too late to tell the client")

    server = serve(application)
    with server.connect() as connection:
        assert connection.request("GET", "/").body == b"done"
        server.loop.call_soon_threadsafe(failing.set)
        wait_until(lambda: "too late to tell the client" in caplog.text)
        assert connection.request("GET", "/").body == b"done"


def working(told, seconds):
    """An application that works on for so many seconds after its response."""

    async def application(scope, receive, send):
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            told.add((await receive())["type"])
            await send({"type": "lifespan.shutdown.complete"})
            return
        await send(start())
        await send(body(b"done"))
        try:
            await asyncio.sleep(seconds)
            told.add("worked")
        except asyncio.CancelledError:
            told.add("cancelled")
            raise

    return application


@pytest.mark.parametrize(
    ("seconds", "timeout", "end"), [(0.5, 10, "worked"), (60, 0.2, "cancelled")]
)
def test_work_after_the_response_ends_before_the_application_is_shut_down(
    serve, told, seconds, timeout, end
):
    server = serve(working(told, seconds), graceful_timeout=timeout)
    assert server.get("/").body == b"done"
    server.stop()
    assert told.items == [end, "lifespan.shutdown"]
    server.start()


def test_work_after_the_response_is_cancelled_when_the_server_has_no_time(serve, told):
    server = serve(working(told, 60))
    assert server.get("/").body == b"done"

    async def end_at_once():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(server.app.cleanup(), 0.2)

    server.run(end_at_once())
    assert told.items == ["cancelled", "lifespan.shutdown"]


# --- lifespan -----------------------------------------------------------------------------


def lifespan(told, *, startup="complete", shutdown="complete", message=""):
    async def application(scope, receive, send):
        if scope["type"] == "lifespan":
            told.add(await receive())
            scope["state"]["shared"] = shared = []
            scope["state"]["number"] = 1
            told.add(shared)
            await send({"type": f"lifespan.startup.{startup}", "message": message})
            told.add(await receive())
            await send({"type": f"lifespan.shutdown.{shutdown}", "message": message})
            return
        scope["state"]["number"] += 1
        scope["state"]["shared"].append(scope["state"]["number"])
        await send(start())
        await send(body())

    return application


def test_startup_and_shutdown(serve, told):
    server = serve(lifespan(told))
    server.get("/")
    server.get("/")
    assert told.items == [{"type": "lifespan.startup"}, [2, 2]]
    server.stop()
    assert told.items[2:] == [{"type": "lifespan.shutdown"}]
    server.start()


def test_a_failed_startup_fails_the_server(serve, told):
    with pytest.raises(LifespanFailed, match="no database"):
        serve(lifespan(told, startup="failed", message="no database"))


def test_a_failed_startup_that_also_raises_fails_the_server(serve):
    async def application(scope, receive, send):
        await receive()
        await send({"type": "lifespan.startup.failed"})
        raise ValueError("as Starlette does")

    with pytest.raises(LifespanFailed, match="start-up failed"):
        serve(application)


def test_a_failed_shutdown_is_logged(serve, told, caplog):
    server = serve(lifespan(told, shutdown="failed", message="unsaved"))
    server.stop()
    assert "shutdown failed: unsaved" in caplog.text
    server.start()


def test_an_application_without_lifespan_is_served_all_the_same(serve, caplog):
    server = serve(answering(start(), body(b"ok")))
    assert server.get("/").body == b"ok"
    assert not caplog.records


def test_a_startup_that_raises_is_told_and_the_application_is_served(serve, caplog):
    async def application(scope, receive, send):
        if scope["type"] == "lifespan":
            await receive()
            raise ConnectionError("the cache is away")
        await send(start())
        await send(body(b"ok"))

    assert serve(application).get("/").body == b"ok"
    assert "start-up raised ConnectionError('the cache is away')" in caplog.text


def test_an_application_that_ignores_lifespan_is_served_all_the_same(serve):
    async def application(scope, receive, send):
        if scope["type"] == "http":
            await send(start())
            await send(body(b"ok"))

    assert serve(application).get("/").body == b"ok"


def test_a_shutdown_that_hangs_is_given_up(serve, caplog):
    async def application(scope, receive, send):
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await asyncio.sleep(60)

    server = serve(application, graceful_timeout=0.2)
    server.stop()
    assert "more than 0.2 s" in caplog.text
    server.start()


def test_an_error_during_the_lifespan_is_logged(serve, caplog):
    async def application(scope, receive, send):
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            raise ValueError("later")
        await send(start())
        await send(body(b"ok"))

    server = serve(application)
    assert server.get("/").body == b"ok"
    wait_until(lambda: "later" in caplog.text)


def test_a_lifespan_message_out_of_order_is_refused(serve, told):
    async def application(scope, receive, send):
        if scope["type"] == "lifespan":
            await receive()
            for kind in ("lifespan.shutdown.complete", "http.response.start"):
                try:
                    await send({"type": kind})
                except ValueError as error:
                    told.add(str(error))
            await send({"type": "lifespan.startup.complete"})
            try:
                await send({"type": "lifespan.startup.complete"})
            except ValueError as error:
                told.add(str(error))

    serve(application)
    assert len(told.wait(3)) == 3


def test_only_a_callable_is_an_application():
    with pytest.raises(TypeError, match="must be callable"):
        ASGIBridge("project.asgi.application", Config(), None)


# --- WebSocket: what the tests stand on ---------------------------------------------------


def websocket(function):
    """An application for WebSockets only."""

    async def application(scope, receive, send):
        if scope["type"] != "websocket":
            raise NotImplementedError(scope["type"])
        await function(scope, receive, send)

    return application


def echoing(told=None, **accept):
    @websocket
    async def application(scope, receive, send):
        assert await receive() == {"type": "websocket.connect"}
        await send({"type": "websocket.accept", **accept})
        while True:
            event = await receive()
            if event["type"] == "websocket.disconnect":
                if told is not None:
                    told.add(event)
                return
            await send({**event, "type": "websocket.send"})

    return application


KEY = "dGhlIHNhbXBsZSBub25jZQ=="
HANDSHAKE = {
    "Host": "localhost",
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Key": KEY,
    "Sec-WebSocket-Version": "13",
}


def handshake(method="GET", version="1.1", target="/", **headers):
    lines = [f"{method} {target} HTTP/{version}"]
    merged = HANDSHAKE | {name.replace("_", "-"): value for name, value in headers.items()}
    lines += [f"{name}: {value}" for name, value in merged.items() if value is not None]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


@contextlib.contextmanager
def raw_websocket(server, **headers):
    """A raw connection with an open WebSocket on it."""
    with server.connect() as connection:
        connection.send(handshake(**headers))
        response = connection.read_response()
        assert response.status == 101, response
        assert response.header("Sec-WebSocket-Accept") == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
        yield connection


def read_frame(connection):
    """First byte and payload of the next frame of the server, which are never masked."""
    first, length = connection.recv_exactly(2)
    if length == 126:
        (length,) = struct.unpack("!H", connection.recv_exactly(2))
    elif length == 127:
        (length,) = struct.unpack("!Q", connection.recv_exactly(8))
    assert length < 1 << 62
    return first, connection.recv_exactly(length)


def read_close(connection):
    """Code and reason of the close frame that comes next, after which the connection ends."""
    first, payload = read_frame(connection)
    assert first == 0x88
    assert connection.at_eof()
    return (struct.unpack("!H", payload[:2])[0], payload[2:].decode()) if payload else (1005, "")


def close_frame(code=1000, reason=b""):
    return client_frame(8, struct.pack("!H", code) + reason)


def ws_url(server, target="/"):
    return f"ws://127.0.0.1:{server.port}{target}"


# --- WebSocket: the handshake -------------------------------------------------------------


def test_the_scope_of_a_websocket(serve, told):
    @websocket
    async def application(scope, receive, send):
        told.add(scope)
        await send({"type": "websocket.accept", "subprotocol": "b"})

    server = serve(application)
    with raw_websocket(server, target="/%C3%A9?x", Sec_WebSocket_Protocol="a, b,c") as connection:
        read_frame(connection)
    (scope,) = told.items
    assert (scope["path"], scope["raw_path"], scope["query_string"]) == ("/é", b"/%C3%A9", b"x")
    assert (scope["scheme"], scope["http_version"]) == ("ws", "1.1")
    assert scope["subprotocols"] == ["a", "b", "c"]
    assert scope["extensions"] == {"websocket.http.response": {}}
    assert (b"sec-websocket-key", KEY.encode()) in scope["headers"]


def test_a_trusted_proxy_tells_that_a_websocket_is_secure(serve, told):
    @websocket
    async def application(scope, receive, send):
        told.add(scope["scheme"])
        await send({"type": "websocket.close"})

    with serve(application).connect() as connection:
        connection.send(handshake(X_Forwarded_Proto="https"))
        connection.read_response()
    assert told.items == ["wss"]


def test_a_websocket_is_accepted_with_subprotocol_and_headers(serve):
    accept = {"subprotocol": "two", "headers": [(b"x-a", b"1"), (b"set-cookie", b"a=b")]}
    server = serve(echoing(**accept))
    with ws_connect(ws_url(server), subprotocols=["one", "two"]) as client:
        assert client.subprotocol == "two"
        assert client.response.headers["X-A"] == "1"
        assert client.response.headers["Set-Cookie"] == "a=b"
        client.send("hi")
        assert client.recv() == "hi"


def test_no_subprotocol_is_chosen_for_the_application(serve):
    with ws_connect(ws_url(serve(echoing())), subprotocols=["one"]) as client:
        assert client.subprotocol is None


@pytest.mark.parametrize(
    "accept",
    [
        {"subprotocol": "three"},
        {"subprotocol": 3},
        {"headers": [(b"sec-websocket-protocol", b"one")]},
        {"headers": [(b"Sec-WebSocket-Accept", b"x")]},
        {"headers": [(b"x", b"1\r\nx-evil: 1")]},
        {"headers": [(b"upgrade", b"h2c")]},
        {"headers": [(b"content-length", b"3")]},
        {"headers": [("x", "1")]},
    ],
    ids=repr,
)
def test_a_websocket_that_cannot_be_accepted_so_is_a_500(serve, caplog, accept):
    with serve(echoing(**accept)).connect() as connection:
        connection.send(handshake(Sec_WebSocket_Protocol="one"))
        response = connection.read_response()
    assert response.status == 500
    assert response.header("x-evil") is None
    assert caplog.records


def test_a_refused_websocket_is_a_403(serve, told):
    @websocket
    async def application(scope, receive, send):
        await receive()
        await send({"type": "websocket.close", "code": 4000})
        told.add(await receive())
        try:
            await send({"type": "websocket.accept"})
        except OSError:
            told.add("closed")

    server = serve(application)
    with pytest.raises(InvalidStatus) as refusal:
        ws_connect(ws_url(server))
    assert refusal.value.response.status_code == 403
    assert told.wait(2) == [{"type": "websocket.disconnect", "code": 1006, "reason": ""}, "closed"]


def test_a_websocket_may_be_refused_with_a_response(serve, told):
    @websocket
    async def application(scope, receive, send):
        await receive()
        await send(
            {
                "type": "websocket.http.response.start",
                "status": 401,
                "headers": [(b"www-authenticate", b"Basic")],
            }
        )
        await send({"type": "websocket.http.response.body", "body": b"who ", "more_body": True})
        await send({"type": "websocket.http.response.body", "body": b"are you"})
        told.add(await receive())

    with serve(application).connect() as connection:
        connection.send(handshake())
        response = connection.read_response()
        assert (response.status, response.body) == (401, b"who are you")
        assert response.header("WWW-Authenticate") == "Basic"
        assert response.header("Connection") == "close"
        assert connection.at_eof()
    assert told.wait() == [{"type": "websocket.disconnect", "code": 1006, "reason": ""}]


@pytest.mark.parametrize(
    "messages",
    [
        [{"type": "websocket.http.response.start", "status": 401}, {"type": "websocket.accept"}],
        [{"type": "websocket.http.response.start", "status": 401}, {"type": "websocket.close"}],
        [{"type": "websocket.http.response.start", "status": 401}],
        [{"type": "websocket.http.response.body"}],
        [{"type": "websocket.send", "text": "early"}],
        [{"type": "http.response.start", "status": 200}],
        [],
    ],
    ids=repr,
)
def test_another_answer_to_a_handshake_is_a_500(serve, caplog, messages):
    @websocket
    async def application(scope, receive, send):
        for message in messages:
            await send(message)

    with serve(application).connect() as connection:
        connection.send(handshake())
        assert connection.read_response().status == 500
    assert "The ASGI application" in caplog.text


@pytest.mark.parametrize(
    "messages",
    [
        [{"type": "websocket.close"}],
        [
            {"type": "websocket.http.response.start", "status": 403},
            {"type": "websocket.http.response.body"},
        ],
    ],
)
def test_work_after_a_refusal_does_not_hold_up_the_client(serve, told, messages):
    released = asyncio.Event()

    async def application(scope, receive, send):
        if scope["type"] == "websocket":
            for message in messages:
                await send(message)
            await released.wait()
            told.add("worked")

    server = serve(application)
    with server.connect() as connection:
        connection.send(handshake())
        assert connection.read_response().status == 403
        assert connection.at_eof()
    server.loop.call_soon_threadsafe(released.set)
    told.wait(1)


def test_a_refusal_longer_than_its_content_length_is_cut(serve, caplog):
    @websocket
    async def application(scope, receive, send):
        headers = [(b"content-length", b"1")]
        await send({"type": "websocket.http.response.start", "status": 401, "headers": headers})
        await send({"type": "websocket.http.response.body", "body": b"abc"})

    with serve(application).connect() as connection:
        connection.send(handshake())
        assert connection.recv_to_eof().endswith(b"\r\n\r\na")
    assert "longer than its Content-Length" in caplog.text


def test_a_refusal_that_is_not_completed_is_cut(serve, caplog):
    @websocket
    async def application(scope, receive, send):
        await send({"type": "websocket.http.response.start", "status": 401})
        await send({"type": "websocket.http.response.body", "body": b"a", "more_body": True})

    with serve(application).connect() as connection:
        connection.send(handshake())
        assert connection.recv_to_eof().endswith(b"1\r\na\r\n")
    assert caplog.records


def test_an_exception_before_a_websocket_is_accepted_is_a_500(serve, caplog):
    @websocket
    async def application(scope, receive, send):
        raise ValueError("oh")

    with pytest.raises(InvalidStatus) as refusal:
        ws_connect(ws_url(serve(application)))
    assert refusal.value.response.status_code == 500
    assert "oh" in caplog.text


@pytest.mark.parametrize("version", ["8", "12", "14", "", None])
def test_a_version_that_is_not_supported_is_answered_with_the_one_that_is(serve, version):
    with serve(echoing()).connect() as connection:
        connection.send(handshake(Sec_WebSocket_Version=version))
        response = connection.read_response()
        assert response.status == 426
        assert response.header("Sec-WebSocket-Version") == "13"
        assert response.header("Upgrade") == "websocket"
        connection.send(handshake())
        assert connection.read_response().status == 101


@pytest.mark.parametrize("key", [None, "", "abc", "AAAA", KEY[:-2], KEY + "AAAA", "ä" * 24])
def test_a_key_that_is_not_valid_is_a_400(serve, key):
    with serve(echoing()).connect() as connection:
        connection.send(handshake(Sec_WebSocket_Key=key))
        assert connection.read_response().status == 400


@pytest.mark.parametrize(
    "options",
    [
        {"method": "POST", "Content_Length": "0"},
        {"version": "1.0"},
        {"Upgrade": "h2c"},
        {"Connection": "keep-alive"},
    ],
    ids=repr,
)
def test_what_asks_for_no_websocket_is_http(serve, told, options):
    scope = scope_of(serve, told, handshake(**options))
    assert scope["type"] == "http"


def test_connection_may_name_more_than_the_upgrade(serve):
    with raw_websocket(serve(echoing()), Connection="keep-alive, Upgrade", Upgrade="WebSocket"):
        pass


def test_frames_that_come_with_the_handshake_are_taken(serve):
    with serve(echoing()).connect() as connection:
        connection.send(handshake() + client_frame(1, b"early"))
        assert connection.read_response().status == 101
        assert read_frame(connection) == (0x81, b"early")


# --- WebSocket: messages ------------------------------------------------------------------


@pytest.mark.parametrize("compression", [None, "deflate"])
@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536, 1 << 20])
def test_messages_go_both_ways(serve, size, compression):
    text, data = ("ü" * (size // 2 + 1))[: size // 2], os.urandom(size)
    with ws_connect(ws_url(serve(echoing())), compression=compression, max_size=None) as client:
        for message in (text, data, text):
            client.send(message)
            assert client.recv() == message


def test_the_pieces_of_a_message_arrive_as_one(serve):
    with ws_connect(ws_url(serve(echoing()))) as client:
        client.send(iter(["a", "", "ü", "b"]))
        assert client.recv() == "aüb"


@pytest.mark.parametrize(
    "message",
    [
        {"text": "a", "bytes": b"a"},
        {"text": None, "bytes": None},
        {},
        {"text": b"a"},
        {"bytes": "a"},
        {"text": "\ud800"},
        {"type": "websocket.accept"},
        {"type": "websocket.close", "code": 1006},
        {"type": "websocket.close", "code": "1000"},
        {"type": "http.response.start", "status": 200},
    ],
    ids=repr,
)
def test_a_message_that_cannot_be_sent_closes_with_1011(serve, caplog, message):
    @websocket
    async def application(scope, receive, send):
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.send", **message})

    with ws_connect(ws_url(serve(application))) as client, pytest.raises(ConnectionClosed) as end:
        client.recv()
    assert end.value.rcvd.code == 1011
    assert "The ASGI application raised an exception" in caplog.text


def test_one_of_text_and_bytes_may_be_none(serve):
    @websocket
    async def application(scope, receive, send):
        await send({"type": "websocket.accept", "subprotocol": None})
        await send({"type": "websocket.send", "text": "a", "bytes": None})
        await send({"type": "websocket.send", "text": None, "bytes": bytearray(b"b")})
        await send({"type": "websocket.close", "code": None, "reason": None})

    with ws_connect(ws_url(serve(application))) as client:
        assert client.recv() == "a"
        assert client.recv() == b"b"
        with pytest.raises(ConnectionClosed) as end:
            client.recv()
    assert end.value.rcvd.code == 1000


def test_pings_are_answered_in_order_while_the_application_is_busy(serve):
    @websocket
    async def application(scope, receive, send):
        await send({"type": "websocket.accept"})
        await asyncio.sleep(60)

    with raw_websocket(serve(application)) as connection:
        connection.send(b"".join(client_frame(9, b"%d" % n) for n in range(10)))
        for number in range(10):
            assert read_frame(connection) == (0x8A, b"%d" % number)


def test_a_ping_within_a_message_is_answered_before_it_is_complete(serve):
    with raw_websocket(serve(echoing())) as connection:
        connection.send(client_frame(1, b"a", fin=False) + client_frame(9, b"ping"))
        assert read_frame(connection) == (0x8A, b"ping")
        connection.send(client_frame(10, b"unasked") + client_frame(0, b"b"))
        assert read_frame(connection) == (0x81, b"ab")


def test_a_flood_of_small_frames_is_answered(serve):
    with raw_websocket(serve(echoing())) as connection:
        flood = client_frame(9) * 50_000 + client_frame(1, b"end")
        sender = threading.Thread(target=connection.send, args=(flood,))
        sender.start()
        received = connection.recv_until(b"\x81\x03end")
        sender.join()
        assert received == b"\x8a\x00" * 50_000 + b"\x81\x03end"


def test_a_flood_of_messages_that_inflate_holds_up_nobody(serve):
    @websocket
    async def application(scope, receive, send):
        await receive()
        await send({"type": "websocket.accept"})
        rounds = 0

        async def count():
            nonlocal rounds
            while True:
                rounds += 1
                await asyncio.sleep(0)

        await receive()
        counting = asyncio.create_task(count())
        for _ in range(49):
            await receive()
        counting.cancel()
        await send({"type": "websocket.send", "text": str(rounds)})

    extensions = {"Sec_WebSocket_Extensions": "permessage-deflate"}
    with raw_websocket(serve(application), **extensions) as connection:
        connection.send(client_frame(0x2, deflate(bytes(100_000)), rsv=4) * 50)
        first, rounds = read_frame(connection)
        assert first == 0x81
        # Each is more than may wait: the loop goes round for each.
        assert int(rounds) >= 49


def test_messages_that_the_application_does_not_take_stay_with_the_client(serve):
    gate = asyncio.Event()

    @websocket
    async def application(scope, receive, send):
        await receive()
        await send({"type": "websocket.accept"})
        await gate.wait()
        size = 0
        while (event := await receive())["type"] == "websocket.receive":
            size += len(event["bytes"])
            if not event["bytes"]:
                await send({"type": "websocket.send", "text": str(size)})

    server = serve(application)
    frame = client_frame(2, bytes(60_000))
    with raw_websocket(server) as connection:
        data = frame * 400
        sent = send_until_blocked(connection, data)
        server.loop.call_soon_threadsafe(gate.set)
        connection.send(data[sent:])
        connection.send(client_frame(2))
        assert read_frame(connection) == (0x81, b"%d" % (400 * 60_000))


def test_a_slow_client_gets_everything_and_the_latest_pong(serve, told):
    @websocket
    async def application(scope, receive, send):
        await send({"type": "websocket.accept"})
        for number in range(40):
            await send({"type": "websocket.send", "bytes": bytes([number]) * (1 << 20)})
            told.add(number)

    with raw_websocket(serve(application)) as connection:
        told.wait(1)
        assert told.settle() < 40
        connection.send(client_frame(9, b"old"))
        connection.send(client_frame(9, b"new"))
        frames = [read_frame(connection) for _ in range(42)]
    messages = [payload for first, payload in frames if first == 0x82]
    assert messages == [bytes([number]) * (1 << 20) for number in range(40)]
    assert [payload for first, payload in frames if first == 0x8A] == [b"new"]


def test_an_application_that_waits_for_a_slow_client_is_told_of_a_drain(serve, told):
    @websocket
    async def application(scope, receive, send):
        await receive()
        await send({"type": "websocket.accept"})
        try:
            while True:
                await send({"type": "websocket.send", "bytes": bytes(1 << 20)})
                told.add("sent")
        except OSError:
            told.items.clear()
            told.add(await receive())

    server = serve(application)
    with raw_websocket(server) as connection:
        told.wait(1)
        told.settle()
        server.run(server.app[BRIDGE].close_streams(0))
        while (frame := read_frame(connection))[0] == 0x82:
            pass
        assert frame[0] == 0x88
        connection.send(close_frame(1012))
        assert connection.at_eof()
    assert told.wait()[0]["code"] == 1012


def test_a_client_that_reads_no_messages_holds_up_the_application(serve, told):
    @websocket
    async def application(scope, receive, send):
        await send({"type": "websocket.accept"})
        for _ in range(300):
            await send({"type": "websocket.send", "bytes": bytes(1 << 20)})
            told.add("sent")

    with raw_websocket(serve(application)):
        told.wait(1)
        assert told.settle() < 30


def test_a_client_that_reads_no_messages_for_too_long_is_cut_off(serve, told):
    @websocket
    async def application(scope, receive, send):
        await receive()
        await send({"type": "websocket.accept"})
        try:
            while True:
                await send({"type": "websocket.send", "bytes": bytes(1 << 20)})
        except OSError:
            told.add(await receive())

    with raw_websocket(serve(application, write_timeout=0.3)):
        assert told.wait() == [{"type": "websocket.disconnect", "code": 1006, "reason": ""}]


# --- WebSocket: compression ---------------------------------------------------------------


def test_compression_is_agreed_upon_with_a_small_window(serve):
    server = serve(echoing())
    offer = "permessage-deflate; client_max_window_bits"
    with raw_websocket(server, Sec_WebSocket_Extensions=offer) as connection:
        message = b"hello " * 100
        for _ in range(2):
            connection.send(client_frame(1, deflate(message), rsv=4))
            first, payload = read_frame(connection)
            assert first == 0xC1
            assert len(payload) < 60
        # The second one refers to the first: it takes a window that goes on.
        with pytest.raises(zlib.error):
            zlib.decompress(payload + b"\x00\x00\xff\xff", -12)


def test_compression_without_a_window_that_goes_on(serve):
    offer = "permessage-deflate; server_no_context_takeover; server_max_window_bits=10"
    with raw_websocket(serve(echoing()), Sec_WebSocket_Extensions=offer) as connection:
        message = b"hello " * 100
        for _ in range(2):
            connection.send(client_frame(1, message))
            first, payload = read_frame(connection)
            assert first == 0xC1
            inflater = zlib.decompressobj(-10)
            assert inflater.decompress(payload + b"\x00\x00\xff\xff") == message


@pytest.mark.parametrize("offer", [None, "x-webkit-deflate-frame", "permessage-deflate; foo"])
def test_no_compression_that_was_not_offered(serve, offer):
    with serve(echoing()).connect() as connection:
        connection.send(handshake(Sec_WebSocket_Extensions=offer))
        assert connection.read_response().header("Sec-WebSocket-Extensions") is None
        connection.send(client_frame(1, b"x" * 1000))
        assert read_frame(connection)[0] == 0x81


# --- WebSocket: the end -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frame", "code", "reason"),
    [
        (close_frame(1000, b"bye"), 1000, "bye"),
        (close_frame(1001), 1001, ""),
        (close_frame(3333, "tschüß".encode()), 3333, "tschüß"),
        (client_frame(8), 1005, ""),
    ],
)
def test_a_client_that_closes_is_echoed_and_told(serve, told, frame, code, reason):
    with raw_websocket(serve(echoing(told))) as connection:
        connection.send(client_frame(1, b"first") + frame)
        assert read_frame(connection) == (0x81, b"first")
        assert read_close(connection) == (code, "")
    assert told.wait() == [{"type": "websocket.disconnect", "code": code, "reason": reason}]


def test_a_close_is_echoed_while_the_application_is_busy(serve):
    @websocket
    async def application(scope, receive, send):
        await send({"type": "websocket.accept"})
        await asyncio.sleep(60)

    with raw_websocket(serve(application)) as connection:
        connection.send(close_frame())
        assert read_close(connection) == (1000, "")


def test_a_client_that_closes_and_vanishes_is_told_as_it_closed(serve, told):
    gate = asyncio.Event()

    @websocket
    async def application(scope, receive, send):
        await send({"type": "websocket.accept"})
        await gate.wait()
        for _ in range(3):
            told.add(await receive())

    server = serve(application)
    with raw_websocket(server) as connection:
        connection.send(client_frame(1, b"a") + close_frame(4000, b"b"))
    exchange = wait_until(lambda: next(iter(server.app[BRIDGE]._service.lasting), None))
    wait_until(exchange._gone.is_set)
    server.loop.call_soon_threadsafe(gate.set)
    assert told.wait(3) == [
        {"type": "websocket.connect"},
        {"type": "websocket.receive", "text": "a"},
        {"type": "websocket.disconnect", "code": 4000, "reason": "b"},
    ]


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_client_that_vanishes_is_1006(serve, told, how):
    server = serve(echoing(told))
    connection = server.connect()
    connection.send(handshake())
    connection.read_response()
    getattr(connection, how)()
    assert told.wait() == [{"type": "websocket.disconnect", "code": 1006, "reason": ""}]


def test_a_websocket_that_asks_on_and_on_holds_up_nobody(serve, told):
    async def application(scope, receive, send):
        if scope["type"] == "http":
            await send(start())
            await send(body(b"served"))
            return
        if scope["type"] != "websocket":
            raise NotImplementedError(scope["type"])
        await receive()
        await send({"type": "websocket.accept"})
        while True:
            told.add((await receive())["type"])

    server = serve(application)
    with raw_websocket(server) as connection:
        connection.send(close_frame())
        told.wait(2)
    with server.connect() as connection:
        assert connection.request("GET", "/").body == b"served"
    assert told.items[:2] == ["websocket.disconnect"] * 2


def test_a_client_that_vanishes_before_it_is_accepted_is_1006(serve, told):
    @websocket
    async def application(scope, receive, send):
        told.add(await receive())
        told.add(await receive())
        try:
            await send({"type": "websocket.accept"})
        except OSError:
            told.add("gone")
            raise

    connection = serve(application).connect()
    connection.send(handshake())
    told.wait(1)
    connection.reset()
    assert told.wait(3)[1:] == [
        {"type": "websocket.disconnect", "code": 1006, "reason": ""},
        "gone",
    ]


@pytest.mark.parametrize(
    ("message", "code", "reason"),
    [
        ({}, 1000, ""),
        ({"code": 1001}, 1001, ""),
        ({"code": 4321, "reason": "tschüß"}, 4321, "tschüß"),
        ({"code": 1000, "reason": "ü" * 100}, 1000, "ü" * 61),
    ],
)
def test_the_application_closes(serve, told, message, code, reason):
    @websocket
    async def application(scope, receive, send):
        await receive()
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.close", **message})
        told.add((await receive())["code"])
        for late in ({"type": "websocket.send", "text": "late"}, {"type": "websocket.close"}):
            try:
                await send(late)
            except OSError:
                told.add("closed")

    with raw_websocket(serve(application)) as connection:
        connection.send(client_frame(1, b"not taken"))
        first, payload = read_frame(connection)
        assert first == 0x88
        assert struct.unpack("!H", payload[:2])[0] == code
        assert payload[2:].decode() == reason
        connection.send(client_frame(9, b"no pong any more") + close_frame(code))
        assert connection.at_eof()
    assert told.wait(3) == [code, "closed", "closed"]


def test_both_sides_may_close_at_the_same_time(serve):
    gate = asyncio.Event()

    @websocket
    async def application(scope, receive, send):
        await send({"type": "websocket.accept"})
        await gate.wait()
        await send({"type": "websocket.close", "code": 4001})

    server = serve(application)
    with raw_websocket(server) as connection:
        connection.send(client_frame(9) + close_frame(4000))
        assert read_frame(connection) == (0x8A, b"")
        server.loop.call_soon_threadsafe(gate.set)
        assert read_close(connection) == (4000, "")


def test_an_application_that_returns_closes_with_1000(serve):
    @websocket
    async def application(scope, receive, send):
        await send({"type": "websocket.accept"})

    with ws_connect(ws_url(serve(application))) as client, pytest.raises(ConnectionClosed) as end:
        client.recv()
    assert end.value.rcvd.code == 1000


def test_an_application_that_crashes_closes_with_1011(serve, caplog):
    @websocket
    async def application(scope, receive, send):
        await send({"type": "websocket.accept"})
        raise SystemExit(3)

    server = serve(application)
    for _ in range(2):
        with ws_connect(ws_url(server)) as client, pytest.raises(ConnectionClosed) as end:
            client.recv()
        assert end.value.rcvd.code == 1011
    assert "SystemExit" in caplog.text


def test_a_client_that_does_not_answer_a_close_is_cut_off(serve, monkeypatch):
    monkeypatch.setattr(asgi_websocket, "_CLOSE_TIMEOUT", 0.2)

    @websocket
    async def application(scope, receive, send):
        await send({"type": "websocket.accept"})

    with raw_websocket(serve(application)) as connection:
        assert read_close(connection) == (1000, "")


@pytest.mark.parametrize(
    ("data", "code"),
    [
        pytest.param(b"\x81\x01a", 1002, id="no mask"),
        pytest.param(client_frame(3), 1002, id="opcode"),
        pytest.param(client_frame(1, b"a", rsv=4), 1002, id="reserved bit"),
        pytest.param(client_frame(0, b"a"), 1002, id="continuation"),
        pytest.param(client_frame(9, b"x" * 126), 1002, id="long ping"),
        pytest.param(close_frame(1006), 1002, id="close code"),
        pytest.param(client_frame(1, b"\xff"), 1007, id="no UTF-8"),
        pytest.param(client_frame(2, bytes(2_000_000)), 1009, id="too large"),
        pytest.param(
            client_frame(2, bytes(600_000), fin=False) * 1 + client_frame(0, bytes(600_000)),
            1009,
            id="too large in pieces",
        ),
    ],
)
def test_a_client_that_breaks_the_protocol_is_told_how(serve, told, data, code):
    with raw_websocket(serve(echoing(told))) as connection:
        connection.send(client_frame(1, b"fine") + data + client_frame(1, b"not taken"))
        assert read_frame(connection) == (0x81, b"fine")
        assert read_close(connection)[0] == code
    assert told.wait()[0]["code"] == code


def test_the_largest_message_is_configured(serve):
    with ws_connect(ws_url(serve(echoing(), websocket_max_size=100)), compression=None) as client:
        client.send("x" * 100)
        assert client.recv() == "x" * 100
        client.send("x" * 101)
        with pytest.raises(ConnectionClosed) as end:
            client.recv()
    assert end.value.rcvd.code == 1009


def test_a_large_message_is_refused_while_it_is_still_on_its_way(serve):
    frame = client_frame(2, bytes(8 << 20))[: 1 << 20]  # takes longer than a heartbeat
    with raw_websocket(serve(echoing())) as connection:
        connection.send(frame)
        assert read_close(connection) == (1009, "more than 1048576 bytes")


# --- WebSocket: heartbeat and drain -------------------------------------------------------


def test_a_silent_client_is_pinged_and_then_cut_off(serve, told):
    server = serve(echoing(told), websocket_heartbeat=0.2)
    with raw_websocket(server) as connection:
        assert read_frame(connection) == (0x89, b"")
        assert connection.at_eof()
    assert told.wait() == [{"type": "websocket.disconnect", "code": 1006, "reason": ""}]


def test_a_client_that_answers_pings_is_not_cut_off(serve):
    server = serve(echoing(), websocket_heartbeat=0.1)
    with raw_websocket(server) as connection:
        for _ in range(5):
            assert read_frame(connection) == (0x89, b"")
            connection.send(client_frame(10))
        connection.send(client_frame(1, b"alive"))
        assert read_frame(connection) in {(0x81, b"alive"), (0x89, b"")}


def test_without_a_heartbeat_nobody_is_pinged(serve):
    with raw_websocket(serve(echoing(), websocket_heartbeat=0.0)) as connection:
        connection.socket.settimeout(0.3)
        with pytest.raises(TimeoutError):
            read_frame(connection)


def test_a_drain_closes_websockets_with_1012_one_after_the_other(serve, told):
    server = serve(echoing(told))
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(raw_websocket(server)) for _ in range(5)]
        began = time.monotonic()
        server.run(server.app[BRIDGE].close_streams(0.5))
        assert time.monotonic() - began >= 0.3
        for connection in connections:
            first, payload = read_frame(connection)
            assert (first, payload[:2]) == (0x88, struct.pack("!H", 1012))
            connection.send(close_frame(1012))
            assert connection.at_eof()
    assert [event["code"] for event in told.wait(5)] == [1012] * 5


def test_a_drain_ends_event_streams_completely(serve, told):
    @http
    async def application(scope, receive, send):
        await receive()
        await send(start(headers=[(b"content-type", b"text/event-stream")]))
        await send(body(b"data: 1\n\n", more_body=True))
        told.add(await receive())
        with contextlib.suppress(OSError):
            await send(body(b"data: 2\n\n", more_body=True))
            told.add("sent")

    server = serve(application)
    with server.connect() as connection:
        connection.send(request())
        connection.recv_until(b"data: 1\n\n")
        server.run(server.app[BRIDGE].close_streams(0))
        assert connection.recv_until(b"0\r\n\r\n") == b"\r\n0\r\n\r\n"
        assert connection.at_eof()
    assert told.items == [{"type": "http.disconnect"}]


def test_a_drain_leaves_other_responses_alone(serve, told):
    gate = asyncio.Event()

    @http
    async def application(scope, receive, send):
        await send(start())
        await send(body(b"a", more_body=True))
        await gate.wait()
        await send(body(b"b"))

    server = serve(application)
    with server.connect() as connection:
        connection.send(request())
        connection.recv_until(b"a\r\n")
        server.run(server.app[BRIDGE].close_streams(0))
        server.loop.call_soon_threadsafe(gate.set)
        assert connection.recv_until(b"0\r\n\r\n") == b"1\r\nb\r\n0\r\n\r\n"


def test_a_server_that_ends_closes_websockets_with_1012(serve, told):
    server = serve(echoing(told))
    with raw_websocket(server) as connection:
        server.stop()
        first, payload = read_frame(connection)
        assert (first, payload[:2]) == (0x88, struct.pack("!H", 1012))
    assert told.wait()[0]["code"] == 1012
    server.start()


def test_each_websocket_has_a_context_of_its_own(serve):
    variable = contextvars.ContextVar("variable", default="none")

    @websocket
    async def application(scope, receive, send):
        await send({"type": "websocket.accept"})
        await receive()
        for _ in range(2):
            text = (await receive())["text"]
            await send({"type": "websocket.send", "text": variable.get()})
            variable.set(text)

    server = serve(application)
    with ws_connect(ws_url(server)) as one, ws_connect(ws_url(server)) as two:
        for client, text in ((one, "1"), (two, "2"), (one, "3"), (two, "4")):
            client.send(text)
        assert [one.recv(), one.recv()] == ["none", "1"]
        assert [two.recv(), two.recv()] == ["none", "2"]


# --- Django -------------------------------------------------------------------------------


def show(request):
    meta = request.META
    return JsonResponse(
        {
            "method": request.method,
            "path": request.path,
            "query": request.GET.dict(),
            "post": request.POST.dict(),
            "files": {name: file.size for name, file in request.FILES.items()},
            "cookies": request.COOKIES,
            "url": request.build_absolute_uri(),
            "secure": request.is_secure(),
            "client": meta["REMOTE_ADDR"],
            "server": [meta["SERVER_NAME"], meta["SERVER_PORT"]],
        }
    )


async def stream(request):
    async def pieces():
        for number in range(3):
            yield b"%d," % number

    return StreamingHttpResponse(pieces(), headers={"X-Latin": "é"})


def download(request):
    return FileResponse(Path(__file__).open("rb"))


def crash(request):
    raise ValueError("in a view")


views = Recorder()


async def wait(request):
    views.add("waiting")
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        views.add("cancelled")
        raise


urlpatterns = [
    path(function.__name__, function) for function in (show, stream, download, crash, wait)
]


@pytest.fixture
def django(django_ready, serve):
    """A server of Django's own ASGI handler with the views above."""
    views.items.clear()
    with override_settings(ROOT_URLCONF=__name__, MIDDLEWARE=[], ALLOWED_HOSTS=["*"], DEBUG=False):
        yield serve(get_asgi_application())


def test_django_sees_the_request(django):
    response = django.request(
        "POST",
        "/show?a=%C3%A9",
        [
            ("Host", "example.com:81"),
            ("Content-Type", "application/x-www-form-urlencoded"),
            ("Cookie", "a=1"),
            ("Cookie", "b=2"),
        ],
        b"x=1&y=%C3%BC",
    )
    seen = json.loads(response.body)
    assert seen.pop("server") == ["127.0.0.1", str(django.port)]
    assert seen == {
        "method": "POST",
        "path": "/show",
        "query": {"a": "é"},
        "post": {"x": "1", "y": "ü"},
        "files": {},
        "cookies": {"a": "1", "b": "2"},
        "url": "http://example.com:81/show?a=%C3%A9",
        "secure": False,
        "client": "127.0.0.1",
    }


def test_django_takes_an_upload(django):
    content = os.urandom(5_000_000)
    data = (
        b'--boundary\r\nContent-Disposition: form-data; name="f"; filename="f"\r\n\r\n'
        + content
        + b"\r\n--boundary--\r\n"
    )
    kind = [("Content-Type", "multipart/form-data; boundary=boundary")]
    response = django.request("POST", "/show", kind, data)
    assert json.loads(response.body)["files"] == {"f": len(content)}


def test_django_streams(django):
    response = django.get("/stream")
    assert response.body == b"0,1,2,"
    assert response.header("X-Latin") == "é"


@pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume synchronous:Warning")
def test_django_sends_a_file(django):
    assert django.get("/download").body == Path(__file__).read_bytes()


def test_djangos_errors_are_djangos(django, caplog):
    assert django.get("/nowhere").status == 404
    assert django.get("/crash").status == 500
    assert not [record for record in caplog.records if record.name == "django_aioserve"]


def test_djangos_view_is_cancelled_when_its_client_leaves(django):
    with django.connect() as connection:
        connection.send(request("/wait"))
        views.wait(1)
    assert views.wait(2) == ["waiting", "cancelled"]


def test_django_may_be_mounted_below_a_path(django_ready, serve):
    with override_settings(ROOT_URLCONF=__name__, MIDDLEWARE=[], ALLOWED_HOSTS=["*"]):
        server = serve(get_asgi_application(), route="/app/{path_info:.*}")
        seen = json.loads(server.get("/app/show").body)
    assert seen["path"] == "/app/show"


# --- Channels -----------------------------------------------------------------------------


@pytest.fixture
def channels(django_ready, serve):
    """A server of a Channels project: a router with consumers of each kind, and groups."""
    from channels.generic.http import AsyncHttpConsumer
    from channels.generic.websocket import AsyncJsonWebsocketConsumer, WebsocketConsumer
    from channels.routing import ProtocolTypeRouter, URLRouter
    from channels.security.websocket import OriginValidator

    class Echo(WebsocketConsumer):
        def connect(self):
            self.accept("chat" if "chat" in self.scope["subprotocols"] else None)

        def receive(self, text_data=None, bytes_data=None):
            self.send(text_data=text_data, bytes_data=bytes_data)

        def disconnect(self, code):
            views.add(code)

    class Room(AsyncJsonWebsocketConsumer):
        async def connect(self):
            self.room = self.scope["url_route"]["kwargs"]["room"]
            await self.channel_layer.group_add(self.room, self.channel_name)
            await self.accept()

        async def disconnect(self, code):
            await self.channel_layer.group_discard(self.room, self.channel_name)

        async def receive_json(self, content):
            if content == "close":
                await self.close(4001, "as you wish")
            elif content == "crash":
                raise ValueError("in a consumer")
            else:
                event = {"type": "room.message", "content": content}
                await self.channel_layer.group_send(self.room, event)

        async def room_message(self, event):
            await self.send_json(event["content"])

    class Refusing(WebsocketConsumer):
        def connect(self):
            self.close()

    class Events(AsyncHttpConsumer):
        async def handle(self, body):
            await self.send_headers(headers=[(b"Content-Type", b"text/event-stream")])
            for number in range(3):
                await self.send_body(b"data: %d\n\n" % number, more_body=True)
            await self.send_body(b"")

    websockets = URLRouter(
        [
            path("echo", Echo.as_asgi()),
            path("room/<slug:room>", Room.as_asgi()),
            path("refuse", Refusing.as_asgi()),
        ]
    )
    views.items.clear()
    with override_settings(
        CHANNEL_LAYERS={"default": {"BACKEND": "channels.layers.InMemoryChannelLayer"}}
    ):
        yield serve(
            ProtocolTypeRouter(
                {
                    "http": URLRouter([path("events", Events.as_asgi())]),
                    "websocket": OriginValidator(websockets, ["http://good.example"]),
                }
            )
        )


def channels_client(server, target, **options):
    return ws_connect(ws_url(server, target), origin="http://good.example", **options)


def test_a_synchronous_consumer(channels):
    with channels_client(channels, "/echo", subprotocols=["chat"]) as client:
        assert client.subprotocol == "chat"
        for message in ("text", b"bytes"):
            client.send(message)
            assert client.recv() == message
    assert views.wait() == [1000]


def test_consumers_in_a_group(channels):
    with (
        channels_client(channels, "/room/a") as one,
        channels_client(channels, "/room/a") as two,
        channels_client(channels, "/room/b") as other,
    ):
        one.send('{"hello": 1}')
        assert json.loads(one.recv()) == json.loads(two.recv()) == {"hello": 1}
        other.send('"b"')
        assert json.loads(other.recv()) == "b"


def test_a_consumer_that_closes(channels):
    with channels_client(channels, "/room/a") as client:
        client.send('"close"')
        with pytest.raises(ConnectionClosed) as end:
            client.recv()
    assert (end.value.rcvd.code, end.value.rcvd.reason) == (4001, "as you wish")


def test_a_consumer_that_crashes(channels, caplog):
    with channels_client(channels, "/room/a") as client:
        client.send('"crash"')
        with pytest.raises(ConnectionClosed) as end:
            client.recv()
    assert end.value.rcvd.code == 1011
    assert "in a consumer" in caplog.text


@pytest.mark.parametrize("target", ["/refuse", "/echo"])
def test_a_consumer_or_a_validator_that_refuses(channels, target):
    origin = "http://good.example" if target == "/refuse" else "http://evil.example"
    with pytest.raises(InvalidStatus) as refusal:
        ws_connect(ws_url(channels, target), origin=origin)
    assert refusal.value.response.status_code == 403


def test_a_consumer_of_http(channels):
    response = channels.get("/events")
    assert response.body == b"data: 0\n\ndata: 1\n\ndata: 2\n\n"
    assert response.header("Content-Type") == "text/event-stream"

"""WebSockets and event streams: handshake, limits, slow clients, and the end of a worker."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import struct
import threading
import time
from typing import TYPE_CHECKING, Any, Self

import pytest
from aiohttp import web

from django_aioserve import websocket
from tests.native_project import aio
from tests.native_project.serving import serving
from tests.support import AppServer, RawConnection, Response, raw, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.usefixtures("django_ready")


@pytest.fixture
def native_server(django_ready: None) -> Iterator[AppServer]:
    """A server for tests that need no settings of their own."""
    with serving() as server:
        yield server


KEY = "dGhlIHNhbXBsZSBub25jZQ=="
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


def shake(connection: RawConnection, target: str, **changed: str | None) -> Response:
    headers: dict[str, str | None] = {
        "Host": "localhost",
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": KEY,
    }
    headers.update({name.replace("_", "-"): value for name, value in changed.items()})
    sent = [(name, value) for name, value in headers.items() if value is not None]
    return connection.request("GET", target, sent)


class Socket:
    """A WebSocket client that says exactly the frames it is told to."""

    def __init__(self, server: AppServer, target: str, **changed: str | None) -> None:
        self.connection = server.connect()
        response = shake(self.connection, target, **changed)
        if response.status != 101:
            self.connection.close()
            raise AssertionError(response)
        expected = hashlib.sha1(KEY.encode() + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
        assert response.header("Sec-WebSocket-Accept") == base64.b64encode(expected).decode()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.connection.close()

    def send(self, opcode: int, payload: bytes = b"", *, final: bool = True) -> None:
        head = bytes([opcode | (0x80 if final else 0)])
        if len(payload) < 126:
            head += bytes([0x80 | len(payload)])
        elif len(payload) < 1 << 16:
            head += b"\xfe" + struct.pack("!H", len(payload))
        else:
            head += b"\xff" + struct.pack("!Q", len(payload))
        self.connection.send(head + b"\0\0\0\0" + payload)

    def receive(self) -> tuple[int, bytes]:
        head, size = self.connection.recv_exactly(2)
        if size == 126:
            size = struct.unpack("!H", self.connection.recv_exactly(2))[0]
        elif size == 127:
            size = struct.unpack("!Q", self.connection.recv_exactly(8))[0]
        return head & 15, self.connection.recv_exactly(size)


def close_code(frame: tuple[int, bytes]) -> int:
    opcode, payload = frame
    assert opcode == CLOSE, frame
    return int.from_bytes(payload[:2], "big")


@pytest.fixture
def events() -> dict[str, Any]:
    aio.EVENTS.clear()
    return aio.EVENTS


def status(server: AppServer, **changed: str | None) -> int:
    with server.connect() as connection:
        return shake(connection, "/echo-socket/", **changed).status


# --- handshake ----------------------------------------------------------------------------


def test_a_socket_echoes(native_server: AppServer) -> None:
    with Socket(native_server, "/echo-socket/") as socket:
        socket.send(TEXT, b"hello")
        assert socket.receive() == (TEXT, b"hello")
        socket.send(CLOSE, struct.pack("!H", 1000))
        assert close_code(socket.receive()) == 1000


def test_a_client_without_origin_is_no_browser(native_server: AppServer) -> None:
    assert status(native_server) == 101


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "http://localhost.evil.example",
        "http://localhost:8000",
        "https://localhost",
        "http://user@localhost.example",
        "null",
        "http://",
        "//localhost",
        "http://[::1",
        "",
    ],
)
def test_a_foreign_origin_is_refused(
    native_server: AppServer, origin: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert status(native_server, Origin=origin) == 403
    assert "is foreign" in caplog.text


def test_two_origins_are_refused(native_server: AppServer) -> None:
    with native_server.connect() as connection:
        connection.send(
            b"GET /echo-socket/ HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n"
            b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: "
            + KEY.encode()
            + b"\r\nOrigin: http://localhost\r\nOrigin: https://evil.example\r\n\r\n"
        )
        assert connection.read_response().status in {400, 403}


@pytest.mark.parametrize("origin", ["http://localhost", "http://LOCALHOST", "http://localhost:80"])
def test_the_host_itself_is_admitted(native_server: AppServer, origin: str) -> None:
    assert status(native_server, Origin=origin) == 101


def test_a_host_with_a_port_is_admitted(native_server: AppServer) -> None:
    host = f"localhost:{native_server.port}"
    assert status(native_server, Host=host, Origin=f"http://{host}") == 101


def test_a_host_that_is_not_allowed_admits_nobody(native_server: AppServer) -> None:
    assert status(native_server, Host="evil.example", Origin="http://evil.example") == 403


def test_the_scheme_of_a_trusted_proxy_counts(native_server: AppServer) -> None:
    forwarded = {"X_Forwarded_Proto": "https"}
    assert status(native_server, Origin="https://localhost", **forwarded) == 101
    assert status(native_server, Origin="http://localhost", **forwarded) == 403


def test_the_scheme_of_another_peer_does_not_count() -> None:
    with serving({"forwarded_allow_ips": ("10.0.0.1",)}) as server:
        told = {"X_Forwarded_Proto": "https"}
        assert status(server, Origin="https://localhost", **told) == 403


def test_the_forwarded_host_counts_where_django_uses_it() -> None:
    forwarded = {"X_Forwarded_Host": "www.example.com", "Origin": "http://www.example.com"}
    with serving(ALLOWED_HOSTS=["www.example.com", "localhost"]) as server:
        assert status(server, **forwarded) == 403
    with serving(ALLOWED_HOSTS=["www.example.com"], USE_X_FORWARDED_HOST=True) as server:
        assert status(server, **forwarded) == 101


def test_csrf_trusted_origins_are_admitted() -> None:
    trusted = ["https://app.example.com", "https://*.example.org", "http://*.local:8080"]
    with serving(CSRF_TRUSTED_ORIGINS=trusted) as server:
        for good in (
            "https://app.example.com",
            "https://app.example.com:443",
            "https://a.example.org",
            "https://a.b.example.org",
            "http://x.local:8080",
        ):
            assert status(server, Origin=good) == 101, good
        for bad in (
            "http://app.example.com",
            "https://app.example.com:8443",
            "https://example.com",
            "https://evilexample.org",
            "http://x.local",
        ):
            assert status(server, Origin=bad) == 403, bad


def test_websocket_origins_are_admitted() -> None:
    with serving({"websocket_origins": ("https://other.example",)}) as server:
        assert status(server, Origin="https://other.example") == 101
        assert status(server, Origin="https://third.example") == 403
    with serving({"websocket_origins": ("*",)}) as server:
        assert status(server, Origin="https://third.example") == 101


def test_the_origin_is_checked_for_routes_of_aioserve_routes_too() -> None:
    for name in ("sockets", "mounted_sockets"):
        with serving({"routes": (f"tests.native_project.aio.{name}",)}) as server:
            with server.connect() as connection:
                target = "/sockets/echo/"
                assert shake(connection, target, Origin="https://evil.example").status == 403
            with server.connect() as connection:
                assert shake(connection, target, Origin="http://localhost").status == 101


@pytest.mark.parametrize("version", ["8", "7", "14", "0", "", "x", None])
def test_another_version_is_426(native_server: AppServer, version: str | None) -> None:
    with native_server.connect() as connection:
        response = shake(connection, "/echo-socket/", Sec_WebSocket_Version=version)
    assert response.status == 426
    assert response.header("Sec-WebSocket-Version") == "13"
    assert response.header("Upgrade") == "websocket"
    assert response.header("Connection") == "Upgrade"


@pytest.mark.parametrize(
    "line",
    [
        b"Sec-WebSocket-Protocol: a\x01b",
        b"Sec-WebSocket-Protocol: a\x00b",
        b"X-Other: a\x7fb",
        b"Origin: http://localhost\x0b",
    ],
)
def test_control_bytes_are_400(line: bytes) -> None:
    with serving(allow_errors=True) as server:
        answer = raw(
            server.address,
            b"GET /echo-socket/ HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n"
            b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: "
            + KEY.encode()
            + b"\r\n"
            + line
            + b"\r\n\r\n",
        )
    assert answer.split()[1] == b"400"


@pytest.mark.parametrize("key", ["", "short", "=" * 24, None])
def test_a_wrong_key_is_400(native_server: AppServer, key: str | None) -> None:
    assert status(native_server, Sec_WebSocket_Key=key) == 400


def test_a_page_asked_for_with_an_upgrade_to_something_else_is_served(
    native_server: AppServer,
) -> None:
    headers = [("Connection", "Upgrade"), ("Upgrade", "h2c"), ("Origin", "https://evil.example")]
    assert native_server.get("/live/3/", headers).status == 200


# --- limits -------------------------------------------------------------------------------


def test_a_message_that_is_too_large_closes_with_1009() -> None:
    with (
        serving({"websocket_max_size": 1000}) as server,
        Socket(server, "/echo-socket/") as socket,
    ):
        socket.send(TEXT, b"x" * 1000)
        assert socket.receive() == (TEXT, b"x" * 1000)
        socket.send(TEXT, b"x" * 1001)
        assert close_code(socket.receive()) == 1009


def test_fragments_are_counted_together() -> None:
    with (
        serving({"websocket_max_size": 1000}) as server,
        Socket(server, "/echo-socket/") as socket,
    ):
        socket.send(TEXT, b"x" * 600, final=False)
        socket.send(0, b"x" * 600)
        assert close_code(socket.receive()) == 1009


def test_a_limit_of_zero_is_none() -> None:
    with serving({"websocket_max_size": 0}) as server, Socket(server, "/echo-socket/") as socket:
        message = b"x" * (websocket.AIOHTTP_MAX_SIZE + 1)
        socket.send(TEXT, message)
        assert socket.receive() == (TEXT, message)


def test_a_limit_of_the_handler_s_own_counts() -> None:
    with (
        serving({"websocket_max_size": 1000}) as server,
        Socket(server, "/own-limits-socket/") as socket,
    ):
        socket.send(TEXT, b"x" * 1999)
        assert socket.receive() == (TEXT, b"x" * 1999)


def test_a_silent_peer_is_pinged_and_then_gone() -> None:
    with (
        serving({"websocket_heartbeat": 0.1}) as server,
        Socket(server, "/echo-socket/") as socket,
    ):
        assert socket.receive()[0] == PING
        socket.send(PONG)
        assert socket.receive()[0] == PING
        assert socket.connection.at_eof()  # which was not answered
        wait_until(lambda: websocket.open_count(server.app) == 0)


def test_aiohttp_s_socket_takes_our_defaults() -> None:
    response = web.WebSocketResponse()
    for name in websocket.AIOHTTP_PRIVATE:
        assert hasattr(response, name) or name == "_pong_heartbeat"
    assert response._max_msg_size == websocket.AIOHTTP_MAX_SIZE
    assert response._heartbeat is None


def test_a_client_that_does_not_read_makes_the_handler_wait(
    native_server: AppServer, events: dict[str, Any]
) -> None:
    with Socket(native_server, "/flood-socket/") as socket:
        settled: list[int] = []

        def is_settled() -> bool:
            settled.append(events.get("flooded", 0))
            return len(settled) > 30 and settled[-1] == settled[-30] > 0

        wait_until(is_settled)
        waiting = events["flooded"]
        # Kernel buffers on both sides, and 64 KiB of aiohttp's.
        assert waiting * 65536 < 32 << 20
        for _ in range(waiting + 10):
            assert socket.receive() == (BINARY, b"x" * 65536)
        socket.connection.reset()
        wait_until(lambda: websocket.open_count(native_server.app) == 0)


def test_a_handler_that_waits_for_something_else_is_cancelled_when_its_client_is_gone(
    native_server: AppServer, events: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(websocket, "SWEEP_SECONDS", 0.05)
    with serving() as server, Socket(server, "/deaf-socket/") as socket:
        wait_until(lambda: events.get("deaf") == "waiting")
        socket.connection.reset()
        wait_until(lambda: events.get("deaf") == "left")
        assert websocket.open_count(server.app) == 0


# --- the end of a worker --------------------------------------------------------------------


def test_all_sockets_are_closed_with_1012_spread_over_time(native_server: AppServer) -> None:
    with serving() as server:
        sockets = [Socket(server, "/echo-socket/") for _ in range(4)]
        wait_until(lambda: websocket.open_count(server.app) == 4)
        times: list[float] = []
        codes: list[int] = []

        def listen(socket: Socket) -> None:
            frame = socket.receive()
            times.append(time.monotonic())
            codes.append(close_code(frame))
            socket.send(CLOSE, frame[1])

        listeners = [threading.Thread(target=listen, args=(socket,)) for socket in sockets]
        for listener in listeners:
            listener.start()
        server.run(websocket.close_all(server.app, within=0.4))
        for listener in listeners:
            listener.join()
        assert codes == [1012] * 4
        assert max(times) - min(times) >= 0.2
        assert websocket.open_count(server.app) == 0
        assert status(server) == 503
        for socket in sockets:
            socket.connection.close()


def test_a_close_frame_is_sent_once_more_at_most_and_nothing_is_lost(
    native_server: AppServer,
) -> None:
    with serving() as server, Socket(server, "/echo-socket/") as socket:
        socket.send(TEXT, b"last words")
        closing = asyncio.run_coroutine_threadsafe(
            websocket.close_all(server.app, within=0.0), server.loop
        )
        frames = [socket.receive(), socket.receive()]
        assert sorted(opcode for opcode, _ in frames) == [TEXT, CLOSE]
        socket.send(CLOSE, struct.pack("!H", 1012))
        closing.result(10)


def test_a_client_that_does_not_answer_is_closed_all_the_same(
    monkeypatch: pytest.MonkeyPatch, events: dict[str, Any]
) -> None:
    monkeypatch.setattr(websocket, "CLOSING_SECONDS", 0.1)
    with serving() as server:
        sockets = [Socket(server, f"/{name}-socket/") for name in ("echo", "deaf")]
        wait_until(lambda: websocket.open_count(server.app) == 2)
        server.run(websocket.close_all(server.app, within=0.0))
        assert websocket.open_count(server.app) == 0
        assert events["deaf"] == "left"
        for socket in sockets:
            assert close_code(socket.receive()) == 1012
            socket.connection.close()


def test_streams_are_ended_with_the_worker(events: dict[str, Any]) -> None:
    with serving() as server, server.connect() as connection:
        connection.send(b"GET /events/?wait HTTP/1.1\r\nHost: localhost\r\n\r\n")
        connection.recv_until(b"id: 2\n")
        assert websocket.open_count(server.app) == 1
        server.run(websocket.close_all(server.app, within=0.0))
        # The end of a complete response: the browser comes back.
        assert connection.recv_until(b"0\r\n\r\n").endswith(b"\r\n0\r\n\r\n")
        assert events["events"] == "left"
        assert server.get("/events/").status == 503


def test_a_stream_whose_block_was_left_needs_no_end(
    native_server: AppServer, events: dict[str, Any]
) -> None:
    with native_server.connect() as connection:
        connection.send(b"GET /lingering-events/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
        wait_until(lambda: "stream" in events)
        native_server.loop.call_soon_threadsafe(events["stream"].end)
        native_server.loop.call_soon_threadsafe(events["go"].set)
        assert connection.read_response().status == 200
    assert not events["stream"].ended


# --- event streams ------------------------------------------------------------------------


def test_an_event_stream_is_what_the_standard_says(native_server: AppServer) -> None:
    response = native_server.get("/events/")
    assert response.header("Content-Type") == "text/event-stream"
    assert response.header("Cache-Control") == "no-cache"
    assert response.text == (
        "retry: 1500\n\n"
        "event: tick\nid: 1\ndata: line one\ndata: line 1\n\n"
        "event: tick\nid: 2\ndata: line one\ndata: line 2\n\n"
    )


def test_a_stream_goes_on_after_the_last_event(native_server: AppServer) -> None:
    response = native_server.get("/events/", [("Last-Event-ID", "7")])
    assert "id: 8\n" in response.text
    assert "id: 7\n" not in response.text


def test_a_silent_stream_has_a_heartbeat(native_server: AppServer, events: dict[str, Any]) -> None:
    with native_server.connect() as connection:
        connection.send(b"GET /fast-heart/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
        for _ in range(3):
            connection.recv_until(b":\n\n")
    wait_until(lambda: events.get("heart") == "stopped", message="the client's end went unnoticed")


def test_a_line_break_in_an_event_s_name_is_refused(native_server: AppServer) -> None:
    assert json.loads(native_server.get("/wrong-events/").text.partition("data: ")[2]) == [
        "event 'a\\nb' has a line break or a NUL in it",
        "id 'a\\rb' has a line break or a NUL in it",
        "id 'a\\x00b' has a line break or a NUL in it",
    ]


def test_a_failing_stream_is_logged_and_cut_off(
    native_server: AppServer, caplog: pytest.LogCaptureFixture
) -> None:
    with native_server.connect() as connection:
        connection.send(b"GET /failing-events/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
        received = connection.recv_to_eof()
    assert b"data: one" in received
    assert not received.endswith(b"0\r\n\r\n")
    assert "Internal Server Error: /failing-events/" in caplog.text


# --- messages of a group that were lost ------------------------------------------------------


@pytest.fixture
def _nothing_is_an_error(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.mark.usefixtures("_nothing_is_an_error")
def test_a_socket_that_lost_messages_is_closed_with_1013(native_server: AppServer) -> None:
    with Socket(native_server, "/lost-socket/") as socket:
        assert close_code(socket.receive()) == 1013


@pytest.mark.usefixtures("_nothing_is_an_error")
def test_a_stream_that_lost_messages_ends_properly(native_server: AppServer) -> None:
    assert native_server.get("/lost-events/").text.endswith("data: one\n\n")


@pytest.mark.usefixtures("_nothing_is_an_error")
def test_a_long_poll_that_lost_messages_is_to_ask_again(native_server: AppServer) -> None:
    response = native_server.get("/lost-poll/")
    assert (response.status, response.header("Retry-After")) == (503, "1")


def test_a_page_that_lost_messages_does_not_look_complete(native_server: AppServer) -> None:
    with native_server.connect() as connection:
        connection.send(b"GET /lost-page/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv_to_eof().endswith(b"4\r\nhalf\r\n")


def test_a_slow_reader_of_a_stream_makes_the_handler_wait(
    native_server: AppServer, events: dict[str, Any]
) -> None:
    with native_server.connect() as connection:
        connection.send(b"GET /flood-events/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
        seen: list[int] = []

        def is_settled() -> bool:
            seen.append(events.get("sent", 0))
            return len(seen) > 30 and seen[-1] == seen[-30] > 0

        wait_until(is_settled)
        assert events["sent"] * 65536 < 32 << 20
        connection.reset()
    wait_until(lambda: events.get("sent") == "left")

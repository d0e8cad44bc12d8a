"""The WSGI bridge over real sockets: PEP 3333, and what a server of Django must get right."""

from __future__ import annotations

import gc
import gzip
import io
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any
from wsgiref.validate import validator

import pytest
from aiohttp import web

from django_aioserve.bridge.body import MEMORY_LIMIT, expect_handler
from django_aioserve.bridge.stream import WINDOW, BridgeResponse
from django_aioserve.bridge.threads import ThreadPool
from django_aioserve.bridge.wsgi import WSGIBridge
from django_aioserve.conf import Config
from django_aioserve.keys import POOL
from tests.support import AppServer, raw, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from wsgiref.types import WSGIApplication

    Serve = Callable[..., AppServer]

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
GET_AND_CLOSE = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
TEXT = [("Content-Type", "text/plain")]


@pytest.fixture
def serve(app_server: Callable[..., AppServer]) -> Serve:
    """Serve a WSGI callable: `serve(app, threads=2, ...)`; further options are of the Config."""

    def start(
        application: WSGIApplication,
        *,
        mount: str = "/{path_info:(?s:.*)}",
        prefix: str = "",
        middlewares: Iterable[Any] = (),
        loop: str = "asyncio",
        server: dict[str, Any] | None = None,
        **options: Any,
    ) -> AppServer:
        async def factory() -> web.Application:
            config = Config(**{"threads": 2, **options})
            pool = ThreadPool(config.threads, config.queue_size)
            bridge = WSGIBridge(application, config, pool)
            app = web.Application(middlewares=list(middlewares))
            app.router.add_route("*", mount, bridge.handle, expect_handler=expect_handler)
            root = app
            if prefix:
                root = web.Application()
                root.add_subapp(prefix, app)
            root[POOL] = pool

            async def close_pool(_: web.Application) -> None:
                pool.close()
                await pool.join(10)

            root.on_cleanup.append(close_pool)
            return root

        extra = server or {}
        if loop == "uvloop":
            extra = {"loop_factory": pytest.importorskip("uvloop").new_event_loop, **extra}
        return app_server(factory, **extra)

    return start


@pytest.fixture(params=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest) -> str:
    return request.param


def hello(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    start_response("200 OK", TEXT)
    return [b"hello"]


def answering(
    body: Iterable[bytes] = (b"hello",),
    status: Any = "200 OK",
    headers: Any = TEXT,
) -> WSGIApplication:
    """An application that always gives this answer."""

    def application(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        start_response(status, headers)
        return body

    return application


class Body:
    """An iterable that counts the calls of its close()."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self.chunks = chunks
        self.closed: list[str] = []

    def __iter__(self) -> Iterator[bytes]:
        yield from self.chunks

    def close(self) -> None:
        self.closed.append(threading.current_thread().name)


# --- PEP 3333 ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("error::wsgiref.validate.WSGIWarning")
def test_the_validator_of_the_standard_library_is_content(serve, caplog):
    def application(environ, start_response):
        body = environ["wsgi.input"].read(100)
        environ["wsgi.errors"].write("")
        length = str(len(body) + 4)
        start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", length)])
        return [b"got ", body]

    server = serve(validator(application))
    for _ in range(2):
        assert server.request("POST", "/x?y=z", body=b"abc").body == b"got abc"
        assert server.get("/").status == 200
    assert not caplog.records


def test_a_list_leaves_with_its_length(serve):
    response = serve(answering([b"one", b"", b"two"])).get("/")
    assert response.body == b"onetwo"
    assert response.header("Content-Length") == "6"
    assert response.header("Transfer-Encoding") is None


def test_head_and_body_leave_in_one_segment(serve):
    server = serve(hello)
    with server.connect() as connection:
        connection.send(GET)
        assert connection.socket.recv(65536).endswith(b"hello")


def test_an_empty_iterable_is_an_empty_body(serve):
    response = serve(answering([])).get("/")
    assert (response.status, response.body) == (200, b"")
    assert response.header("Content-Length") == "0"


def test_a_generator_may_start_the_response_itself(serve):
    def application(environ, start_response):
        yield b""
        start_response("202 Accepted", TEXT)
        yield b"late"

    response = serve(application).get("/")
    assert (response.status, response.body) == (202, b"late")


def test_write_comes_before_the_iterable(serve):
    def application(environ, start_response):
        write = start_response("200 OK", TEXT)
        write(b"a")
        write(b"")
        write(b"b")
        return [b"c", b"d"]

    assert serve(application).get("/").body == b"abcd"


def test_exc_info_replaces_a_response_that_has_not_begun(serve):
    def application(environ, start_response):
        start_response("200 OK", [*TEXT, ("X-First", "1")])
        try:
            raise KeyError("x")
        except KeyError:
            start_response("418 Teapot", TEXT, sys.exc_info())
        return [b"short and stout"]

    response = serve(application).get("/")
    assert (response.status, response.header("X-First")) == (418, None)


def test_exc_info_after_output_raises_again(serve):
    raised = []

    def application(environ, start_response):
        write = start_response("200 OK", TEXT)
        write(b"begun")
        try:
            try:
                raise KeyError("mine")
            except KeyError:
                start_response("500 Oops", TEXT, sys.exc_info())
        except KeyError as error:
            raised.append(error.args)
        return []

    assert serve(application).get("/").status == 200
    assert raised == [("mine",)]


def test_a_second_start_response_without_exc_info_is_an_error(serve, caplog):
    def application(environ, start_response):
        start_response("200 OK", TEXT)
        start_response("200 OK", TEXT)
        return [b"x"]

    assert serve(application).get("/").status == 500
    assert "called twice" in caplog.text


@pytest.mark.parametrize("body", [[b"x"], [], (), iter([b"x"])])
def test_no_start_response_is_an_error(serve, caplog, body):
    assert serve(lambda environ, start_response: body).get("/").status == 500
    assert "did not call start_response" in caplog.text


@pytest.mark.parametrize("body", [["text"], iter(["text"]), iter([bytearray(b"x")]), None, 5])
def test_a_body_that_is_not_bytes_is_an_error(serve, caplog, body):
    assert serve(answering(body)).get("/").status == 500
    assert "Traceback" in caplog.text


def test_the_error_is_logged_with_the_request(serve, caplog):
    def application(environ, start_response):
        raise ValueError("boom")

    response = serve(application).get("/some/path?x=y")
    assert (response.status, response.body) == (500, b"500: Internal Server Error")
    assert "GET /some/path?x=y" in caplog.text
    assert "ValueError: boom" in caplog.text


def test_an_error_before_any_byte_left_is_a_clean_500(serve):
    def application(environ, start_response):
        start_response("200 OK", [*TEXT, ("X-Secret", "1")])
        return chunks()

    def chunks():
        raise ValueError
        yield b""

    server = serve(application)
    with server.connect() as connection:
        for _ in range(2):
            response = connection.request("GET", "/")
            assert (response.status, response.header("X-Secret")) == (500, None)


def test_an_error_after_the_first_bytes_closes_the_connection(serve, caplog):
    received = threading.Event()

    def application(environ, start_response):
        start_response("200 OK", TEXT)
        yield b"first"
        received.wait(10)
        raise ValueError

    server = serve(application)
    with server.connect() as connection:
        connection.send(GET)
        connection.recv_until(b"first")
        received.set()
        assert b"0\r\n\r\n" not in connection.recv_to_eof()
    assert "ValueError" in caplog.text


def test_the_environ_has_all_that_the_pep_requires(serve):
    seen = {}

    def application(environ, start_response):
        seen.update(environ)
        return hello(environ, start_response)

    serve(application).get("/")
    assert type(seen["aiohttp.request"]) is web.Request
    assert seen["wsgi.version"] == (1, 0)
    assert seen["wsgi.multithread"] is True
    assert seen["wsgi.multiprocess"] is True
    assert seen["wsgi.run_once"] is False
    assert seen["wsgi.input_terminated"] is True
    assert seen["wsgi.errors"] is sys.stderr
    assert seen["SERVER_PROTOCOL"] == "HTTP/1.1"


def test_an_application_that_cannot_be_called_is_refused():
    with pytest.raises(TypeError, match="callable"):
        WSGIBridge("app", Config(), None)


# --- lines 12, 16, 19, 21, 22: the request's body -----------------------------------------


def read_all(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    data = environ["wsgi.input"].read()
    start_response("200 OK", TEXT)
    shown = {key: environ.get(key) for key in ("CONTENT_LENGTH", "HTTP_CONTENT_ENCODING")}
    kind = "memory" if isinstance(environ["wsgi.input"], io.BytesIO) else "file"
    return [json.dumps({"size": len(data), "kind": kind, "sum": sum(data), **shown}).encode()]


@pytest.mark.parametrize(
    ("size", "kind"),
    [
        (0, "memory"),
        (1, "memory"),
        (70_000, "memory"),
        (MEMORY_LIMIT, "memory"),
        (MEMORY_LIMIT + 1, "file"),
        (3 * MEMORY_LIMIT, "file"),
    ],
)
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_arrives_whole_wherever_it_was_kept(serve, loop, size, kind, chunked):
    server = serve(read_all, loop=loop)
    data = os.urandom(size)
    if chunked:
        pieces = [data[i : i + 50_000] for i in range(0, size, 50_000)]
        framed = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
        headers, sent = [("Transfer-Encoding", "chunked")], framed + b"0\r\n\r\n"
    else:
        headers, sent = [("Content-Length", str(size))], data
    response = json.loads(server.request("POST", "/", headers, sent).body)
    assert response["size"] == size
    assert response["sum"] == sum(data)
    assert response["kind"] == kind
    assert response["CONTENT_LENGTH"] == str(size)


def test_line_12_a_body_that_was_not_read_is_not_the_next_request(serve):
    targets = []

    def application(environ, start_response):
        targets.append(environ["RAW_URI"])
        return hello(environ, start_response)

    evil = b"GET /evil HTTP/1.1\r\nHost: localhost\r\n\r\n"
    server = serve(application)
    with server.connect() as connection:
        connection.request("POST", "/first", body=evil)
        connection.request("GET", "/second")
    assert targets == ["/first", "/second"]


def test_line_16_a_body_that_stalls_is_answered_with_408_and_closed(serve):
    server = serve(hello, body_timeout=0.2)
    answer = raw(
        server.address, b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nabc"
    )
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"Connection: close" in answer


def test_line_16_a_body_that_is_slow_but_moves_is_read(serve):
    server = serve(read_all, body_timeout=1)
    with server.connect() as connection:
        connection.send(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 15\r\n\r\n")
        for _ in range(15):
            time.sleep(0.1)  # the pace of the client is what this test is about
            connection.send(b"x")
        assert json.loads(connection.read_response().body)["size"] == 15


def test_line_19_a_gzip_body_is_passed_on_as_it_came(serve):
    server = serve(read_all, server={"auto_decompress": False})
    data = gzip.compress(b"x" * 1000)
    response = server.request("POST", "/", [("Content-Encoding", "gzip")], data)
    assert json.loads(response.body) == {
        "size": len(data),
        "kind": "memory",
        "sum": sum(data),
        "CONTENT_LENGTH": str(len(data)),
        "HTTP_CONTENT_ENCODING": "gzip",
    }


def test_line_19_what_a_foreign_server_inflated_is_described_as_it_is(serve):
    response = serve(read_all).request(
        "POST", "/", [("Content-Encoding", "gzip")], gzip.compress(b"x" * 1000)
    )
    shown = json.loads(response.body)
    assert (shown["size"], shown["CONTENT_LENGTH"]) == (1000, "1000")
    assert shown["HTTP_CONTENT_ENCODING"] is None


def test_a_body_that_inflates_beyond_the_limit_is_refused(serve):
    server = serve(read_all, max_body_size=10_000)
    data = gzip.compress(b"x" * 1_000_000)
    assert server.request("POST", "/", [("Content-Encoding", "gzip")], data).status == 413


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_body_that_is_too_long_is_refused_and_closed(serve, framing):
    server = serve(hello, max_body_size=1000)
    head = b"POST / HTTP/1.1\r\nHost: localhost\r\n"
    if framing == "length":
        data = head + b"Content-Length: 1001\r\n\r\n" + b"x" * 1001
    else:
        data = head + b"Transfer-Encoding: chunked\r\n\r\n3e9\r\n" + b"x" * 1001 + b"\r\n0\r\n\r\n"
    answer = raw(server.address, data)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"Connection: close" in answer


def test_line_21_continue_is_granted_when_the_body_is_wanted(serve):
    server = serve(read_all)
    with server.connect() as connection:
        connection.send(
            b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n"
            b"Expect: 100-Continue\r\n\r\n"
        )
        assert connection.recv_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.send(b"abc")
        assert json.loads(connection.read_response().body)["size"] == 3
        assert connection.request("GET", "/").status == 200


def test_line_21_continue_is_not_granted_before_a_refusal(serve):
    server = serve(hello, max_body_size=1000)
    with server.connect() as connection:
        connection.send(
            b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1001\r\n"
            b"Expect: 100-continue\r\n\r\n"
        )
        assert connection.read_response().status == 413


def test_line_21_continue_is_unknown_to_http_1_0(serve):
    server = serve(hello)
    answer = raw(
        server.address, b"POST / HTTP/1.0\r\nContent-Length: 1\r\nExpect: 100-continue\r\n\r\nx"
    )
    assert answer.startswith(b"HTTP/1.0 200 ")


def test_another_expectation_fails(serve):
    response = serve(hello).request("POST", "/", [("Expect", "the best")], b"x")
    assert response.status == 417


def test_line_22_a_full_disk_is_a_500_and_leaves_nothing_behind(serve, caplog, monkeypatch):
    files = []

    def full(**options: Any) -> Any:
        files.append(Path("/dev/full").open("r+b", buffering=0))  # noqa: SIM115
        return files[-1]

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    server = serve(hello)
    with server.connect() as connection:
        connection.send(
            b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (8 << 20)
        )
        connection.send(b"x" * (1 << 20))
        response = connection.read_response()
        assert (response.status, response.header("Connection")) == (500, "close")
    assert caplog.text.count("could not be stored") == 1
    wait_until(lambda: files[0].closed)
    monkeypatch.undo()
    assert server.get("/").status == 200


def test_a_client_that_leaves_amid_its_body_is_no_error(serve, caplog):
    calls = []
    server = serve(lambda environ, start_response: calls.append(1))
    with server.connect() as connection:
        connection.send(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nabc")
        connection.reset()
    assert server.get("/nothing").status == 500  # served, so the loop has seen the reset
    assert len(calls) == 1


# --- line 17: backpressure; line 37: streams ----------------------------------------------


def test_line_37_a_stream_reaches_the_client_as_it_is_produced(serve, loop):
    gate = threading.Semaphore(0)

    def application(environ, start_response):
        start_response("200 OK", TEXT)
        for number in range(4):
            yield b"event %d" % number
            gate.acquire(timeout=10)

    server = serve(application, loop=loop)
    with server.connect() as connection:
        connection.send(GET)
        for number in range(4):
            connection.recv_until(b"event %d" % number)
            gate.release()
        assert connection.recv_until(b"0\r\n\r\n")


def test_a_fast_stream_of_small_chunks_arrives_whole_in_few_pieces(serve, loop):
    numbers = [b"%d," % number for number in range(50_000)]
    server = serve(answering(iter(numbers)), loop=loop)
    with server.connect() as connection:
        connection.send(GET)
        head = connection.recv_until(b"\r\n\r\n")
        assert b"Transfer-Encoding: chunked" in head
        body, chunks = b"", 0
        while size := int(connection.recv_until(b"\r\n"), 16):
            body += connection.recv_exactly(size)
            connection.recv_exactly(2)
            chunks += 1
    assert body == b"".join(numbers)
    assert chunks < 1000


def test_a_large_stream_arrives_whole(serve, loop):
    data = os.urandom(65536)
    server = serve(answering(data for _ in range(160)), loop=loop)
    assert server.get("/").body == data * 160


@pytest.mark.parametrize("size", [WINDOW - 1, WINDOW, 3 * WINDOW])
@pytest.mark.parametrize("way", ["iterable", "write"])
def test_a_chunk_may_be_larger_than_the_window(serve, loop, size, way):
    data = os.urandom(size)

    def application(environ, start_response):
        write = start_response("200 OK", TEXT)
        if way == "iterable":
            return (data for _ in range(3))
        for _ in range(3):
            write(data)
        return []

    assert serve(application, loop=loop).get("/").body == data * 3


@pytest.mark.parametrize("size", [100, 70_000, 10_000_000])
def test_a_body_of_any_size_arrives_whole(serve, loop, size):
    data = os.urandom(size)
    server = serve(answering([data]), loop=loop)
    with server.connect() as connection:
        for _ in range(2):
            assert connection.request("GET", "/").body == data


def test_line_37_a_stream_to_a_client_that_does_not_read_waits(serve, loop):
    produced = []

    def application(environ, start_response):
        start_response("200 OK", TEXT)
        for _ in range(3000):
            produced.append(1)
            yield bytes(100_000)

    server = serve(application, loop=loop)
    with server.connect() as connection:
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.send(GET)
        wait_until(lambda: settled(produced))
        # The window, what the loop holds, and what the kernel holds for both sides.
        assert len(produced) * 100_000 < 2 * WINDOW + 16_000_000


def settled(items: list[Any]) -> bool:
    """Whether the list has begun to grow and does so no more."""
    before = len(items)
    time.sleep(0.2)
    return before > 0 and len(items) == before


@pytest.mark.parametrize("kind", ["stream", "body", "file"])
def test_line_17_a_client_that_does_not_read_is_disconnected(serve, loop, kind, tmp_path):
    data = bytes(100_000)
    path = tmp_path / "file"
    path.write_bytes(bytes(20_000_000))
    bodies = []

    def application(environ, start_response):
        start_response("200 OK", TEXT)
        if kind == "body":
            return [data * 200]
        if kind == "stream":
            bodies.append(Body(data for _ in range(3000)))
            return bodies[0]
        return environ["wsgi.file_wrapper"](path.open("rb"))

    server = serve(application, loop=loop, write_timeout=0.3)
    with server.connect() as connection:
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.send(GET)
        wait_until(lambda: is_reset(connection.socket))
    wait_until(lambda: server.run(busy(server)) == 0)
    assert all(len(body.closed) == 1 for body in bodies)


def is_reset(connection: socket.socket) -> bool:
    """Whether the peer is gone, told without reading what it has sent."""
    return connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0 or bool(
        connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] in {7, 8}
    )


async def busy(server: AppServer) -> int:
    return server.app[POOL].busy


# --- line 41: the client leaves -----------------------------------------------------------


def test_line_41_a_client_that_leaves_a_stream_frees_the_thread(serve, loop):
    body = Body(bytes(50_000) for _ in iter(int, 1))
    server = serve(answering(body), loop=loop)
    with server.connect() as connection:
        connection.send(GET)
        connection.recv_exactly(100_000)
        connection.reset()
    wait_until(lambda: body.closed)
    wait_until(lambda: server.run(busy(server)) == 0)
    assert len(body.closed) == 1
    assert body.closed[0].startswith("aioserve")


def test_line_41_write_tells_the_application_that_the_client_left(serve):
    errors = []

    def application(environ, start_response):
        write = start_response("200 OK", TEXT)
        try:
            while True:
                write(bytes(50_000))
        except ConnectionResetError as error:
            errors.append(error)
            raise

    server = serve(application)
    with server.connect() as connection:
        connection.send(GET)
        connection.recv_exactly(100_000)
        connection.reset()
    wait_until(lambda: errors)
    wait_until(lambda: server.run(busy(server)) == 0)


def test_line_41_a_client_that_left_before_the_answer_closes_it_once(serve):
    left = threading.Event()
    body = Body([b"a", b"b"])

    def application(environ, start_response):
        left.wait(10)
        start_response("200 OK", TEXT)
        return body

    server = serve(application, threads=1)
    with server.connect() as connection:
        connection.send(GET)
        wait_until(lambda: server.run(busy(server)) == 1)
        connection.reset()
    left.set()
    wait_until(lambda: body.closed)
    assert len(body.closed) == 1


def test_line_41_a_cancelled_handler_frees_the_thread(serve):
    body = Body(bytes(50_000) for _ in iter(int, 1))
    server = serve(answering(body), server={"handler_cancellation": True})
    with server.connect() as connection:
        connection.send(GET)
        connection.recv_exactly(100_000)
        connection.reset()
    wait_until(lambda: body.closed)
    assert len(body.closed) == 1


def test_line_41_a_handler_cancelled_before_the_answer_closes_it_once(serve, tmp_path):
    left = threading.Event()
    path = tmp_path / "file"
    path.write_bytes(bytes(1_000_000))
    files = []

    def application(environ, start_response):
        left.wait(10)
        start_response("200 OK", TEXT)
        files.append(path.open("rb"))
        return environ["wsgi.file_wrapper"](files[0])

    server = serve(application, server={"handler_cancellation": True})
    with server.connect() as connection:
        connection.send(GET)
        wait_until(lambda: server.run(busy(server)) == 1)
        connection.reset()
    left.set()
    wait_until(lambda: files and files[0].closed)


def test_line_41_a_handler_cancelled_before_the_first_chunk_closes_it_once(serve):
    left = threading.Event()

    def chunks():
        left.wait(10)
        while True:
            yield bytes(50_000)

    body = Body(chunks())

    def application(environ, start_response):
        start_response("200 OK", TEXT)
        return body if environ["PATH_INFO"] == "/" else [b"other"]

    server = serve(application, server={"handler_cancellation": True})
    with server.connect() as connection:
        connection.send(GET)
        wait_until(lambda: server.run(busy(server)) == 1)
        connection.reset()
        assert server.get("/other").body == b"other"  # so the loop has seen the reset
    left.set()
    wait_until(lambda: server.run(busy(server)) == 0)
    assert len(body.closed) == 1


@pytest.mark.parametrize("chunks", [[], [b"a"], [b"a", b"b"]])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_close_is_called_exactly_once(serve, chunks, method):
    body = Body(chunks)
    server = serve(answering(body))
    assert server.request(method, "/").status == 200
    wait_until(lambda: body.closed)
    wait_until(lambda: server.run(busy(server)) == 0)
    assert len(body.closed) == 1


@pytest.mark.parametrize("problem", ["iteration", "start_response", "headers", "type"])
def test_close_is_called_after_an_error(serve, problem):
    def broken():
        if problem == "iteration":
            raise ValueError
        yield "text" if problem == "type" else b"bytes"

    body = Body(broken())

    def application(environ, start_response):
        if problem != "start_response":
            start_response("200 OK", TEXT)
        return body

    def late(environ, start_response):
        yield from ()

    server = serve(application)
    server.get("/")
    wait_until(lambda: body.closed)
    assert len(body.closed) == 1


def test_an_error_in_close_spoils_nothing(serve, caplog):
    class Broken(Body):
        def close(self) -> None:
            super().close()
            raise SystemExit(3)

    body = Broken([b"fine"])
    server = serve(answering(body))
    assert server.get("/").body == b"fine"
    wait_until(lambda: "Error in close()" in caplog.text)
    assert server.get("/").status == 200


# --- line 32, 35, 36: status and headers --------------------------------------------------

BAD_STATUSES = [
    b"200 OK",
    None,
    200,
    "",
    "OK",
    "20 OK",
    "2000 OK",
    "200OK",
    "101 Switching Protocols",
    "200 OK\r\nX-Evil: 1",
    "200 OK\n",
    "200 O\0K",
    "200 \u20ac",
    "\u0662\u0660\u0660 OK",
]

BAD_HEADERS = [
    ("X-A", "a\r\nX-Evil: 1"),
    ("X-A", "a\nX-Evil: 1"),
    ("X-A", "a\rb"),
    ("X-A", "a\0b"),
    ("X-A", "\x7f"),
    ("X-A\r\nX-Evil", "1"),
    ("X-A: 1\r\nX-Evil", "1"),
    ("X A", "1"),
    ("X-A:", "1"),
    ("", "1"),
    ("X-\xe9", "1"),
    ("X-A", "\u20ac"),
    ("X-A", b"bytes"),
    (b"X-A", "bytes"),
    ("X-A", None),
    ("X-A", 5),
    ("Content-Length", "five"),
    ("Content-Length", "-1"),
    ("Content-Length", "+5"),
    ("Content-Length", ""),
    ("Content-Length", "\u0665"),
]

HOP_BY_HOP = [
    "Connection",
    "keep-alive",
    "Proxy-Authenticate",
    "Proxy-Authorization",
    "TE",
    "Trailer",
    "Trailers",
    "TRANSFER-ENCODING",
    "Upgrade",
]


@pytest.mark.parametrize("status", BAD_STATUSES, ids=repr)
def test_line_32_a_bad_status_is_a_500(serve, status):
    answer = raw(serve(answering(status=status)).address, GET_AND_CLOSE)
    assert answer.startswith(b"HTTP/1.1 500 ")
    assert b"Evil" not in answer


@pytest.mark.parametrize("header", BAD_HEADERS, ids=repr)
def test_line_32_a_bad_header_is_a_500_and_nothing_of_it_is_sent(serve, header, caplog):
    application = answering(headers=[("X-Good", "1"), header])
    answer = raw(serve(application).address, GET_AND_CLOSE)
    assert answer.startswith(b"HTTP/1.1 500 ")
    assert b"Evil" not in answer
    assert b"X-Good" not in answer


def test_line_32_two_lengths_are_a_500(serve):
    headers = [("Content-Length", "5"), ("content-length", "5")]
    assert serve(answering(headers=headers)).get("/").status == 500


def test_the_value_of_a_bad_header_is_not_logged(serve, caplog):
    serve(answering(headers=[("Set-Cookie", "secret\n")])).get("/")
    assert "ValueError" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize("name", HOP_BY_HOP)
def test_line_35_hop_by_hop_headers_are_refused(serve, name):
    assert serve(answering(headers=[(name, "x")])).get("/").status == 500


@pytest.mark.parametrize(
    ("status", "line"),
    [
        ("200 ", b"HTTP/1.1 200 \r\n"),
        ("200", b"HTTP/1.1 200 \r\n"),
        ("299 A b\tc", b"HTTP/1.1 299 A b\tc\r\n"),
        ("200 caf\xe9", b"HTTP/1.1 200 caf\xe9\r\n"),
        ("999 Highest", b"HTTP/1.1 999 Highest\r\n"),
    ],
)
def test_line_36_the_reason_phrase_is_the_applications(serve, status, line):
    assert raw(serve(answering(status=status)).address, GET_AND_CLOSE).startswith(line)


def test_headers_leave_as_the_bytes_they_stand_for(serve):
    headers = [
        ("X-Utf8", "caf\xc3\xa9"),
        ("X-Latin1", "caf\xe9 \xff"),
        ("X-Space", "  a\tb  "),
        ("Set-Cookie", "a=1"),
        ("Set-Cookie", "b=2"),
    ]
    answer = raw(serve(answering(headers=headers)).address, GET_AND_CLOSE)
    assert b"\r\nX-Utf8: caf\xc3\xa9\r\n" in answer
    assert b"\r\nX-Latin1: caf\xe9 \xff\r\n" in answer
    assert b"\r\nX-Space: a\tb\r\n" in answer
    assert b"\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\n" in answer


def test_date_and_server_are_added_unless_they_are_there(serve):
    server = serve(hello)
    response = server.get("/")
    assert response.header("Date").endswith(" GMT")
    assert response.header("Server") == "django-aioserve"
    headers = [("Date", "Thu, 01 Jan 1970 00:00:00 GMT"), ("Server", "mine")]
    response = serve(answering(headers=headers)).get("/")
    assert response.header("Date") == "Thu, 01 Jan 1970 00:00:00 GMT"
    assert response.header("Server") == "mine"


def test_native_middlewares_can_change_a_response(serve):
    @web.middleware
    async def decorate(request: web.Request, handler: Any) -> web.StreamResponse:
        response = await handler(request)
        response.headers["X-Native"] = "\u20ac"
        response.set_cookie("native", "1")
        return response

    answer = raw(serve(hello, middlewares=[decorate]).address, GET_AND_CLOSE)
    assert b"\r\nX-Native: \xe2\x82\xac\r\n" in answer
    assert b"\r\nSet-Cookie: native=1; Path=/\r\n" in answer


def test_a_native_handler_may_send_such_a_response_piece_by_piece(app_server):
    async def handler(request: web.Request) -> web.StreamResponse:
        response = BridgeResponse(200, "OK", [("X-A", "1")], write_timeout=5)
        assert repr(response) == "<BridgeResponse 200 OK>"
        assert not response.prepared
        with pytest.raises(RuntimeError):
            await response.write(b"too early")
        with pytest.raises(RuntimeError):
            await response.send_file(0, 0, 0)
        await response.prepare(request)
        await response.prepare(request)
        assert response.prepared
        await response.write(b"")
        await response.write(bytearray(b"one"))
        await response.write_eof(memoryview(b"two"))
        assert response.body_length == 6
        return response

    async def factory() -> web.Application:
        app = web.Application()
        app.router.add_get("/", handler)
        return app

    with app_server(factory).connect() as connection:
        for _ in range(2):
            assert connection.request("GET", "/").body == b"onetwo"


def test_line_32_a_native_signal_cannot_break_the_head_either(app_server):
    async def on_prepare(request: web.Request, response: web.StreamResponse) -> None:
        response.headers["X-A"] = "a\r\nX-Evil: 1"

    async def handler(request: web.Request) -> web.StreamResponse:
        response = BridgeResponse(200, "OK", [], body=b"x", write_timeout=5)
        with pytest.raises(ValueError, match="control character"):
            await response.prepare(request)
        return web.Response(status=500)

    async def factory() -> web.Application:
        app = web.Application()
        app.router.add_get("/", handler)
        app.on_response_prepare.append(on_prepare)
        return app

    server = app_server(factory, allow_errors=True)
    assert b"Evil" not in raw(server.address, GET_AND_CLOSE)


# --- lines 33, 34: framing ----------------------------------------------------------------


def with_length(length: int, chunks: Iterable[bytes]) -> WSGIApplication:
    return answering(chunks, headers=[*TEXT, ("Content-Length", str(length))])


@pytest.mark.parametrize("kind", [list, iter], ids=["list", "iterator"])
@pytest.mark.parametrize("chunks", [[b"abcdef"], [b"ab", b"cdef"], [b"ab", b"c", b"def"]])
def test_line_33_a_body_that_is_too_long_is_cut(serve, kind, chunks):
    def application(environ, start_response):
        return with_length(3, kind(chunks))(environ, start_response)

    server = serve(application)
    with server.connect() as connection:
        for _ in range(2):
            assert connection.request("GET", "/").body == b"abc"


def test_line_33_write_beyond_the_length_is_cut(serve):
    def application(environ, start_response):
        write = start_response("200 OK", [("Content-Length", "3")])
        write(b"ab")
        write(b"cd")
        write(b"ef")
        return [b"gh"]

    server = serve(application)
    with server.connect() as connection:
        for _ in range(2):
            assert connection.request("GET", "/").body == b"abc"


@pytest.mark.parametrize("chunks", [[b"ab"], iter([b"a", b"b"]), []])
def test_line_33_a_body_that_is_too_short_closes_the_connection(serve, chunks, caplog):
    server = serve(with_length(5, chunks))
    answer = raw(server.address, GET + GET)
    assert answer.count(b"HTTP/1.1") == 1
    assert b"Content-Length: 5" in answer
    assert "before its Content-Length" in caplog.text


@pytest.mark.parametrize("kind", [list, iter], ids=["list", "iterator"])
@pytest.mark.parametrize("headers", [[], [("Content-Length", "5")]], ids=["", "length"])
@pytest.mark.parametrize(
    ("method", "status"),
    [("HEAD", "200 OK"), ("GET", "204 No Content"), ("GET", "304 Not Modified")],
)
def test_line_34_a_response_without_a_body_keeps_the_connection_aligned(
    serve, method, status, headers, kind
):
    def application(environ, start_response):
        start_response(status, headers)
        return kind([b"hello"])

    server = serve(application)
    with server.connect() as connection:
        for _ in range(3):
            response = connection.request(method, "/")
            assert response.status == int(status[:3])
            assert response.header("Transfer-Encoding") is None
            if status.startswith("204"):
                assert response.header("Content-Length") is None
            elif headers:
                assert response.header("Content-Length") == "5"


def test_head_of_a_stream_without_end_ends(serve):
    body = Body(b"x" for _ in iter(int, 1))
    server = serve(answering(body))
    assert server.request("HEAD", "/").status == 200
    wait_until(lambda: body.closed)


def test_http_1_0_gets_no_chunks(serve):
    answer = raw(serve(answering(iter([b"a", b"b"]))).address, b"GET / HTTP/1.0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.0 200 OK\r\n")
    assert answer.endswith(b"\r\n\r\nab")
    assert b"chunked" not in answer


def test_http_1_0_may_keep_the_connection_for_a_known_length(serve):
    server = serve(hello)
    request = b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
    with server.connect() as connection:
        for _ in range(2):
            connection.send(request)
            response = connection.recv_until(b"hello")
            assert b"\r\nConnection: keep-alive\r\n" in response


# --- line 38: files -----------------------------------------------------------------------


def sending(open_file: Callable[[], Any], headers: Any = TEXT) -> WSGIApplication:
    def application(environ, start_response):
        start_response("200 OK", headers)
        return environ["wsgi.file_wrapper"](open_file(), 4096)

    return application


@pytest.fixture
def big_file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(3_000_000))
    return path


def test_line_38_a_file_is_sent_by_sendfile_and_closed(serve, loop, big_file, monkeypatch):
    sent = []
    sendfile = os.sendfile

    def spy(*args: Any) -> int:
        sent.append(sendfile(*args))
        return sent[-1]

    monkeypatch.setattr(os, "sendfile", spy)
    files = []

    def open_file() -> Any:
        files.append(big_file.open("rb"))
        return files[-1]

    server = serve(sending(open_file), loop=loop)
    with server.connect() as connection:
        for _ in range(3):
            response = connection.request("GET", "/")
            assert response.header("Content-Length") == "3000000"
            assert response.body == big_file.read_bytes()
    assert sum(sent) == 9_000_000
    wait_until(lambda: all(file.closed for file in files))


def test_line_38_a_file_occupies_no_thread_while_it_is_sent(serve, loop, big_file):
    big_file.write_bytes(bytes(30_000_000))
    server = serve(sending(lambda: big_file.open("rb")), loop=loop, threads=1)
    with server.connect() as slow:
        slow.send(GET)
        slow.recv_exactly(1000)
        wait_until(lambda: server.run(busy(server)) == 0)
        assert len(server.get("/").body) == 30_000_000


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [
        (0, 10, slice(0, 10)),
        (7, 2_000_000, slice(7, 2_000_007)),
        (2_999_000, None, slice(-1000, None)),
    ],
)
def test_line_38_ranges_are_the_applications(serve, big_file, offset, length, expected):
    def open_file() -> Any:
        file = big_file.open("rb")
        file.read(1)  # what Python has read ahead does not count
        file.seek(offset)
        return file

    headers = [] if length is None else [("Content-Length", str(length))]
    response = serve(sending(open_file, headers)).get("/")
    assert response.body == big_file.read_bytes()[expected]


@pytest.mark.parametrize("size", [1_000, 1_000_000])
def test_a_file_shorter_than_its_length_closes_the_connection(serve, tmp_path, size):
    path = tmp_path / "short"
    path.write_bytes(bytes(size))
    server = serve(sending(lambda: path.open("rb"), [("Content-Length", str(size + 1))]))
    assert raw(server.address, GET + GET).count(b"HTTP/1.1") == 1


class NoAttributes:
    """A file that has read() and nothing else."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)

    def read(self, size: int) -> bytes:
        return self._file.read(size)


@pytest.mark.parametrize(
    "make",
    [
        lambda path: io.BytesIO(path.read_bytes()),
        lambda path: NoAttributes(path.read_bytes()),
        lambda path: gzip.GzipFile(compressed(path)),
        lambda path: path.open("r+b"),
        lambda path: path.open("rb", buffering=0),
    ],
    ids=["BytesIO", "read", "gzip", "r+b", "unbuffered"],
)
def test_line_38_any_file_is_read_as_it_would_read_itself(serve, big_file, make):
    response = serve(sending(lambda: make(big_file))).get("/")
    assert response.body == big_file.read_bytes()


def compressed(path: Path) -> Path:
    target = path.with_suffix(".gz")
    target.write_bytes(gzip.compress(path.read_bytes()))
    return target


def test_line_38_a_pipe_is_no_file_to_the_kernel(serve):
    def open_file() -> Any:
        reader, writer = os.pipe()
        os.write(writer, b"through a pipe")
        os.close(writer)
        return os.fdopen(reader, "rb")

    assert serve(sending(open_file)).get("/").body == b"through a pipe"


def test_line_38_a_file_is_read_where_the_kernel_cannot_send_it(serve, big_file, monkeypatch):
    monkeypatch.delattr(os, "sendfile")
    server = serve(sending(lambda: big_file.open("rb")))
    assert server.get("/").body == big_file.read_bytes()


def test_line_38_a_file_that_tells_no_length_is_read_to_its_end(serve):
    server = serve(sending(lambda: io.FileIO("/proc/self/status")))
    assert b"Threads:" in server.get("/").body


def test_line_38_a_closed_file_is_a_500(serve, big_file):
    def open_file() -> Any:
        file = big_file.open("rb")
        file.close()
        return file

    assert serve(sending(open_file)).get("/").status == 500


def test_line_38_a_file_that_shrinks_closes_the_connection(serve, loop, big_file, monkeypatch):
    sendfile = os.sendfile

    def shrinking(out: int, source: int, offset: int, count: int) -> int:
        os.truncate(big_file, 1_000_000)
        return sendfile(out, source, offset, count)

    monkeypatch.setattr(os, "sendfile", shrinking)
    server = serve(sending(lambda: big_file.open("rb")), loop=loop)
    answer = raw(server.address, GET + GET)
    assert answer.count(b"HTTP/1.1") == 1
    assert len(answer) < 1_001_000


def test_line_38_a_file_is_closed_on_another_thread_when_the_queue_is_full(
    serve, big_file, monkeypatch
):
    gate = threading.Event()
    files = []

    def application(environ, start_response):
        start_response("200 OK", TEXT)
        if environ["PATH_INFO"] != "/file":
            gate.wait(10)
            return [b"waited"]
        files.append(big_file.open("rb"))
        return environ["wsgi.file_wrapper"](files[-1])

    big_file.write_bytes(bytes(30_000_000))
    server = serve(application, threads=1, queue_size=1)
    with server.connect() as slow, server.connect() as first, server.connect() as second:
        slow.send(GET.replace(b"/ ", b"/file "))
        slow.recv_exactly(1000)
        first.send(GET)
        second.send(GET)
        wait_until(lambda: server.run(waiting(server)) == 1)
        slow.reset()
        wait_until(lambda: files[0].closed)
        gate.set()
        assert first.read_response().body == second.read_response().body == b"waited"


def test_line_38_head_of_a_file_tells_its_length(serve, big_file):
    server = serve(sending(lambda: big_file.open("rb")))
    with server.connect() as connection:
        for _ in range(2):
            response = connection.request("HEAD", "/")
            assert response.header("Content-Length") == "3000000"


def test_line_38_a_client_that_leaves_closes_the_file(serve, loop, big_file):
    big_file.write_bytes(bytes(30_000_000))
    files = []

    def open_file() -> Any:
        files.append(big_file.open("rb"))
        return files[-1]

    server = serve(sending(open_file), loop=loop)
    with server.connect() as connection:
        connection.send(GET)
        connection.recv_exactly(1000)
        connection.reset()
    wait_until(lambda: files[0].closed)
    descriptors = len(os.listdir("/proc/self/fd"))
    assert server.get("/").status == 200
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 1


# --- lines 40, 42: execution --------------------------------------------------------------

FATAL = [SystemExit, KeyboardInterrupt, MemoryError, RecursionError, GeneratorExit, BaseException]


@pytest.mark.parametrize("where", ["call", "iteration", "write"])
@pytest.mark.parametrize("error", FATAL)
def test_line_40_nothing_that_is_raised_ends_more_than_its_request(serve, error, where, caplog):
    def application(environ, start_response):
        if environ["PATH_INFO"] == "/fine":
            return hello(environ, start_response)
        if where == "call":
            raise error
        write = start_response("200 OK", TEXT)
        return iteration(write)

    def iteration(write):
        if where == "write":
            write(b"x" * 10)
        raise error
        yield b""

    server = serve(application)
    answer = raw(server.address, GET_AND_CLOSE)
    if where != "write":
        assert answer.startswith(b"HTTP/1.1 500 ")
    assert b"0\r\n\r\n" not in answer
    assert error.__name__ in caplog.text
    assert server.get("/fine").status == 200


def test_line_40_a_real_recursion_is_a_500(serve):
    def application(environ, start_response):
        return application(environ, start_response)

    server = serve(application)
    for _ in range(2):
        assert server.get("/").status == 500


def test_line_40_a_log_that_fails_leaves_nobody_waiting(serve):
    class Failing(logging.Filter):
        failures = 1

        def filter(self, record: logging.LogRecord) -> bool:
            if self.failures:
                self.failures -= 1
                raise SystemExit
            return True

    def application(environ, start_response):
        raise ValueError

    server = serve(application, threads=1)
    log = logging.getLogger("django_aioserve")
    log.addFilter(failing := Failing())
    try:
        assert server.get("/").status == 500
    finally:
        log.removeFilter(failing)
    assert server.get("/").status == 500


def test_line_42_a_full_queue_is_a_503_with_retry_after(serve):
    gate = threading.Event()

    def application(environ, start_response):
        gate.wait(10)
        return hello(environ, start_response)

    server = serve(application, threads=1, queue_size=1)
    connections = [server.connect() for _ in range(2)]
    for connection in connections:
        connection.send(GET)
    wait_until(lambda: server.run(waiting(server)) == 1)
    refused = server.request("POST", "/", body=b"x")
    assert (refused.status, refused.header("Retry-After")) == (503, "1")
    gate.set()
    for connection in connections:
        assert connection.read_response().status == 200
        connection.close()
    assert server.get("/").status == 200


async def waiting(server: AppServer) -> int:
    return server.app[POOL].queued


VARIABLE: ContextVar[str] = ContextVar("VARIABLE", default="unset")


def test_context_variables_do_not_leak_between_requests(serve):
    def application(environ, start_response):
        before = VARIABLE.get()
        VARIABLE.set("set by a request")
        start_response("200 OK", TEXT)
        return [before.encode()]

    server = serve(application, threads=1)
    assert [server.get("/").body for _ in range(3)] == [b"unset"] * 3


def test_context_variables_of_native_middlewares_reach_the_application(serve):
    @web.middleware
    async def outer(request: web.Request, handler: Any) -> web.StreamResponse:
        VARIABLE.set("native")
        return await handler(request)

    def application(environ, start_response):
        start_response("200 OK", TEXT)
        return iterate()

    def iterate():
        yield VARIABLE.get().encode()

    assert serve(application, middlewares=[outer]).get("/").body == b"native"


# --- line 45: python -O -------------------------------------------------------------------

PROGRAM = textwrap.dedent(
    """
    import asyncio, json, logging
    from aiohttp import web
    from django_aioserve.bridge.threads import ThreadPool
    from django_aioserve.bridge.wsgi import WSGIBridge
    from django_aioserve.conf import Config

    logging.disable()

    CASES = {
        "/hop": ("200 OK", [("Connection", "close")], [b"x"]),
        "/evil": ("200 OK", [("X-A", "a\\r\\nX-Evil: 1")], [b"x"]),
        "/status": ("200", [], [b"x"]),
        "/type": ("200 OK", [("X-A", 5)], [b"x"]),
        "/text": ("200 OK", [], ["x"]),
        "/long": ("200 OK", [("Content-Length", "1")], [b"xyz"]),
        "/short": ("200 OK", [("Content-Length", "9")], [b"xyz"]),
        "/empty": ("204 No Content", [], [b"xyz"]),
        "/stream": ("200 OK", [("Content-Length", "6")], iter([b"xyz", b"abc"])),
        "/none": None,
    }

    def application(environ, start_response):
        case = CASES[environ["PATH_INFO"]]
        if case is None:
            return [b"never started"]
        status, headers, body = case
        write = start_response(status, headers)
        if environ["QUERY_STRING"] == "twice":
            start_response(status, headers)
        return body

    async def main():
        pool = ThreadPool(2, 10)
        app = web.Application()
        bridge = WSGIBridge(application, Config(), pool)
        app.router.add_route("*", "/{path_info:.*}", bridge.handle)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = int(site.name.rpartition(":")[2])
        answers = {}
        for path in [*CASES, "/status?twice"]:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            lines = [f"GET {path} HTTP/1.1", "Host: x", "Connection: close", "", ""]
            writer.write("\\r\\n".join(lines).encode())
            answer = (await reader.read()).decode("latin-1")
            answers[path] = [line for line in answer.split("\\r\\n") if line[:5] != "Date:"]
            writer.close()
        await runner.cleanup()
        pool.close()
        await pool.join(5)
        print(json.dumps([__debug__, answers]))

    asyncio.run(main())
    """
)


def test_line_45_python_o_behaves_identically(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    root = str(Path(__file__).parent.parent)
    answers = []
    for flags in ([], ["-O"], ["-OO"]):
        result = subprocess.run(
            [sys.executable, *flags, str(program)],
            capture_output=True,
            check=True,
            cwd=root,
            env={**os.environ, "PYTHONPATH": root, "PYTHONOPTIMIZE": ""},
            timeout=60,
        )
        debug, answer = json.loads(result.stdout)
        assert debug == (not flags)
        answers.append(answer)
    assert answers[0] == answers[1] == answers[2]
    assert answers[0]["/hop"][0] == "HTTP/1.1 500 Internal Server Error"


# --- leaks --------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_stays_flat_over_5000_requests(serve):
    def application(environ, start_response):
        if environ["PATH_INFO"] == "/stream":
            start_response("200 OK", TEXT)
            return (bytes(1000) for _ in range(5))
        if environ["PATH_INFO"] == "/error":
            raise ValueError
        environ["wsgi.input"].read()
        start_response("200 OK", TEXT)
        return [bytes(1000)]

    server = serve(application)

    def requests(count: int) -> int:
        with server.connect() as connection:
            for number in range(count):
                kind = number % 10
                if kind == 7:
                    connection.request("GET", "/stream")
                elif kind == 8:
                    connection.request("POST", f"/{number}", [("X-Number", "1")], b"x" * 5000)
                else:
                    connection.request("GET", f"/{number}?{number}")
        wait_until(lambda: server.run(busy(server)) == 0)
        gc.collect()
        return len(gc.get_objects())

    requests(500)
    before = requests(100)
    after = requests(5000)
    assert after - before < 500

"""One client's connection: what hazards.md says of parsing and connections, by raw bytes.

The numbers in the names are its lines. One real server answers most of them; its timeouts
are short, so that whoever waits for one waits for no long time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import resource
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp import web

from django_aioserve.server import connection as connection_module
from tests.support import RawConnection, Runaio, raw, wait_until

HOST = b"Host: localhost\r\n"
CLOSE = b"Connection: close\r\n"
PING = b"GET /ping/ HTTP/1.1\r\n" + HOST
MIB = 1 << 20

#: How much more memory a worker may take for one greedy client.
BOUND = 48 * MIB


@pytest.fixture(scope="module")
def server() -> Iterator[Runaio]:
    """One worker with short timeouts."""
    with Runaio(
        "--threads=4",
        "--header-timeout=0.6",
        "--body-timeout=0.6",
        "--write-timeout=0.6",
        "--max-body-size=8M",
    ) as started:
        started.get("/ping/")
        yield started


@pytest.fixture
def worker(server: Runaio) -> Iterator[int]:
    """The pid of the worker, which is to be the same after the test and to answer."""
    (pid,) = server.workers()
    yield pid
    assert server.get("/pid/").text == str(pid)


def resident(pid: int) -> int:
    """Resident memory of a process, in bytes."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def cpu_seconds(pid: int) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def statuses(answer: bytes) -> list[int]:
    """The status of each response in `answer`, interim ones included."""
    return [int(status) for status in re.findall(rb"HTTP/\d\.\d (\d{3})", answer)]


def post(headers: bytes, body: bytes = b"", version: bytes = b"1.1") -> bytes:
    """A request that echo answers, with its body and all headers but Host given."""
    return b"POST /echo/ HTTP/" + version + b"\r\n" + HOST + headers + b"\r\n" + body


def refused(server: Runaio, data: bytes, allowed: tuple[int, ...] = (400,)) -> None:
    """`data`, followed by a good request, gets one refusal and the end of the connection."""
    with server.connect() as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.send(data + PING + b"\r\n")
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while chunk := connection.socket.recv(65536):
                answer += chunk
    found = statuses(answer)
    assert len(found) == 1, answer
    assert found[0] in allowed, answer


# --- parsing ------------------------------------------------------------------------------

CHUNKED = b"Transfer-Encoding: chunked\r\n"


@pytest.mark.parametrize(
    "headers",
    [b"Content-Length: 5\r\n" + CHUNKED, CHUNKED + b"Content-Length: 5\r\n"],
    ids=["length first", "chunked first"],
)
def test_line_1_a_length_and_chunks_are_refused(server, worker, headers):
    refused(server, post(headers, b"5\r\nhello\r\n0\r\n\r\n"))


@pytest.mark.parametrize(
    "coding",
    [
        b"gzip",
        b"chunked, gzip",
        b"identity",
        b"xchunked",
        b"chunked,",
        b"chunked x",
        b"",
        b'"chunked"',
    ],
)
def test_line_2_a_transfer_coding_that_does_not_end_in_chunked_is_refused(server, worker, coding):
    refused(server, post(b"Transfer-Encoding: " + coding + b"\r\n"), (400, 501))


def test_line_2_chunked_twice_is_refused(server, worker):
    refused(server, post(CHUNKED * 2, b"0\r\n\r\n"), (400, 501))


def test_line_2_no_empty_transfer_coding_stands_beside_a_length(server, worker):
    refused(server, post(b"Transfer-Encoding:\r\nContent-Length: 5\r\n", b"hello"))


@pytest.mark.parametrize("coding", [b"gzip, chunked", b"identity, chunked"])
def test_line_2_a_transfer_coding_that_would_have_to_be_undone_is_refused(server, worker, coding):
    """RFC 9112, section 6.1. The page would take what is compressed for the body."""
    body = b"5\r\nhello\r\n0\r\n\r\n"
    refused(server, post(b"Transfer-Encoding: " + coding + b"\r\n", body), (501,))


@pytest.mark.parametrize(
    "headers",
    [
        b"Content-Length: 5\r\nContent-Length: 6\r\n",
        b"Content-Length: 5\r\nContent-Length: 5\r\n",
        b"Content-Length: 5, 5\r\n",
        b"Content-Length: +5\r\n",
        b"Content-Length: -5\r\n",
        b"Content-Length: 0x5\r\n",
        b"Content-Length: 5 5\r\n",
        b"Content-Length: 5_0\r\n",
        b"Content-Length: 99999999999999999999999\r\n",
    ],
)
def test_line_3_a_length_that_is_not_one_number_is_refused(server, worker, headers):
    refused(server, post(headers, b"hello"))


def test_line_4_a_transfer_coding_of_http_1_0_is_refused(server, worker):
    refused(server, post(CHUNKED, b"5\r\nhello\r\n0\r\n\r\n", version=b"1.0"))


@pytest.mark.parametrize(
    "line", [b"5;a\rb\r\n", b"5;a\nb\r\n", b"5;a=\n\r\n", b"5\n", b"5;a\r\r\n"]
)
def test_line_5_cr_or_lf_in_a_chunk_extension_is_refused(server, worker, line):
    refused(server, post(CHUNKED, line + b"hello\r\n0\r\n\r\n"))


@pytest.mark.parametrize(
    "size", [b"+5", b"-5", b"", b"0x5", b"F" * 17, b"5g", b";a", b" 5", b"5_0"]
)
def test_line_6_a_chunk_size_that_is_no_hexadecimal_number_is_refused(server, worker, size):
    refused(server, post(CHUNKED, size + b"\r\nhello\r\n0\r\n\r\n"))


@pytest.mark.parametrize("path", [b"/ping/", b"/native/ping/", b"/static/none.css"])
def test_line_6_nobody_is_asked_for_a_body_that_is_malformed(server, worker, path):
    request = b"GET " + path + b" HTTP/1.1\r\n" + HOST + CHUNKED + b"\r\n"
    refused(server, request + b"5\r\nhello\r\nZ\r\n\r\n")


def test_line_6_a_fault_is_noticed_at_once_by_who_waits_for_the_body(server, worker):
    """The end of a chunk wakes the reader just before the fault does."""
    for _ in range(5):
        with server.connect() as connection:
            connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.send(post(b"Expect: 100-continue\r\n" + CHUNKED))
            assert connection.read_response().status == 100
            connection.send(b"5\r\nhello")
            time.sleep(0.005)  # so that they are packets of their own
            connection.send(b"\r\n0\r\n X: folded\r\n\r\n")
            assert connection.read_response().status == 400


def test_line_6_a_chunk_longer_than_its_size_is_refused(server, worker):
    refused(server, post(CHUNKED, b"5\r\nhello world\r\n0\r\n\r\n"))


@pytest.mark.parametrize(
    "trailer", [b"Content-Length: 0", b"Transfer-Encoding: gzip", b"Host: evil.example"]
)
def test_line_7_a_trailer_overrides_no_header(server, worker, trailer):
    body = b"5\r\nhello\r\n0\r\n" + trailer + b"\r\n\r\n"
    with server.connect() as connection:
        connection.send(post(CHUNKED, body))
        answer = connection.read_response()
        if answer.status == 200:
            assert b'"length": 5' in answer.body
            assert b'"HTTP_HOST": "localhost"' in answer.body
            # aiohttp's parser would make it a header of the next request.
            assert ("Connection", "close") in answer.headers
            assert connection.at_eof()
        else:
            assert answer.status == 400


CHUNKS = b"5\r\nhello\r\n0\r\n"


@pytest.fixture(scope="module")
def asgi_server() -> Iterator[Runaio]:
    """Its answers begin in the application, before the request is at its end."""
    with Runaio("--interface=asgi", "--body-timeout=5") as started:
        started.get("/ping/")
        yield started


@pytest.mark.parametrize("interface", ["wsgi", "asgi"])
@pytest.mark.parametrize(
    "parts",
    [
        [CHUNKS + b"X-Leak: 10\r\n\r\n"],
        [b"", CHUNKS + b"X-Leak: 10\r\n\r\n"],
        [CHUNKS + b"X-Leak: 1\r\n", b"X-Leak: 0\r\n\r\n"],
    ],
    ids=["at once", "head and body", "amid the trailers"],
)
def test_line_7_a_trailer_is_no_header_of_the_next_request(
    server, worker, asgi_server, interface, parts
):
    with (server if interface == "wsgi" else asgi_server).connect() as connection:
        first, *rest = parts
        # An answer of 100 says that what was sent has been read.
        connection.send(post((EXPECT if rest else b"") + CHUNKED, first))
        if rest:
            assert connection.read_response().status == 100
        for part in rest:
            connection.send(part)
        assert connection.read_response().status == 200
        with contextlib.suppress(OSError):
            connection.send(b"GET /echo/ HTTP/1.1\r\n" + HOST + b"\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv_to_eof() == b""


@pytest.mark.parametrize("path", [b"/echo/", b"/native/ping/"])
@pytest.mark.parametrize(
    "parts",
    [
        [CHUNKS + b"\r\n"],
        [b"", CHUNKS + b"\r\n"],
        [b"5\r\nhello\r\n", b"0\r\n\r\n"],
        [b"5\r\nhello\r\n0", b"\r\n\r", b"\n"],
    ],
    ids=["at once", "head and body", "the last chunk alone", "the last chunk in bits"],
)
def test_line_7_a_connection_outlives_a_chunked_body_without_trailers(server, worker, path, parts):
    with server.connect() as connection:
        connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        request = post(CHUNKED).replace(b"/echo/", path).replace(b"POST", b"GET")
        connection.send(request)
        for part in parts:
            connection.send(part)
        assert connection.read_response().status == 200
        connection.send(PING + b"\r\n")
        assert connection.read_response().text == "pong"


def test_line_7_requests_before_one_with_trailers_do_not_end_the_connection(server, worker):
    pipelined = PING + b"\r\n" + post(CHUNKED, CHUNKS + b"X-Leak: 10\r\n\r\n") + PING + b"\r\n"
    answer = raw(server.address, pipelined)
    assert statuses(answer) == [200, 200]
    assert answer.count(b"Connection: close") == 1


def test_line_7_a_trailer_behind_a_declined_upgrade_is_no_header(server, worker):
    upgrade = PING + b"Upgrade: websocket\r\nConnection: upgrade\r\n\r\n"
    leaking = post(CHUNKED, CHUNKS + b"X-Leak: 10\r\n\r\n")
    echo = b"GET /echo/ HTTP/1.1\r\n" + HOST + CLOSE + b"\r\n"
    answer = raw(server.address, upgrade + leaking + echo)
    assert statuses(answer)
    assert b"X_LEAK" not in answer


@pytest.mark.parametrize("count", [1_000, 100_000])
def test_line_7_the_number_of_trailers_is_capped(server, worker, count):
    trailers = b"".join(b"X-%d: y\r\n" % number for number in range(count))
    refused(server, post(CHUNKED, b"5\r\nhello\r\n0\r\n" + trailers + b"\r\n"), (400, 431))


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /ping/ HTTP/1.1\r\n\r\n",
        b"GET /ping/ HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
        b"GET /ping/ HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        b"GET /ping/ HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        b"GET /ping/ HTTP/1.1\r\nHost: a b\r\n\r\n",
    ],
    ids=["none", "the same twice", "two", "not allowed", "not a host"],
)
def test_line_8_exactly_one_host_that_is_allowed(server, worker, request_bytes):
    answer = raw(server.address, request_bytes.replace(b"\r\n\r\n", b"\r\n" + CLOSE + b"\r\n"))
    assert statuses(answer) == [400]


@pytest.mark.parametrize(
    "host",
    [
        b"",
        b"user@localhost",
        b"localhost/path",
        b"localhost:80a",
        b"localhost,localhost",
        b"[::1",
        b"[:::]",
        b"localhost:65536",
        b"localhost:" + b"9" * 5000,
        b"local\xe9",
        b"http://localhost",
    ],
)
@pytest.mark.parametrize("path", [b"/ping/", b"/native/ping/"])
def test_line_8_what_is_no_host_is_refused_by_native_routes_too(server, worker, path, host):
    refused(server, b"GET " + path + b" HTTP/1.1\r\nHost: " + host + b"\r\n\r\n")


@pytest.mark.parametrize(
    "host",
    [b"my_service", b"LOCALHOST:080", b"[::1]:65535", b"[::ffff:1.2.3.4]", b"a.b-c.example."],
)
def test_line_8_a_host_may_be_any_name_or_address(server, worker, host):
    request = b"GET /native/ping/ HTTP/1.1\r\nHost: " + host + b"\r\n" + CLOSE + b"\r\n"
    assert statuses(raw(server.address, request)) == [200]


@pytest.mark.parametrize("target", [b"http://user:word@localhost/", b"http://a,b/native/ping/"])
def test_line_8_a_target_without_a_valid_host_is_refused(server, worker, target):
    refused(server, b"GET " + target + b" HTTP/1.1\r\n" + HOST + b"\r\n")


@pytest.mark.parametrize("query", [b"", b"?a=%20b"])
def test_line_8_an_empty_path_in_a_target_is_the_root(server, worker, query):
    request = b"GET http://localhost" + query + b" HTTP/1.1\r\n" + HOST + CLOSE + b"\r\n"
    assert statuses(raw(server.address, request)) == [200]


def test_options_of_the_server_itself_are_answered(server, worker):
    with server.connect() as connection:
        connection.send(b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n")
        answer = connection.read_response()
        assert (answer.status, answer.header("Content-Length")) == (200, "0")
        connection.send(PING + b"\r\n")
        assert connection.read_response().text == "pong"


def test_there_is_no_tunnel(server, worker):
    refused(server, b"CONNECT localhost:443 HTTP/1.1\r\n" + HOST + b"\r\n", (501,))


def test_line_8_http_1_0_needs_no_host(server, worker):
    assert statuses(raw(server.address, b"GET /ping/ HTTP/1.0\r\n\r\n")) == [200]


def test_line_8_an_absolute_form_with_a_foreign_host_is_not_served_as_that_host(server, worker):
    target = b"GET http://evil.example/echo/ HTTP/1.1\r\n"
    answer = raw(server.address, target + HOST + CLOSE + b"\r\n")
    assert statuses(answer)[0] in (200, 400)
    assert b'"HTTP_HOST": "evil' not in answer
    assert b'"SERVER_NAME": "evil' not in answer


def test_line_8_an_absolute_form_gets_no_forbidden_host_past(server, worker):
    target = b"GET http://localhost/ping/ HTTP/1.1\r\nHost: evil.example\r\n"
    assert statuses(raw(server.address, target + CLOSE + b"\r\n"))[0] in (200, 400)
    # Where it is served it is served as what the target names (RFC 9112, section 3.2.2).
    echo = raw(server.address, target.replace(b"ping", b"echo") + CLOSE + b"\r\n")
    assert statuses(echo) == [400] or b'"HTTP_HOST": "evil' not in echo


@pytest.mark.parametrize(
    "line",
    [
        b"X-A: a\x00b\r\n",
        b"X-A: a\x01b\r\n",
        b"X-A: a\x7fb\r\n",
        b"X-A: a\rb\r\n",
        b"X-A: a\nX-B: b\r\n",
        b"X-A: a\r\n folded\r\n",
        b" X-A: a\r\n",
        b"X-A : a\r\n",
        b"X\x00A: a\r\n",
        b"X A: a\r\n",
        b": a\r\n",
        b"X-A\r\n",
        b"X\xe9A: a\r\n",
    ],
)
def test_line_9_what_no_header_may_contain_is_refused(server, worker, line):
    refused(server, b"GET /ping/ HTTP/1.1\r\n" + HOST + line + b"\r\n")


@pytest.mark.parametrize(
    "line",
    [
        b"GET /ping/ HTTP/1.1\n" + HOST.replace(b"\r", b""),
        b"GET /ping/\x00 HTTP/1.1\r\n" + HOST,
        b"GET /ping/ HTTP/1.1 \r\n" + HOST,
        b"GET /ping/ HTTP/2.0\r\n" + HOST,
        b"GET /ping/ HTTP/1.10\r\n" + HOST,
        b"GET /ping/\r\n",
        b"G\x01T /ping/ HTTP/1.1\r\n" + HOST,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n",
    ],
    ids=[
        "bare LF",
        "NUL",
        "space at the end",
        "HTTP/2.0",
        "HTTP/1.10",
        "HTTP/0.9",
        "control character",
        "TLS",
    ],
)
def test_line_9_what_is_no_request_line_is_refused(server, worker, line):
    refused(server, line + b"\r\n", (400, 505))


@pytest.mark.parametrize("version", [b"HTTP/2.0", b"HTTP/0.9", b"HTTP/1.2", b"HTTP/9.9"])
def test_line_9_the_refusal_of_a_version_is_of_one_that_is_spoken(server, worker, version):
    answer = raw(server.address, b"GET /ping/ " + version + b"\r\n" + HOST + b"\r\n")
    assert statuses(answer)[0] in (400, 505)
    assert answer.startswith(b"HTTP/1.1 ")
    assert b"\r\nConnection: close\r\n" in answer


@pytest.mark.parametrize("digit", ["٣", "³", "３"])
def test_line_10_digits_that_are_not_ascii_are_no_digits(server, worker, digit):
    refused(server, post(f"Content-Length: {digit}\r\n".encode(), b"abc"))
    refused(server, post(CHUNKED, f"{digit}\r\nabc\r\n0\r\n\r\n".encode()))


# --- bodies and what follows them ---------------------------------------------------------

SMUGGLED = b"GET /crash/ HTTP/1.1\r\n" + HOST + b"\r\n"


@pytest.mark.parametrize("path", [b"/ping/", b"/no-such-page/", b"/static/none.css"])
def test_line_12_a_body_that_nobody_read_is_not_the_next_request(server, worker, path):
    headers = HOST + b"Content-Length: %d\r\n\r\n" % len(SMUGGLED)
    answer = raw(
        server.address,
        b"POST " + path + b" HTTP/1.1\r\n" + headers + SMUGGLED + PING + CLOSE + b"\r\n",
    )
    found = statuses(answer)
    assert 500 not in found
    assert len(found) in (1, 2)
    assert found[1:] in ([], [200])


def test_line_12_a_body_that_comes_after_its_refusal_is_not_the_next_request(server, worker):
    with server.connect() as connection:
        connection.send(
            b"POST /echo/ HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 999999999\r\n\r\n"
        )
        assert connection.read_response().status in (400, 413)
        with contextlib.suppress(OSError):
            connection.send(SMUGGLED)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv_to_eof() == b""


EXPECT = b"Expect: 100-continue\r\n"
#: Its handler answers without a look at the body.
NATIVE = b"GET /native/ping/ HTTP/1.1\r\n"


@pytest.mark.parametrize(
    ("header", "body"),
    [(b"Content-Length: 5\r\n", b"hello"), (CHUNKED, CHUNKS + b"\r\n")],
    ids=["length", "chunked"],
)
def test_line_12_a_body_that_comes_after_its_answer_is_skipped(server, worker, header, body):
    with server.connect() as connection:
        connection.send(NATIVE + HOST + header + b"\r\n")
        answer = connection.read_response()
        assert answer.status == 200
        assert ("Connection", "close") not in answer.headers
        connection.send(body)
        connection.send(PING + b"\r\n")
        assert connection.read_response().text == "pong"


@pytest.mark.parametrize(
    "body",
    [CHUNKS + b"\r\n", b"6\r\n\n0\r\n\r\n\r\n0\r\n\r\n", b"0\r\n\r\n"],
    ids=["chunks", "what looks like an end", "none"],
)
def test_line_12_what_follows_a_body_that_is_skipped_is_answered(server, worker, body):
    """The answer before it did not say that the connection would be closed."""
    with server.connect() as connection:
        connection.send(NATIVE + HOST + CHUNKED + b"\r\n")
        assert connection.read_response().status == 200
        connection.send(body + PING + b"\r\n")
        assert connection.read_response().text == "pong"


def test_line_12_trailers_behind_a_body_that_is_skipped_are_no_headers(server, worker):
    with server.connect() as connection:
        connection.send(NATIVE + HOST + CHUNKED + b"\r\n")
        assert connection.read_response().status == 200
        connection.send(CHUNKS + b"X-Leak: 10\r\n\r\nGET /echo/ HTTP/1.1\r\n" + HOST + b"\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv_to_eof() == b""


@pytest.mark.parametrize("header", [b"Content-Length: 5\r\n", CHUNKED])
def test_line_12_a_body_that_never_comes_is_not_waited_for_long(server, worker, header):
    with server.connect() as connection:
        connection.send(NATIVE + HOST + header + b"\r\n")
        assert connection.read_response().status == 200
        assert connection.recv_to_eof() == b""


@pytest.mark.parametrize(
    "header", [b"Content-Length: 1048577\r\n", EXPECT + b"Content-Length: 5\r\n"]
)
def test_line_12_an_answer_says_when_its_body_will_not_be_skipped(server, worker, header):
    with server.connect() as connection:
        connection.send(NATIVE + HOST + header + b"\r\n")
        answer = connection.read_response()
        if answer.status == 100:  # aiohttp grants it before the handler is asked
            answer = connection.read_response()
        assert ("Connection", "close") in answer.headers
        connection.send(SMUGGLED)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv_to_eof() == b""


def test_line_12_no_more_than_a_mebibyte_is_skipped(server, worker):
    with server.connect() as connection:
        connection.send(NATIVE + HOST + CHUNKED + b"\r\n")
        assert connection.read_response().status == 200
        with contextlib.suppress(OSError):  # it may be closed amid that
            for _ in range(3):
                connection.send(b"100000\r\n" + b"x" * MIB + b"\r\n")
            connection.send(b"0\r\n\r\n" + PING + b"\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv_to_eof() == b""


def test_line_12_a_fault_in_a_body_that_is_skipped_ends_the_connection(server, worker):
    with server.connect() as connection:
        connection.send(NATIVE + HOST + CHUNKED + b"\r\n")
        assert connection.read_response().status == 200
        connection.send(b"Z\r\n" + SMUGGLED)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv_to_eof() == b""


@pytest.mark.parametrize("end", [b"Z\r\n", None], ids=["fault", "FIN"])
def test_line_12_a_body_that_cannot_be_skipped_ends_the_connection_at_once(server, worker, end):
    with server.connect() as connection:
        connection.send(NATIVE + HOST + CHUNKED + b"\r\n")
        assert connection.read_response().status == 200
        began = time.monotonic()
        if end is None:
            connection.socket.shutdown(socket.SHUT_WR)
        else:
            connection.send(end)
        assert connection.at_eof()
    assert time.monotonic() - began < connection_module.LINGER_SECONDS / 2


def test_line_12_a_fault_in_a_body_turns_none_of_it_into_requests(server, worker):
    """The second packet looks like a request and is the content of a chunk."""
    with server.connect() as connection:
        connection.send(post(EXPECT + CHUNKED, b"%x\r\n" % len(SMUGGLED)))
        assert connection.read_response().status == 100  # the first has been read
        connection.send(SMUGGLED + b"\r\nZ\r\n")
        answer = connection.recv_to_eof()
    assert statuses(answer) == [400], answer


def test_line_12_a_fault_behind_a_body_turns_none_of_it_into_requests(server, worker):
    """The second packet begins within the body of a request and ends in what is none."""
    with server.connect() as connection:
        connection.send(post(EXPECT + b"Content-Length: %d\r\n" % len(SMUGGLED)))
        assert connection.read_response().status == 100
        connection.send(SMUGGLED + b"\0\r\n\r\n")
        answer = connection.recv_to_eof()
    assert statuses(answer) == [200, 400], answer


@pytest.mark.parametrize(
    "rest",
    [PING + b"\r\n", b"\r\n", b"garbage", b"\x00\x01\x02", SMUGGLED * 500],
    ids=["a request", "an empty line", "garbage", "control characters", "many requests"],
)
def test_line_13_what_follows_connection_close_does_not_spoil_the_answer(server, worker, rest):
    answer = raw(server.address, PING + CLOSE + b"\r\n" + rest)
    assert statuses(answer) == [200]
    assert answer.endswith(b"pong")


def test_line_13_what_follows_http_1_0_does_not_spoil_the_answer(server, worker):
    answer = raw(server.address, b"GET /ping/ HTTP/1.0\r\n" + HOST + b"\r\n" + PING + b"\r\n")
    assert statuses(answer) == [200]


def test_what_came_before_a_malformed_request_is_answered(server, worker):
    answer = raw(server.address, (PING + b"\r\n") * 3 + b"GET / HTTP/1.1\r\nBad Header: x\r\n\r\n")
    assert statuses(answer) == [200, 200, 200, 400]


def test_a_malformed_request_behind_one_that_runs_is_refused_after_its_answer(server, worker):
    with server.connect() as connection:
        connection.send(b"GET /slow/?seconds=0.2 HTTP/1.1\r\n" + HOST + b"\r\n")
        connection.send(b"nonsense\r\n\r\n")
        answer = connection.recv_to_eof()
    assert statuses(answer) == [200, 400]


UPGRADE = b"Upgrade: h2c\r\nConnection: Upgrade\r\n"
HANDSHAKE = b"Upgrade: websocket\r\nConnection: Upgrade\r\n"


@pytest.mark.parametrize("path", [b"/ping/", b"/native/ping/"])
def test_a_request_behind_a_declined_upgrade_is_answered_or_told_of_the_end(server, worker, path):
    """aiohttp's parser forgets what follows such a request in the same data."""
    request = b"GET " + path + b" HTTP/1.1\r\n" + HOST + UPGRADE + b"\r\n"
    answer = raw(server.address, PING + b"\r\n" + request + PING + CLOSE + b"\r\n")
    assert statuses(answer) in ([200] * 2, [200] * 3)
    assert answer.count(b"\r\nConnection: close\r\n") == 1


@pytest.mark.parametrize(
    ("header", "body"), [(b"", b""), (b"Content-Length: 5\r\n", b"hello")], ids=["", "body"]
)
def test_what_is_left_of_a_request_behind_a_declined_upgrade_is_none(server, worker, header, body):
    """It would be what a client had sent as the content of its request."""
    cut = b"POST /echo/ HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % len(SMUGGLED)
    with server.connect() as connection:
        connection.send(post(UPGRADE + header, body + cut))
        assert connection.read_response().status == 200
        with contextlib.suppress(OSError):
            connection.send(SMUGGLED)
        with contextlib.suppress(ConnectionResetError):
            assert 500 not in statuses(connection.recv_to_eof())


def test_a_connection_outlives_a_declined_upgrade_that_came_alone(server, worker):
    with server.connect() as connection:
        for more in (UPGRADE, b""):
            connection.send(PING + more + b"\r\n")
            answer = connection.read_response()
            assert answer.status == 200
            assert ("Connection", "close") not in answer.headers


def test_a_body_that_comes_after_the_refusal_of_its_handshake_ends_the_connection(server, worker):
    """What follows it would be taken for WebSocket frames that nobody reads."""
    with server.connect() as connection:
        connection.send(NATIVE + HOST + HANDSHAKE + b"Content-Length: 5\r\n\r\n")
        assert connection.read_response().status == 426
        with contextlib.suppress(OSError):
            connection.send(b"hello" + PING + b"\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv_to_eof() == b""


def test_what_came_before_a_declined_handshake_is_answered(server, worker):
    handshake = PING + HANDSHAKE + b"\r\n"
    answer = raw(server.address, PING + b"\r\n" + handshake + PING + CLOSE + b"\r\n")
    assert statuses(answer)[0] == 200
    assert len(statuses(answer)) > 1


# --- limits in size -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("begin", "piece", "count"),
    [
        (b"GET /ping/?", b"a" * 500, 30),
        (b"GET /ping/ HTTP/1.1\r\n" + HOST + b"X-Long: ", b"a" * 500, 30),
        (b"GET /ping/ HTTP/1.1\r\n" + HOST + b"X-Long", b"a" * 500, 30),
        (b"GET /ping/ HTTP/1.1\r\n" + HOST, b"X-Many: a\r\n" * 10, 30),
        (b"G", b"G" * 500, 30),
    ],
    ids=["target", "value", "name", "number", "method"],
)
def test_line_14_limits_hold_over_many_packets(server, worker, begin, piece, count):
    with server.connect() as connection:
        connection.send(begin)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(count):
                connection.send(piece)
                time.sleep(0.001)  # so that they are packets of their own
            connection.send(b"\r\n\r\n")
        answer = connection.read_response()
        assert answer.status in (400, 414, 431)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv_to_eof() == b""


def test_line_14_what_is_within_the_limits_is_served_over_many_packets(server, worker):
    request = b"GET /ping/?" + b"a" * 7000 + b" HTTP/1.1\r\n" + HOST
    request += b"".join(b"X-%d: %s\r\n" % (number, b"b" * 100) for number in range(60))
    with server.connect() as connection:
        for start in range(0, len(request), 997):
            connection.send(request[start : start + 997])
            time.sleep(0.001)
        connection.send(b"\r\n")
        assert connection.read_response().text == "pong"


# --- limits in time -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "begin",
    [b"G", b"GET /ping/ HTTP/1.1\r\n", PING, PING + b"X-Slow: "],
    ids=["method", "line", "header", "value"],
)
def test_line_15_a_header_that_stops_is_cut_off(server, worker, begin):
    with server.connect() as connection:
        connection.send(begin)
        assert statuses(connection.recv_to_eof()) in ([408], [])


def test_line_15_a_header_that_drips_is_cut_off(server, worker):
    with server.connect() as connection:
        ended = threading.Event()

        def drip() -> None:
            with contextlib.suppress(OSError):
                connection.send(PING + b"X-Slow: ")
                while not ended.wait(0.05):
                    connection.send(b"a")

        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            with contextlib.suppress(ConnectionResetError):
                assert statuses(connection.recv_to_eof()) in ([408], [])
        finally:
            ended.set()
            dripping.join()


def test_line_15_a_second_header_that_stops_is_cut_off_as_well(server, worker):
    with server.connect() as connection:
        connection.send(PING + b"\r\n")
        assert connection.read_response().status == 200
        connection.send(PING)
        assert statuses(connection.recv_to_eof()) in ([408], [])


def test_line_15_an_idle_connection_is_not_cut_off_by_it(server, worker):
    with server.connect() as idle:
        idle.send(PING + b"\r\n")
        assert idle.read_response().status == 200
        with server.connect() as dripping:  # takes as long as the limit
            dripping.send(b"G")
            dripping.recv_to_eof()
        idle.send(PING + b"\r\n")
        assert idle.read_response().status == 200


@pytest.mark.parametrize(
    "headers", [b"Content-Length: 100\r\n", CHUNKED], ids=["length", "chunked"]
)
def test_line_16_a_body_that_stalls_is_answered_with_408_and_closed(server, worker, headers):
    with server.connect() as connection:
        connection.send(post(headers, b"5\r\nhel"))
        assert connection.read_response().status == 408
        assert connection.at_eof()


@pytest.mark.parametrize("headers", [b"Content-Length: 100\r\n", CHUNKED])
@pytest.mark.parametrize("begun", [b"", b"5\r\nhel", b"5\r\nhello\r\n"])
def test_line_16_a_native_handler_waits_for_no_body_that_stalls(server, worker, headers, begun):
    with server.connect() as connection:
        request = post(headers, begun).replace(b"/echo/", b"/native/length/")
        connection.send(request)
        assert connection.read_response().status == 408
        assert connection.at_eof()


def test_line_16_a_native_handler_gets_a_body_that_is_slow_and_comes(server, worker):
    with server.connect() as connection:
        connection.send(
            post(b"Content-Length: 20\r\n", b"x").replace(b"/echo/", b"/native/length/")
        )
        for _ in range(19):
            # Longer in all than a body may stall; nothing else can be waited for.
            time.sleep(0.1)
            connection.send(b"x")
        answer = connection.read_response()
        assert (answer.status, answer.text) == (200, "20")


def test_line_16_a_body_of_a_page_that_does_not_read_it_holds_nothing_up(server, worker):
    with server.connect() as connection:
        connection.send(
            b"POST /static/none.css HTTP/1.1\r\n" + HOST + b"Content-Length: 100\r\n\r\nhello"
        )
        answer = connection.read_response()
        assert answer.status in (400, 403, 404, 405, 408)
        assert connection.at_eof()


# --- clients that do not read -------------------------------------------------------------


def disconnected(connection: RawConnection) -> bool:
    """Whether the server has cut the connection off; reads nothing."""
    import struct

    information = connection.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
    (state,) = struct.unpack("B", information)
    return state not in (1, 4, 5)  # ESTABLISHED, FIN_WAIT


@pytest.mark.parametrize("target", ["/big-stream/?mb=300", "/big-file/"])
def test_line_17_a_client_that_does_not_read_is_disconnected(server, worker, target):
    before = resident(worker)
    with server.connect() as connection:
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.send(f"GET {target} HTTP/1.1\r\n".encode() + HOST + b"\r\n")
        largest = 0

        def gone() -> bool:
            nonlocal largest
            largest = max(largest, resident(worker) - before)
            return disconnected(connection)

        wait_until(gone, 20)
    assert largest < BOUND


def test_line_17_a_client_that_asks_much_and_reads_nothing_is_disconnected(server, worker):
    before = resident(worker)
    with server.connect() as connection:
        connection.socket.settimeout(0.2)
        request = b"GET /megabyte/ HTTP/1.1\r\n" + HOST + b"\r\n"
        with contextlib.suppress(OSError):  # its own buffer is full, or the server has gone
            connection.send(request * 5000)
        largest = 0

        def gone() -> bool:
            nonlocal largest
            largest = max(largest, resident(worker) - before)
            return disconnected(connection)

        wait_until(gone, 20)
    assert largest < BOUND


def test_line_17_a_client_that_reads_slowly_is_served(server, worker):
    """It takes longer than the write timeout, and never stops for so long."""
    with server.connect() as connection:
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        connection.send(b"GET /big-stream/?mb=6 HTTP/1.1\r\n" + HOST + CLOSE + b"\r\n")
        began = time.monotonic()
        size = 0
        while chunk := connection.socket.recv(32768):
            size += len(chunk)
            time.sleep(0.006)
        assert time.monotonic() - began > 1.0
    assert size > 6 * MIB


# --- floods -------------------------------------------------------------------------------


def test_line_18_chunks_of_one_byte_cost_bounded_memory(server, worker):
    count = 200_000
    before = resident(worker)
    with server.connect(30) as connection:
        connection.send(post(CHUNKED, b"1\r\na\r\n" * count + b"0\r\n\r\n"))
        answer = connection.read_response()
    assert answer.status == 200
    assert b'"length": %d' % count in answer.body
    assert resident(worker) - before < BOUND


def test_line_18_a_pipelined_flood_is_answered_in_order(server, worker):
    count = 3000
    before = resident(worker)
    with server.connect(30) as connection:
        requests = b"".join(
            b"GET /no-such-%d HTTP/1.1\r\n" % number + HOST + b"\r\n" for number in range(3)
        )
        flood = (PING + b"\r\n") * count + requests
        sending = threading.Thread(target=connection.send, args=(flood,))
        sending.start()
        for _ in range(count):
            assert connection.read_response().text == "pong"
        for _ in range(3):
            assert connection.read_response().status == 404
        sending.join()
    assert resident(worker) - before < BOUND


def test_line_18_a_pipelined_flood_leaves_room_for_others(server, worker):
    stop = threading.Event()

    def flood() -> None:
        with server.connect(30) as connection, contextlib.suppress(OSError):
            reading = threading.Thread(target=_swallow, args=(connection.socket,))
            reading.start()
            while not stop.is_set():
                connection.send((PING + b"\r\n") * 100)
            connection.socket.shutdown(socket.SHUT_RDWR)
            reading.join()

    flooding = threading.Thread(target=flood)
    flooding.start()
    try:
        for _ in range(20):
            assert server.get("/ping/").status == 200
    finally:
        stop.set()
        flooding.join()


def _swallow(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while sock.recv(65536):
            pass


# --- half-closed clients ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("/ping/", b"pong"),
        ("/ping-async/", b"pong"),
        ("/slow/?seconds=0.3", b"slept 0.3 s"),
        ("/slow-async/?seconds=0.3", b"slept 0.3 s"),
        ("/stream/", b"line 9"),
        ("/stream-async/", b"line 9"),
        ("/no-such-page/", b"Not Found"),
    ],
)
def test_line_20_a_half_closed_client_gets_its_answer(server, worker, target, expected):
    request = f"GET {target} HTTP/1.1\r\n".encode() + HOST + b"\r\n"
    answer = raw(server.address, request, half_close=True)
    assert len(statuses(answer)) == 1
    assert expected in answer


@pytest.mark.parametrize("path", [b"/ping/", b"/ping-async/", b"/slow-async/?seconds=0.1"])
def test_line_20_all_pipelined_requests_of_a_half_closed_client_are_answered(server, worker, path):
    request = b"GET " + path + b" HTTP/1.1\r\n" + HOST + b"\r\n"
    assert statuses(raw(server.address, request * 4, half_close=True)) == [200] * 4


def test_line_20_a_half_closed_client_may_have_sent_a_body(server, worker):
    data = b"x" * 3 * MIB
    answer = raw(server.address, post(b"Content-Length: %d\r\n" % len(data), data), half_close=True)
    assert statuses(answer) == [200]
    assert b'"length": %d' % len(data) in answer


def test_line_20_half_a_body_and_a_fin_is_no_request(server, worker):
    answer = raw(server.address, post(b"Content-Length: 100\r\n", b"hello"), half_close=True)
    assert statuses(answer) in ([], [400])


def test_line_20_a_connection_that_is_closed_between_requests_ends_at_once(server, worker):
    with server.connect() as connection:
        connection.send(PING + b"\r\n")
        assert connection.read_response().status == 200
        connection.socket.shutdown(socket.SHUT_WR)
        assert connection.at_eof()


def test_the_answer_to_a_refused_upload_is_not_destroyed_by_a_reset(server, worker):
    """The server closes while the client still sends; the answer is read all the same."""
    for _ in range(10):
        with server.connect() as connection:
            data = b"x" * (9 * MIB)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.send(post(b"Content-Length: %d\r\n" % len(data), data[: MIB // 2]))
            assert connection.read_response().status == 413


def test_a_connection_that_was_reset_unnoticed_can_be_ended():
    """asyncio's own loop raises what the socket says to that."""

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        limits = connection_module.Limits(header_timeout=5, body_timeout=5, write_timeout=5)
        front = connection_module.Front(limits, logging.getLogger("aioserve"), lambda: None)
        http = web.Server(web.Response)
        listening = await loop.create_server(
            lambda: connection_module.Connection(http, front, loop=loop), "127.0.0.1", 0
        )
        async with listening, asyncio.timeout(5):
            client = RawConnection(listening.sockets[0].getsockname())
            while not front.connections:
                await asyncio.sleep(0)
            client.reset()
            for connection in front.connections:
                connection.say_goodbye()
            while front.connections:
                await asyncio.sleep(0)

    asyncio.run(serve())


# --- Expect -------------------------------------------------------------------------------


def test_line_21_continue_is_granted_where_the_body_is_wanted(server, worker):
    with server.connect() as connection:
        connection.send(post(b"Expect: 100-continue\r\nContent-Length: 5\r\n"))
        assert connection.read_response().status == 100
        connection.send(b"hello")
        answer = connection.read_response()
        assert answer.status == 200
        assert b'"length": 5' in answer.body


def test_line_21_continue_is_not_granted_before_a_refusal(server, worker):
    with server.connect() as connection:
        connection.send(post(b"Expect: 100-continue\r\nContent-Length: 9000000\r\n"))
        assert connection.read_response().status == 413
        assert connection.at_eof()


# --- descriptors --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.allow_tracebacks
# asyncio's own loop of Python 3.11 tries as often as the backlog is long, then waits a second.
def test_line_22_without_descriptors_a_worker_waits_and_recovers(runaio):
    server = runaio("--loop=uvloop")
    server.get("/ping/")
    (pid,) = server.workers()
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = len(os.listdir(f"/proc/{pid}/fd"))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 6, hard))
    held = []
    try:
        for _ in range(40):
            with contextlib.suppress(OSError):
                held.append(server.connect())
        wait_until(lambda: len(os.listdir(f"/proc/{pid}/fd")) >= used + 5)
        # It waits; a loop that tries again at once would take all of a processor.
        began, cpu = time.monotonic(), cpu_seconds(pid)
        while time.monotonic() - began < 1.5:
            time.sleep(0.05)
        assert cpu_seconds(pid) - cpu < 0.75
    finally:
        for connection in held:
            connection.close()
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))

    def answered() -> bool:
        try:
            return server.get("/pid/").text == str(pid)
        except OSError:
            return False

    wait_until(answered, 15)


# --- what is said of bad requests ---------------------------------------------------------


def test_line_23_a_bad_request_is_one_line_in_the_log(server, worker):
    start = len(server.log)
    count = 50
    for _ in range(count):
        assert statuses(raw(server.address, b"GET / HTTP/1.1\r\nX-A: \x1b[31m\x07\r\n\r\n")) == [
            400
        ]
    server.get("/ping/")
    wait_until(lambda: len(server.log) >= start + count)
    lines = server.log[start:]
    assert len(lines) == count, lines
    assert all("Malformed request from 127.0.0.1" in line for line in lines)


@pytest.mark.parametrize(
    "data",
    [
        b"GET /\x1b[2J HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nX-A: a\x1b]0;owned\x07\r\n\r\n",
        b"\x1b[31mGET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nX\xc2\x9b: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nX-A: forged\nline\r\n\r\n",
    ],
)
def test_line_23_no_control_character_reaches_the_log(server, worker, data):
    start = len(server.log)
    raw(server.address, data)
    server.wait_for_log("Malformed request", start=start)
    (line,) = server.log[start:]
    assert line.rstrip("\n").isascii()
    assert line.rstrip("\n").isprintable()


def test_line_23_nothing_of_a_bad_request_is_in_its_answer(server, worker):
    answer = raw(server.address, b"GET /<script> HTTP/1.1\r\nX-A: \x00<script>\r\n\r\n")
    assert b"script" not in answer


@pytest.mark.parametrize("line", [b"Host: a b\r\n", b"X : y\r\n" + HOST, CHUNKED + HOST])
def test_a_refusal_has_no_body_for_it_may_answer_a_head(server, worker, line):
    """RFC 9110, section 9.3.2; the method of what is malformed is anybody's guess."""
    answer = raw(server.address, b"HEAD /native/ping/ HTTP/1.1\r\n" + line + b"\r\nZ\r\n")
    assert statuses(answer) == [400]
    assert answer.endswith(b"\r\n\r\n")


# --- what is used of aiohttp --------------------------------------------------------------


def test_this_aiohttp_has_the_private_names_that_are_used():
    connection_module.require_aiohttp()


def test_a_worker_does_not_start_where_aiohttp_lacks_a_private_name(monkeypatch):
    names = (*connection_module.AIOHTTP_PRIVATE, "_gone_in_a_new_version")
    monkeypatch.setattr(connection_module, "AIOHTTP_PRIVATE", names)
    with pytest.raises(RuntimeError, match="_gone_in_a_new_version"):
        connection_module.require_aiohttp()


def test_every_private_name_that_is_used_of_aiohttp_is_listed():
    import ast
    import inspect

    own = {*connection_module.Connection.__slots__, *vars(connection_module.Connection)}
    source = ast.parse(inspect.getsource(connection_module.Connection))
    used = {
        node.attr
        for node in ast.walk(source)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
        and node.attr.startswith("_")
        and node.attr not in own
        and hasattr(web.RequestHandler, node.attr)
    }
    assert used == set(connection_module.AIOHTTP_PRIVATE)

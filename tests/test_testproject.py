"""Real Django projects, served by the real command."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from typing import TYPE_CHECKING

import pytest

from tests.support import Runaio, Visitor, fresh_project, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MEGABYTE = 1024 * 1024


@pytest.fixture(scope="module")
def testproject() -> Iterator[Runaio]:
    with Runaio("--workers=2", "--threads=4") as server:
        yield server
    server.check_log()


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runaio]:
    with Runaio(project=fresh_project(tmp_path_factory.mktemp("fresh"))) as server:
        yield server
    server.check_log()


@pytest.fixture(params=["testproject", "fresh"])
def site(request: pytest.FixtureRequest) -> Runaio:
    """Each project in turn: ours, and what `startproject` makes."""
    server: Runaio = request.getfixturevalue(request.param)
    return server


@pytest.fixture
def visitor(testproject: Runaio) -> Iterator[Visitor]:
    with Visitor(testproject.address) as someone:
        yield someone


# --- any Django project -------------------------------------------------------------------


def test_admin_shows_its_login_page(site: Runaio) -> None:
    response = site.get("/admin/login/")
    assert response.status == 200
    assert "Django administration" in response.text


def test_unknown_page_is_not_found(site: Runaio) -> None:
    assert site.get("/no/such/page/").status == 404


def test_admin_lets_its_superuser_in(site: Runaio) -> None:
    with Visitor(site.address) as visitor:
        response = visitor.login("/admin/login/?next=/admin/")
        assert response.status == 302
        assert response.header("Location") == "/admin/"
        assert "Site administration" in visitor.get("/admin/").text


def test_admin_refuses_a_wrong_password(site: Runaio) -> None:
    with Visitor(site.address) as visitor:
        response = visitor.login("/admin/login/", password="wrong")
        assert response.status == 200
        assert "Please enter the correct username and password" in response.text
        assert "sessionid" not in visitor.cookies


def test_admin_refuses_a_post_without_the_csrf_token(site: Runaio) -> None:
    with Visitor(site.address) as visitor:
        response = visitor.post("/admin/login/", {"username": "admin", "password": "admin"})
        assert response.status == 403


def test_admin_adds_what_is_posted(site: Runaio) -> None:
    with Visitor(site.address) as visitor:
        visitor.login("/admin/login/")
        visitor.get("/admin/auth/group/add/")
        response = visitor.post("/admin/auth/group/add/", {"name": "readers"})
        assert response.status == 302
        assert "readers" in visitor.get("/admin/auth/group/").text


@pytest.mark.allow_tracebacks  # Django's own, for DisallowedHost
def test_unknown_host_is_refused(runaio: Callable[..., Runaio]) -> None:
    assert runaio().get("/ping/", [("Host", "elsewhere.example")]).status == 400


# --- the board ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("/", "Welcome"),
        ("/topics/1/", "This board is served by aiohttp"),
        ("/search/?q=workers", "grace"),
        ("/visits/", "You have seen this page"),
        ("/accounts/login/", "Password"),
    ],
)
def test_page_is_served(testproject: Runaio, path: str, content: str) -> None:
    response = testproject.get(path)
    assert response.status == 200
    assert response.header("Content-Type") == "text/html; charset=utf-8"
    assert content in response.text


def test_session_counts_visits(visitor: Visitor) -> None:
    pages = [visitor.get("/visits/").text for _ in range(3)]
    assert '<strong id="visits">3</strong> times' in pages[-1]


def test_each_visitor_has_a_session_of_their_own(testproject: Runaio, visitor: Visitor) -> None:
    visitor.get("/visits/")
    assert '<strong id="visits">1</strong> time.' in testproject.get("/visits/").text


def test_posted_message_appears_in_its_topic(visitor: Visitor) -> None:
    visitor.get("/topics/1/")
    response = visitor.post("/topics/1/", {"author": "hedy", "text": "Grüße & <b>signals</b>"})
    assert response.status == 302
    assert response.header("Location") == "/topics/1/"
    assert "Grüße &amp; &lt;b&gt;signals&lt;/b&gt;" in visitor.get("/topics/1/").text


def test_incomplete_message_is_answered_with_the_form_and_its_errors(visitor: Visitor) -> None:
    visitor.get("/topics/1/")
    response = visitor.post("/topics/1/", {"author": "", "text": "anonymous"})
    assert response.status == 200
    assert "This field is required." in response.text


@pytest.mark.parametrize("size", [10, 3 * MEGABYTE], ids=["small", "large"])
def test_uploaded_file_is_downloaded_as_it_was(visitor: Visitor, size: int) -> None:
    content = os.urandom(size)
    visitor.get("/topics/2/")
    fields = {"author": "hedy", "text": "See the file"}
    response = visitor.post("/topics/2/", fields, {"file": (f"{size}.bin", content)})
    assert response.status == 302
    before, _, _ = visitor.get("/topics/2/").text.partition(f">{size}.bin</a>")
    download = visitor.get(before.rpartition('href="')[2].rstrip('"'))
    assert download.header("Content-Disposition") == f'attachment; filename="{size}.bin"'
    assert download.body == content


def test_empty_upload_is_refused_by_the_form(visitor: Visitor) -> None:
    visitor.get("/topics/2/")
    fields = {"author": "hedy", "text": "See the file"}
    response = visitor.post("/topics/2/", fields, {"file": ("empty.bin", b"")})
    assert "The submitted file is empty." in response.text


def test_login_and_logout_of_the_site(visitor: Visitor) -> None:
    assert visitor.login("/accounts/login/").header("Location") == "/"
    assert "Log out admin" in visitor.get("/").text
    assert visitor.post("/accounts/logout/", {}).status == 302
    assert "Log in" in visitor.get("/").text


def test_json_of_topics(testproject: Runaio) -> None:
    response = testproject.get("/api/topics/")
    assert response.header("Content-Type") == "application/json"
    titles = [found["title"] for found in json.loads(response.body)["topics"]]
    assert titles == ["Memory", "Time", "Welcome"]


# --- what a server is tried with ----------------------------------------------------------


@pytest.mark.parametrize("path", ["/ping/", "/ping-async/"])
def test_ping_is_answered(testproject: Runaio, path: str) -> None:
    assert testproject.get(path).body == b"pong"


def test_sync_and_async_orm_give_the_same_rows(testproject: Runaio) -> None:
    rows = json.loads(testproject.get("/orm/").body)["messages"]
    assert len(rows) == 5
    assert json.loads(testproject.get("/orm-async/").body)["messages"] == rows


def test_pid_is_that_of_a_worker(testproject: Runaio) -> None:
    assert int(testproject.get("/pid/").body) in testproject.workers()


@pytest.mark.parametrize("path", ["/slow/", "/slow-async/"])
def test_slow_view_waits_no_longer_than_it_may(testproject: Runaio, path: str) -> None:
    assert testproject.get(f"{path}?seconds=0.01").body == b"slept 0.01 s"
    assert testproject.get(f"{path}?seconds=61").status == 400


def test_echo_tells_what_arrived(testproject: Runaio) -> None:
    body = os.urandom(MEGABYTE)
    told = json.loads(testproject.request("PUT", "/echo/?a=%20", [("X-Colour", "red")], body).body)
    assert told["method"] == "PUT"
    assert told["path"] == "/echo/"
    assert told["meta"]["QUERY_STRING"] == "a=%20"
    assert told["meta"]["HTTP_X_COLOUR"] == "red"
    assert told["meta"]["REMOTE_ADDR"] == "127.0.0.1"
    assert told["length"] == len(body)
    assert told["sha256"] == hashlib.sha256(body).hexdigest()


@pytest.mark.parametrize("path", ["/stream/", "/stream-async/"])
def test_stream_has_all_its_lines(testproject: Runaio, path: str) -> None:
    assert testproject.get(path).text == "".join(f"line {number}\n" for number in range(10))


def test_event_arrives_before_the_next_one_is_due(testproject: Runaio) -> None:
    with testproject.connect() as connection:
        connection.send(b"GET /events/?count=2&pause=60 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"text/event-stream" in connection.recv_until(b"\r\n\r\n")
        connection.recv_until(b"data: event 0\n\n")


@pytest.mark.parametrize(
    ("path", "size"),
    [
        ("/megabyte/", MEGABYTE),
        ("/big-stream/?mb=10", 10 * MEGABYTE),
        ("/big-file/", 10 * MEGABYTE),
    ],
)
def test_large_response_is_complete(testproject: Runaio, path: str, size: int) -> None:
    assert testproject.get(path).body == b"x" * size


@pytest.mark.allow_tracebacks
@pytest.mark.parametrize("path", ["/crash/", "/crash-async/", "/exit/?code=3"])
def test_failing_view_is_a_server_error_and_the_worker_lives(
    runaio: Callable[..., Runaio], path: str
) -> None:
    server = runaio("--workers=1")
    before = server.get("/pid/").body
    assert server.get(path).status == 500
    assert server.get("/pid/").body == before


# --- other servers ------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/search/?q=workers", "/events/?count=2&pause=0"])
def test_testproject_runs_under_plain_runserver(path: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = free.getsockname()

    def reachable() -> bool:
        with socket.socket() as sock:
            return sock.connect_ex(address) == 0

    server = Runaio(f"{address[0]}:{address[1]}", "--noreload", bind=(), command="runserver")
    server.launch()
    try:
        wait_until(reachable, message="runserver does not listen")
        with Visitor(address) as visitor:
            assert visitor.get(path).status == 200
    finally:
        server.stop()

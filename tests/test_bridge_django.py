"""Django behind aiohttp: what holds for every bridge, and what the fast one owes besides."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import gc
import json
import logging
import os
import secrets
import subprocess
import threading
import weakref
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web

from django_aioserve.bridge.body import expect_handler
from django_aioserve.bridge.home import Homes
from django_aioserve.bridge.stream import WINDOW
from django_aioserve.bridge.threads import ThreadPool
from django_aioserve.bridge.wsgi import WSGIBridge
from django_aioserve.conf import Config
from tests.django_project import probe
from tests.support import (
    ROOT,
    TESTPROJECT,
    AppServer,
    python_command,
    skip_or_fail,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Site = Callable[..., AppServer]

MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]
RECORDER = "tests.django_project.middleware.Recorder"
LOCALE = "django.middleware.locale.LocaleMiddleware"
TRANSACTION = "tests.django_project.middleware.in_a_transaction"

FORM = [("Content-Type", "application/x-www-form-urlencoded")]


@pytest.fixture(params=["wsgi", "django"])
def bridge(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["", "async-"], ids=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> str:
    """The prefix of the paths of synchronous, or of asynchronous views."""
    return request.param


@pytest.fixture
def site(app_server: Callable[..., AppServer], django_ready: None) -> Iterator[Site]:
    """Serve tests/django_project: `site("django", middleware=[...], settings={...}, threads=2)`."""
    from django.core.cache import caches
    from django.core.handlers.wsgi import WSGIHandler
    from django.db import connections
    from django.test import override_settings

    probe.reset()
    overrides = []

    def start(
        bridge: str = "django",
        *,
        middleware: list[str] = MIDDLEWARE,
        settings: dict[str, Any] | None = None,
        mount: str = "/{path_info:(?s:.*)}",
        prefix: str = "",
        native: tuple[Any, ...] = (),
        prepare_signals: tuple[Any, ...] = (),
        server: dict[str, Any] | None = None,
        **options: Any,
    ) -> AppServer:
        override = override_settings(
            **{
                "ROOT_URLCONF": "tests.django_project.urls",
                "MIDDLEWARE": middleware,
                **(settings or {}),
            }
        )
        override.enable()
        overrides.append(override)

        async def factory() -> web.Application:
            from django_aioserve.bridge.django import DjangoBridge

            config = Config(**{"threads": 2, **options})
            pool = ThreadPool(config.threads, config.queue_size, "pool")
            pool.at_exit(connections.close_all)
            serving: Any
            if bridge == "django":
                serving = DjangoBridge(WSGIHandler(), config, pool)
            else:
                serving = WSGIBridge(WSGIHandler(), config, pool)
            app = web.Application(middlewares=list(native))
            app.on_response_prepare.extend(prepare_signals)
            app.router.add_route("*", mount, serving.handle, expect_handler=expect_handler)

            async def end(_: web.Application) -> None:
                if bridge == "django":
                    assert await serving.close(10)
                pool.close()
                assert await pool.join(10)

            app.on_cleanup.append(end)
            if not prefix:
                return app
            root = web.Application()
            root.add_subapp(prefix, app)
            return root

        return app_server(factory, **(server or {}))

    yield start
    probe.go_on.set()
    for override in reversed(overrides):
        override.disable()
    caches.close_all()


def events(*words: str) -> list[str]:
    """The events that begin with one of `words`."""
    return [event for event in list(probe.events) if event.split()[0] in words]


def await_event(event: str) -> None:
    wait_until(lambda: event in probe.events, message=f"no {event!r} in {probe.events}")


class InBackground:
    """A request that is made in a thread of the test; `response()` waits for the answer."""

    def __init__(self, server: AppServer, target: str) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._future = self._pool.submit(server.get, target)

    def response(self) -> Any:
        response = self._future.result(10)
        self._pool.shutdown()
        return response

    @property
    def answered(self) -> bool:
        return self._future.done()


# --- requests -----------------------------------------------------------------------------


def describe(server: AppServer, target: str, headers: Any = (), method: str = "GET") -> Any:
    response = server.request(method, target, headers)
    assert response.status == 200, response
    return json.loads(response.body)


def test_a_view_answers(site, bridge, kind):
    response = site(bridge).get(f"/{kind}hello/")
    assert (response.status, response.reason, response.body) == (200, "OK", b"hello")
    assert response.header("Content-Type") == "text/plain"
    assert response.header("Content-Length") == "5"
    assert response.header("X-Content-Type-Options") == "nosniff"
    assert response.header("Server") == "django-aioserve"
    assert response.header("Date").endswith(" GMT")


def test_the_request_is_what_django_code_expects_under_wsgi(site, bridge, kind):
    server = site(bridge)
    seen = describe(
        server,
        f"/{kind}describe/caf%C3%A9/%E2%82%AC//x%2Fy?a=1&b=%C3%A9",
        [("Cookie", "a=1; b=zwei"), ("X-Some-Header", "some"), ("Host", "localhost:81")],
    )
    assert seen["is_wsgi"]
    assert seen["environ_is_meta"]
    assert seen["method"] == "GET"
    assert seen["path"] == seen["path_info"] == f"/{kind}describe/café/€//x/y"
    assert seen["full_path"] == f"/{kind}describe/caf%C3%A9/%E2%82%AC//x/y?a=1&b=%C3%A9"
    assert seen["uri"].startswith(f"http://localhost:81/{kind}describe/caf")
    assert (seen["scheme"], seen["secure"]) == ("http", False)
    assert (seen["host"], seen["port"]) == ("localhost:81", str(server.port))
    assert seen["get"] == {"a": "1", "b": "é"}
    assert seen["cookies"] == {"a": "1", "b": "zwei"}
    assert seen["headers"]["X-Some-Header"] == "some"
    assert seen["kwargs"] == {"rest": "café/€//x/y"}
    assert seen["route"] == f"{kind}describe/<path:rest>"
    assert seen["content_type"] == ""
    assert seen["meta"]["REMOTE_ADDR"] == "127.0.0.1"
    assert seen["meta"]["QUERY_STRING"] == "a=1&b=%C3%A9"
    assert seen["meta"]["SERVER_PROTOCOL"] == "HTTP/1.1"


def test_both_bridges_tell_django_the_same(site):
    target = "/describe/caf%C3%A9?x=y"
    headers = [("Cookie", "a=1"), ("Cookie", "b=2"), ("X-A", "1"), ("X-A", "2"), ("X_A", "3")]
    seen = [describe(site(bridge), target, headers) for bridge in ("wsgi", "django")]
    for one in seen:
        for own in ("REMOTE_PORT", "SERVER_PORT", "HTTP_HOST"):
            one["meta"].pop(own, None)
        one["port"] = one["uri"] = None
        one["headers"].pop("Host")
    assert seen[0] == seen[1]


def test_content_type_and_charset_are_read(site, bridge, kind):
    seen = describe(
        site(bridge), f"/{kind}describe/", [("Content-Type", "text/x; charset=latin-1; a=b")]
    )
    assert seen["content_type"] == "text/x"
    assert seen["content_params"] == {"charset": "latin-1", "a": "b"}
    assert seen["encoding"] == "latin-1"


@pytest.mark.parametrize("path", ["%FF%FE", "%C3", "%00", "a%20b"])
def test_any_path_reaches_the_urls(site, bridge, path):
    server = site(bridge)
    assert server.get(f"/describe/{path}").status == 200
    assert server.get(f"/{path}").status == 404


def test_the_mount_point_is_the_script_name(site, bridge, kind):
    server = site(bridge, prefix="/mounted")
    seen = describe(server, f"/mounted/{kind}describe/x")
    assert seen["meta"]["SCRIPT_NAME"] == "/mounted"
    assert seen["path_info"] == f"/{kind}describe/x"
    assert seen["path"] == f"/mounted/{kind}describe/x"


def test_force_script_name_is_obeyed(site, bridge, kind):
    server = site(bridge, settings={"FORCE_SCRIPT_NAME": "/forced"})
    seen = describe(server, f"/{kind}describe/x")
    assert seen["meta"]["SCRIPT_NAME"] == "/forced"
    assert seen["path"] == f"/forced/{kind}describe/x"


def test_reverse_knows_the_script_name_and_forgets_it(site, bridge):
    # CommonMiddleware redirects with it.
    server = site(bridge, settings={"FORCE_SCRIPT_NAME": "/forced"})
    assert server.get("/hello").header("Location") == "/forced/hello/"


def test_a_script_name_that_is_no_utf_8_is_a_400(site, caplog):
    server = site("django", mount="/%FF/{path_info:.*}")
    assert server.get("/%FF/hello/").status == 400
    assert "UnicodeDecodeError" in caplog.text
    assert server.get("/%FF/async-hello/").status == 400


def test_a_secure_proxy_header_makes_the_request_secure(site, bridge, kind):
    server = site(bridge, settings={"SECURE_PROXY_SSL_HEADER": ("HTTP_X_MY_SCHEME", "https")})
    seen = describe(server, f"/{kind}describe/", [("X-My-Scheme", "https")])
    assert (seen["scheme"], seen["secure"]) == ("https", True)


def test_an_unknown_host_is_a_400(site, bridge, kind):
    assert site(bridge).get(f"/{kind}describe/", [("Host", "evil.example")]).status == 400


# --- bodies -------------------------------------------------------------------------------


def test_a_form_is_read(site, bridge, kind):
    response = site(bridge).request("POST", f"/{kind}form/", FORM, b"a=1&b=%C3%A9")
    assert json.loads(response.body) == {"form": {"a": "1", "b": "é"}, "files": {}}


@pytest.mark.parametrize("size", [10, 3_000_000])
def test_an_upload_goes_through_the_upload_handlers(site, bridge, kind, size):
    body = (
        b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n'
        b'--x\r\nContent-Disposition: form-data; name="f"; filename="n.txt"\r\n\r\n'
        + b"y" * size
        + b"\r\n--x--\r\n"
    )
    response = site(bridge).request(
        "POST", f"/{kind}form/", [("Content-Type", "multipart/form-data; boundary=x")], body
    )
    kept = "InMemoryUploadedFile" if size == 10 else "TemporaryUploadedFile"
    assert json.loads(response.body) == {
        "form": {"a": "1"},
        "files": {"f": ["n.txt", size, "y" * 10, kept]},
    }


def test_the_body_is_there_as_it_came(site, bridge, kind):
    body = bytes(range(256))
    assert site(bridge).request("POST", f"/{kind}body/", body=body).body == body


def test_the_body_can_be_read_in_bits(site, bridge, kind):
    response = site(bridge).request("POST", f"/{kind}some/", body=b"abcdef\nghi")
    assert json.loads(response.body) == ["abc", "def\n", "ghi", "RawPostDataException"]


def test_a_body_that_is_still_arriving_is_waited_for(site, bridge, kind):
    with site(bridge).connect() as connection:
        connection.send(
            f"POST /{kind}body/ HTTP/1.1\r\nHost: localhost\r\n"
            "Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n".encode()
        )
        connection.send(b"3\r\ndef\r\n")
        connection.send(b"0\r\n\r\n")
        assert connection.read_response().body == b"abcdef"


def test_a_body_beyond_djangos_limit_is_a_400(site, bridge, kind):
    server = site(bridge, settings={"DATA_UPLOAD_MAX_MEMORY_SIZE": 10})
    assert server.request("POST", f"/{kind}body/", body=b"x" * 10).status == 200
    assert server.request("POST", f"/{kind}body/", body=b"x" * 11).status == 400
    assert server.request("POST", f"/{kind}form/", FORM, b"a=" + b"x" * 20).status == 400


def test_a_body_that_was_not_read_is_not_the_next_request(site, bridge, kind):
    with site(bridge).connect() as connection:
        assert connection.request("POST", f"/{kind}hello/", body=b"GET / HTTP/1.1").status == 200
        assert connection.request("GET", f"/{kind}hello/").body == b"hello"


# --- responses ----------------------------------------------------------------------------


def test_each_cookie_has_a_line_of_its_own(site, bridge, kind):
    response = site(bridge).get(f"/{kind}cookies/")
    lines = [value for name, value in response.headers if name == "Set-Cookie"]
    assert len(lines) == 2
    assert lines[0].startswith("one=1; expires=")
    assert lines[1] == 'two="zwei und drei"; Path=/'


@pytest.mark.parametrize("code", [204, 304])
def test_a_response_without_body_keeps_the_connection_aligned(site, bridge, kind, code):
    with site(bridge).connect() as connection:
        response = connection.request("GET", f"/{kind}status/{code}/?body=yes")
        assert (response.status, response.body) == (code, b"")
        assert connection.request("GET", f"/{kind}hello/").body == b"hello"


@pytest.mark.parametrize("path", ["hello/", "file/", "stream/", "size/100000/"])
def test_head_is_answered_without_a_body(site, bridge, kind, path):
    with site(bridge).connect() as connection:
        assert connection.request("HEAD", f"/{kind}{path}?fast=yes").status == 200
        assert connection.request("GET", f"/{kind}hello/").body == b"hello"


def test_head_tells_the_length(site, bridge, kind):
    assert site(bridge).request("HEAD", f"/{kind}hello/").header("Content-Length") == "5"


@pytest.mark.parametrize("what", ["reason", "nul", "name", "hop", "status"])
def test_what_would_break_the_head_is_a_500(site, bridge, kind, what):
    with site(bridge).connect() as connection:
        response = connection.request("GET", f"/{kind}head/?kind={what}")
        assert response.status == 500
        assert not {name for name, _ in response.headers} & {"X-Bad", "X Bad", "Set-Cookie"}
        assert connection.request("GET", f"/{kind}hello/").body == b"hello"


def test_a_body_longer_than_its_length_is_cut(site, bridge, kind):
    with site(bridge, middleware=[]).connect() as connection:
        assert connection.request("GET", f"/{kind}head/?kind=long").body == b"hel"
        assert connection.request("GET", f"/{kind}hello/").body == b"hello"


def test_a_body_shorter_than_its_length_closes_the_connection(site, bridge, kind):
    with site(bridge, middleware=[]).connect() as connection:
        connection.send(f"GET /{kind}head/?kind=short HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert connection.recv_to_eof().endswith(b"\r\n\r\nhello")


def test_header_values_leave_as_latin_1(site, bridge, kind):
    with site(bridge).connect() as connection:
        connection.send(f"GET /{kind}head/?kind=latin HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert b"X-Latin: \xe9\r\n" in connection.recv_until(b"\r\n\r\n")


def test_an_empty_reason_phrase_is_passed_on(site, bridge, kind):
    response = site(bridge).get(f"/{kind}head/?kind=empty-reason")
    assert (response.status, response.reason) == (200, "")


def test_server_and_date_may_be_djangos(site, bridge, kind):
    response = site(bridge).get(f"/{kind}head/?kind=own")
    assert (response.header("Server"), response.header("Date")) == ("mine", "today")


@pytest.mark.parametrize("size", [0, 1, 32_768, 32_769, 1_000_000])
def test_a_body_of_any_size_arrives_whole(site, bridge, kind, size):
    response = site(bridge).get(f"/{kind}size/{size}/")
    assert response.header("Content-Length") == str(size)
    assert response.body == b"x" * size


def test_http_1_0_is_closed_unless_asked_to_stay(site, bridge, kind):
    server = site(bridge)
    with server.connect() as connection:
        connection.send(f"GET /{kind}hello/ HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
        answer = connection.recv_to_eof()
        assert answer.startswith(b"HTTP/1.0 200 OK\r\n")
        assert b"Connection: close\r\n" in answer
    with server.connect() as connection:
        for _ in range(2):
            connection.send(
                f"GET /{kind}hello/ HTTP/1.0\r\nHost: localhost\r\n"
                "Connection: keep-alive\r\n\r\n".encode()
            )
            response = connection.read_response()
            assert response.header("Connection") == "keep-alive"


def test_a_client_may_have_the_connection_closed(site, bridge, kind):
    with site(bridge).connect() as connection:
        connection.send(
            f"GET /{kind}hello/ HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        )
        assert b"Connection: close\r\n" in connection.recv_to_eof()


def test_pipelined_requests_are_answered_in_order(site, bridge):
    with site(bridge).connect() as connection:
        connection.send(
            b"GET /size/1/ HTTP/1.1\r\nHost: localhost\r\n\r\n"
            b"GET /async-size/2/ HTTP/1.1\r\nHost: localhost\r\n\r\n"
            b"GET /size/3/ HTTP/1.1\r\nHost: localhost\r\n\r\n"
        )
        assert [connection.read_response().body for _ in range(3)] == [b"x", b"xx", b"xxx"]


def test_a_whole_response_leaves_in_one_segment(site, kind):
    with site("django").connect() as connection:
        connection.send(f"GET /{kind}hello/ HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert connection.socket.recv(65536).endswith(b"\r\n\r\nhello")


def test_native_middleware_can_change_the_response(site, bridge, kind):
    @web.middleware
    async def change(request, handler):
        response = await handler(request)
        response.headers["X-Native"] = response.headers["Content-Type"]
        return response

    response = site(bridge, native=(change,)).get(f"/{kind}hello/")
    assert response.header("X-Native") == "text/plain"
    assert response.body == b"hello"


def test_native_signals_can_change_the_response(site, bridge, kind):
    async def change(request, response):
        response.headers["X-Native"] = "yes"

    assert site(bridge, prepare_signals=(change,)).get(f"/{kind}hello/").header("X-Native") == "yes"


def test_the_access_log_sees_the_response(site, bridge, kind):
    lines = []

    class Logger(web.AbstractAccessLogger if hasattr(web, "AbstractAccessLogger") else object):
        enabled = True

        def __init__(self, *args):
            pass

        def log(self, request, response, time):
            lines.append((response.status, response.body_length, response.headers["Content-Type"]))

    server = site(bridge, server={"access_log_class": Logger})
    server.get(f"/{kind}hello/")
    wait_until(lambda: lines)
    assert lines == [(200, 5, "text/plain")]


# --- Django's own handling ----------------------------------------------------------------


@pytest.mark.parametrize("code", [400, 403, 404, 500])
def test_exceptions_become_djangos_responses(site, bridge, kind, code):
    server = site(bridge, settings={"DEBUG": False})
    assert server.get(f"/{kind}fail/{code}/").status == code
    assert server.get(f"/{kind}hello/").status == 200


def test_the_debug_page_shows_where_it_happened(site, bridge, kind):
    server = site(bridge, settings={"DEBUG": True})
    response = server.get(f"/{kind}fail/500/", [("Accept", "text/html")])
    assert response.status == 500
    assert "ValueError" in response.text
    assert "deliberate" in response.text
    assert "tests/django_project/views.py" in response.text
    assert "in <code>fail</code>" in response.text or ", in fail" in response.text
    if bridge == "django":
        assert (
            "bridge/home.py"
            not in response.text.partition("Traceback Switch")[0]
            .partition('id="browserTraceback"')[2]
            .partition("</ul>")[0]
        )


def test_a_missing_page_is_a_404(site, bridge):
    assert site(bridge).get("/missing/").status == 404


def test_a_view_that_gives_nothing_is_a_500(site, bridge, kind, caplog):
    assert site(bridge).get(f"/{kind}nothing/").status == 500
    assert "didn't return an HttpResponse object" in caplog.text


@pytest.mark.parametrize("error", ["exit", "interrupt", "memory", "recursion", "stop", "cancelled"])
def test_nothing_that_is_raised_ends_more_than_its_request(site, bridge, kind, error, caplog):
    server = site(bridge)
    with server.connect() as connection:
        assert connection.request("GET", f"/{kind}fail/{error}/").status == 500
        assert connection.request("GET", f"/{kind}hello/").status == 200
    assert caplog.records
    if bridge == "django":
        assert {record.name for record in caplog.records} == {"django.request"}


def test_a_log_that_fails_leaves_nobody_waiting(site, kind, capfd):
    def fail(record: logging.LogRecord) -> bool:
        raise SystemExit("no log")

    server = site("django", threads=1)
    log = logging.getLogger("django.request")
    log.addFilter(fail)
    try:
        assert server.get(f"/{kind}fail/exit/").status == 500
    finally:
        log.removeFilter(fail)
    assert "no log" in capfd.readouterr().err
    assert server.get(f"/{kind}hello/").status == 200


def test_debug_propagate_exceptions_is_a_500_all_the_same(site, bridge, kind, caplog):
    server = site(bridge, settings={"DEBUG_PROPAGATE_EXCEPTIONS": True})
    assert server.get(f"/{kind}fail/500/").status == 500
    assert "deliberate" in caplog.text


def test_middleware_is_called_as_django_does(site, bridge, kind):
    server = site(bridge, middleware=[RECORDER])
    assert server.get(f"/{kind}template/").body == b"middleware"
    name = "async_template" if kind else "template"
    assert [event.split(" ")[0] for event in probe.events] == [
        "in",
        "process_view",
        "process_template_response",
        "out",
    ]
    assert f"process_view {name}" in probe.events


def test_process_view_may_answer(site, bridge, kind):
    server = site(bridge, middleware=[RECORDER])
    assert server.get(f"/{kind}hello/?answer=yes").body == b"from process_view"


def test_process_exception_sees_the_views_exception(site, bridge, kind):
    server = site(bridge, middleware=[RECORDER])
    assert server.get(f"/{kind}fail/500/?catch=yes").body == b"caught deliberate"
    assert server.get(f"/{kind}fail/500/").status == 500
    assert events("process_exception") == ["process_exception deliberate"] * 2


def test_context_variables_flow_in_and_out(site, bridge, kind):
    response = site(bridge, middleware=[RECORDER]).get(f"/{kind}context/?inward=middleware")
    assert response.body == b"middleware|"
    assert response.header("X-Outward") == "view"


def test_context_variables_do_not_leak(site, bridge, kind):
    server = site(bridge, middleware=[RECORDER], threads=1)
    server.get(f"/{kind}context/?inward=first")
    response = server.get(f"/{kind}hello/")
    assert response.header("X-Outward") == ""


def test_context_variables_of_native_middleware_are_seen(site, bridge, kind):
    @web.middleware
    async def change(request, handler):
        probe.native.set("native")
        return await handler(request)

    assert site(bridge, native=(change,)).get(f"/{kind}context/").body == b"|native"


def test_translation_and_time_zone_do_not_leak(site, bridge, kind):
    server = site(bridge, threads=1)
    before = server.get(f"/{kind}active/").body
    server.get(f"/{kind}activate/")
    assert server.get(f"/{kind}active/").body == before


@pytest.mark.parametrize("language", ["de", "fr"])
def test_i18n_patterns_choose_the_language(site, bridge, kind, language):
    server = site(
        bridge, middleware=[LOCALE], settings={"ROOT_URLCONF": "tests.django_project.i18n_urls"}
    )
    response = server.get(f"/{language}/{kind}language/")
    assert response.body == language.encode()
    assert response.header("Content-Language") == language


@pytest.mark.parametrize(("english", "german"), [("Sunday", "Sonntag"), ("Monday", "Montag")])
def test_paths_may_be_translated(site, bridge, english, german):
    server = site(
        bridge,
        middleware=[LOCALE],
        settings={"ROOT_URLCONF": "tests.django_project.translated_urls"},
    )
    in_german = [("Accept-Language", "de")]
    assert server.get(f"/{english}").body == b"en"
    assert server.get(f"/{german}", in_german).body == b"de"
    assert server.get(f"/{english}", in_german).status == 404
    assert server.get(f"/{german}").status == 404


def test_the_url_conf_may_be_changed_by_middleware(site, bridge):
    server = site(bridge, middleware=["tests.django_project.middleware.other_urlconf"])
    for _ in range(2):
        assert server.get("/hello/").body == b"en-us"
        assert server.get("/async-hello/").body == b"hello"
        # What ROOT_URLCONF promises is not what comes.
        assert server.get("/turned-async/").body == b"hello"
        assert server.get("/turned-sync/").body == b"hello"
    assert server.get("/wait/").status == 404


def test_a_converter_sees_what_middleware_has_set(site, bridge, kind):
    urls = {"ROOT_URLCONF": "tests.django_project.converted_urls"}
    server = site(bridge, middleware=["tests.django_project.middleware.InTokyo"], settings=urls)
    assert server.get(f"/{kind}moment/12/").body == b"12 Asia/Tokyo ann"


def test_middleware_that_is_only_asynchronous_is_run(site, bridge, kind):
    server = site(bridge, middleware=["tests.django_project.middleware.OnlyAsynchronous"])
    response = server.get(f"/{kind}hello/")
    assert response.body == b"hello"
    assert response.header("X-Asynchronous") == "yes"


def test_async_to_sync_works_in_a_view(site, bridge):
    inner, outer = json.loads(site(bridge).get("/calls-async/").body)
    assert inner == outer


def test_async_to_sync_works_in_middleware(site, bridge, kind):
    server = site(bridge, middleware=["tests.django_project.middleware.CallsAsynchronousCode"])
    assert server.get(f"/{kind}answer/").body == b"42"


def test_a_view_may_use_timeouts_and_task_groups(site, bridge):
    server = site(bridge)
    assert server.get("/timeout/").body == b"timeout"
    assert server.get("/group/").body == b"3"


# --- what is around Django's handler --------------------------------------------------------


class Watched:
    """A response that an agent watches."""

    def __init__(self, chunks):
        self.chunks = chunks

    def __iter__(self):
        for chunk in self.chunks:
            probe.tell("chunk")
            yield chunk

    def close(self):
        probe.tell("close")
        self.chunks.close()


def watch_handler(call, self, environ, start_response):
    """Stand around ``WSGIHandler.__call__``, as monitoring agents do."""

    def start(status, headers, exc_info=None):
        probe.tell("start", status)
        return start_response(status, [*headers, ("X-Agent", "here")], exc_info)

    probe.tell("call", environ["PATH_INFO"])
    token = probe.native.set("agent")
    try:
        return Watched(call(self, environ, start))
    finally:
        probe.native.reset(token)


def watch_lazily(call, self, environ, start_response):
    """The same, as a generator: nothing happens until it is iterated over."""
    response = watch_handler(call, self, environ, start_response)
    try:
        yield from response
    finally:
        response.close()


def refuse(call, self, environ, start_response):
    """Answer without Django."""
    probe.tell("call", environ["PATH_INFO"])
    start_response("403 Not today", [("Content-Length", "2"), ("X-Agent", "here")])
    return [b"no"]


@pytest.fixture
def around(django_ready, monkeypatch) -> Callable[[Any], None]:
    """`around(agent)` has `agent` called for each call of Django's handler."""
    from django.core.handlers.wsgi import WSGIHandler

    def put(agent):
        monkeypatch.setattr(WSGIHandler, "__call__", wrapped(agent, WSGIHandler.__call__))

    return put


def wrapped(agent, call):
    @functools.wraps(call)
    def wrapper(self, environ, start_response):
        return agent(call, self, environ, start_response)

    return wrapper


@pytest.mark.parametrize("agent", [watch_handler, watch_lazily])
@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("hello/", "200 OK"),
        ("size/100000/", "200 OK"),
        ("file/", "200 OK"),
        ("memory-file/", "200 OK"),
        ("stream/?fast", "200 OK"),
        ("cookies/", "200 OK"),
        ("status/204/", "204 No Content"),
        ("fail/500/", "500 Internal Server Error"),
        ("missing/", "404 Not Found"),
    ],
)
def test_what_is_around_djangos_handler_sees_a_request(
    site, bridge, kind, path, status, agent, around, signals
):
    plain = site(bridge).get(f"/{kind}{path}")
    wait_until(lambda: events("finished"))
    probe.events.clear()
    around(agent)
    response = site(bridge).get(f"/{kind}{path}")
    wait_until(lambda: events("close"))
    assert response.status == plain.status
    assert response.body == plain.body
    assert response.header("X-Agent") == "here"
    assert response.header("Content-Type") == plain.header("Content-Type")
    names = [name for name, _ in response.headers]
    assert names.count("Set-Cookie") == [name for name, _ in plain.headers].count("Set-Cookie")
    assert len(events("call")) == len(events("close")) == 1
    assert events("start") == [f"start {status}"]
    wait_until(lambda: events("finished"))
    assert len(events("started")) == len(events("finished")) == 1


def test_what_is_around_djangos_handler_shares_its_context(site, bridge, kind, around):
    around(watch_handler)
    for _ in range(2):
        assert site(bridge).get(f"/{kind}context/").body == b"|agent"


def test_what_is_around_djangos_handler_leaves_a_stream_asynchronous(site, kind, around):
    around(watch_handler)
    server = site("django")
    with server.connect() as connection:
        target = f"/{kind}stream-async/"
        connection.send(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        connection.recv_until(b"one,")
        probe.go_on.set()
        connection.recv_until(b"0\r\n\r\n")
    await_event("close")


def test_what_is_around_djangos_handler_may_answer(site, bridge, kind, around):
    around(refuse)
    response = site(bridge).get(f"/{kind}hello/")
    assert (response.status, response.reason, response.body) == (403, "Not today", b"no")
    assert response.header("X-Agent") == "here"


def test_waiting_views_hold_no_thread_with_something_around_djangos_handler(site, around):
    around(watch_handler)
    server = site("django", threads=1)
    waiting = [InBackground(server, "/wait/") for _ in range(5)]
    wait_until(lambda: len(events("waiting")) == 5)
    probe.go_on.set()
    assert {request.response().status for request in waiting} == {200}


@pytest.fixture
def atomic_requests(database: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from django.db import connections

    monkeypatch.setitem(connections.settings["default"], "ATOMIC_REQUESTS", True)


def test_atomic_requests_undo_what_a_failing_view_did(site, bridge, atomic_requests):
    server = site(bridge)
    assert server.get("/add-group/?name=kept").status == 200
    assert server.get("/add-group/?name=lost&fail=yes").status == 500
    from django.contrib.auth.models import Group

    assert list(Group.objects.values_list("name", flat=True)) == ["kept"]


def test_atomic_requests_refuse_asynchronous_views(site, bridge, atomic_requests, caplog):
    assert site(bridge).get("/async-hello/").status == 500
    assert "You cannot use ATOMIC_REQUESTS with async views." in caplog.text


# --- the beginning and the end of a request -----------------------------------------------


@pytest.fixture
def signals() -> Iterator[None]:
    """Tell of request_started and request_finished."""
    from django.core.signals import request_finished, request_started

    def started(sender, **kwargs):
        probe.tell("started", probe.thread())

    def finished(sender, **kwargs):
        probe.tell("finished", probe.thread())

    request_started.connect(started)
    request_finished.connect(finished)
    yield
    request_started.disconnect(started)
    request_finished.disconnect(finished)


@pytest.mark.parametrize(
    "path", ["hello/", "size/100000/", "fail/500/", "file/", "stream/", "nothing/"]
)
def test_the_signals_are_sent_once_on_the_thread_of_the_request(site, bridge, kind, path, signals):
    server = site(bridge, middleware=[RECORDER])
    server.get(f"/{kind}{path}?fast=yes")
    wait_until(lambda: events("finished"))
    assert [event.split()[0] for event in events("started", "in", "finished")] == [
        "started",
        "in",
        "finished",
    ]
    if path != "file/":
        assert len({event.split()[1] for event in events("started", "in", "finished")}) == 1


def test_the_signals_are_sent_when_the_view_exits(site, kind, signals):
    site("django").get(f"/{kind}fail/exit/")
    wait_until(lambda: events("finished"))
    assert len(events("started")) == len(events("finished")) == 1


def test_the_sender_of_the_signals_is_djangos_handler(site, bridge, kind):
    from django.core.handlers.wsgi import WSGIHandler
    from django.core.signals import request_finished, request_started

    seen = []

    def receive(sender, **kwargs):
        seen.append(sender)

    for signal in (request_started, request_finished):
        signal.connect(receive, sender=WSGIHandler)
    site(bridge).get(f"/{kind}hello/")
    wait_until(lambda: len(seen) == 2)
    assert seen == [WSGIHandler, WSGIHandler]


def test_a_receiver_that_connects_late_is_called(site, kind):
    from django.core.signals import request_finished, request_started

    server = site("django")
    server.get(f"/{kind}hello/")
    seen = []

    def receive(signal, **kwargs):
        seen.append(signal)

    request_started.connect(receive)
    request_finished.connect(receive)
    server.get(f"/{kind}hello/")
    # The end of the first request may be seen, too: it comes after its response.
    wait_until(lambda: {request_started, request_finished} <= set(seen))


def test_the_receivers_that_django_connects_are_known():
    """Others would be called by their signal, which is slower; then do what they do, too."""
    script = """
import django
django.setup()
from django.core.cache import close_caches
from django.core.handlers.base import reset_urlconf
from django.core.signals import request_finished, request_started
from django.db import close_old_connections, reset_queries
from django_aioserve.bridge.django import known_receivers

if not known_receivers(request_started, reset_queries, close_old_connections):
    raise SystemExit(f"request_started: {request_started.receivers}")
if not known_receivers(request_finished, close_old_connections, close_caches, reset_urlconf):
    raise SystemExit(f"request_finished: {request_finished.receivers}")
if known_receivers(request_finished, close_old_connections) is not None:
    raise SystemExit("a receiver too many was not noticed")
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTPROJECT)])}
    subprocess.run([*python_command(), "-c", script], env=env, check=True, timeout=60)


def test_queries_of_the_request_before_are_forgotten(site, database, kind):
    from django.db import connection

    server = site("django", threads=1, settings={"DEBUG": True})
    for _ in range(2):
        assert server.get(f"/{kind}connection/").status == 200
    assert connection is not None


def test_connections_are_closed_at_the_end_when_they_are_old(site, bridge, database, monkeypatch):
    from django.db import connections

    monkeypatch.setitem(connections.settings["default"], "CONN_MAX_AGE", 0)
    server = site(bridge, threads=1)
    closed = []

    from django.db.backends.sqlite3.base import DatabaseWrapper

    real = DatabaseWrapper._close

    def close(self):
        closed.append(probe.thread())
        real(self)

    monkeypatch.setattr(DatabaseWrapper, "_close", close)
    paths = ["connection/", "async-connection/", "stream-connection/", "async-stream-connection/"]
    if bridge == "django":
        paths += ["stream-connection/?async", "async-stream-connection/?async"]
    for number, path in enumerate(paths, 1):
        server.get(f"/{path}")
        wait_until(lambda number=number: len(closed) == number, message=path)


def test_a_transaction_of_a_stream_that_is_broken_off_is_rolled_back(
    site, bridge, kind, database, signals
):
    from django.contrib.auth.models import Group

    server = site(bridge, threads=1)
    with server.connect() as connection:
        target = f"/{kind}stream-in-transaction/"
        connection.send(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        connection.recv_until(b"xxx")
    wait_until(lambda: events("finished"))
    # The next request of the same thread is not within it.
    assert server.get("/add-group/?name=after").status == 200
    names = set(Group.objects.values_list("name", flat=True))
    assert "after" in names
    assert "streamed" not in names


@pytest.mark.parametrize("path", ["connection/", "async-connection/"])
def test_connections_live_on_as_conn_max_age_says(site, database, path, monkeypatch):
    from django.db import connections

    monkeypatch.setitem(connections.settings["default"], "CONN_MAX_AGE", 60)
    server = site("django", threads=1)
    assert len({server.get(f"/{path}").body for _ in range(5)}) == 1


def test_caches_live_as_long_as_the_thread(site, bridge, kind):
    server = site(bridge, threads=1)
    assert len({server.get(f"/{kind}cache/").body for _ in range(5)}) == 1


KEEPING = [*MIDDLEWARE, "tests.django_project.middleware.Keeping"]


@pytest.mark.parametrize("path", ["hello/", "hello/?use", "stream/", "file/"])
def test_a_request_is_gone_with_its_response_without_the_collector(site, kind, path):
    probe.go_on.set()
    server = site(middleware=KEEPING)
    gc.collect()
    gc.disable()
    try:
        server.get(f"/{kind}{path}")
        wait_until(lambda: probe.requests[0]() is None)
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["", "user", "auser", "_messages"])
def test_what_somebody_keeps_of_a_request_stays_whole(site, kind, name):
    server = site(middleware=KEEPING, threads=1)
    assert server.get(f"/{kind}hello/?keep={name}").body == b"hello"
    server.get(f"/{kind}hello/")  # by the same thread, so that the first is done with
    wait_until(lambda: probe.requests[1]() is None)
    request = probe.requests[0]()
    assert request is not None
    assert probe.kept[0] is (getattr(request, name) if name else request)
    assert request._messages.request is request
    assert request.user.is_anonymous


def test_a_spare_chain_keeps_nothing_of_its_request_alive(django_ready):
    from django_aioserve.bridge.home import Home

    class Request:
        pass

    async def live() -> list[bool]:
        pool = ThreadPool(1, 10)
        home = Home("home", pool, 10)
        done = asyncio.get_running_loop().create_future()
        left = []

        def answer(request: Request) -> Request:
            return request

        def take_turn() -> None:
            for _ in range(2):
                request = Request()
                left.append(weakref.ref(request))
                chain = home.chain(contextvars.copy_context())
                chain.switch((answer, request))
                home.give_back(chain)
            del request
            pool.call_soon(lambda: done.set_result(None))

        home.submit(None, take_turn)
        await done
        home.close()
        assert await home.join(10)
        pool.close()
        return [reference() is not None for reference in left]

    assert asyncio.run(live()) == [False, False]


# --- bit by bit ---------------------------------------------------------------------------

ENDLESS = [("wsgi", "endless/"), ("django", "endless/"), ("django", "endless-async/")]


# Under WSGI Django has consumed an asynchronous stream before the bridge sees it.
@pytest.mark.parametrize(
    ("bridge", "path"), [("wsgi", "stream/"), ("django", "stream/"), ("django", "stream-async/")]
)
def test_a_stream_arrives_as_it_is_produced(site, bridge, kind, path):
    with site(bridge).connect() as connection:
        connection.send(f"GET /{kind}{path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert b"Transfer-Encoding: chunked" in connection.recv_until(b"\r\n\r\n")
        connection.recv_until(b"one,")
        probe.go_on.set()
        connection.recv_until(b"two")
        connection.recv_until(b"0\r\n\r\n")
        assert connection.request("GET", "/hello/").body == b"hello"
    wait_until(lambda: "iterator closed" in probe.events)
    assert probe.events.count("iterator closed") == 1


@pytest.mark.parametrize("size", [1, WINDOW - 1, WINDOW, 3 * WINDOW])
def test_a_chunk_of_a_stream_may_have_any_size(site, bridge, kind, size):
    assert site(bridge).get(f"/{kind}stream-size/{size}/").body == b"x" * 3 * size


def test_the_head_of_an_asynchronous_stream_does_not_wait_for_its_first_chunk(site):
    server = site("django")
    with server.connect() as connection:
        connection.send(b"GET /async-silent-async/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
        connection.recv_until(b"\r\n\r\n")


@pytest.mark.parametrize(("bridge", "path"), ENDLESS)
def test_a_client_that_leaves_ends_a_stream(site, bridge, kind, path):
    server = site(bridge, threads=1)
    connection = server.connect()
    connection.send(f"GET /{kind}{path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    connection.recv_exactly(200_000)
    connection.reset()
    await_event("generator closed")
    assert probe.events.count("generator closed") == 1
    assert server.get("/hello/").body == b"hello"


def test_a_client_that_leaves_ends_a_stream_that_has_nothing_to_say(site, kind):
    connection = site("django").connect()
    connection.send(f"GET /{kind}silent-async/ HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    connection.recv_until(b"one")
    connection.close()
    await_event("generator closed")
    assert events("generator") == ["generator cancelled", "generator closed"]


@pytest.mark.parametrize(("bridge", "path"), ENDLESS)
def test_a_stream_waits_for_a_client_that_does_not_read(site, bridge, kind, path):
    """While it waits the others are served, and the generator is not run ahead."""
    server = site(bridge)
    with server.connect() as connection:
        connection.send(f"GET /{kind}{path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        connection.recv_until(b"\r\n\r\n")
        for _ in range(20):
            assert server.get("/async-hello/").body == b"hello"


@pytest.mark.parametrize(("bridge", "query"), [("wsgi", ""), ("django", ""), ("django", "?async")])
def test_a_stream_is_closed_in_the_language_of_its_request(site, bridge, kind, query):
    assert site(bridge).get(f"/{kind}stream-language/{query}").body == b"one"
    await_event("closed fr")


def test_a_stream_that_fails_at_once_is_a_500(site, bridge, kind, caplog):
    assert site(bridge).get(f"/{kind}broken-stream/").status == 500
    assert "deliberate" in caplog.text


@pytest.mark.parametrize(
    ("bridge", "path"),
    [
        ("wsgi", "broken-stream/?late=yes"),
        ("django", "broken-stream/?late=yes"),
        ("django", "broken-stream-async/"),
    ],
)
def test_a_stream_that_fails_later_closes_the_connection(site, bridge, kind, path, caplog):
    with site(bridge).connect() as connection:
        connection.send(f"GET /{kind}{path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert connection.recv_until(b"one").startswith(b"HTTP/1.1 200 OK")
        probe.go_on.set()
        answer = connection.recv_to_eof()
    assert not answer.endswith(b"0\r\n\r\n")
    assert "deliberate" in caplog.text


@pytest.mark.parametrize("error", ["exit", "interrupt", "cancelled", "connection"])
def test_nothing_that_an_asynchronous_stream_raises_ends_more_than_it(site, kind, error, caplog):
    server = site("django")
    target = f"/{kind}broken-stream-async/?kind={error}"
    with server.connect() as connection:
        connection.send(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        connection.recv_until(b"one")
        probe.go_on.set()
        # No end of the body, and no other answer in the midst of it.
        assert connection.recv_to_eof() == b"\r\n"
    assert server.get("/hello/").status == 200
    assert "Error in a streaming response" in caplog.text


@pytest.mark.parametrize("error", ["exit", "500"])
def test_a_stream_that_cannot_be_closed_ends_all_the_same(site, kind, error, caplog, signals):
    server = site("django")
    target = f"/{kind}endless-async/?kind={error}"
    with server.connect() as connection:
        connection.send(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        connection.recv_until(b"x")
    await_event("generator closed")
    wait_until(lambda: events("finished"))
    assert server.get("/hello/").status == 200
    assert "Error while closing a stream" in caplog.text


@pytest.mark.parametrize("offset", [0, 5, 199_990])
def test_a_file_is_sent_from_where_it_stands(site, bridge, kind, offset):
    response = site(bridge).get(f"/{kind}file/?offset={offset}")
    assert response.header("Content-Type") == "application/x-test"
    assert response.header("Content-Length") == str(200_000 - offset)
    assert response.body == (b"0123456789" * 20_000)[offset:]


def test_a_file_is_sent_by_the_kernel(site, bridge, kind, monkeypatch):
    calls = []
    real = os.sendfile
    monkeypatch.setattr(os, "sendfile", lambda *args: calls.append(1) or real(*args))
    assert len(site(bridge).get(f"/{kind}file/").body) == 200_000
    assert calls


def test_a_file_that_is_none_to_the_kernel_is_read_and_closed_once(site, bridge, kind):
    assert len(site(bridge).get(f"/{kind}memory-file/").body) == 200_000
    wait_until(lambda: events("file"))
    assert events("file") == ["file closed"]


# --- clients that leave -------------------------------------------------------------------


@pytest.mark.parametrize("path", ["told/", "wrapped-close/"])
def test_a_response_is_closed_exactly_once(site, bridge, kind, path):
    server = site(bridge)
    assert server.get(f"/{kind}{path}").status == 200
    wait_until(lambda: events("closed"))
    server.get("/hello/")
    assert len(events("closed")) == 1


def test_a_client_that_leaves_a_synchronous_view_frees_the_thread(site, bridge, signals):
    server = site(bridge, threads=1)
    with server.connect() as connection:
        connection.send(b"GET /hold/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
        wait_until(lambda: events("held"))
    probe.go_on.set()
    wait_until(lambda: events("finished"))
    assert server.get("/hello/").body == b"hello"
    assert len(events("closed")) == 1


def leave(server: AppServer, target: str, event: str) -> None:
    """Ask for `target`, and leave when `event` has happened."""
    connection = server.connect()
    connection.send(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    wait_until(lambda: events(event))
    connection.close()


@pytest.mark.parametrize("cancellation", [False, True], ids=["", "handler_cancellation"])
def test_a_client_that_leaves_cancels_the_view_and_unwinds_the_chain(site, signals, cancellation):
    server = site(
        middleware=[RECORDER], server={"handler_cancellation": True} if cancellation else None
    )
    leave(server, "/wait/", "waiting")
    wait_until(lambda: events("finished"))
    assert [event.split()[0] for event in probe.events] == [
        "started",
        "in",
        "process_view",
        "waiting",
        "cancelled",
        "cleaned",
        "error",
        "out",
        "finished",
    ]
    assert events("error") == ["error CancelledError"]
    assert server.get("/async-hello/").body == b"hello"


def test_a_view_that_does_not_want_to_be_cancelled_ends_as_usual(site, signals):
    server = site(middleware=[RECORDER])
    leave(server, "/swallow/", "waiting")
    wait_until(lambda: events("finished"))
    assert events("closed", "error", "swallowed") == [
        "swallowed",
        f"closed {events('in')[0].split()[1]}",
    ]


def test_a_client_that_leaves_before_the_chain_reaches_its_view(site, signals):
    """The view is not run, and the chain is unwound."""
    server = site(middleware=["tests.django_project.middleware.Holding", RECORDER])
    with server.connect() as connection:
        connection.send(b"GET /wait/?hold=yes HTTP/1.1\r\nHost: localhost\r\n\r\n")
        wait_until(lambda: events("holding"))
    # The loop learns of it while the thread is still occupied.
    wait_until(lambda: server.run(_requests_under_way()) == 0)
    probe.go_on.set()
    wait_until(lambda: events("finished"))
    assert events("waiting", "error") == ["error CancelledError"]


# --- home threads -------------------------------------------------------------------------


def test_waiting_views_hold_no_thread(site):
    server = site(threads=1)
    waiting = [InBackground(server, f"/wait/?name={number}") for number in range(30)]
    wait_until(lambda: len(events("waiting")) == 30)
    assert server.get("/hello/").body == b"hello"
    assert server.get("/async-hello/").body == b"hello"
    probe.go_on.set()
    assert {request.response().status for request in waiting} == {200}
    assert len(events("closed")) == 30
    assert len({event.split()[1] for event in events("closed")}) == 1


def test_a_suspended_chain_is_not_resumed_behind_a_slow_synchronous_view(site):
    server = site(threads=1)
    released = threading.Event()
    waiting = InBackground(server, "/wait/")
    wait_until(lambda: events("waiting"))
    # go_on would let both go; the synchronous one is held by a body that does not come.
    from tests.django_project import views

    real = probe.go_on.wait
    views.probe.go_on.wait = released.wait
    try:
        held = InBackground(server, "/hold/")
        wait_until(lambda: events("held"))
        probe.go_on.set()
        assert waiting.response().status == 200
        assert not held.answered
        released.set()
        assert held.response().status == 200
    finally:
        views.probe.go_on.wait = real


def test_new_requests_do_not_wait_behind_a_job_that_takes_long(django_ready):
    async def main():
        config = Config(threads=2)
        pool = ThreadPool(1, 1)
        homes = Homes(config, pool)
        done = threading.Event()
        try:
            async with asyncio.timeout(10):
                first = homes.choose()
                for _ in range(100):  # it is known for being quick
                    first.submit(None, lambda: None)
                while first.load:
                    await asyncio.sleep(0.001)
                first.submit(None, lambda: done.wait(10) and None)
                while homes.choose() is first:
                    await asyncio.sleep(0.001)
        finally:
            done.set()
            assert await homes.close(10)
            pool.close()
            assert await pool.join(10)

    asyncio.run(main())


def test_languages_do_not_mix_on_one_home_thread(site):
    server = site(
        middleware=[LOCALE],
        settings={"ROOT_URLCONF": "tests.django_project.i18n_urls"},
        threads=1,
    )
    waiting = {
        language: InBackground(server, f"/{language}/wait/?name={language}")
        for language in ("de", "fr", "it")
    }
    wait_until(lambda: len(events("waiting")) == 3)
    probe.go_on.set()
    for language, request in waiting.items():
        response = request.response()
        assert response.body == f"{language} {language}".encode()
        assert response.header("Content-Language") == language


def test_sensitive_calls_run_on_the_thread_of_the_middleware(site):
    server = site(middleware=[RECORDER])
    one, two = json.loads(server.get("/threads/").body)
    (home,) = {event.split()[1] for event in events("in", "out")}
    assert one == two == home
    assert home.startswith("aioserve-home")


def test_a_stream_out_of_a_synchronous_view_has_a_thread_that_stays(site):
    server = site()
    names = {server.get("/stream-threads/").body for _ in range(3)}
    assert len(names) == 1
    assert names.pop().startswith(b"aioserve-home")


def test_one_handler_may_serve_twice_and_be_called_as_well(site, app_server):
    from django.core.handlers.wsgi import WSGIHandler
    from django.test import RequestFactory

    from django_aioserve.bridge.django import DjangoBridge

    handler = []

    async def factory():
        handler[:] = handler or [WSGIHandler()]
        pool = ThreadPool(2, 10)
        bridge = DjangoBridge(handler[0], Config(), pool)
        app = web.Application()
        app.router.add_route("*", "/{path_info:.*}", bridge.handle)

        async def end(_):
            await bridge.close(10)
            pool.close()
            await pool.join(10)

        app.on_cleanup.append(end)
        return app

    site()  # for its settings
    for server in [app_server(factory), app_server(factory)]:
        assert server.get("/async-hello/").body == b"hello"
    assert type(handler[0]) is WSGIHandler
    environ = RequestFactory().get("/async-hello/", headers={"host": "localhost"}).environ
    response = handler[0](environ, lambda *args: None)
    assert response.content == b"hello"
    response.close()


@pytest.mark.parametrize("patched", ["WSGIHandler.__call__", "WSGIRequest.__init__"])
@pytest.mark.parametrize("is_object", [False, True], ids=["function", "object"])
def test_what_a_library_puts_around_djangos_handler_is_run(
    site, app_server, kind, patched, is_object, monkeypatch
):
    # As Sentry, New Relic and Datadog do it: to the class, with a function or an object.
    from django.core.handlers import wsgi

    from django_aioserve.application import build_application

    owner, name = patched.split(".")
    original = getattr(getattr(wsgi, owner), name)
    calls = []

    @functools.wraps(original)
    def around(*args):
        calls.append(args)
        return original(*args)

    class Around:
        """A proxy that looks like the function, and is bound like one."""

        def __getattr__(self, name):
            return getattr(original, name)

        def __get__(self, instance, owner):
            return functools.partial(around, instance)

    monkeypatch.setattr(getattr(wsgi, owner), name, Around() if is_object else around)

    async def factory():
        return build_application(Config(), wsgi.WSGIHandler())

    site()  # for its settings
    server = app_server(factory)
    assert server.get(f"/{kind}hello/").body == b"hello"
    assert len(calls) == 1


def test_a_request_class_of_the_projects_own_is_used(site, app_server, kind):
    from django.core.handlers import wsgi

    from django_aioserve.application import build_application

    class Request(wsgi.WSGIRequest):
        def __init__(self, environ):
            super().__init__({**environ, "QUERY_STRING": "from=the-class"})

    async def factory():
        handler = wsgi.WSGIHandler()
        handler.request_class = Request
        return build_application(Config(), handler)

    site()  # for its settings
    server = app_server(factory)
    assert describe(server, f"/{kind}describe/")["meta"]["QUERY_STRING"] == "from=the-class"


def test_the_end_of_the_server_unwinds_what_is_suspended(app_server, site):
    server = site(middleware=[RECORDER], server={"shutdown_timeout": 0.01, "allow_errors": True})
    with server.connect() as connection:
        connection.send(b"GET /wait/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
        wait_until(lambda: events("waiting"))
        server.run(server._runner.cleanup())
    assert events("cancelled", "out")[0] == "cancelled"
    assert len(events("out")) == 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [("500", "ValueError NoneType"), ("exit", "RuntimeError SystemExit")],
)
def test_a_job_that_fails_raises_in_its_view(site, error, expected):
    assert site().get(f"/job-fails/?kind={error}").body.decode() == expected


def test_the_asynchronous_orm_works(site, bridge, database):
    server = site(bridge)
    assert server.get("/async-add-group/?name=a").status == 200
    assert server.get("/async-add-group/?name=b").status == 200
    assert json.loads(server.get("/async-groups/").body) == ["a", "b"]


def test_a_transaction_of_middleware_is_not_shared(site, database):
    """Both requests live on one thread; the second waits until the first one's is over."""
    server = site(middleware=[TRANSACTION], threads=1)
    first = InBackground(server, "/async-add-group/?name=undone&wait=yes&atomic=1&undo=yes")
    await_event("added undone")
    second = InBackground(server, "/async-add-group/?name=kept")
    third = InBackground(server, "/async-add-group/?name=committed&atomic=3")
    assert server.get("/hello/").status == 200
    assert "added kept" not in probe.events
    assert "begin 3" not in probe.events
    probe.go_on.set()
    assert [request.response().status for request in (first, second, third)] == [200] * 3
    assert json.loads(server.get("/async-groups/").body) == ["committed", "kept"]


def test_a_transaction_that_is_left_open_is_rolled_back(site, database, caplog):
    server = site(threads=1)
    assert server.get("/leave-open/").status == 200
    assert json.loads(server.get("/async-groups/").body) == []
    assert server.get("/async-add-group/?name=kept").status == 200
    assert json.loads(server.get("/async-groups/").body) == ["kept"]
    assert "A request ended with an open transaction" in caplog.text


def test_the_transaction_of_a_client_that_left_is_rolled_back(site, database):
    server = site(middleware=[TRANSACTION], threads=1)
    leave(server, "/async-add-group/?name=undone&wait=yes&atomic=1", "added")
    assert json.loads(server.get("/async-groups/").body) == []


def test_a_backend_with_tenants_is_served_djangos_own_way(site, database, monkeypatch):
    from django.db.backends.sqlite3.base import DatabaseWrapper

    monkeypatch.setattr(DatabaseWrapper, "set_tenant", lambda self: None, raising=False)
    server = site(middleware=[RECORDER])
    assert server.get("/async-hello/").body == b"hello"
    assert all(event.split()[1].startswith("pool") for event in events("in", "out"))


def test_middleware_that_keeps_the_request_on_its_thread_has_it_for_itself(site):
    server = site(middleware=[RECORDER, "tests.django_project.thread_locals.remember"])
    assert server.get("/async-hello/").body == b"hello"
    assert all(event.split()[1].startswith("pool") for event in events("in", "out"))


# --- PostgreSQL ---------------------------------------------------------------------------


@pytest.fixture
def postgres(
    django_ready: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], list[int]]]:
    """The database "other", with a table of groups; gives its connections' process ids."""
    psycopg = pytest.importorskip("psycopg")
    from django.db import connections

    host = os.environ.get("PGHOST", "127.0.0.1")
    try:
        admin = psycopg.connect(f"host={host} dbname=test user=postgres", autocommit=True)
    except psycopg.OperationalError as error:
        skip_or_fail(f"no PostgreSQL: {error}")
    name = f"aioserve_{secrets.token_hex(4)}"
    admin.execute(f"CREATE DATABASE {name}")
    settings = {
        **connections.settings["default"],
        "ENGINE": "django.db.backends.postgresql",
        "NAME": name,
        "HOST": host,
        "USER": "postgres",
        "PASSWORD": "",
        "PORT": "",
        "CONN_MAX_AGE": 60,
        "OPTIONS": {"application_name": name},
    }
    monkeypatch.setitem(connections.settings, "other", settings)
    connection = connections["other"]
    with connection.cursor() as cursor:
        cursor.execute("CREATE TABLE auth_group (id serial PRIMARY KEY, name varchar(150))")
    connection.close()

    def pids() -> list[int]:
        rows = admin.execute(
            "SELECT pid FROM pg_stat_activity WHERE application_name = %s ORDER BY pid", [name]
        )
        return [pid for (pid,) in rows]

    yield pids
    connection.close()
    del connections["other"]
    admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    admin.close()


@pytest.mark.postgres
def test_a_hundred_asynchronous_queries_open_no_more_connections_than_threads(postgres, site):
    server = site(threads=4)
    requests = [InBackground(server, "/query-slowly/") for _ in range(100)]
    most = 0
    while not all(request.answered for request in requests):
        most = max(most, len(postgres()))
    assert {request.response().status for request in requests} == {200}
    assert 1 <= most <= 4
    before = postgres()
    for _ in range(10):
        assert server.get("/query-slowly/").status == 200
    assert postgres() == before


@pytest.mark.postgres
def test_a_server_side_cursor_outlives_the_end_of_another_request(postgres, monkeypatch, site):
    from django.contrib.auth.models import Group
    from django.db import connections

    Group.objects.using("other").bulk_create(Group(name=str(number)) for number in range(5))
    monkeypatch.setitem(connections.settings["other"], "CONN_MAX_AGE", 0)
    server = site(threads=1)
    iterating = InBackground(server, "/query-in-bits/")
    await_event("cursor open")
    for _ in range(3):
        assert server.get("/query-once/").body == b"5"
    probe.go_on.set()
    assert iterating.response().body == b"5"
    # With the last request its connection is closed, as CONN_MAX_AGE says.
    connections["other"].close()
    wait_until(lambda: not postgres())


# --- too much -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["hello/", "async-hello/"])
def test_a_full_queue_is_a_503_with_retry_after(site, bridge, path):
    server = site(
        bridge,
        middleware=["tests.django_project.middleware.Holding"],
        threads=1,
        queue_size=1,
    )
    held = [InBackground(server, f"/{path}?hold=yes")]
    wait_until(lambda: events("holding"))
    held.append(InBackground(server, f"/{path}?hold=yes"))
    wait_until(lambda: server.run(_requests_under_way()) == 2)
    response = server.get(f"/{path}")
    assert response.status == 503
    assert response.header("Retry-After") == "1"
    probe.go_on.set()
    assert {request.response().status for request in held} == {200}
    assert server.get(f"/{path}").status == 200


async def _requests_under_way() -> int:
    return sum("_handle_request" in repr(task.get_coro()) for task in asyncio.all_tasks())


# --- what is private elsewhere ------------------------------------------------------------
# The bridge relies on names that promise nothing. Each of these tests fails when a new
# version takes one away, and says where it is used.


def test_private_run_in_executor_gives_a_future_of_asyncio_on():
    """home.py: _HomeExecutor.submit()."""

    class Mine(Executor):
        def submit(self, function, /, *args, **kwargs):
            self.future = asyncio.get_running_loop().create_future()
            self.future.set_result(function(*args))
            return self.future

    async def main():
        mine = Mine()
        given = asyncio.get_running_loop().run_in_executor(mine, max, 1, 2)
        assert given is mine.future
        assert await given == 2

    asyncio.run(main())
    uvloop = pytest.importorskip("uvloop")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def test_private_restore_context_moves_locals_to_another_thread():
    """home.py: rehome()."""
    from asgiref.local import Local

    from django_aioserve.bridge.home import rehome

    local = Local()
    context = contextvars.Context()
    context.run(setattr, local, "value", 1)

    def look():
        rehome(context)
        return local.value

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(context.run, look).result() == 1


def test_private_names_of_djangos_responses(django_ready):
    """django.py: _Whole, _Exchange and _Life."""
    from django.http import HttpResponse, StreamingHttpResponse

    response = HttpResponse(headers={"X-One": "1"})
    assert response.headers._store["x-one"] == ("X-One", "1")
    assert response._resource_closers == []
    assert response._handler_class is None

    async def generate():
        yield b""

    iterator = generate()
    assert StreamingHttpResponse(iterator)._iterator is iterator


def test_private_close_of_djangos_responses_does_what_ours_does(django_ready):
    """django.py: _Life.finish()."""
    import inspect

    from django.http.response import HttpResponseBase

    source = "".join(inspect.getsource(HttpResponseBase.close).split())
    assert source == (
        "defclose(self):forcloserinself._resource_closers:try:closer()exceptException:pass"
        "#Freeresourcesthatwerestillreferenced.self._resource_closers.clear()self.closed=True"
        "signals.request_finished.send(sender=self._handler_class)"
    )


def test_private_cancel_is_called_when_the_client_leaves(app_server):
    """django.py: _CancelWhenLost."""
    called = threading.Event()
    entered = threading.Event()

    async def handler(request):
        object.__setattr__(request, "_cancel", lambda error: called.set())
        entered.set()
        await asyncio.sleep(0.5)
        return web.Response()

    async def factory():
        app = web.Application()
        app.router.add_get("/", handler)
        return app

    server = app_server(factory)
    with server.connect() as connection:
        connection.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        entered.wait(10)
    assert called.wait(10)


def test_thread_sensitive_context_takes_an_executor():
    """home.py: Home."""
    from asgiref.sync import ThreadSensitiveContext, sync_to_async

    class Mine(ThreadPoolExecutor):
        pass

    async def main():
        with Mine(1, "mine") as executor:
            async with ThreadSensitiveContext(executor=executor):
                assert (await sync_to_async(probe.thread)()).startswith("mine")

    asyncio.run(main())


def test_a_foreign_loop_may_use_the_home_thread(site):
    """A thread with a loop of its own, started in a request's context, gets its answer, too."""
    from asgiref.sync import sync_to_async

    from tests.django_project import views

    async def foreign(request):
        context = contextvars.copy_context()

        def other_loop():
            return context.run(asyncio.run, sync_to_async(probe.thread)())

        return views.HttpResponse(await asyncio.to_thread(other_loop))

    real = views.threads
    from django.urls import clear_url_caches

    from tests.django_project import urls

    pattern = next(p for p in urls.urlpatterns if p.callback is real)
    pattern.callback = foreign
    clear_url_caches()
    try:
        assert site().get("/threads/").body.startswith(b"aioserve-home")
    finally:
        pattern.callback = real
        clear_url_caches()


@pytest.mark.slow
def test_memory_stays_flat_over_50_000_requests(site, bridge):
    server = site(bridge)
    # Under WSGI each asynchronous view has a loop and a thread made for it.
    paths = ["/hello/", "/async-hello/" if bridge == "django" else "/describe/"]
    batch = "".join(
        f"GET {paths[n % 2]} HTTP/1.1\r\nHost: localhost\r\n\r\n" for n in range(50)
    ).encode()

    def ask(times: int) -> tuple[int, int]:
        with server.connect(30) as connection:
            for _ in range(times // 50):
                connection.send(batch)
                for _ in range(50):
                    assert connection.read_response().status == 200
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return len(gc.get_objects()), pages * os.sysconf("SC_PAGE_SIZE")

    ask(5_000)
    objects, memory = ask(5_000)
    objects_after, memory_after = ask(40_000)
    assert objects_after - objects < 500
    assert memory_after - memory < 4 << 20

"""Sessions, users, permissions, CSRF, the database and exceptions in native handlers."""

from __future__ import annotations

import json
import logging
import re
from http.cookies import SimpleCookie
from typing import TYPE_CHECKING, Any

import pytest
import redis as redis_client
from aiohttp import web
from django.test import Client, override_settings

from django_aioserve import auth, state
from tests.native_project.aio import Permission, SessionStore, User
from tests.native_project.caches import CLOSED
from tests.native_project.serving import serving
from tests.redis_server import RedisServer
from tests.support import AppServer, RawConnection, Response, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("database")

ENGINES = ["db", "signed_cookies", "cache", "cached_db", "file"]
FORM = ("Content-Type", "application/x-www-form-urlencoded")
PAGE = ("Accept", "text/html")
UPGRADE = [
    ("Connection", "Upgrade"),
    ("Upgrade", "websocket"),
    ("Sec-WebSocket-Version", "13"),
    ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
]


class Browser:
    """A client that keeps cookies."""

    def __init__(self, server: AppServer) -> None:
        self.server = server
        self.cookies: dict[str, str] = {}

    def request(
        self, method: str, target: str, *headers: tuple[str, str], body: bytes = b""
    ) -> Response:
        return self.on(self.server.connect(), method, target, *headers, body=body)

    def on(
        self,
        connection: RawConnection,
        method: str,
        target: str,
        *headers: tuple[str, str],
        body: bytes = b"",
    ) -> Response:
        sent = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        with connection:
            response = connection.request(
                method, target, [*headers, *([("Cookie", sent)] if sent else [])], body
            )
        for name, value in response.headers:
            if name.lower() == "set-cookie":
                for morsel in SimpleCookie(value).values():
                    self.cookies[morsel.key] = morsel.value
                    if morsel["max-age"] == "0" or "1970" in morsel["expires"]:
                        del self.cookies[morsel.key]
        return response

    def get(self, target: str, *headers: tuple[str, str]) -> Response:
        return self.request("GET", target, *headers)

    def log_in(self, name: str = "alice") -> Response:
        return self.request(
            "POST", "/log-in/", FORM, body=f"username={name}&password=secret".encode()
        )


@pytest.fixture(autouse=True)
def _cheap_passwords() -> Iterator[None]:
    with override_settings(PASSWORD_HASHERS=["django.contrib.auth.hashers.MD5PasswordHasher"]):
        yield


@pytest.fixture
def alice(database: None) -> User:
    return User.objects.create_user("alice", password="secret")


@pytest.fixture
def server(database: None) -> Iterator[AppServer]:
    with serving() as started:
        yield started


@pytest.fixture
def browser(server: AppServer) -> Browser:
    return Browser(server)


@pytest.fixture(params=ENGINES)
def engine_browser(request: pytest.FixtureRequest, alice: User, tmp_path: Any) -> Iterator[Browser]:
    """A browser at a server with each of Django's session engines."""
    engine = f"django.contrib.sessions.backends.{request.param}"
    with serving(SESSION_ENGINE=engine, SESSION_FILE_PATH=str(tmp_path)) as started:
        yield Browser(started)


# --- sessions and users with every engine ---------------------------------------------------


def test_a_session_is_kept(engine_browser: Browser) -> None:
    assert [engine_browser.get("/count/").text for _ in range(3)] == ["1", "2", "3"]
    assert engine_browser.get("/peek/").text == "3"
    assert Browser(engine_browser.server).get("/peek/").text == "0"


def test_a_user_logs_in_and_out(engine_browser: Browser) -> None:
    assert engine_browser.get("/whoami/").text == "anonymous True"
    assert engine_browser.log_in().text == "hello alice"
    assert engine_browser.get("/whoami/").text == "alice True"
    answer = engine_browser.get("/log-out/")
    assert (answer.status, answer.header("Location")) == (302, "/whoami/")
    assert engine_browser.get("/whoami/").text == "anonymous True"


def test_a_session_changed_by_a_stream_is_saved_before_its_head(engine_browser: Browser) -> None:
    engine_browser.get("/count-in-stream/")
    assert engine_browser.get("/peek/").text == "1"


def test_a_session_changed_before_a_handshake_is_saved_with_it(engine_browser: Browser) -> None:
    connection = engine_browser.server.connect()
    assert engine_browser.on(connection, "GET", "/count-in-socket/", *UPGRADE).status == 101
    assert engine_browser.get("/peek/").text == "1"


def test_permissions_are_asked_with_every_engine(engine_browser: Browser, alice: User) -> None:
    engine_browser.log_in()
    assert engine_browser.get("/adders/").status == 403
    alice.user_permissions.add(Permission.objects.get(codename="add_user"))
    assert engine_browser.get("/adders/").text == "may add"


def test_a_session_is_shared_with_django_views(engine_browser: Browser, alice: User) -> None:
    engine_browser.log_in()
    response = engine_browser.get("/accounts-of-django/")
    assert response.text == "alice"


# --- sessions -----------------------------------------------------------------------------


def test_a_session_that_was_not_touched_sets_no_cookie(browser: Browser) -> None:
    response = browser.get("/peek/")
    assert response.header("Set-Cookie") is None
    assert response.header("Vary") == "Cookie"
    assert browser.get("/live/1/").header("Vary") is None


def test_the_session_cookie_has_django_s_attributes(database: None) -> None:
    with serving(
        SESSION_COOKIE_NAME="sid", SESSION_COOKIE_SECURE=True, SESSION_COOKIE_SAMESITE="Strict"
    ) as server:
        cookie = server.get("/count/").header("Set-Cookie") or ""
    assert re.match(r"sid=\w{32}; expires=[^;]+GMT; HttpOnly; Max-Age=1209600; Path=/;", cookie)
    assert "Secure" in cookie
    assert "SameSite=Strict" in cookie


def test_a_session_is_saved_at_every_request_where_that_is_set(database: None) -> None:
    with serving(SESSION_SAVE_EVERY_REQUEST=True) as server:
        browser = Browser(server)
        browser.get("/count/")
        assert browser.get("/peek/").header("Set-Cookie") is not None


def test_a_session_is_saved_with_an_exception_of_aiohttp(browser: Browser) -> None:
    assert browser.get("/refused/").status == 409
    assert browser.get("/peek/").text == "7"


def test_a_session_that_was_deleted_meanwhile_is_answered_400(browser: Browser) -> None:
    browser.get("/count/")
    key = browser.cookies["sessionid"]
    assert browser.get(f"/delete-and-save/{key}/").status == 400


def test_an_unknown_session_is_a_new_one(browser: Browser) -> None:
    browser.cookies["sessionid"] = "x" * 32
    assert browser.get("/whoami/").text == "anonymous True"
    assert browser.get("/peek/").text == "0"


def test_session_and_user_are_loaded_once_by_two_tasks(browser: Browser, alice: User) -> None:
    browser.log_in()
    assert browser.get("/both/").text == "True alice"


# --- users --------------------------------------------------------------------------------


def test_a_changed_password_ends_the_session(browser: Browser, alice: User) -> None:
    browser.log_in()
    alice.set_password("other")
    alice.save()
    assert browser.get("/whoami/").text == "anonymous True"


def test_a_user_who_was_deactivated_is_nobody(browser: Browser, alice: User) -> None:
    browser.log_in()
    User.objects.update(is_active=False)
    assert browser.get("/whoami/").text == "anonymous True"


@pytest.fixture
def templated(alice: User) -> Iterator[Browser]:
    """A browser at a server whose templates, that of 404 among them, greet the user."""
    text = "Hello {{ user.get_username|default:'nobody' }} {{ request.session.count }}"
    loader = (
        "django.template.loaders.locmem.Loader",
        {"greeting.html": text, "404.html": text},
    )
    processors = [
        "django.template.context_processors.request",
        "django.contrib.auth.context_processors.auth",
    ]
    templates = {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "OPTIONS": {"loaders": [loader], "context_processors": processors},
    }
    with serving(TEMPLATES=[templates]) as server:
        yield Browser(server)


@pytest.mark.parametrize(
    "target", ["/greeting/?loaded=1", "/greeting/?thread=1", "/missing/", "/no-such-page/"]
)
def test_templates_know_the_user(templated: Browser, target: str) -> None:
    assert templated.get(target).text == "Hello nobody "
    templated.log_in()
    templated.get("/count/")
    assert templated.get(target).text == "Hello alice 1"


def test_a_user_that_was_not_awaited_is_told_and_not_taken_for_nobody(
    templated: Browser, caplog: pytest.LogCaptureFixture
) -> None:
    assert templated.get("/greeting/").text == "Hello nobody "
    templated.log_in()
    assert templated.get("/greeting/").status == 500
    (record,) = errors_of(caplog, "django.request")
    assert record.exc_info is not None
    assert "await get_user(request)" in str(record.exc_info[1])


def test_a_page_redirects_to_the_login(browser: Browser) -> None:
    response = browser.get("/members/?a=1", PAGE)
    assert response.status == 302
    assert response.header("Location") == "/accounts/login/?next=/members/%3Fa%3D1"


def test_a_login_elsewhere_gets_the_whole_address(database: None) -> None:
    with serving(LOGIN_URL="https://sso.example.com/") as server:
        response = server.get("/members/", [PAGE, ("Host", "localhost")])
    assert response.header("Location") == (
        "https://sso.example.com/?next=http%3A//localhost/members/"
    )


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("Accept", "application/json")],
        [PAGE, ("X-Requested-With", "XMLHttpRequest")],
        [PAGE, ("Sec-Fetch-Mode", "cors")],
    ],
)
def test_a_fetch_is_answered_401(browser: Browser, headers: list[tuple[str, str]]) -> None:
    response = browser.get("/members/", *headers)
    assert (response.status, response.header("WWW-Authenticate")) == (401, "Session")


def test_a_navigation_is_known_by_its_fetch_mode(browser: Browser) -> None:
    assert browser.get("/members/", ("Sec-Fetch-Mode", "navigate")).status == 302


def test_the_redirect_can_be_turned_off(browser: Browser) -> None:
    assert browser.get("/members-api/", PAGE).status == 401


def test_a_websocket_needs_the_login(browser: Browser, alice: User) -> None:
    assert browser.get("/members-socket/", *UPGRADE, PAGE).status == 401
    browser.log_in()
    assert browser.get("/members-socket/", *UPGRADE).status == 101


def test_a_method_of_a_view_class_needs_the_login(browser: Browser, alice: User) -> None:
    assert browser.request("DELETE", "/things/3/").status == 401
    browser.log_in()
    assert browser.request("DELETE", "/things/3/").text == "deleted"


def test_all_of_several_permissions_are_needed(browser: Browser, alice: User) -> None:
    browser.log_in()
    for codename, status in (("add_user", 403), ("delete_user", 200)):
        alice.user_permissions.add(Permission.objects.get(codename=codename))
        assert browser.get("/adders-and-deleters/").status == status


def test_nobody_is_sent_to_the_login_for_a_permission(browser: Browser) -> None:
    assert browser.get("/adders/", PAGE).status == 302
    assert browser.get("/adders/").status == 401


def test_a_websocket_without_the_permission_is_403(browser: Browser, alice: User) -> None:
    browser.log_in()
    assert browser.get("/adders-socket/", *UPGRADE).status == 403


def test_a_decorator_refuses_what_is_no_coroutine_function() -> None:
    with pytest.raises(TypeError, match=r"of a web\.View decorate the methods"):
        auth.login_required(web.View)  # type: ignore[type-var]


def test_outside_of_a_native_handler_the_functions_say_so() -> None:
    with pytest.raises(RuntimeError, match="native handlers"):
        auth.django_request(None)  # type: ignore[arg-type]


# --- CSRF ---------------------------------------------------------------------------------


@pytest.mark.parametrize("use_sessions", [False, True])
def test_a_form_needs_the_token(database: None, use_sessions: bool) -> None:
    with serving(CSRF_USE_SESSIONS=use_sessions) as server:
        browser = Browser(server)
        token = browser.get("/form/").text
        body = f"text=hello&csrfmiddlewaretoken={token}".encode()
        accepted = browser.request("POST", "/form/", FORM, body=body)
        assert (accepted.status, accepted.text) == (200, "hello hello")
        assert browser.request("POST", "/form/", FORM, body=b"text=hello").status == 403
        assert Browser(server).request("POST", "/form/", FORM, body=body).status == 403


def test_a_multipart_form_carries_the_token(browser: Browser) -> None:
    token = browser.get("/form/").text
    fields = {"text": "hello", "csrfmiddlewaretoken": token}
    body = "".join(
        f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in fields.items()
    )
    kind = ("Content-Type", "multipart/form-data; boundary=b")
    response = browser.request("POST", "/form/", kind, body=f"{body}--b--\r\n".encode())
    assert (response.status, response.text) == (200, "hello hello")


def test_a_malformed_form_is_400(browser: Browser) -> None:
    browser.get("/form/")
    kind = ("Content-Type", "multipart/form-data; boundary=b")
    body = b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n"
    assert browser.request("POST", "/form/", kind, body=body).status == 400


def test_a_header_carries_the_token(browser: Browser) -> None:
    token = browser.get("/form/").text
    response = browser.request("PUT", "/form/", ("X-CSRFToken", token))
    assert response.status == 200
    assert browser.request("PUT", "/form/", ("X-CSRFToken", "x" * 64)).status == 403


def test_a_foreign_origin_is_refused_even_with_the_token(browser: Browser) -> None:
    token = ("X-CSRFToken", browser.get("/form/").text)
    foreign = ("Origin", "https://evil.example")
    response = browser.request("PUT", "/form/", token, foreign)
    assert response.status == 403
    assert "CSRF" in response.text
    assert browser.request("PUT", "/form/", token, ("Origin", "http://localhost")).status == 200


def test_a_token_of_django_s_is_good_for_native_handlers(browser: Browser) -> None:
    token = browser.get("/token-of-django/").text
    assert browser.request("PUT", "/form/", ("X-CSRFToken", token)).status == 200


# --- database -----------------------------------------------------------------------------


def test_the_asynchronous_orm_works(browser: Browser, alice: User) -> None:
    names = json.loads(browser.get("/users/").text)
    assert "alice" in names
    assert json.loads(browser.get("/chunked-users/").text) == names


def test_a_request_has_one_thread_and_threads_keep_their_connections(browser: Browser) -> None:
    seen = [json.loads(browser.get("/threads/").text) for _ in range(5)]
    assert all(len(each) == 1 for each in seen)
    # A second thread may be taken while the first is still tidying up behind a request.
    assert len({tuple(map(tuple, each)) for each in seen}) <= 2
    assert seen[0][0][0].startswith("aioserve-home-")


def test_native_handlers_and_asynchronous_views_share_threads_and_connections(
    database: None,
) -> None:
    with serving({"threads": 1}) as server:
        (native,) = json.loads(server.get("/threads/").text)
        assert json.loads(server.get("/threads-of-django/").text) == native


def test_a_transaction_left_open_is_rolled_back(browser: Browser) -> None:
    assert browser.get("/left-open/").text == "left open"
    assert "never" not in browser.get("/users/").text
    assert not User.objects.filter(username="never").exists()


def test_a_socket_gives_its_connection_back_while_it_does_not_use_it(
    database: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "ABSENCE", 0.05)
    with serving({"threads": 1}) as server, server.connect() as connection:
        assert connection.request("GET", "/counting-socket/", UPGRADE).status == 101
        users = User.objects.count()
        for _ in range(2):
            connection.send(b"\x81\x81\0\0\0\0x")
            assert connection.recv_exactly(3)[2:] == str(users).encode()
            wait_until(lambda: not server.app[state.SHARED].homes.has_guests())


def test_a_handler_without_free_threads_is_answered_503(database: None) -> None:
    with serving({"threads": 1, "queue_size": 1}) as server:
        response = server.get("/too-many-jobs/")
    assert (response.status, response.header("Retry-After")) == (503, "1")


# --- caches -------------------------------------------------------------------------------


def test_the_caches_are_made_once_for_all_requests_and_closed_in_the_end(
    database: None, tmp_path: Path
) -> None:
    backend = "tests.native_project.caches.CountedCache"
    caches = {"default": {"BACKEND": backend, "LOCATION": str(tmp_path)}}
    CLOSED.clear()
    with serving(CACHES=caches) as server:
        assert [server.get("/cached/").text for _ in range(3)] == ["1", "2", "3"]
        objects = [json.loads(server.get("/cache-objects/").text) for _ in range(3)]
        (number,) = {each[place] for each in objects for place in ("loop", "home")}
        assert CLOSED == []
    assert number in CLOSED


@pytest.mark.redis
def test_requests_share_their_connections_to_redis(database: None, tmp_path: Path) -> None:
    backend = "django.core.cache.backends.redis.RedisCache"
    with RedisServer(tmp_path) as redis:
        caches = {"default": {"BACKEND": backend, "LOCATION": redis.url}}
        with (
            serving({"threads": 1}, CACHES=caches) as server,
            redis_client.Redis.from_url(redis.url) as client,
        ):
            assert server.get("/cached/").text == "1"
            before = client.info("stats")["total_connections_received"]
            assert [server.get("/cached/").text for _ in range(9)] == [*"23456789", "10"]
            assert client.info("stats")["total_connections_received"] == before


# --- exceptions ---------------------------------------------------------------------------


def errors_of(caplog: pytest.LogCaptureFixture, name: str) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == name]


def test_an_exception_goes_to_django_s_log(
    browser: Browser, caplog: pytest.LogCaptureFixture
) -> None:
    response = browser.get("/fail/")
    assert (response.status, "Server Error (500)" in response.text) == (500, True)
    (record,) = errors_of(caplog, "django.request")
    assert record.getMessage() == "Internal Server Error: /fail/"
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ZeroDivisionError)
    assert record.request.path == "/fail/"
    assert record.status_code == 500


def test_with_debug_an_exception_gives_the_technical_page(database: None) -> None:
    with serving(DEBUG=True) as server:
        response = server.get("/fail/", [("Accept", "text/html")])
    assert response.status == 500
    assert "ZeroDivisionError" in response.text
    assert "a local of the handler" in response.text
    assert "_django_answer" not in response.text


@pytest.mark.parametrize(
    ("target", "status", "text"),
    [("/missing/", 404, "Not Found"), ("/denied/", 403, "403 Forbidden"), ("/nothing/", 500, "")],
)
def test_django_s_exceptions_are_answered_as_django_does(
    browser: Browser, target: str, status: int, text: str
) -> None:
    response = browser.get(target)
    assert response.status == status
    assert text in response.text


def test_with_debug_a_missing_page_is_explained(database: None) -> None:
    with serving(DEBUG=True) as server:
        response = server.get("/missing/")
    assert response.status == 404
    assert "no such thing" in response.text


def test_the_administrators_get_a_mail(database: None) -> None:
    from django.core import mail
    from django.utils.log import AdminEmailHandler

    mail.outbox = []
    with serving(
        ADMINS=[("Admin", "admin@example.com")],
        EMAIL_BACKEND="django.core.mail.backends.locmem.EmailBackend",
    ) as server:
        handler = AdminEmailHandler()
        logging.getLogger("django.request").addHandler(handler)
        try:
            server.get("/fail/")
        finally:
            logging.getLogger("django.request").removeHandler(handler)
    (message,) = mail.outbox
    assert message.subject.endswith("Internal Server Error: /fail/")
    assert "ZeroDivisionError" in message.body


def test_an_exception_in_a_stream_does_not_look_like_its_end(
    browser: Browser, caplog: pytest.LogCaptureFixture
) -> None:
    with browser.server.connect() as connection:
        connection.send(b"GET /fail-in-stream/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
        received = connection.recv_to_eof()
    assert received.endswith(b"4\r\nhalf\r\n")
    assert len(errors_of(caplog, "django.request")) == 1


def test_an_exception_in_a_websocket_closes_it_with_1011(
    browser: Browser, caplog: pytest.LogCaptureFixture
) -> None:
    with browser.server.connect() as connection:
        assert connection.request("GET", "/fail-in-socket/", UPGRADE).status == 101
        assert connection.recv_exactly(4) == b"\x88\x02" + (1011).to_bytes(2, "big")
        connection.send(b"\x88\x82\0\0\0\0" + (1011).to_bytes(2, "big"))
        connection.recv_to_eof()
    assert len(errors_of(caplog, "django.request")) == 1


def test_a_streaming_response_of_django_is_refused() -> None:
    from django.http import StreamingHttpResponse

    with pytest.raises(ValueError, match="streaming"):
        auth.web_response(StreamingHttpResponse([b"x"]))


# --- Django's request ---------------------------------------------------------------------


def test_django_s_request_is_that_of_a_view(browser: Browser) -> None:
    seen = json.loads(
        browser.get(
            "/as-django/?a=1&a=2", ("Host", "127.0.0.1"), ("X-Forwarded-Proto", "https")
        ).text
    )
    assert seen == {
        "path": "/as-django/",
        "GET": ["1", "2"],
        "host": "127.0.0.1",
        "secure": True,
        "uri": "https://127.0.0.1/as-django/?a=1&a=2",
    }


def test_the_test_client_and_native_handlers_share_sessions(server: AppServer, alice: User) -> None:
    client = Client()
    client.force_login(alice)
    browser = Browser(server)
    browser.cookies["sessionid"] = client.cookies["sessionid"].value
    assert browser.get("/whoami/").text == "alice True"
    assert SessionStore(browser.cookies["sessionid"]).get("_auth_user_id") == str(alice.pk)

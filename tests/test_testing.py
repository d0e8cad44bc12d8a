"""What projects test themselves with: the live server and its client."""

from __future__ import annotations

import io
import os
import subprocess
import threading
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from django.test import override_settings

from tests import support

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from django_aioserve.testing import AioClient, AioLiveServer

SITE = {"ROOT_URLCONF": "tests.testing_site", "AIOSERVE_ROUTES": ["tests.testing_site.routes"]}


@pytest.fixture
def server(database: None) -> Iterator[AioLiveServer]:
    from django_aioserve.testing import AioLiveServer

    with override_settings(**SITE), AioLiveServer() as server:
        yield server


@pytest.fixture
def client(server: AioLiveServer) -> Iterator[AioClient]:
    from django_aioserve.testing import AioClient

    with AioClient(server.url) as client:
        yield client


@pytest.fixture
def user(database: None) -> Any:
    from django.contrib.auth.models import User

    return User.objects.create_user("ann", password="secret")


# --- HTTP ------------------------------------------------------------------------------------


def test_views_and_native_handlers_answer(client, user):
    for path in ("/users/", "/async-users/", "/native/users/"):
        response = client.get(path)
        assert response.status_code == 200
        assert "ann" in response.json()
        assert response.headers["Content-Type"].startswith("application/json")


def test_what_is_not_there_is_a_404(client):
    assert client.get("/nowhere/").status_code == 404


@pytest.mark.parametrize("method", ["post", "put", "patch", "delete"])
def test_each_method_is_sent(client, method):
    assert getattr(client, method)("/echo/").json()["method"] == method.upper()


def test_head_has_no_content(client):
    response = client.head("/users/")
    assert (response.status_code, response.content) == (200, b"")


def test_a_form_is_posted(client):
    assert client.post("/echo/", {"a": "1"}).json()["form"] == {"a": "1"}


def test_a_file_is_uploaded(client):
    assert client.post("/echo/", {"file": io.BytesIO(b"content")}).content == b"content"


def test_a_text_is_decoded_by_its_charset(client):
    assert client.get("/latin/").text == "öl"


def test_redirections_are_followed_on_demand(client):
    assert client.get("/moved/").status_code == 302
    followed = client.get("/moved/", follow=True)
    assert followed.status_code == 200
    assert followed.url.endswith("/users/")


def test_an_answer_that_does_not_come_is_a_timeout(server):
    from django_aioserve.testing import AioClient

    with AioClient(server.url, timeout=0.1) as client, pytest.raises(TimeoutError):
        client.get("/native/never/")


def test_the_csrf_check_is_passed(client):
    assert client.post("/echo/").status_code == 200
    assert client.post("/echo/").status_code == 200


def test_the_csrf_check_is_enforced_on_demand(server):
    from django_aioserve.testing import AioClient

    with AioClient(server.url, enforce_csrf_checks=True) as client:
        assert client.post("/echo/").status_code == 403
        assert client.post("/exempt/").status_code == 200


def test_a_stream_is_read_line_by_line(client):
    with client.stream("/native/events/") as events:
        assert events.status_code == 200
        assert events.headers["Content-Type"] == "text/event-stream"
        assert events.readline() == ": entered\n"
        assert client.post("/create/", {"name": "bob"}).status_code == 201
        assert events.readline() == 'data: {"name": "bob"}\n'


def test_a_stream_is_read_to_its_end(client):
    with client.stream("/echo/", method="POST") as stream:
        assert b"POST" in stream.read()
        assert stream.readline() == ""


def test_cookies_are_kept(client):
    client.set_cookie("colour", "green")
    assert client.cookies == {"colour": "green"}


# --- users -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "engine",
    [
        "django.contrib.sessions.backends.db",
        "django.contrib.sessions.backends.signed_cookies",
        "django.contrib.sessions.backends.cache",
    ],
)
def test_a_user_is_logged_in_for_views_and_native_handlers(database, user, engine):
    from django_aioserve.testing import AioClient, AioLiveServer

    with (
        override_settings(SESSION_ENGINE=engine, **SITE),
        AioLiveServer() as server,
        AioClient(server.url) as client,
    ):
        client.force_login(user)
        assert client.get("/me/").text == "ann"
        assert client.get("/native/me/").text == "ann"
        client.logout()
        assert client.get("/me/").text == ""
        assert client.get("/native/me/").text == ""


def test_credentials_are_checked(client, user):
    assert not client.login(username="ann", password="wrong")
    assert client.get("/me/").text == ""
    assert client.login(username="ann", password="secret")
    assert client.get("/me/").text == "ann"


def test_one_that_never_logged_in_can_log_out(client):
    client.logout()
    assert client.get("/me/").text == ""


# --- WebSockets ------------------------------------------------------------------------------


def test_a_websocket_sends_and_receives(client):
    with client.websocket("/native/echo/") as websocket:
        websocket.send_text("text")
        websocket.send_bytes(b"bytes")
        websocket.send_json({"a": 1})
        assert websocket.receive_text() == "text"
        assert websocket.receive_bytes() == b"bytes"
        assert websocket.receive_json() == {"a": 1}
        assert websocket.close_code is None
    assert websocket.close_code == 1000


def test_a_websocket_closed_by_the_server_says_so(client):
    from django_aioserve.testing import WebSocketClosed

    with client.websocket("/native/echo/") as websocket:
        websocket.send_text("close")
        with pytest.raises(WebSocketClosed, match="closed with 4000 as you wish") as caught:
            websocket.receive_text()
        assert (caught.value.code, caught.value.reason) == (4000, "as you wish")
        with pytest.raises(WebSocketClosed):
            websocket.receive_text()


def test_a_message_of_another_kind_is_a_type_error(client):
    with client.websocket("/native/echo/") as websocket:
        websocket.send_bytes(b"bytes")
        with pytest.raises(TypeError):
            websocket.receive_text()


def test_a_subprotocol_is_chosen(client):
    with client.websocket("/native/echo/", protocols=["chat"]) as websocket:
        assert websocket.protocol == "chat"


def test_a_websocket_from_a_foreign_origin_is_refused(client):
    with (
        pytest.raises(aiohttp.WSServerHandshakeError) as caught,
        client.websocket("/native/echo/", origin="https://evil.example"),
    ):
        pytest.fail("it was admitted")
    assert caught.value.status == 403


def test_what_is_used_before_it_is_entered_says_so(client):
    with pytest.raises(RuntimeError, match="Enter"):
        client.websocket("/native/echo/").send_text("text")
    with pytest.raises(RuntimeError, match="Enter"):
        client.stream("/native/events/").readline()


# --- the server ------------------------------------------------------------------------------


def test_settings_overridden_in_a_test_count(client):
    with override_settings(LANGUAGE_CODE="de"):
        assert client.get("/language/").text == "de"


def test_the_interface_of_the_project_is_served(database, user):
    from django_aioserve.testing import AioClient, AioLiveServer

    with (
        override_settings(AIOSERVE_INTERFACE="asgi", **SITE),
        AioLiveServer() as server,
        AioClient(server.url) as client,
    ):
        for path in ("/users/", "/async-users/", "/native/users/"):
            assert "ann" in client.get(path).json()


def test_wsgi_middleware_of_the_project_is_served(database, user):
    from django_aioserve.testing import AioClient, AioLiveServer

    with (
        override_settings(WSGI_APPLICATION="tests.testing_site.wrapped", **SITE),
        AioLiveServer() as server,
        AioClient(server.url) as client,
    ):
        assert client.get("/middleware/").text == "me"
        assert "ann" in client.get("/users/").json()


def test_middleware_overridden_for_the_server_counts(database, user):
    from django_aioserve.testing import AioClient, AioLiveServer

    with (
        override_settings(MIDDLEWARE=[], **SITE),
        AioLiveServer() as server,
        AioClient(server.url, enforce_csrf_checks=True) as client,
    ):
        assert client.post("/echo/").status_code == 200


def test_a_live_server_has_no_url_before_it_starts(django_ready):
    from django_aioserve.testing import AioLiveServer

    server = AioLiveServer()
    server.stop()
    with pytest.raises(RuntimeError, match="not been started"):
        _ = server.url


def test_what_keeps_the_server_from_starting_is_raised(database):
    from django_aioserve.exceptions import ConfigurationError
    from django_aioserve.testing import AioLiveServer

    with override_settings(AIOSERVE_THREADS="many"), pytest.raises(ConfigurationError):
        AioLiveServer().start()


def test_a_server_stops_while_a_stream_and_a_websocket_are_open(database):
    from django_aioserve.testing import AioClient, AioLiveServer

    with (
        override_settings(**SITE),
        AioLiveServer() as server,
        AioClient(server.url) as client,
        client.stream("/native/events/") as events,
        client.websocket("/native/echo/"),
    ):
        assert events.readline() == ": entered\n"
        server.stop()
        assert events.readline() == ""


def test_no_thread_is_left_over(database):
    from django_aioserve.testing import AioClient, AioLiveServer

    before = set(threading.enumerate())
    with override_settings(**SITE), AioLiveServer() as server, AioClient(server.url) as client:
        client.get("/users/")
        client.get("/native/users/")
        client.close()
    support.wait_until(lambda: set(threading.enumerate()) <= before)


# --- a project's own tests -------------------------------------------------------------------

SETTINGS = """
import os
SECRET_KEY = "key"
INSTALLED_APPS = [
    "django_aioserve", "django.contrib.auth", "django.contrib.contenttypes",
    "django.contrib.sessions", "shop",
]
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
]
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "db.sqlite3"}}
if os.environ.get("TEST_DATABASE"):
    DATABASES["default"]["TEST"] = {"NAME": os.environ["TEST_DATABASE"]}
    DATABASES["default"]["CONN_MAX_AGE"] = None
ROOT_URLCONF = "tests.testing_site"
AIOSERVE_ROUTES = ["tests.testing_site.routes"]
AIOSERVE_STATIC = False
"""

DJANGO_TESTS = """
from django.contrib.auth.models import User
from django.test import override_settings

from django_aioserve.exceptions import ConfigurationError
from django_aioserve.testing import AioClient, AioLiveServerTestCase


class Together(AioLiveServerTestCase):
    def test_the_server_sees_what_the_test_made(self):
        User.objects.create_user("ann")
        for path in ("/users/", "/async-users/", "/native/users/"):
            self.assertEqual(self.aio_client.get(path).json(), ["ann"])

    def test_the_test_sees_what_the_server_made(self):
        self.assertEqual(self.aio_client.post("/create/", {"name": "bob"}).status_code, 201)
        self.assertEqual(User.objects.get().username, "bob")

    def test_no_test_sees_what_another_has_left(self):
        self.assertEqual(self.aio_client.get("/users/").json(), [])

    def test_each_test_has_a_client_of_its_own(self):
        self.assertEqual(self.aio_client.cookies, {})
        self.aio_client.force_login(User.objects.create_user("ann"))
        self.assertEqual(self.aio_client.get("/native/me/").text, "ann")

    def test_two_clients(self):
        with AioClient(self.live_server_url) as other:
            with other.stream("/native/events/") as events:
                self.assertEqual(events.readline(), ": entered\\n")
                self.aio_client.post("/create/", {"name": "carl"})
                self.assertEqual(events.readline(), 'data: {"name": "carl"}\\n')

    def test_in_an_asynchronous_test(self):
        self.assertEqual(self.aio_client.get("/users/").status_code, 200)

    async def test_asynchronously(self):
        await User.objects.acreate(username="ann")
        self.assertEqual(self.aio_client.get("/users/").json(), ["ann"])


@override_settings(AIOSERVE_ROUTES=[])
class Overridden(AioLiveServerTestCase):
    def test_options_overridden_for_the_class_count(self):
        self.assertEqual(self.aio_client.get("/native/users/").status_code, 404)


class Wrong(AioLiveServerTestCase):
    @classmethod
    def setUpClass(cls):
        with override_settings(AIOSERVE_THREADS="many"):
            try:
                super().setUpClass()
            except ConfigurationError:
                cls.refused = True
            cls.doClassCleanups()

    def test_a_wrong_option_is_raised(self):
        self.assertTrue(self.refused)
"""

PYTEST_TESTS = """
import pytest


@pytest.fixture
def ann(django_user_model, transactional_db):
    return django_user_model.objects.create_user("ann")


def test_live(aio_live_server, aio_client, ann):
    assert aio_client.base_url == aio_live_server.url
    aio_client.force_login(ann)
    assert aio_client.get("/native/me/").text == "ann"
    with aio_client.websocket("/native/echo/") as websocket:
        websocket.send_json([1])
        assert websocket.receive_json() == [1]


def test_afterwards_the_database_is_empty(aio_client):
    assert aio_client.get("/users/").json() == []


@pytest.mark.django_db
def test_the_mark_alone_is_enough(aio_client, django_user_model):
    django_user_model.objects.create_user("bob")
    assert aio_client.get("/users/").json() == ["bob"]
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "__init__.py").write_text("")
    (tmp_path / "shop" / "settings.py").write_text(SETTINGS)
    return tmp_path


def run(project: Path, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*support.python_command(), "-W", "error::ResourceWarning", "-m", *command],
        cwd=project,
        env={
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "shop.settings",
            "PYTHONPATH": f"{project}{os.pathsep}{support.ROOT}",
            **env,
        },
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("database", ["in memory", "file"])
def test_djangos_runner_runs_live_server_tests(project, database):
    (project / "shop" / "tests.py").write_text(DJANGO_TESTS)
    env = {"TEST_DATABASE": str(project / "test.sqlite3")} if database == "file" else {}
    result = run(project, "django", "test", **env)
    assert result.returncode == 0, result.stderr
    assert "Ran 9 tests" in result.stderr
    assert support.UNEXPECTED.search(result.stderr) is None, result.stderr


@pytest.mark.parametrize("database", ["in memory", "file"])
def test_pytest_has_fixtures(project, database):
    pytest.importorskip("pytest_django")
    (project / "test_shop.py").write_text(PYTEST_TESTS)
    env = {"TEST_DATABASE": str(project / "test.sqlite3")} if database == "file" else {}
    result = run(project, "pytest", "-q", "--color=no", "-W", "error", **env)
    assert result.returncode == 0, result.stdout
    assert "3 passed" in result.stdout


def test_pytest_finds_the_fixtures_by_itself():
    found = [entry.value for entry in entry_points(group="pytest11")]
    assert "django_aioserve.pytest_plugin" in found

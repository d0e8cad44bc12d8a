"""Native routes: where they come from, what they get, and who comes first."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web
from django.test import Client, override_settings
from django.urls import include, path

from django_aioserve import auth, routes
from django_aioserve.conf import Config
from django_aioserve.exceptions import ConfigurationError
from tests.native_project import aio
from tests.native_project.serving import URLCONF, serving
from tests.native_project.urls import django_view
from tests.support import ROOT, AppServer

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.usefixtures("django_ready")


@pytest.fixture
def native_server(django_ready: None) -> Iterator[AppServer]:
    """A server for tests that need no settings of their own."""
    with serving() as server:
        yield server


PROJECT = "tests.native_project.aio."


def get(server: AppServer, target: str) -> str:
    response = server.get(target)
    assert response.status == 200, response
    return response.text


# --- aio_path -----------------------------------------------------------------------------


def test_a_handler_gets_what_the_converters_made(native_server: AppServer) -> None:
    assert json.loads(get(native_server, "/live/3/")) == {
        "room": 3,
        "match_info": 3,
        "next": "/live/4/",
    }


def test_every_converter_and_extra_argument_works(native_server: AppServer) -> None:
    key = "01234567-89ab-4cde-8fab-0123456789ab"
    assert json.loads(get(native_server, f"/value/{key}/a/b%20c")) == {
        "extra": "1",
        "key": f"UUID('{key}')",
        "rest": "'a/b c'",
    }


def test_an_included_path_gets_the_arguments_of_its_parent(native_server: AppServer) -> None:
    assert json.loads(get(native_server, "/in/x/7/")) == {"outer": "'x'", "pk": "7"}


def test_django_views_reverse_native_routes(native_server: AppServer) -> None:
    with override_settings(ROOT_URLCONF=URLCONF):
        from django.urls import reverse

        assert reverse("live", kwargs={"room": 5}) == "/live/5/"
        assert reverse("app:inner", kwargs={"outer": "x", "pk": 1}) == "/in/x/1/"


def test_a_path_that_is_not_native_is_django_s(native_server: AppServer) -> None:
    assert get(native_server, "/live/lobby/") == "django /live/lobby/ [('room', 'lobby')]"
    assert get(native_server, "/") == "django / []"


def test_a_django_pattern_that_stands_first_wins(native_server: AppServer) -> None:
    assert get(native_server, "/live/0/") == "django /live/0/ []"
    assert get(native_server, "/regex/2020/") == "django /regex/2020/ [('year', '2020')]"


def test_a_native_path_wins_where_the_earlier_pattern_does_not_match(
    native_server: AppServer,
) -> None:
    assert json.loads(get(native_server, "/regex/20/")) == {"year": "'20'"}


def test_a_value_that_no_converter_takes_is_not_found(native_server: AppServer) -> None:
    assert native_server.get("/things/x/").status == 404


def test_the_beginning_of_a_path_is_not_the_path(native_server: AppServer) -> None:
    assert native_server.get("/live/").status == 404
    assert native_server.get("/live/3/x").status == 404
    # Django appends the slash, for it knows the native pattern.
    assert native_server.get("/live/3").header("Location") == "/live/3/"


def test_an_encoded_letter_is_a_letter(native_server: AppServer) -> None:
    assert native_server.get("/%6Cive/3/").status == 200


def test_native_routes_are_introspected_as_aiohttp_s_own(native_server: AppServer) -> None:
    names = {resource.canonical for resource in native_server.app.router.resources()}
    assert {"/live/{room}/", "/in/{outer}/{pk}/", "/only-get/", "/de/language/"} <= names


def test_a_view_class_is_called_by_method(native_server: AppServer) -> None:
    assert get(native_server, "/things/3/") == "get 3"
    assert native_server.request("POST", "/things/3/").text == "post"
    assert native_server.request("PUT", "/things/3/").status == 405


def test_methods_are_limited_and_get_admits_head(native_server: AppServer) -> None:
    assert native_server.request("HEAD", "/only-get/").status == 200
    refused = native_server.request("POST", "/only-get/")
    assert (refused.status, refused.header("Allow")) == (405, "GET,HEAD")


def test_a_path_beyond_ascii_is_matched_decoded(native_server: AppServer) -> None:
    assert native_server.get("/stra%C3%9Fe/").status == 200


def test_a_language_prefix_activates_its_language(native_server: AppServer) -> None:
    assert get(native_server, "/de/language/") == "de Ja"
    assert get(native_server, "/language/") == "en-us Yes"
    # The next request of the same connection is in nobody else's language.
    with native_server.connect() as connection:
        assert connection.request("GET", "/fr/language/").text == "fr Oui"
        assert connection.request("GET", "/language/").text == "en-us Yes"


def test_the_header_decides_the_language_where_the_handler_asks(native_server: AppServer) -> None:
    response = native_server.get("/own-language/", [("Accept-Language", "de")])
    assert response.text == "de de Ja"


def test_reverse_knows_force_script_name() -> None:
    with serving(FORCE_SCRIPT_NAME="/shop") as server:
        assert json.loads(get(server, "/live/3/"))["next"] == "/shop/live/4/"


def test_a_native_route_of_a_mounted_application_knows_its_mount() -> None:
    from tests.native_project.serving import application

    def mounted() -> web.Application:
        outer = web.Application()
        outer.add_subapp("/site", application())
        return outer

    with override_settings(ROOT_URLCONF=URLCONF), AppServer(mounted) as server:
        assert json.loads(get(server, "/site/live/3/"))["next"] == "/site/live/4/"
        assert get(server, "/site/live/lobby/").startswith("django /site/live/lobby/")
        assert get(server, "/site/whoami/") == "anonymous True"


@pytest.mark.parametrize("method", ["get", "post"])
def test_under_another_server_a_native_url_says_who_serves_it(method: str) -> None:
    with override_settings(ROOT_URLCONF=URLCONF):
        response = getattr(Client(enforce_csrf_checks=True, headers={"host": "localhost"}), method)(
            "/live/3/"
        )
    assert response.status_code == 501
    assert "tests.native_project.aio.live" in response.content.decode()
    assert "manage.py runaio" in response.content.decode()


def test_a_handler_that_is_no_coroutine_function_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"aio_path\('x/', \.\.\.\) takes a coroutine function"):
        routes.aio_path("x/", django_view)  # type: ignore[arg-type]


def test_a_decorator_of_django_s_is_refused_with_its_remedy() -> None:
    from django.contrib.auth.decorators import login_required
    from django.views.decorators.cache import never_cache

    async def handler(request: web.Request) -> web.Response:
        raise NotImplementedError

    for decorated in (login_required(handler), auth.login_required(never_cache(handler))):
        with pytest.raises(TypeError, match=r"a decorator of django\..* of django_aioserve\.auth"):
            routes.aio_path("x/", decorated)


def test_the_urlconf_is_loaded_at_start_up_only() -> None:
    code = "import django_aioserve.routes, sys; print([m for m in sys.modules if 'urls' in m])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "tests.native_project.urls" not in done.stdout


# --- AIOSERVE_ROUTES, AIOSERVE_MIDDLEWARES, AIOSERVE_CLEANUP_CTX ---------------------------


@pytest.mark.parametrize(
    ("name", "method", "target", "text"),
    [
        ("routes", "GET", "/table/x/", "table x"),
        ("listed", "GET", "/listed/", "posted"),
        ("add", "GET", "/added/", "posted"),
        ("mounted", "GET", "/sub/where/", "sub /sub/where/ AnonymousUser"),
    ],
)
def test_routes_come_in_four_shapes(name: str, method: str, target: str, text: str) -> None:
    with serving({"routes": (PROJECT + name,)}) as server:
        assert server.request(method, target).text == text


def test_a_method_that_the_native_route_lacks_is_django_s() -> None:
    with serving({"routes": (PROJECT + "routes",)}) as server:
        assert server.request("POST", "/form/").text == "posted"
        assert server.get("/form/").text != "posted"


@pytest.mark.parametrize(
    ("option", "path", "reason"),
    [
        ("routes", PROJECT + "rutes", 'there is no "rutes" in tests.native_project.aio'),
        ("routes", "nowhere.routes", 'there is no module "nowhere"'),
        ("routes", PROJECT + "wrong", "not 3"),
        ("routes", PROJECT + "bare_application", "a prefix with a sub-application"),
        ("middlewares", PROJECT + "live", "a function decorated with aiohttp.web.middleware"),
        ("cleanup_ctx", PROJECT + "wrong", "an asynchronous generator function"),
        ("cleanup_ctx", PROJECT + "live", "an asynchronous generator function"),
        ("cleanup_ctx", "builtins.object", "an asynchronous generator function"),
        ("routes", "builtins.object", "a function that takes the application"),
    ],
)
def test_a_wrong_path_names_itself(option: str, path: str, reason: str) -> None:
    config = Config(**{option: (path,)})
    load = {
        "routes": partial(routes.setup, web.Application()),
        "middlewares": routes.load_middlewares,
        "cleanup_ctx": routes.load_cleanup_ctx,
    }
    with pytest.raises(ConfigurationError) as raised:
        load[option](config)  # type: ignore[operator]
    (problem,) = raised.value.problems
    assert str(problem).startswith(f'AIOSERVE_{option.upper()} (default) is "{path}"; expected ')
    assert reason in str(problem)
    assert "\n" not in str(problem)


def test_what_aiohttp_refuses_is_told_with_the_path() -> None:
    aio.no_slash = [web.get("no-slash", aio.live)]  # type: ignore[attr-defined]
    config = Config(routes=(PROJECT + "no_slash",))
    with pytest.raises(ConfigurationError, match=r"no_slash.*valid routes; path should be started"):
        routes.setup(web.Application(), config)


def test_middlewares_and_cleanup_contexts_are_run() -> None:
    aio.STARTED.clear()
    options = {"middlewares": (PROJECT + "stamp",), "cleanup_ctx": (PROJECT + "starting",)}
    with serving(options) as server:
        assert server.get("/live/3/").header("X-Stamp") == "outer"
        assert server.get("/live/lobby/").header("X-Stamp") == "outer"
        assert server.get("/whoami/").text == "anonymous True"
        assert server.get("/de/language/").text == "de Ja"
        assert aio.STARTED == ["started"]
    assert aio.STARTED == ["started", "cleaned"]


def test_two_middlewares_are_run_outermost_first() -> None:
    with serving({"middlewares": (PROJECT + "stamp",) * 2}) as server:
        assert server.get("/live/3/").header("X-Stamp") == "both"


# --- system checks ------------------------------------------------------------------------


def check(urlpatterns: list[Any], *names: str) -> list[tuple[str | None, str]]:
    class urlconf:
        pass

    urlconf.urlpatterns = urlpatterns  # type: ignore[attr-defined]
    with override_settings(ROOT_URLCONF=urlconf):
        found = routes.check(Config(routes=tuple(PROJECT + name for name in names)))
    return [(message.id, message.msg) for message in found]


def test_the_test_project_has_no_clash() -> None:
    with override_settings(ROOT_URLCONF=URLCONF):
        assert routes.check(Config(routes=(PROJECT + "add",))) == []


def test_a_route_that_hides_a_django_url_is_w010() -> None:
    ((id_, text),) = check([path("table/<int:pk>/", django_view)], "routes")
    assert id_ == "aioserve.W010"
    assert text == (
        'tests.native_project.aio.routes serves /table/{name}/, which hides "/table/<int:pk>/" '
        "of the URLconf."
    )


def test_a_mounted_application_that_hides_a_django_url_is_w010() -> None:
    ((id_, text),) = check([path("sub/", include([path("x/", django_view)]))], "mounted")
    assert (id_, "/sub/x/" in text) == ("aioserve.W010", True)


def test_a_catch_all_of_django_is_no_clash() -> None:
    assert check([path("<path:anything>", django_view)], "routes", "listed") == []


def test_a_route_that_takes_other_methods_is_no_clash() -> None:
    assert check([path("form/", django_view)], "routes") == []


def test_an_aio_path_behind_a_pattern_that_takes_all_is_w011() -> None:
    ((id_, text),) = check(
        [path("live/<slug:room>/", django_view), routes.aio_path("live/<int:room>/", aio.live)]
    )
    assert id_ == "aioserve.W011"
    assert text == (
        'The aio_path "/live/<int:room>/" can never match: "/live/<slug:room>/" stands before it.'
    )


def test_an_aio_path_behind_a_narrower_pattern_is_no_clash() -> None:
    patterns = [path("live/<int:room>/", django_view), routes.aio_path("live/<str:x>/", aio.live)]
    assert check(patterns) == []


def test_a_wrong_path_is_an_error_of_the_checks() -> None:
    config = Config(routes=("a.b",), middlewares=("a.c",), cleanup_ctx=("a.d",))
    found = [message.id for message in routes.check(config)]
    assert found == ["aioserve.E010", "aioserve.E011", "aioserve.E012"]
    assert len(routes.check(Config(routes=("a.b",)))) == 1

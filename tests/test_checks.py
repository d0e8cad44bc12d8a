"""The system checks: their ids, their hints, and where they run."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest
from django.core import checks as django_checks
from django.core.checks.registry import registry
from django.test import override_settings

from django_aioserve import checks, conf

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("django_ready")


def hook(server: object) -> None:
    """A hook of Gunicorn's that takes one argument, as on_exit does."""


def ids(messages: list[django_checks.CheckMessage]) -> list[str | None]:
    return [message.id for message in messages]


def test_a_project_without_settings_of_ours_has_nothing_to_mend() -> None:
    assert checks.check_settings() == []


def test_the_checks_are_registered() -> None:
    assert checks.check_settings in registry.registered_checks
    assert checks.check_deployment in registry.deployment_checks


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("aioserve.E001", {"AIOSERVE_WORKER": 2}, "did you mean AIOSERVE_WORKERS?"),
    ("aioserve.E002", {"AIOSERVE_WORKERS": "x"}, 'is "x"; expected a whole number'),
    ("aioserve.E003", {"AIOSERVE_KEYFILE": "/k"}, "AIOSERVE_CERTFILE to be set with it"),
    ("aioserve.E004", {"AIOSERVE_GUNICORN": {"umsk": 7}}, "did you mean umask?"),
]


@pytest.mark.parametrize(("identifier", "settings", "text"), WRONG, ids=[row[0] for row in WRONG])
def test_a_mistake_has_a_stable_id_and_a_hint(
    identifier: str, settings: dict[str, Any], text: str
) -> None:
    with override_settings(**settings):
        (message,) = checks.check_settings()
    assert message.id == identifier
    assert text in message.msg
    assert message.hint
    assert message.is_serious()


def test_the_environment_is_checked_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIOSERVE_THREADS", "none")
    (message,) = checks.check_settings()
    assert (message.id, message.msg.split(" is ")[0]) == (
        "aioserve.E002",
        "AIOSERVE_THREADS (environment)",
    )


# --- Gunicorn's settings ----------------------------------------------------------------------

REFUSED: list[tuple[str, Any, str]] = [
    ("no_such_thing_anywhere", 1, "a setting of Gunicorn"),
    ("max_request", 1, "did you mean max_requests?"),
    ("max_requests", 1, "AIOSERVE_MAX_REQUESTS in its place"),
    ("preload_app", True, "AIOSERVE_PRELOAD in its place"),
    ("bind", "127.0.0.1:1", "AIOSERVE_BIND in its place"),
    ("keepalive", 2, "AIOSERVE_KEEPALIVE in its place"),
    ("forwarded_allow_ips", "*", "AIOSERVE_FORWARDED_ALLOW_IPS in its place"),
    ("config", "gunicorn.conf.py", "a configuration file of Gunicorn's is not read"),
    ("reuse_port", True, "connections in the accept queue of a leaving worker would be lost"),
    ("reload", True, "runserver is for developing"),
    ("daemon", True, "runaio stays in the foreground"),
    ("proxy_protocol", "v1", "aiohttp speaks HTTP here"),
    ("http2_max_frame_size", 1, "aiohttp speaks HTTP here"),
    ("worker_class", "sync", "django_aioserve.server.worker.RecyclingWorker or a subclass"),
    ("worker_class", "nowhere.Worker", "what Gunicorn accepts: "),
    ("worker_class", "tests.test_checks_nothing.Worker", "class uri 'tests.test_checks_nothing"),
    ("logger_class", "nowhere.Logger", "class uri 'nowhere.Logger' invalid or not found"),
    ("logger_class", "builtins.object", "gunicorn.glogging.Logger or a class like it"),
    ("umask", "rw", "what Gunicorn accepts: "),
    ("user", "no-such-user-here", "what Gunicorn accepts: No such user"),
    ("on_exit", "nowhere_at_all.hook", "what Gunicorn accepts: No module named"),
    ("on_exit", "tests.test_checks.nothing", "what Gunicorn accepts: Can not load 'nothing'"),
    ("pre_fork", hook, "what Gunicorn accepts: Value must have an arity of: 2"),
    ("on_exit", lambda server: None, "functions that can be imported by their name"),
    ("logconfig_dict", {"filters": {"x": {"()": hook}}}, "functions that can be imported"),
]


@pytest.mark.parametrize(
    ("name", "value", "expected"), REFUSED, ids=[f"{row[0]}-{row[2][:20]}" for row in REFUSED]
)
def test_what_gunicorn_does_not_take_is_refused_with_the_reason(
    name: str, value: Any, expected: str
) -> None:
    with override_settings(AIOSERVE_GUNICORN={name: value}):
        (message,) = checks.check_settings()
    assert message.id == "aioserve.E004"
    assert message.msg.startswith(f'AIOSERVE_GUNICORN["{name}"] (Django settings) is ')
    assert "\n" not in message.msg
    assert expected in message.msg


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("umask", 0o007),
        ("limit_request_fields", 50),
        ("statsd_host", "localhost:8125"),
        ("proc_name", "shop"),
        ("on_exit", hook),
        ("on_exit", "tests.test_checks.hook"),
        ("worker_class", "django_aioserve.server.worker.RecyclingWorker"),
        ("worker_class", "django_aioserve.server.RecyclingWorker"),
        ("logconfig_dict", {"version": 1}),
    ],
)
def test_what_gunicorn_takes_passes(name: str, value: Any) -> None:
    with override_settings(AIOSERVE_GUNICORN={name: value}):
        assert checks.check_settings() == []


# --- functions --------------------------------------------------------------------------------


def of_a_sample(sample: object) -> str | None:
    """Asked whether a worker is to be replaced."""
    return None


async def later(sample: object) -> str | None:
    """What nobody would await."""
    return None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothing", 'there is no "nothing" in tests.test_checks'),
        ("REFUSED", "not [("),
        ("of_two", "not <function of_two"),
        ("later", "not <function later"),
    ],
)
def test_what_is_no_function_of_a_sample_is_refused(name: str, said: str) -> None:
    with override_settings(AIOSERVE_RECYCLE_WHEN=f"tests.test_checks.{name}"):
        (message,) = checks.check_settings()
    assert message.id == "aioserve.E002"
    assert "expected the dotted path of a function of a Sample" in message.msg
    assert said in message.msg


def of_two(sample: object, more: object) -> None:
    """Takes more than it is given."""


@pytest.mark.parametrize("function", [of_a_sample, bool, "builtins.print"])
def test_a_function_of_a_sample_passes(function: object) -> None:
    with override_settings(AIOSERVE_RECYCLE_WHEN=function):
        assert checks.check_settings() == []


# --- deployment -------------------------------------------------------------------------------


def test_what_a_machine_lacks_is_looked_at_only_for_deployment() -> None:
    with override_settings(AIOSERVE_CERTFILE="/nowhere.pem", AIOSERVE_PIDFILE="/nowhere/pid"):
        assert checks.check_settings() == []
        found = checks.check_deployment()
    assert ids(found)[:2] == ["aioserve.E005", "aioserve.E005"]


def test_static_files_that_were_not_collected_are_told_only_for_deployment(
    tmp_path: Path,
) -> None:
    with override_settings(STATIC_ROOT=tmp_path / "none"):
        assert checks.check_settings() == []
        assert ids(checks.check_deployment()) == ["aioserve.W012"]


EXPOSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"DEBUG": True, "AIOSERVE_BIND": "0.0.0.0:80"}, ["aioserve.W001"]),
    ({"DEBUG": True, "AIOSERVE_BIND": ":80"}, ["aioserve.W001"]),
    ({"DEBUG": True, "AIOSERVE_BIND": "[::]:80"}, ["aioserve.W001"]),
    ({"DEBUG": True, "AIOSERVE_BIND": "0:80"}, ["aioserve.W001"]),
    ({"DEBUG": True, "AIOSERVE_BIND": "shop.example.com:80"}, ["aioserve.W001"]),
    ({"DEBUG": True, "AIOSERVE_BIND": ["80", "192.0.2.1:80"]}, ["aioserve.W001"]),
    ({"DEBUG": True, "AIOSERVE_BIND": ["80", "127.0.0.2:1", "[::1]:1", "localhost:1"]}, []),
    ({"DEBUG": True, "AIOSERVE_BIND": ["unix:/run/x", "unix:@x", "fd://3"]}, []),
    ({"DEBUG": False, "AIOSERVE_BIND": "0.0.0.0:80"}, []),
    ({"DEBUG": False, "ALLOWED_HOSTS": []}, ["aioserve.W002"]),
    ({"DEBUG": True, "ALLOWED_HOSTS": []}, []),
    ({"AIOSERVE_FORWARDED_ALLOW_IPS": "*", "AIOSERVE_BIND": ":80"}, ["aioserve.W003"]),
    ({"AIOSERVE_FORWARDED_ALLOW_IPS": "*"}, []),
]


@pytest.mark.parametrize(("settings", "expected"), EXPOSED, ids=[str(row[0]) for row in EXPOSED])
def test_what_everybody_could_reach_is_warned_of(
    settings: dict[str, Any], expected: list[str]
) -> None:
    with override_settings(**settings):
        found = list(checks.exposure(conf.resolve()))
    assert ids(found) == expected
    assert all(message.hint and not message.is_serious() for message in found)


def test_bad_settings_are_told_once_not_by_the_deployment_checks_too() -> None:
    with override_settings(AIOSERVE_WORKERS="x"):
        assert checks.check_deployment() == []


def test_on_windows_the_settings_are_still_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    # Gunicorn cannot be imported there.
    monkeypatch.setitem(sys.modules, "django_aioserve.server.launcher", None)
    assert checks.check_settings() == []
    assert checks.check_deployment() == []
    with override_settings(AIOSERVE_WORKERS="x"):
        assert ids(checks.check_settings()) == ["aioserve.E002"]

"""Serving of the test project in this process."""

import contextlib
from collections.abc import Iterator
from typing import Any

from aiohttp import web
from django.core.wsgi import get_wsgi_application
from django.test import override_settings

from django_aioserve.application import build_application
from django_aioserve.conf import Config
from tests.support import AppServer

URLCONF = "tests.native_project.urls"


def application(**options: Any) -> web.Application:
    """The whole application, with the options of AIOSERVE_* given by their names."""
    return build_application(Config(**options), get_wsgi_application())


@contextlib.contextmanager
def serving(
    options: dict[str, Any] | None = None, *, allow_errors: bool = False, **settings: Any
) -> Iterator[AppServer]:
    """A server of the test project, under these Django settings."""
    settings.setdefault("ROOT_URLCONF", URLCONF)
    with (
        override_settings(**settings),
        AppServer(lambda: application(**(options or {})), allow_errors=allow_errors) as server,
    ):
        yield server

"""Fixtures that start servers, and the rule for what a machine may lack."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest.register_assert_rewrite("tests.support")

from tests import support  # noqa: E402 - its asserts are rewritten only when registered before

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Iterator

    from aiohttp import web


def pytest_configure(config: pytest.Config) -> None:
    """Tests in this process use testproject's settings, with a database of their own."""
    os.environ["DJANGO_SETTINGS_MODULE"] = "testproject.settings"
    directory = tempfile.mkdtemp(prefix="aioserve-tests-")
    config.add_cleanup(lambda: shutil.rmtree(directory, ignore_errors=True))
    os.environ["DATABASE_URL"] = f"sqlite:///{directory}/db.sqlite3"


#: The servers that a test has started through the fixture.
STARTED = pytest.StashKey[list[support.Runaio]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Function, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the log of each server with the failure of a test that used it."""
    report = yield
    if report.failed:
        used = [value for value in item.funcargs.values() if isinstance(value, support.Runaio)]
        for server in [*used, *item.stash.get(STARTED, [])]:
            report.sections.append((f"log of {server}", server.log_text()))
    return report


@pytest.fixture(scope="session")
def django_ready() -> None:
    """Django set up in this process with testproject's settings."""
    import django

    django.setup()


@pytest.fixture
def database(django_ready: None) -> Iterator[None]:
    """Testproject's database, seeded, for this process; undone after the test."""
    from django.db import connections

    path = Path(os.environ["DATABASE_URL"].removeprefix("sqlite:///"))
    shutil.copy(support.template_database(), path)
    yield
    connections.close_all()
    for leftover in path.parent.glob(f"{path.name}*"):  # with SQLite's journals
        leftover.unlink()


@pytest.fixture
def runaio(request: pytest.FixtureRequest) -> Iterator[Callable[..., support.Runaio]]:
    """Starts servers: `runaio("--workers=2", env={...})` gives a started `Runaio`.

    All are stopped after the test, which fails when one does not stop or has logged a
    traceback or a warning of a resource leak. `@pytest.mark.allow_tracebacks` permits that.
    """
    started = request.node.stash.setdefault(STARTED, [])
    allowed = request.node.get_closest_marker("allow_tracebacks") is not None
    with contextlib.ExitStack() as stack:

        def start(*args: str, **options: Any) -> support.Runaio:
            server = support.Runaio(*args, **options)
            server.allow_tracebacks = allowed
            started.append(server)
            stack.callback(server.check_log)
            return stack.enter_context(server)

        yield start


@pytest.fixture
def app_server() -> Iterator[Callable[..., support.AppServer]]:
    """Starts aiohttp applications in this process: `app_server(factory)` gives an `AppServer`."""
    with contextlib.ExitStack() as stack:

        def start(
            factory: Callable[[], web.Application | Awaitable[web.Application]], **options: Any
        ) -> support.AppServer:
            return stack.enter_context(support.AppServer(factory, **options))

        yield start

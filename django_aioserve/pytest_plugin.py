"""pytest fixtures for the tests of a project: ``aio_live_server`` and ``aio_client``.

pytest loads them by itself where the package is installed. With pytest-django they bring
``transactional_db`` along; without it, the test database is the project's own affair. ::

    def test_what_one_says_the_other_hears(aio_client, django_user_model):
        aio_client.force_login(django_user_model.objects.create_user("ann"))
        with aio_client.websocket("/chat/") as websocket:
            websocket.send_json({"text": "Hello"})
            assert websocket.receive_json()["text"] == "Hello"
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import pytest

# All else is imported when a fixture is used: this module is loaded in every run of pytest.
if TYPE_CHECKING:
    from collections.abc import Iterator

    from django_aioserve.testing import AioClient, AioLiveServer

__all__ = ["aio_client", "aio_live_server"]


if importlib.util.find_spec("pytest_django") is not None:

    @pytest.fixture
    def _aio_database(transactional_db: None) -> None:
        """What the server shall see must be committed."""

else:

    @pytest.fixture
    def _aio_database() -> None:
        """The test database is the project's affair."""


@pytest.fixture
def aio_live_server(_aio_database: None) -> Iterator[AioLiveServer]:
    """The combined application, served for one test at ``aio_live_server.url``."""
    from django_aioserve.testing import AioLiveServer

    with AioLiveServer() as server:
        yield server


@pytest.fixture
def aio_client(aio_live_server: AioLiveServer) -> Iterator[AioClient]:
    """A client of ``aio_live_server``."""
    from django_aioserve.testing import AioClient

    with AioClient(aio_live_server.url) as client:
        yield client

"""Requests and answers as Gunicorn's hooks and its access log read them."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable
from typing import Any

from aiohttp import web
from aiohttp.abc import AbstractAccessLogger

__all__ = ["GunicornAccessLogger", "GunicornRequest", "GunicornResponse"]


class GunicornRequest:
    """A request as Gunicorn's hooks and its access log read it."""

    def __init__(self, request: web.BaseRequest, client: str) -> None:
        self.method = request.method
        self.uri = request.raw_path
        self.path = request.path
        self.query = request.rel_url.raw_query_string
        self.version = tuple(request.version)
        self.headers = [(name.upper(), value) for name, value in request.headers.items()]
        self._client = client

    @property
    def environ(self) -> dict[str, str]:
        """The part of a WSGI environ that Gunicorn's access log uses."""
        environ = {f"HTTP_{name.replace('-', '_')}": value for name, value in self.headers}
        return environ | {
            "REQUEST_METHOD": self.method,
            "RAW_URI": self.uri,
            "PATH_INFO": self.path,
            "QUERY_STRING": self.query,
            "SERVER_PROTOCOL": "HTTP/{}.{}".format(*self.version),
            "REMOTE_ADDR": self._client,
        }


class GunicornResponse:
    """An answer as Gunicorn's hooks and its access log read it."""

    def __init__(self, response: web.StreamResponse) -> None:
        self.status = f"{response.status} {response.reason}"
        self.status_code = response.status
        self.headers = list(response.headers.items())
        self.sent = response.body_length


class GunicornAccessLogger(AbstractAccessLogger):
    """Writes aiohttp's accesses by Gunicorn's logger, in Gunicorn's format."""

    __slots__ = ("_client", "_gunicorn")

    def __init__(
        self,
        logger: logging.Logger,
        log_format: str,
        *,
        gunicorn: Any,
        client: Callable[[web.BaseRequest], str],
    ) -> None:
        super().__init__(logger, log_format)
        self._gunicorn = gunicorn
        self._client = client

    def log(self, request: web.BaseRequest, response: web.StreamResponse, time: float) -> None:
        """Log one access; ``time`` is what it took, in seconds."""
        described = GunicornRequest(request, self._client(request))
        self._gunicorn.access(
            GunicornResponse(response),
            described,
            described.environ,
            datetime.timedelta(seconds=time),
        )

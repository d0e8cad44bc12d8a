"""This project's server and its peers: how each is started, and stopped."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import time
from dataclasses import dataclass, field
from functools import partial

from tests.benchmarks.environment import PYTHON, ROOT, find_program

WSGI = "testproject.wsgi:application"
ASGI = "testproject.asgi:application"
GUNICORN = ["-m", "gunicorn", "--workers=1", "--log-level=warning", "--bind=127.0.0.1:{port}"]
UVICORN = ["-m", "uvicorn", ASGI, "--host=127.0.0.1", "--port={port}", "--workers=1"]
#: By default it serves no more than 1,024 requests at a time, its backlog.
GRANIAN = ["-m", "granian", "--host=127.0.0.1", "--port={port}", "--workers=1", "--no-ws",
           "--backlog=4096"]  # fmt: skip
RUNAIO = [f"{ROOT}/testproject/manage.py", "runaio", "--workers=1", "--bind=127.0.0.1:{port}"]

#: Under ASGI each request of Django's has a thread of its own, and a database connection that
#: outlives it is lost: Django's documentation says to switch persistent ones off.
ASGI_VARIABLES = {"CONN_MAX_AGE": "0"}


@dataclass(frozen=True)
class Server:
    """A way to serve: `arguments` are Python's, or of a program where `program` names one."""

    name: str
    title: str
    arguments: list[str]
    variables: dict[str, str] = field(default_factory=dict)
    program: str = ""


def _own(name, title, *arguments, **variables):
    return Server(name, title, [*RUNAIO, *arguments], variables)


def _wsgi(name, title, *arguments, **variables):
    return Server(name, title, list(arguments), variables)


def _asgi(name, title, *arguments, **variables):
    return Server(name, title, list(arguments), ASGI_VARIABLES | variables)


_GTHREAD = [*GUNICORN, "--worker-class=gthread", "--threads=8", WSGI]
_UVICORN = [*UVICORN, "--loop=uvloop", "--http=httptools", "--no-access-log", "--lifespan=off",
            "--log-level=warning"]  # fmt: skip
_AIOHTTP = [*GUNICORN, "--worker-class=aiohttp.worker.GunicornUVLoopWebWorker"]
_GRANIAN_WSGI = [*GRANIAN, "--interface=wsgi", "--log-level=warning"]
_GRANIAN_ASGI = [*GRANIAN, "--interface=asginl", "--loop=uvloop", "--log-level=warning"]

SERVERS = {
    server.name: server
    for server in (
        _own("aioserve", "django-aioserve, 8 threads"),
        _own("aioserve-1", "django-aioserve, 1 thread", "--threads=1"),
        _own("aioserve-64", "django-aioserve, 64 threads", "--threads=64"),
        _own(
            "aioserve-native",
            "django-aioserve, native route",
            AIOSERVE_ROUTES="tests.benchmarks.native.routes",
        ),
        _wsgi("gunicorn-sync", "Gunicorn sync", *GUNICORN, "--worker-class=sync", WSGI),
        _wsgi("gunicorn-gthread", "Gunicorn gthread, 8 threads", *_GTHREAD),
        _asgi("gunicorn-asgi", "Gunicorn ASGI", *GUNICORN, "--worker-class=asgi",
              "--worker-connections=4096", ASGI),
        _asgi("uvicorn", "uvicorn, uvloop and httptools", *_UVICORN),
        _wsgi("granian-wsgi-1", "Granian WSGI, 1 thread", *_GRANIAN_WSGI, "--blocking-threads=1",
              WSGI),
        _wsgi("granian-wsgi-8", "Granian WSGI, 8 threads", *_GRANIAN_WSGI, "--blocking-threads=8",
              WSGI),
        _asgi("granian-asgi-1", "Granian ASGI, 1 thread", *_GRANIAN_ASGI, "--blocking-threads=1",
              ASGI),
        _asgi("granian-asgi-8", "Granian ASGI, 8 threads", *_GRANIAN_ASGI, "--blocking-threads=8",
              ASGI),
        _wsgi("aiohttp-wsgi", "aiohttp-wsgi on aiohttp's worker, 8 threads", *_AIOHTTP,
              "tests.benchmarks.aiohttp_wsgi_app:make_app"),
        _wsgi("waitress", "waitress, 8 threads", "-m", "waitress", "--listen=127.0.0.1:{port}",
              "--threads=8", WSGI),
        _wsgi("aiohttp", "aiohttp alone, uvloop", *_AIOHTTP, "tests.benchmarks.native:make_app"),
        _wsgi("whitenoise-gthread", "WhiteNoise under Gunicorn gthread", *_GTHREAD,
              BENCH_WHITENOISE="true"),
        _asgi("whitenoise-uvicorn", "WhiteNoise under uvicorn", *_UVICORN,
              BENCH_WHITENOISE="true"),
        Server("nginx", "nginx (the limit)", ["-e", "{work}/nginx.log", "-c", "{work}/nginx.conf"],
               program="nginx"),
    )
}  # fmt: skip

#: Those that any Django view is measured with.
GENERAL = (
    "aioserve",
    "gunicorn-sync",
    "gunicorn-gthread",
    "gunicorn-asgi",
    "uvicorn",
    "granian-wsgi-1",
    "granian-wsgi-8",
    "granian-asgi-1",
    "granian-asgi-8",
    "aiohttp-wsgi",
    "waitress",
)
GRANIAN_WSGI = ("granian-wsgi-1", "granian-wsgi-8")
ASGI_SERVERS = ("gunicorn-asgi", "uvicorn", "granian-asgi-1", "granian-asgi-8")
ASYNCHRONOUS = ("aioserve", *ASGI_SERVERS)

_NGINX = """
daemon off; worker_processes 1; pid {work}/nginx.pid; {user}
events {{ worker_connections 1024; }}
http {{
    types {{ text/css css; }}
    access_log off; sendfile on; tcp_nopush on; keepalive_requests 1000000;
    client_body_temp_path {work}/nginx; proxy_temp_path {work}/nginx;
    fastcgi_temp_path {work}/nginx; uwsgi_temp_path {work}/nginx; scgi_temp_path {work}/nginx;
    server {{
        listen 127.0.0.1:{port};
        location /static/ {{ alias {work}/static/; }}
        location / {{ return 200 "pong"; }}
    }}
}}
"""


class NotServing(Exception):
    """A server does not answer as it should."""


class NotStarted(NotServing):
    """A server could not be started."""


class Running:
    """A server that runs, pinned to `core`, with all its processes."""

    def __init__(self, server, work, env, core):
        self.server = server
        self._work = work
        self._log = work / f"{server.name}.log"
        self._start(env, core)

    def _start(self, env, core):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        names = {"port": self.port, "work": self._work}
        server = self.server
        if server.program == "nginx":
            # Started by root it would change to a user who may not read our files.
            user = "user root;" if os.geteuid() == 0 else ""
            (self._work / "nginx.conf").write_text(_NGINX.format(user=user, **names))
        command = [
            find_program(server.program) if server.program else str(PYTHON),
            *(item.format(**names) for item in server.arguments),
        ]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                env=env | server.variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=partial(os.sched_setaffinity, 0, {core}),  # noqa: PLW1509  # one thread
            )
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.stop()
            raise

    def _wait_until_it_answers(self):
        end = time.monotonic() + 20
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise NotStarted(
                    f"ended with status {self.process.returncode}: {self._last_words()}"
                )
            try:
                self.request("GET", "/ping/", timeout=10)
                return
            except OSError:
                time.sleep(0.05)
        raise NotStarted(f"did not answer within 20 s: {self._last_words()}")

    def _last_words(self):
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    @property
    def alive(self):
        """Whether its first process still runs."""
        return self.process.poll() is None

    def url(self, path):
        """The URL of `path`."""
        return f"http://127.0.0.1:{self.port}{path}"

    def request(self, method, path, body=None, timeout=30):
        """The status and the body of one answer. Raises OSError."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body)
            response = connection.getresponse()
            return response.status, response.read()
        except http.client.HTTPException as error:
            raise OSError(f"{type(error).__name__}: {error}") from error
        finally:
            connection.close()

    def settles(self):
        """Wait until it answers again: what the load has left behind is done then.

        Tells whether it did so within 2 s.
        """
        try:
            self.request("GET", "/ping/", timeout=2)
        except OSError:
            return False
        return True

    def stop(self):
        """End it, and whatever it has started."""
        if self.alive:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(2)
        with contextlib.suppress(ProcessLookupError):
            # Its session is its own, so is its group.
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(5)

"""What the tests stand on: real servers, raw sockets, and waiting with a deadline."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import inspect
import logging
import os
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Self, TypeVar

import pytest
from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent
TESTPROJECT = ROOT / "testproject"

#: A TCP address, or the path of a Unix socket.
Address = tuple[str, int] | str

#: What no server may log in a test that does not expect it.
UNEXPECTED = re.compile(
    r"Traceback \(most recent call last\)|ResourceWarning|Exception ignored in"
    r"|was never awaited|exception was never retrieved"
)

_SERVING = re.compile(r"Serving .*?\bat (\S+)")
_SCRUBBED = re.compile(
    r"AIOSERVE_|LISTEN_(PID|FDS|FDNAMES)|NOTIFY_SOCKET|WATCHDOG_|GUNICORN_CMD_ARGS"
    r"|DJANGO_AIOSERVE_|DJANGO_SETTINGS_MODULE|DATABASE_URL|WEB_CONCURRENCY"
)


# --- waiting ------------------------------------------------------------------------------


def wait_until(
    predicate: Callable[[], T], deadline: float = 10.0, message: str = "condition not met"
) -> T:
    """Call `predicate` until it returns something true, and return that.

    AssertionError with `message` after `deadline` seconds.
    """
    end = time.monotonic() + deadline
    while True:
        result = predicate()
        if result:
            return result
        if time.monotonic() > end:
            raise AssertionError(f"{message} (within {deadline} s)")
        time.sleep(0.01)


def skip_or_fail(reason: str) -> NoReturn:
    """Skip the test for what the machine lacks; in CI, where nothing may lack, fail it."""
    if os.environ.get("CI"):
        pytest.fail(f"CI must not skip: {reason}")
    pytest.skip(reason)


# --- raw HTTP -----------------------------------------------------------------------------


class Response(NamedTuple):
    """One HTTP response as it was on the wire, its body de-chunked."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    reason: str = ""

    def header(self, name: str) -> str | None:
        """The value of the only header of that name, or None; AssertionError when repeated."""
        values = [value for key, value in self.headers if key.lower() == name.lower()]
        if len(values) > 1:
            raise AssertionError(f"{name} is repeated: {values}")
        return values[0] if values else None

    @property
    def text(self) -> str:
        """The body, decoded as UTF-8."""
        return self.body.decode()


def connect(address: Address, timeout: float = 5.0) -> socket.socket:
    """A connected socket; every operation on it fails after `timeout` seconds."""
    if isinstance(address, str):
        unix = socket.socket(socket.AF_UNIX)
        unix.settimeout(timeout)
        try:
            unix.connect(address)
        except OSError:
            unix.close()
            raise
        return unix
    return socket.create_connection(address, timeout)


def raw(address: Address, data: bytes, *, half_close: bool = False, timeout: float = 5.0) -> bytes:
    """Send `data`, then return what arrives until the peer closes.

    A peer that resets the connection ends it too. TimeoutError when nothing comes for `timeout`
    seconds, with what had come so far in the message.
    """
    received = bytearray()
    with connect(address, timeout) as sock:
        try:
            sock.sendall(data)
            if half_close:
                sock.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass  # refused early: the answer may be there to read all the same
        try:
            while chunk := sock.recv(65536):
                received += chunk
        except ConnectionResetError:
            pass
        except TimeoutError:
            raise TimeoutError(f"still open after {bytes(received)!r}") from None
    return bytes(received)


class RawConnection:
    """A connection that says exactly the bytes it is told to, over TCP or a Unix socket."""

    def __init__(self, address: Address, timeout: float = 5.0) -> None:
        self.socket = connect(address, timeout)
        self._buffer = bytearray()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def send(self, data: bytes) -> None:
        """Send all of `data`."""
        self.socket.sendall(data)

    def request(
        self,
        method: str,
        target: str,
        headers: Iterable[tuple[str, str]] = (),
        body: bytes = b"",
    ) -> Response:
        """Send an ordinary request (Host and Content-Length are added) and read its response."""
        lines = [f"{method} {target} HTTP/1.1"]
        headers = list(headers)
        names = {name.lower() for name, _ in headers}
        if "host" not in names:
            lines.append("Host: localhost")
        if body and not names & {"content-length", "transfer-encoding"}:
            lines.append(f"Content-Length: {len(body)}")
        lines += [f"{name}: {value}" for name, value in headers]
        self.send("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
        return self.read_response(head=method == "HEAD")

    def recv_until(self, marker: bytes) -> bytes:
        """All bytes up to and with `marker`; ConnectionError when the peer closes before."""
        while (found := self._buffer.find(marker)) < 0:
            self._fill()
        return self._take(found + len(marker))

    def recv_exactly(self, size: int) -> bytes:
        """The next `size` bytes; ConnectionError when the peer closes before."""
        while len(self._buffer) < size:
            self._fill()
        return self._take(size)

    def recv_to_eof(self) -> bytes:
        """All bytes until the peer closes."""
        with contextlib.suppress(EOFError):
            while True:
                self._fill()
        return self._take(len(self._buffer))

    def at_eof(self) -> bool:
        """Wait for the next byte or the end, and tell whether it was the end."""
        if not self._buffer:
            try:
                self._fill()
            except ConnectionError:
                return True
        return False

    def read_response(self, *, head: bool = False) -> Response:
        """The next response, 1xx ones included; `head` when it answers a HEAD request.

        A body without a length goes on to the end of the connection.
        """
        lines = self.recv_until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        version, status, *reason = lines[0].split(" ", 2)
        if not re.fullmatch(r"HTTP/1\.[01]", version):
            raise AssertionError(f"not a status line: {lines[0]!r}")
        headers = []
        for line in lines[1:-2]:
            name, _, value = line.partition(":")
            headers.append((name, value.strip()))
        response = Response(int(status), headers, b"", reason[0] if reason else "")
        if head or response.status in {204, 304} or response.status < 200:
            return response
        if (response.header("Transfer-Encoding") or "").lower() == "chunked":
            body = self._read_chunked()
        elif (length := response.header("Content-Length")) is not None:
            body = self.recv_exactly(int(length))
        else:
            body = self.recv_to_eof()
        return response._replace(body=body)

    def close(self) -> None:
        """Close in an orderly way."""
        self.socket.close()

    def reset(self) -> None:
        """Close with a TCP RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def _read_chunked(self) -> bytes:
        body = bytearray()
        while size := int(self.recv_until(b"\r\n").split(b";")[0], 16):
            body += self.recv_exactly(size)
            if self.recv_exactly(2) != b"\r\n":
                raise AssertionError("a chunk does not end where it said")
        while self.recv_until(b"\r\n") != b"\r\n":
            pass  # trailers
        return bytes(body)

    def _fill(self) -> None:
        chunk = self.socket.recv(65536)
        if not chunk:
            raise _ConnectionClosed(f"closed after {bytes(self._buffer[-2000:])!r}")
        self._buffer += chunk

    def _take(self, size: int) -> bytes:
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken


class _ConnectionClosed(ConnectionError, EOFError):
    """The peer closed in good order."""


class Visitor:
    """A browser of sorts: one kept-alive connection, cookies, forms with their CSRF token."""

    def __init__(self, address: Address) -> None:
        self.cookies: dict[str, str] = {}
        self._address = address
        self._connection: RawConnection | None = None
        self._token = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def get(self, target: str, headers: Iterable[tuple[str, str]] = ()) -> Response:
        """Get a page; the CSRF token of a form on it is kept for the next `post()`."""
        return self.request("GET", target, headers)

    def post(
        self,
        target: str,
        fields: Mapping[str, str],
        files: Mapping[str, tuple[str, bytes]] | None = None,
    ) -> Response:
        """Send a form; `files` maps a field to a file name and the file's content."""
        fields = {"csrfmiddlewaretoken": self._token, **fields}
        if not files:
            kind = "application/x-www-form-urlencoded"
            body = urllib.parse.urlencode(fields).encode()
        else:
            boundary = "--------------------------boundary"
            kind = f"multipart/form-data; boundary={boundary}"
            parts = [(f'name="{name}"', value.encode()) for name, value in fields.items()]
            parts += [
                (f'name="{name}"; filename="{filename}"', content)
                for name, (filename, content) in files.items()
            ]
            body = b"".join(
                f"--{boundary}\r\nContent-Disposition: form-data; {what}\r\n\r\n".encode()
                + content
                + b"\r\n"
                for what, content in parts
            )
            body += f"--{boundary}--\r\n".encode()
        return self.request("POST", target, [("Content-Type", kind)], body)

    def login(self, target: str, username: str = "admin", password: str = "admin") -> Response:
        """Fill the login form at `target`; the answer to the post is returned."""
        self.get(target)
        return self.post(target, {"username": username, "password": password})

    def request(
        self,
        method: str,
        target: str,
        headers: Iterable[tuple[str, str]] = (),
        body: bytes = b"",
    ) -> Response:
        """Any request, with the cookies so far."""
        if self._connection is None:
            self._connection = RawConnection(self._address, 10.0)
        headers = list(headers)
        if self.cookies:
            pairs = (f"{name}={value}" for name, value in self.cookies.items())
            headers.append(("Cookie", "; ".join(pairs)))
        response = self._connection.request(method, target, headers, body)
        if (response.header("Connection") or "").lower() == "close":
            self.close()
        for name, value in response.headers:
            if name.lower() == "set-cookie":
                key, _, rest = value.partition("=")
                self.cookies[key] = rest.partition(";")[0]
        form = re.search(rb'name="csrfmiddlewaretoken" value="(\w+)"', response.body)
        if form:
            self._token = form[1].decode()
        return response

    def close(self) -> None:
        """Close the connection, if there is one; the cookies stay."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


# --- Django projects ----------------------------------------------------------------------


def clean_environment() -> dict[str, str]:
    """The environment without anything that would configure the server under test."""
    return {name: value for name, value in os.environ.items() if not _SCRUBBED.match(name)}


def python_command() -> list[str]:
    """The interpreter and its flags that servers under test are started with."""
    return [sys.executable, *shlex.split(os.environ.get("AIO_TEST_PYTHON_FLAGS", ""))]


def manage(project: Path, *args: str, env: Mapping[str, str] | None = None) -> str:
    """Run `manage.py` of `project` and return its output; AssertionError when it fails."""
    done = subprocess.run(
        [sys.executable, "manage.py", *args],
        cwd=project,
        env={**clean_environment(), **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode:
        raise AssertionError(f"manage.py {shlex.join(args)} failed:\n{done.stdout}")
    return done.stdout


@functools.cache
def template_database() -> Path:
    """An SQLite file with testproject's tables and seed, made once; copy it, never open it."""
    directory = tempfile.mkdtemp(prefix="aioserve-db-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    path = Path(directory, "template.sqlite3")
    env = {"DATABASE_URL": f"sqlite:///{path}"}
    manage(TESTPROJECT, "migrate", "--verbosity=0", env=env)
    manage(TESTPROJECT, "seed", env=env)
    return path


def fresh_project(directory: Path, name: str = "fresh") -> Path:
    """What `django-admin startproject` makes, with only INSTALLED_APPS changed, and migrated.

    Its superuser is admin, with the password admin.
    """
    project = directory / name
    project.mkdir(parents=True)
    subprocess.run(
        [sys.executable, "-m", "django", "startproject", name, str(project)],
        env=clean_environment(),
        check=True,
        timeout=60,
    )
    settings = project / name / "settings.py"
    text = settings.read_text()
    marker = "INSTALLED_APPS = [\n"
    if marker not in text:
        raise AssertionError(f"startproject's settings have no {marker!r}")
    settings.write_text(text.replace(marker, f'{marker}    "django_aioserve",\n'))
    manage(project, "migrate", "--verbosity=0")
    manage(
        project,
        "createsuperuser",
        "--noinput",
        "--username=admin",
        "--email=admin@example.com",
        env={"DJANGO_SUPERUSER_PASSWORD": "admin"},
    )
    return project


# --- the server ---------------------------------------------------------------------------


class Runaio:
    """A real `manage.py runaio` in a process group of its own.

    `args` go to the command after `--bind`; `bind` may name several addresses, or none. The
    server of testproject gets a copy of the seeded database. `env` is laid over the cleaned
    environment. `command` replaces `runaio` (and then takes no `--bind` unless `bind` is given).
    """

    def __init__(
        self,
        *args: str,
        bind: Sequence[str] = ("127.0.0.1:0",),
        project: Path = TESTPROJECT,
        env: Mapping[str, str] | None = None,
        command: str = "runaio",
        start_deadline: float = 30.0,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.args = [*(f"--bind={address}" for address in bind), *args]
        self.project = project
        self.log: list[str] = []
        self._addresses = len(bind)
        self.allow_tracebacks = False
        self._env = dict(env or {})
        self._command = command
        self._start_deadline = start_deadline
        self._pass_fds = pass_fds
        self._changed = threading.Condition()
        self._ended = False

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"{self._command} {shlex.join(self.args)}"

    # Starting and stopping.

    def start(self) -> None:
        """Start the server and wait until it says what it serves at."""
        self.launch()
        try:
            # One line for each address; they need not arrive together.
            every = "(?s:.*?)".join([_SERVING.pattern] * max(1, self._addresses))
            self.wait_for_log(every, self._start_deadline)
        except BaseException:
            self.stop()
            raise

    def launch(self) -> None:
        """Start the process without waiting for it to serve."""
        self._scratch = tempfile.TemporaryDirectory(prefix="aioserve-")
        self.directory = Path(self._scratch.name)
        env = {**clean_environment(), "PYTHONUNBUFFERED": "1"}
        env["PYTHONWARNINGS"] = "default::ResourceWarning"
        if self.project == TESTPROJECT and "DATABASE_URL" not in self._env:
            shutil.copy(template_database(), self.directory / "db.sqlite3")
            env["DATABASE_URL"] = f"sqlite:///{self.directory}/db.sqlite3"
            env["MEDIA_ROOT"] = str(self.directory / "media")
        env.update(self._env)
        self.process = subprocess.Popen(
            [*python_command(), "manage.py", self._command, *self.args],
            cwd=self.project,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=self._pass_fds,
        )
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()

    def stop(self, timeout: float = 20.0) -> int:
        """TERM, wait, KILL what is left of the process group; return the exit status.

        AssertionError when the server did not end by itself within `timeout` seconds.
        """
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()
        try:
            return self.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"the server did not stop within {timeout} s of SIGTERM:\n{self.log_text()}"
            ) from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(5)
            self._reader.join(5)
            if self.process.stdout is not None:
                self.process.stdout.close()
            self._scratch.cleanup()

    def wait(self, timeout: float = 20.0) -> int:
        """Wait for the server to end by itself; return its exit status."""
        return self.process.wait(timeout)

    def signal(self, number: int) -> None:
        """Send a signal to the arbiter."""
        self.process.send_signal(number)

    # Where it serves.

    @property
    def pid(self) -> int:
        """The arbiter's process id."""
        return self.process.pid

    @property
    def urls(self) -> list[str]:
        """Everything the banner says it serves at: `http://…`, `https://…` or `unix:PATH`."""
        return [url.rstrip(",") for url in _SERVING.findall(self.log_text())]

    @property
    def url(self) -> str:
        """The first of `urls`, without a slash at its end."""
        return self.urls[0].rstrip("/")

    @property
    def address(self) -> Address:
        """What to connect to for the first URL."""
        if self.url.startswith("unix:"):
            return self.url.removeprefix("unix:")
        found = re.fullmatch(r"https?://\[?(.+?)\]?:(\d+)", self.url)
        if found is None:
            raise AssertionError(f"not a URL with a port: {self.url!r}")
        return found[1], int(found[2])

    @property
    def host(self) -> str:
        """The host part of the first URL."""
        if isinstance(self.address, str):
            raise AssertionError("a Unix socket has no host")
        return self.address[0]

    @property
    def port(self) -> int:
        """The port of the first URL."""
        if isinstance(self.address, str):
            raise AssertionError("a Unix socket has no port")
        return self.address[1]

    def workers(self) -> list[int]:
        """The process ids of the living children of the arbiter, oldest first."""
        return children(self.pid)

    # Talking to it.

    def connect(self, timeout: float = 10.0) -> RawConnection:
        """A new raw connection to the first address."""
        return RawConnection(self.address, timeout)

    def request(
        self,
        method: str,
        target: str,
        headers: Iterable[tuple[str, str]] = (),
        body: bytes = b"",
        timeout: float = 10.0,
    ) -> Response:
        """One request on a connection of its own."""
        with self.connect(timeout) as connection:
            return connection.request(method, target, headers, body)

    def get(self, target: str, headers: Iterable[tuple[str, str]] = ()) -> Response:
        """One GET request on a connection of its own."""
        return self.request("GET", target, headers)

    # Its log: standard output and standard error.

    def log_text(self) -> str:
        """All that the server has written so far."""
        with self._changed:
            return "".join(self.log)

    def wait_for_log(
        self, pattern: str | re.Pattern[str], deadline: float = 10.0, *, start: int = 0
    ) -> re.Match[str]:
        """Wait for `pattern` in the log, from its line number `start` on, and return the match.

        AssertionError with the log after `deadline` seconds, or when the server ends before.
        """
        compiled = re.compile(pattern, re.MULTILINE)
        end = time.monotonic() + deadline
        with self._changed:
            while True:
                text = "".join(self.log[start:])
                if found := compiled.search(text):
                    return found
                remaining = end - time.monotonic()
                if self._ended or remaining <= 0:
                    why = "the server ended" if self._ended else f"nothing within {deadline} s"
                    raise AssertionError(f"no {compiled.pattern!r} in the log, {why}:\n{text}")
                self._changed.wait(remaining)

    def check_log(self) -> None:
        """AssertionError when the log has a traceback or tells of a leak, unless allowed."""
        text = self.log_text()
        if not self.allow_tracebacks and UNEXPECTED.search(text):
            raise AssertionError(f"the server logged what it should not have:\n{text}")

    def _read_log(self) -> None:
        stream = self.process.stdout
        if stream is None:
            raise AssertionError("the server's output is not captured")
        for line in stream:
            with self._changed:
                self.log.append(line.decode(errors="replace"))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()


def children(parent: int) -> list[int]:
    """The process ids of the living children of `parent`, oldest first."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # The command, in parentheses, may contain anything; state and parent follow it.
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # gone since the listing
        if int(fields[1]) == parent and fields[0] != "Z":
            found.append((int(fields[19]), int(entry.name)))
    return [pid for _, pid in sorted(found)]


def is_alive(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


# --- an aiohttp application in this process -----------------------------------------------


class AppServer:
    """An aiohttp application, served on a loop of its own in a thread of this process.

    `factory` is called on that loop and gives the application (or an awaitable of it).
    `runner_options` go to `web.AppRunner`. What reaches the loop's exception handler, and
    whatever aiohttp logs as an error, is collected in `errors`; `stop()` raises them as an
    AssertionError unless `allow_errors`.
    """

    def __init__(
        self,
        factory: Callable[[], web.Application | Awaitable[web.Application]],
        *,
        unix: str | None = None,
        loop_factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop,
        allow_errors: bool = False,
        **runner_options: Any,
    ) -> None:
        self.errors: list[str] = []
        self.allow_errors = allow_errors
        self.app: web.Application
        self._factory = factory
        self._unix = unix
        self._runner_options = runner_options
        self._loop_factory = loop_factory
        self._log_handler = _Collector(self.errors)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def start(self) -> None:
        """Serve; returns when connections are accepted."""
        logging.getLogger("aiohttp").addHandler(self._log_handler)
        self.loop = self._loop_factory()
        self.loop.set_exception_handler(self._collect)
        self._thread = threading.Thread(target=self._run_loop, name="app-server", daemon=True)
        self._thread.start()
        try:
            self.address: Address = self.run(self._start())
        except BaseException:
            self._end_loop()
            raise

    def stop(self) -> None:
        """Shut down the application and the loop, then raise what went wrong meanwhile."""
        try:
            self.run(self._runner.cleanup())
        finally:
            self._end_loop()
        if self.errors and not self.allow_errors:
            raise AssertionError("errors in the server:\n" + "\n".join(self.errors))

    @property
    def port(self) -> int:
        """The TCP port."""
        if isinstance(self.address, str):
            raise AssertionError("a Unix socket has no port")
        return self.address[1]

    def run(self, coroutine: Coroutine[Any, Any, T], timeout: float = 30.0) -> T:
        """Run `coroutine` on the server's loop, from the test's thread, and return its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout)

    def connect(self, timeout: float = 10.0) -> RawConnection:
        """A new raw connection."""
        return RawConnection(self.address, timeout)

    def request(
        self,
        method: str,
        target: str,
        headers: Iterable[tuple[str, str]] = (),
        body: bytes = b"",
        timeout: float = 10.0,
    ) -> Response:
        """One request on a connection of its own."""
        with self.connect(timeout) as connection:
            return connection.request(method, target, headers, body)

    def get(self, target: str, headers: Iterable[tuple[str, str]] = ()) -> Response:
        """One GET request on a connection of its own."""
        return self.request("GET", target, headers)

    async def _start(self) -> Address:
        made = self._factory()
        self.app = await made if inspect.isawaitable(made) else made
        self._runner = web.AppRunner(self.app, **self._runner_options)
        await self._runner.setup()
        site = (
            web.UnixSite(self._runner, self._unix)
            if self._unix is not None
            else web.TCPSite(self._runner, "127.0.0.1", 0)
        )
        await site.start()
        address = self._runner.addresses[0]
        return address if isinstance(address, str) else (address[0], address[1])

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def _end_loop(self) -> None:
        self.run(self._cancel_tasks())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()
        logging.getLogger("aiohttp").removeHandler(self._log_handler)

    async def _cancel_tasks(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.loop.shutdown_asyncgens()
        await self.loop.shutdown_default_executor()

    def _collect(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.errors.append(f"{context.get('message')}: {context.get('exception')!r}")


class _Collector(logging.Handler):
    """Keeps the errors that are logged."""

    def __init__(self, errors: list[str]) -> None:
        super().__init__(logging.ERROR)
        self.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        self._errors = errors

    def emit(self, record: logging.LogRecord) -> None:
        self._errors.append(self.format(record))

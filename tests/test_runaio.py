"""`manage.py runaio`: the command, its mistakes, and how it becomes a server."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import textwrap
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import pytest
from aiohttp import http_parser
from django.core.management import CommandError, call_command
from django.test import override_settings

from django_aioserve.conf import OPTIONS, Boolean, Config
from django_aioserve.exceptions import ConfigurationError
from django_aioserve.server.launcher import AioserveApplication, Launch, _malloc, is_there
from django_aioserve.server.listeners import DEFAULT, Permissions, bind_sockets
from django_aioserve.server.machine import machine_problems, pidfile_problems
from tests.support import (
    Runaio,
    children,
    clean_environment,
    is_alive,
    python_command,
    raw,
    skip_or_fail,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    Start = Callable[..., Runaio]

MANAGE = """\
import os, sys

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "shop.settings")
from django.core.management import execute_from_command_line

if __name__ == "__main__":
    execute_from_command_line(sys.argv)
"""

SETTINGS = """\
import os

SECRET_KEY = "only for this test"
ALLOWED_HOSTS = ["localhost", "127.0.0.1"]
INSTALLED_APPS = ["django_aioserve"]
MIDDLEWARE = []
ROOT_URLCONF = "shop.urls"
WSGI_APPLICATION = "shop.wsgi.application"
exec(os.environ.get("MORE_SETTINGS", ""))
"""

URLS = """\
import json, os, sys

from django.http import HttpResponse, JsonResponse
from django.urls import path

from django_aioserve import conf


def about(request):
    return JsonResponse({
        "pid": os.getpid(),
        "cwd": os.getcwd(),
        "path": sys.path,
        "environment": sorted(os.environ),
        "optimize": sys.flags.optimize,
        "dev_mode": sys.flags.dev_mode,
        "warnings": sys.warnoptions,
        "threads": conf.resolve().threads,
        "trim_threshold": os.environ.get("MALLOC_TRIM_THRESHOLD_"),
    })


urlpatterns = [path("", lambda request: HttpResponse("hello")), path("about", about)]
"""

WSGI = """\
from django.core.wsgi import get_wsgi_application

application = get_wsgi_application()
"""

#: Hooks of Gunicorn's, and an application for aiohttp, beside the project's package.
HOOKS = """\
import sys


def say(name):
    print(f"{name}: the project is {'' if 'shop' in sys.modules else 'not '}here", flush=True)


def when_ready(arbiter):
    say("when_ready")


def post_worker_init(worker):
    say("post_worker_init")
"""


@pytest.fixture(scope="module")
def looked_at(shop: Path) -> Iterator[dict[str, Any]]:
    """What a view sees, in a server that flags and variables were given to."""
    with Runaio(
        *("--threads=3", "--pythonpath=/nowhere/extra"),
        project=shop,
        env={"AIOSERVE_THREADS": "5"},
    ) as server:
        yield about(server)


READY = r"Worker \d+ is ready"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Django project that boots fast; the environment variable MORE_SETTINGS adds to it."""
    directory = tmp_path_factory.mktemp("project")
    write(directory, {"manage.py": MANAGE, "hooks.py": HOOKS, "shop/__init__.py": ""})
    write(directory, {"shop/settings.py": SETTINGS, "shop/urls.py": URLS, "shop/wsgi.py": WSGI})
    return directory


@pytest.fixture
def serving(runaio: Start) -> Start:
    """As `runaio`, but waits until the first worker is ready, too."""

    def start(*args: str, **options: Any) -> Runaio:
        server = runaio(*args, **options)
        server.wait_for_log(READY, 20)
        return server

    return start


def write(directory: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def command(
    project: Path,
    *args: str,
    env: Mapping[str, str] | None = None,
    settings: str = "",
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """Run `manage.py runaio`, which is expected to end by itself."""
    return subprocess.run(
        [*python_command(), "manage.py", "runaio", *args],
        cwd=project,
        env={**clean_environment(), "MORE_SETTINGS": settings, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=30,
        check=False,
        **options,
    )


def about(server: Runaio) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(server.get("/about").body)
    return found


# --- mistakes ---------------------------------------------------------------------------------


class Mistake(NamedTuple):
    """One mistake and what the line about it contains.

    {directory} is one of the test's own, {taken} a port that is taken.
    """

    name: str
    args: list[str]
    said: str
    env: Mapping[str, str] = MappingProxyType({})
    settings: Mapping[str, Any] = MappingProxyType({})
    missing: str = ""
    """A module that is not installed."""


MISTAKES = [
    Mistake(
        "unknown flag",
        ["--max-request=5"],
        "unrecognized arguments: --max-request=5; did you mean --max-requests?",
    ),
    Mistake(
        "unknown variable of another case",
        [],
        "expected a known option; did you mean AIOSERVE_WORKERS?",
        env={"AIOSERVE_workers": "2"},
    ),
    Mistake(
        "one address twice",
        ["8000", "--bind=127.0.0.1:8000"],
        '--bind (command line) is "8000,127.0.0.1:8000"; expected each address once.',
    ),
    Mistake(
        "no lifetime is long enough",
        ["--max-lifetime=1h", "--min-lifetime=2h"],
        '--min-lifetime (command line) is "7200"; expected no more than AIOSERVE_MAX_LIFETIME.',
    ),
    Mistake(
        "two lines in a value",
        ["--loop=uv\nloop\x1b"],
        '--loop (command line) is "uv\\nloop\\x1b"; expected one of auto, uvloop, asyncio.',
    ),
    Mistake("two addresses", ["8000", "8001"], "unrecognized arguments: 8001"),
    Mistake(
        "unknown setting",
        [],
        "AIOSERVE_WORKER (Django settings) is 2; "
        "expected a known option; did you mean AIOSERVE_WORKERS?",
        settings={"AIOSERVE_WORKER": 2},
    ),
    Mistake(
        "unknown variable",
        [],
        'AIOSERVE_THREAD (environment) is "2"; '
        "expected a known option; did you mean AIOSERVE_THREADS?",
        env={"AIOSERVE_THREAD": "2"},
    ),
    Mistake(
        "bad flag",
        ["--workers=many"],
        '--workers (command line) is "many"; expected a whole number from 1 to 1024, or "auto".',
    ),
    Mistake(
        "bad variable",
        [],
        'AIOSERVE_KEEPALIVE (environment) is "long"; '
        "expected a duration such as 90, 90s, 15m or 1h.",
        env={"AIOSERVE_KEEPALIVE": "long"},
    ),
    Mistake(
        "bad setting",
        [],
        'AIOSERVE_PRELOAD (Django settings) is "perhaps"; expected true or false.',
        settings={"AIOSERVE_PRELOAD": "perhaps"},
    ),
    Mistake(
        "contradiction",
        ["--max-requests-jitter=5"],
        '--max-requests-jitter (command line) is "5"; '
        "expected AIOSERVE_MAX_REQUESTS to be set with it.",
    ),
    Mistake(
        "bad address",
        ["localhost"],
        '--bind (command line) is "localhost"; expected one or more addresses, '
        "each PORT, HOST:PORT, [IPV6]:PORT, unix:PATH or fd://N.",
    ),
    Mistake(
        "port taken",
        ["{taken}"],
        '--bind (command line) is "{taken}"; '
        "expected an address that is free; another process listens there.",
    ),
    Mistake(
        "address of another machine",
        [],
        'AIOSERVE_BIND (environment) is "192.0.2.1:8000"; expected an address of this machine.',
        env={"AIOSERVE_BIND": "192.0.2.1:8000"},
    ),
    Mistake(
        "host without an address",
        ["nowhere.invalid:8000"],
        'is "nowhere.invalid:8000"; expected a host that can be looked up (',
    ),
    Mistake(
        "socket in no directory",
        ["unix:{directory}/none/x"],
        'is "unix:{directory}/none/x"; expected a path in a directory that exists.',
    ),
    Mistake(
        "socket where a file is",
        ["unix:{directory}/file"],
        'is "unix:{directory}/file"; expected a path where there is nothing, or a socket.',
    ),
    Mistake(
        "socket where somebody listens",
        ["unix:{directory}/live"],
        'is "unix:{directory}/live"; '
        "expected an address that is free; another process listens there.",
    ),
    Mistake(
        "socket with a long path",
        ["unix:{directory}/" + "x" * 200],
        "expected an address to listen on (AF_UNIX path too long).",
    ),
    Mistake(
        "closed descriptor",
        ["fd://77"],
        '--bind (command line) is "fd://77"; expected the number of an open descriptor.',
    ),
    Mistake("descriptor of a file", ["fd://0"], "expected the descriptor of a socket."),
    Mistake(
        "no certificate",
        ["--certfile={directory}/none"],
        '--certfile (command line) is "{directory}/none"; expected the path of a readable file.',
    ),
    Mistake(
        "no key",
        ["--certfile={directory}/cert", "--keyfile={directory}/none"],
        '--keyfile (command line) is "{directory}/none"; expected the path of a readable file.',
    ),
    Mistake(
        "not a certificate",
        ["--certfile={directory}/file"],
        '--certfile (command line) is "{directory}/file"; expected a certificate in PEM form.',
    ),
    Mistake(
        "certificate without a key",
        ["--certfile={directory}/cert"],
        "expected a file that holds the key too, or AIOSERVE_KEYFILE to be set.",
    ),
    Mistake(
        "not a key",
        ["--certfile={directory}/cert", "--keyfile={directory}/file"],
        '--keyfile (command line) is "{directory}/file"; expected a key in PEM form.',
    ),
    Mistake(
        "key of another certificate",
        ["--certfile={directory}/cert", "--keyfile={directory}/other"],
        "expected the key that belongs to the certificate.",
    ),
    Mistake(
        "key with a passphrase",
        ["--certfile={directory}/cert", "--keyfile={directory}/locked"],
        "expected a key without a passphrase.",
    ),
    Mistake(
        "pidfile in no directory",
        ["--pidfile={directory}/none/pid"],
        '--pidfile (command line) is "{directory}/none/pid"; '
        "expected a path in a directory that exists.",
    ),
    Mistake(
        "pidfile of a living process",
        ["--pidfile={directory}/pid"],
        'is "{directory}/pid"; expected a file that no living process has written (process ',
    ),
    Mistake(
        "access log that is a directory",
        ["--access-log={directory}"],
        '--access-log (command line) is "{directory}"; expected a path that is no directory.',
    ),
    Mistake(
        "unknown setting of Gunicorn's",
        [],
        'AIOSERVE_GUNICORN["unmask"] (Django settings) is 7; expected a setting of Gunicorn ',
        settings={"AIOSERVE_GUNICORN": {"unmask": 7}},
    ),
    Mistake(
        "value that Gunicorn refuses",
        [],
        'AIOSERVE_GUNICORN["umask"] (Django settings) is "rw"; expected what Gunicorn accepts: ',
        settings={"AIOSERVE_GUNICORN": {"umask": "rw"}},
    ),
    Mistake(
        "variable of Gunicorn's own",
        [],
        "FORWARDED_ALLOW_IPS (environment) is not what Gunicorn expects of it: ",
        env={"WEB_CONCURRENCY": "many"},
    ),
    Mistake(
        "no parser in C",
        [],
        'aiohttp\'s HTTP parser (installation) is "pure Python"; expected the one in C: ',
        missing="aiohttp._http_parser",
    ),
    Mistake(
        "no uvloop",
        ["--loop=uvloop"],
        '--loop (command line) is "uvloop"; expected auto or asyncio, for uvloop is not installed.',
        missing="uvloop",
    ),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What the mistakes speak of: files of all sorts, and a port that is taken."""
    directory = tmp_path_factory.mktemp("places")
    (directory / "file").write_text("neither a certificate nor a key\n")
    certificate(directory, "cert", "key")
    certificate(directory, "unused", "other")
    with contextlib.ExitStack() as stack:
        taken = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        live = stack.enter_context(socket.socket(socket.AF_UNIX))
        live.bind(str(directory / "live"))
        live.listen()
        process = subprocess.Popen(["sleep", "600"])
        stack.callback(process.wait)
        stack.callback(process.kill)
        (directory / "pid").write_text(f"{process.pid}\n")
        yield {"directory": str(directory), "taken": str(taken.getsockname()[1])}


def certificate(directory: Path, name: str, key: str) -> None:
    openssl(
        directory,
        *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
        *("-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"),
        *("-out", name, "-keyout", key),
    )
    openssl(directory, "pkcs8", "-topk8", "-in", key, "-out", "locked", "-passout", "pass:secret")


def openssl(directory: Path, *args: str) -> None:
    if shutil.which("openssl") is None:
        skip_or_fail("openssl is not installed")
    subprocess.run(["openssl", *args], cwd=directory, check=True, capture_output=True, timeout=30)


#: Those that are made in a real process, too: one for each stage of the start and each source.
IN_A_PROCESS = {
    "unknown flag",
    "unknown setting",
    "bad flag",
    "bad variable",
    "port taken",
    "address of another machine",
    "no certificate",
    "not a certificate",
    "key of another certificate",
    "pidfile in no directory",
    "unknown setting of Gunicorn's",
    "value that Gunicorn refuses",
    "variable of Gunicorn's own",
    "no parser in C",
}


def identifier(mistake: Mistake) -> str:
    return mistake.name.replace(" ", "-")


def fill(text: str, places: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda match: places[match[1]], text)


@pytest.mark.parametrize(
    "mistake",
    # Gunicorn reads its variables when it is imported, which it is here.
    [row for row in MISTAKES if row.name != "variable of Gunicorn's own"],
    ids=identifier,
)
def test_a_mistake_is_a_command_error_of_one_line(
    django_ready: None,
    monkeypatch: pytest.MonkeyPatch,
    places: dict[str, str],
    mistake: Mistake,
) -> None:
    def started(*_: object) -> None:
        pytest.fail("it would have started")

    monkeypatch.setattr(os, "execve", started)
    for name, value in mistake.env.items():
        monkeypatch.setenv(name, value)
    if mistake.missing == "aiohttp._http_parser":
        monkeypatch.setattr(http_parser, "HttpRequestParser", http_parser.HttpRequestParserPy)
    elif mistake.missing:
        monkeypatch.setitem(sys.modules, mistake.missing, None)
    with (
        override_settings(**mistake.settings),
        pytest.raises(CommandError) as caught,
    ):
        call_command("runaio", *(fill(text, places) for text in mistake.args))
    (line,) = str(caught.value).splitlines()
    assert fill(mistake.said, places) in line
    assert caught.value.returncode == 1


@pytest.mark.parametrize(
    "mistake", [row for row in MISTAKES if row.name in IN_A_PROCESS], ids=identifier
)
def test_a_mistake_ends_with_one_line(shop: Path, places: dict[str, str], mistake: Mistake) -> None:
    lines = [f"{name} = {value!r}" for name, value in mistake.settings.items()]
    if mistake.missing:
        lines.append(f"import sys; sys.modules[{mistake.missing!r}] = None")
    args = [fill(text, places) for text in mistake.args]
    done = command(shop, *args, env=mistake.env, settings="; ".join(lines))
    assert done.returncode in (1, 2)
    (line,) = done.stdout.splitlines()
    assert fill(mistake.said, places) in line


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:80", "a port that this user may listen on, commonly from 1024 up"),
        ("unix:/run/x", "a path in a directory that this user may write to"),
    ],
)
def test_an_address_that_the_user_may_not_have(
    monkeypatch: pytest.MonkeyPatch, address: str, said: str
) -> None:
    def refused(*_: object, **__: object) -> None:  # tests may run as root, who may
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(socket, "create_server", refused)
    monkeypatch.setattr(Path, "stat", refused)
    assert refusal(address) == f'AIOSERVE_BIND (default) is "{address}"; expected {said}.'


def test_without_a_settings_module_there_is_nothing_for_workers_to_load(
    django_ready: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DJANGO_SETTINGS_MODULE")
    with pytest.raises(CommandError, match="DJANGO_SETTINGS_MODULE is not set"):
        call_command("runaio")


def test_a_datagram_socket_is_no_listener() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagram:
        assert "the descriptor of a stream socket" in refusal(f"fd://{datagram.fileno()}")


def test_a_socket_file_whose_queue_is_full_is_somebodys(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with contextlib.ExitStack() as stack:
        busy = stack.enter_context(socket.socket(socket.AF_UNIX))
        busy.bind(path)
        busy.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                client = stack.enter_context(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                client.connect(path)
        assert "another process listens there" in refusal(f"unix:{path}")
        assert Path(path).exists()


def test_a_socket_file_that_cannot_be_given_away_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:  # tests may run as root, who may
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "chown", refused)
    path = tmp_path / "socket"
    said = refusal(f"unix:{path}", Permissions(user=1))
    assert "a user and a group that this user may give a file to" in said
    assert not path.exists()


def refusal(address: str, permissions: Permissions = DEFAULT) -> str:
    with pytest.raises(ConfigurationError) as caught:
        bind_sockets(Config(bind=(address,)), permissions)
    return str(caught.value)


@pytest.mark.parametrize("text", ["", "none", "-", "99999999999999999999", "{dead}", "{own}"])
def test_a_pidfile_of_no_other_living_process_is_taken_over(tmp_path: Path, text: str) -> None:
    with subprocess.Popen(["true"]) as ended:
        pass
    path = tmp_path / "pid"
    path.write_text(text.format(dead=ended.pid, own=os.getpid()))
    assert list(pidfile_problems(Config(pidfile=str(path)))) == []


def test_a_file_that_may_not_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # tests may run as root, who may
    (problem,) = machine_problems(Config(access_log=str(tmp_path / "log")))
    assert problem.expected == "a path that this user may write to"


def test_what_a_server_holds_is_no_mistake_of_the_next_release(
    shop: Path, serving: Start, tmp_path: Path
) -> None:
    pidfile = tmp_path / "pid"
    server = serving(f"--pidfile={pidfile}", project=shop)
    address = "{}:{}".format(*server.address)
    done = command(shop, "--check-config", address, f"--pidfile={pidfile}")
    assert (done.returncode, done.stdout) == (0, "No mistakes were found.\n")


def test_a_pidfile_wants_a_directory_that_may_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pid"
    path.touch()
    monkeypatch.setattr(os, "access", lambda file, _: file == path)
    (problem,) = machine_problems(Config(pidfile=str(path)))
    assert problem.expected == "a path in a directory that this user may write to"


def test_each_of_several_mistakes_has_its_line(shop: Path) -> None:
    done = command(shop, "--workers=x", "--threads=y")
    assert done.returncode == 1
    assert [line.split(" (")[0] for line in done.stdout.splitlines()] == [
        "CommandError: --workers",
        "--threads",
    ]


def test_an_error_of_djangos_checks_stops_the_start(shop: Path) -> None:
    apps = "['django.contrib.auth', 'django.contrib.contenttypes', 'django.contrib.admin']"
    done = command(shop, "127.0.0.1:0", settings=f"INSTALLED_APPS += {apps}")
    assert done.returncode == 1
    assert "SystemCheckError: System check identified some issues" in done.stdout
    assert "(admin.E4" in done.stdout
    assert "Traceback" not in done.stdout


def test_a_silent_setting_that_a_flag_completes_is_no_mistake(shop: Path) -> None:
    settings = "AIOSERVE_MAX_REQUESTS_JITTER = 5"
    done = command(shop, "--check-config", "--max-requests=10", settings=settings)
    assert (done.returncode, done.stdout) == (0, "No mistakes were found.\n")


def test_the_slow_parser_is_taken_where_it_was_asked_for(shop: Path) -> None:
    done = command(shop, "--check-config", env={"AIOHTTP_NO_EXTENSIONS": "1"})
    assert (done.returncode, done.stdout) == (0, "No mistakes were found.\n")


def test_on_windows_it_says_that_it_cannot(
    django_ready: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(CommandError, match="runaio needs Linux, macOS or another Unix"):
        call_command("runaio")


def test_called_from_code_an_unknown_flag_is_a_command_error(django_ready: None) -> None:
    with pytest.raises(CommandError, match="did you mean --workers"):
        call_command("runaio", "--worker=2")


def test_the_module_alone_tells_how_to_start() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "django_aioserve"],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "Start the server by: manage.py runaio\n")


# --- the application that cannot be imported --------------------------------------------------


@pytest.mark.parametrize(
    ("path", "cause"),
    [
        ("shop.nothing.application", 'there is no "nothing" in shop'),
        ("shop.wsgi.nothing", 'there is no "nothing" in shop.wsgi'),
        ("shop.settings.SECRET_KEY", "expected the dotted path of an application; what is there "),
        ("shop.wsgi:application", 'there is no "wsgi:application" in shop'),
        ("application", 'there is no module "application"'),
    ],
)
def test_an_application_that_is_not_there(shop: Path, path: str, cause: str) -> None:
    settings = f"WSGI_APPLICATION = {path!r}"
    checked = command(shop, "--check-config", settings=settings)
    assert checked.returncode == 1
    (line,) = checked.stdout.splitlines()
    assert line.startswith(f'CommandError: WSGI_APPLICATION (Django settings) is "{path}"; ')
    assert cause in line

    started = command(shop, "127.0.0.1:0", settings=settings)
    assert started.returncode != 0
    assert cause in last_line(started)
    assert "Traceback" not in started.stdout


@pytest.mark.parametrize("path", ["shop.nothing.application", "nothing.application", 3])
def test_an_application_whose_module_is_not_there_ends_before_anything_is_started(
    shop: Path, path: object
) -> None:
    started = command(shop, "127.0.0.1:0", settings=f"WSGI_APPLICATION = {path!r}")
    assert started.returncode == 1
    (line,) = started.stdout.splitlines()
    shown = f'"{path}"' if isinstance(path, str) else path
    assert line.startswith(f"CommandError: WSGI_APPLICATION (Django settings) is {shown}; expected")


def test_the_module_of_an_application_is_looked_for_without_its_import() -> None:
    names = ["json.tool.main", "json.nothing.main", "nothing.main", "main", ".json.main", ""]
    assert [is_there(name) for name in names] == [True, False, False, False, False, True]
    assert "json.tool" not in sys.modules


def test_what_the_project_raises_in_the_checks_is_one_line_unless_more_is_wanted(
    shop: Path, tmp_path: Path
) -> None:
    project = shutil.copytree(shop, tmp_path / "broken")
    (project / "shop" / "urls.py").write_text("\nraise ValueError('of two\\nlines.')\n")
    done = command(project, "127.0.0.1:0")
    assert (done.returncode, done.stdout) == (
        1,
        "CommandError: The system checks raised ValueError: of two lines "
        f"({project}/shop/urls.py, line 2). --traceback shows more.\n",
    )
    assert "Traceback" in command(project, "127.0.0.1:0", "--traceback").stdout


@pytest.mark.parametrize("option", ["routes", "middlewares", "cleanup_ctx", "static_headers"])
def test_a_module_that_raises_is_told_with_the_option_that_names_it(
    shop: Path, tmp_path: Path, option: str
) -> None:
    project = shutil.copytree(shop, tmp_path / "broken")
    (project / "raises.py").write_text("\nraise ValueError('broken')\n")
    flag = "--" + option.replace("_", "-")
    done = command(project, "127.0.0.1:0", f"{flag}=raises.it")
    assert (done.returncode, done.stdout) == (
        1,
        f"CommandError: The system checks raised ValueError: broken; {flag} (command line) is "
        f'"raises.it" ({project}/raises.py, line 2). --traceback shows more.\n',
    )


def test_a_project_that_exits_is_told(shop: Path, tmp_path: Path) -> None:
    project = shutil.copytree(shop, tmp_path / "exits")
    (project / "shop" / "wsgi.py").write_text("import sys\n\nsys.exit(0)\n")
    place = f"({project}/shop/wsgi.py, line 3)"
    checked = command(project, "--check-config")
    assert checked.returncode == 1
    assert checked.stdout.endswith(f"raised SystemExit: 0 {place}. --traceback shows more.\n")

    started = command(project, "127.0.0.1:0")
    assert started.returncode == 3
    assert last_line(started).endswith(f"Reason: SystemExit: 0 {place}")


#: Has a process interrupted, as Ctrl-C does, where it begins to import the module.
INTERRUPT = """\
import os, signal, sys


class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["INTERRUPTED_AT"] and sys.argv[0].endswith(os.environ["IN"]):
            os.kill(os.getpid(), signal.SIGINT)


sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize(
    ("program", "module"),
    [("manage.py", "shop.urls"), ("__main__.py", "django_aioserve.server.launcher")],
)
def test_an_interrupted_start_says_nothing(
    shop: Path, tmp_path: Path, program: str, module: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(INTERRUPT)
    env = {"PYTHONPATH": str(tmp_path), "IN": program, "INTERRUPTED_AT": module}
    done = command(shop, "127.0.0.1:0", env=env)
    assert (done.returncode, done.stdout) == (130, "")


def test_what_django_raises_in_the_checks_is_told_without_a_place(shop: Path) -> None:
    done = command(shop, "127.0.0.1:0", settings="ROOT_URLCONF = 'nothing'")
    assert (done.returncode, done.stdout) == (
        1,
        "CommandError: The system checks raised ModuleNotFoundError: No module named 'nothing'. "
        "--traceback shows more.\n",
    )


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.stdout, done
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("interface", "module", "said"),
    [
        (
            "wsgi",
            "asgi",
            "a WSGI application; for an ASGI application, such as this one, set ASGI_",
        ),
        (
            "asgi",
            "wsgi",
            "an ASGI application; for a WSGI application, such as this one, set WSGI_",
        ),
    ],
)
def test_an_application_of_the_other_interface_is_told(
    shop: Path, tmp_path: Path, interface: str, module: str, said: str
) -> None:
    project = shutil.copytree(shop, tmp_path / "confused")
    (project / "shop" / "asgi.py").write_text(
        "from django.core.asgi import get_asgi_application as make\n\napplication = make()\n"
    )
    path = f"shop.{module}.application"
    settings = f"{interface.upper()}_APPLICATION = {path!r}"
    done = command(project, "--check-config", f"--interface={interface}", settings=settings)
    assert done.returncode == 1
    (line,) = done.stdout.splitlines()
    assert f'{interface.upper()}_APPLICATION (Django settings) is "{path}"; expected {said}' in line


def test_an_application_whose_import_fails(shop: Path, tmp_path: Path) -> None:
    project = shutil.copytree(shop, tmp_path / "broken")
    (project / "shop" / "wsgi.py").write_text("\nimport nowhere_at_all\n")
    checked = command(project, "--check-config")
    assert checked.returncode == 1
    (line,) = checked.stdout.splitlines()
    assert line.endswith(
        "its import raised ModuleNotFoundError: No module named 'nowhere_at_all' "
        f"({project}/shop/wsgi.py, line 2). --traceback shows more."
    )

    started = command(project, "127.0.0.1:0")
    assert started.returncode != 0
    assert "No module named 'nowhere_at_all'" in last_line(started)


def test_an_application_that_preload_cannot_import(shop: Path) -> None:
    settings = "WSGI_APPLICATION = 'shop.wsgi.nothing'"
    done = command(shop, "127.0.0.1:0", "--preload", settings=settings)
    assert done.returncode == 1
    (line,) = done.stdout.splitlines()
    assert line.startswith('Error: WSGI_APPLICATION (Django settings) is "shop.wsgi.nothing"')


# --- warnings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "settings", "warning"),
    [
        (["0.0.0.0:8000"], "DEBUG = True", "DEBUG is on, and 0.0.0.0:8000 is not an address"),
        ([], "ALLOWED_HOSTS = []", "ALLOWED_HOSTS is empty while DEBUG is off"),
        (
            [":8000", "--forwarded-allow-ips=*"],
            "",
            '--forwarded-allow-ips (command line) is "*", and :8000 is not an address',
        ),
    ],
    ids=["DEBUG", "ALLOWED_HOSTS", "proxies"],
)
def test_what_everybody_could_reach_is_said(
    shop: Path, args: list[str], settings: str, warning: str
) -> None:
    done = command(shop, *args, "--check-config", settings=settings)
    assert done.returncode == 0
    assert done.stdout.splitlines()[0].startswith(f"WARNING: {warning}")


def test_a_silenced_warning_is_not_said(shop: Path) -> None:
    settings = "ALLOWED_HOSTS = []; SILENCED_SYSTEM_CHECKS = ['aioserve.W002']"
    done = command(shop, "--check-config", settings=settings)
    assert done.stdout == "No mistakes were found.\n"


# --- help and configuration -------------------------------------------------------------------


def test_help_shows_every_option_with_its_default_and_its_name(shop: Path) -> None:
    done = command(shop, "--help")
    assert done.returncode == 0
    words = done.stdout.split()
    text = " ".join(words)
    for option in OPTIONS.values():
        assert (option.flag_name in words) == option.flag
        opposite = f"--no-{option.flag_name[2:]}"
        assert (opposite in words) == isinstance(option.kind, Boolean)
        if option.flag:
            default = " ".join((option.default_text or "none").split())
            assert f"Default: {default}. [{option.setting}]" in text
    for group in {option.group for option in OPTIONS.values() if option.flag}:
        assert f"{group}:" in done.stdout
    assert "A duration is in seconds or has a unit: " in text


def test_print_config_tells_each_value_and_where_it_came_from(shop: Path) -> None:
    done = command(
        shop,
        *("--print-config", "--workers=3", "--no-static"),
        env={"AIOSERVE_THREADS": "5"},
        settings="AIOSERVE_KEEPALIVE = '1m'",
    )
    assert done.returncode == 0
    rows = {line.split()[0]: line.split(None, 1)[1] for line in done.stdout.splitlines()}
    assert rows.keys() == OPTIONS.keys()
    assert re.fullmatch(r"3 +command line --workers", rows["workers"])
    assert re.fullmatch(r"false +command line --static", rows["static"])
    assert re.fullmatch(r"5 +environment AIOSERVE_THREADS", rows["threads"])
    assert re.fullmatch(r"60 +Django settings AIOSERVE_KEEPALIVE", rows["keepalive"])
    assert re.fullmatch(r"2048 +default", rows["backlog"])


def test_print_config_shows_no_password(shop: Path) -> None:
    done = command(shop, "--print-config", "--groups-url=redis://user:secret@localhost/0")
    assert "secret" not in done.stdout
    assert "redis://***@localhost/0" in done.stdout


def test_a_password_that_spoils_its_url_is_not_shown(shop: Path) -> None:
    done = command(shop, "127.0.0.1:0", "--groups-url=redis://user:se/cret@localhost/0")
    assert done.returncode == 1
    (line,) = done.stdout.splitlines()
    assert line.startswith('CommandError: --groups-url (command line) is "redis://***@localhost/0"')
    assert "%2F for a slash in a password" in line


def test_print_config_as_json_is_the_configuration(shop: Path) -> None:
    done = command(
        shop,
        *("--print-config=json", "8001", "--bind=unix:/x", "--max-rss=64M"),
        settings="AIOSERVE_GUNICORN = {'umask': 7}",
    )
    assert done.returncode == 0
    printed = json.loads(done.stdout)
    assert printed["bind"] == {
        "value": ["8001", "unix:/x"],
        "source": "flag",
        "name": "--bind",
    }
    config = Config.load(printed)
    assert config == Config(bind=("8001", "unix:/x"), max_rss=64 << 20, gunicorn={"umask": 7})
    assert json.loads(json.dumps(config.dump())) == printed


# --- where it serves --------------------------------------------------------------------------


def test_the_banner_says_what_runs_where(shop: Path, runaio: Start) -> None:
    server = runaio(
        *("--workers=2", "--threads=3", "--max-requests=100", "--max-requests-jitter=20"),
        project=shop,
        env={"AIOSERVE_LOG_LEVEL": "critical"},
    )
    first, second = server.log_text().splitlines()
    assert re.fullmatch(
        r"django-aioserve \S+ · Django \S+ · aiohttp \S+ · Gunicorn \S+ · Python \S+ · \w+", first
    )
    assert second == (
        f"Serving shop.wsgi.application at http://127.0.0.1:{server.port} · "
        "2 workers \N{MULTIPLICATION SIGN} 3 threads · recycled after 100 to 120 requests"
    )
    assert server.get("/").text == "hello"


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-"])
def test_a_closed_output_stops_no_server(shop: Path, tmp_path: Path, closed: str) -> None:
    path = tmp_path / "socket"
    serve = ["manage.py", "runaio", f"unix:{path}", "--bind=0.0.0.0:0"]
    with subprocess.Popen(
        ["sh", "-c", f'exec "$@" {closed}', "sh", *python_command(), *serve],
        cwd=shop,
        env={**clean_environment(), "MORE_SETTINGS": "DEBUG = True"},  # warned of, at 0.0.0.0
        stderr=subprocess.PIPE,
    ) as process:
        try:
            wait_until(path.exists, 20)
            answer = raw(str(path), b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n", timeout=20)
            assert answer.endswith(b"hello")
        finally:
            process.terminate()


@pytest.mark.parametrize("address", ["0", "127.0.0.1:0", "localhost:0", ":0", "[::1]:0"])
def test_an_address_as_runserver_takes_it(shop: Path, serving: Start, address: str) -> None:
    if address.startswith("["):
        needs_ipv6()
    server = serving(address, bind=(), project=shop)
    expected = {"[::1]:0": "::1", ":0": "0.0.0.0"}.get(address, "127.0.0.1")
    assert server.host == expected
    assert server.get("/").text == "hello"


def needs_ipv6() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")


def test_all_addresses_serve(shop: Path, serving: Start, tmp_path: Path) -> None:
    path = f"{tmp_path}/socket"
    server = serving("127.0.0.1:0", bind=("127.0.0.1:0", f"unix:{path}"), project=shop)
    assert len(server.urls) == 3
    assert server.urls[-1] == f"unix:{path}"
    request = b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n"
    for url in server.urls[:2]:
        port = int(url.rpartition(":")[2])
        assert raw(("127.0.0.1", port), request).endswith(b"hello")
    assert raw(path, request).endswith(b"hello")


def test_both_families_of_a_port(shop: Path, serving: Start) -> None:
    needs_ipv6()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    server = serving(bind=(f"0.0.0.0:{port}", f"[::]:{port}"), project=shop)
    assert server.urls == [f"http://0.0.0.0:{port}", f"http://[::]:{port}"]


def test_the_ipv6_wildcard_alone_takes_ipv4_too(shop: Path, serving: Start) -> None:
    needs_ipv6()
    server = serving(bind=("[::]:0",), project=shop)
    answer = raw(("127.0.0.1", server.port), b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n")
    assert answer.endswith(b"hello")


@pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets are Linux's")
def test_an_abstract_socket(shop: Path, serving: Start) -> None:
    name = f"aioserve-test-{os.getpid()}"
    server = serving(bind=(f"unix:@{name}",), project=shop)
    assert server.url == f"unix:@{name}"
    request = b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n"
    assert raw(f"\0{name}", request).endswith(b"hello")
    assert server.stop() == 0


def test_an_inherited_descriptor(shop: Path, serving: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        number = listener.fileno()
        server = serving(bind=(f"fd://{number}",), project=shop, pass_fds=(number,))
        assert server.port == listener.getsockname()[1]
        assert server.get("/").text == "hello"


def test_tls_says_https(shop: Path, serving: Start, places: dict[str, str]) -> None:
    directory = places["directory"]
    server = serving(f"--certfile={directory}/cert", f"--keyfile={directory}/key", project=shop)
    assert server.url == f"https://127.0.0.1:{server.port}"


# --- socket files -----------------------------------------------------------------------------


def test_a_socket_file_that_nobody_listens_on_is_replaced(
    shop: Path, serving: Start, tmp_path: Path
) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    server = serving(bind=(f"unix:{path}",), project=shop)
    assert server.get("/").text == "hello"


def test_a_socket_file_is_removed_at_the_end(shop: Path, serving: Start, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    server = serving(bind=(f"unix:{path}",), project=shop)
    assert stat.S_ISSOCK(path.stat().st_mode)
    assert server.stop() == 0
    assert not path.exists()


def test_addresses_that_could_be_had_are_given_back_when_another_could_not(
    shop: Path, tmp_path: Path, places: dict[str, str]
) -> None:
    path = tmp_path / "socket"
    assert command(shop, f"unix:{path}", "--bind", places["taken"]).returncode == 1
    assert not path.exists()


@pytest.mark.parametrize(
    ("settings", "mode"), [("", 0o755), ("AIOSERVE_GUNICORN = {'umask': 0o117}", 0o660)]
)
def test_a_socket_file_has_the_permissions_that_the_umask_leaves(
    shop: Path, serving: Start, tmp_path: Path, settings: str, mode: int
) -> None:
    path = tmp_path / "socket"
    umask = os.umask(0o022)
    try:
        serving(bind=(f"unix:{path}",), project=shop, env={"MORE_SETTINGS": settings})
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == mode


# --- passed sockets ---------------------------------------------------------------------------


class Activated:
    """`runaio` as systemd would start it: LISTEN_PID is the server's own, the socket is 3."""

    def __init__(self, project: Path, listener: socket.socket, *args: str, pid: str = "$$") -> None:
        # A shell puts the socket where systemd would, and stays the same process over exec.
        script = f'exec env LISTEN_PID={pid} LISTEN_FDS=1 "$@" 3<&{listener.fileno()}'
        self.process = subprocess.Popen(
            ["bash", "-c", script, "bash", *python_command(), "manage.py", "runaio", *args],
            cwd=project,
            env={**clean_environment(), "PYTHONWARNINGS": "default::ResourceWarning"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            pass_fds=(listener.fileno(),),
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)
        if self.process.stdout is not None:
            self.process.stdout.close()

    def read_until(self, text: str) -> list[str]:
        """All lines up to the one that contains `text`; the process must not end before."""
        lines = []
        stream = self.process.stdout
        for line in stream or ():
            lines.append(line)
            if text in line:
                return lines
        raise AssertionError(f"no {text!r} in:\n{''.join(lines)}")


def test_sockets_of_systemd_take_the_place_of_bind(shop: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        with Activated(shop, listener, "127.0.0.1:1") as server:
            lines = server.read_until("Serving")
            assert lines[0] == (
                "Sockets are passed by systemd; --bind (command line) does not count.\n"
            )
            assert f"at http://127.0.0.1:{address[1]} " in lines[-1]
            answer = raw(address, b"GET /about HTTP/1.0\r\nHost: localhost\r\n\r\n", timeout=20)
            environment = json.loads(answer.partition(b"\r\n\r\n")[2])["environment"]
            assert not [name for name in environment if name.startswith("LISTEN_")]


def test_sockets_of_systemd_for_another_process_are_left_alone(shop: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        Activated(shop, listener, "127.0.0.1:0", pid="1") as server,
    ):
        lines = server.read_until("Serving")
        assert "systemd" not in "".join(lines)
        assert f":{listener.getsockname()[1]} " not in lines[-1]


def test_a_wrong_number_of_sockets_from_systemd_is_told(shop: Path) -> None:
    script = 'exec env LISTEN_PID=$$ LISTEN_FDS=5 "$@"'
    done = subprocess.run(
        ["sh", "-c", script, "sh", *python_command(), "manage.py", "runaio"],
        cwd=shop,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line == (
        'CommandError: LISTEN_FDS (environment) is "5"; '
        "expected the number of stream sockets that are passed, from descriptor 3 on."
    )


@pytest.mark.slow
def test_an_upgrade_keeps_the_sockets_of_systemd_and_their_files(
    shop: Path, tmp_path: Path
) -> None:
    path = str(tmp_path / "socket")
    request = b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        # The same path in --bind is no reason to remove systemd's file.
        with Activated(shop, listener, f"unix:{path}") as server:
            server.read_until("is ready")
            server.process.send_signal(signal.SIGUSR2)
            server.read_until("is ready")
            (upgraded,) = set(children(server.process.pid)) - workers_of(server.process.pid)
            server.process.terminate()
            assert server.process.wait(20) == 0
            assert raw(path, request).endswith(b"hello")
            os.kill(upgraded, signal.SIGTERM)
            wait_until(lambda: not is_alive(upgraded), 20)
        assert Path(path).exists()


def workers_of(arbiter: int) -> set[int]:
    """Children of the arbiter that have no children: an upgraded arbiter has its workers."""
    return {pid for pid in children(arbiter) if not children(pid)}


# --- upgrade ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_upgrade_starts_over_with_the_same_command(shop: Path, serving: Start) -> None:
    server = serving("--threads=3", bind=("127.0.0.1:0",), project=shop)
    address = server.address
    old = server.workers()
    server.signal(signal.SIGUSR2)
    wait_until(lambda: len(server.urls) == 2, 20)
    assert len(set(server.urls)) == 1
    (upgraded,) = set(server.workers()) - set(old)
    wait_until(lambda: children(upgraded), 20)
    server.process.terminate()
    assert server.wait() == 0
    answer = raw(address, b"GET /about HTTP/1.0\r\nHost: localhost\r\n\r\n")
    served = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert served["pid"] in children(upgraded)
    assert served["threads"] == 3
    os.kill(upgraded, signal.SIGTERM)
    wait_until(lambda: not is_alive(upgraded), 20)


def test_an_upgrade_that_fails_its_checks_leaves_the_old_one_serving(
    shop: Path, serving: Start, tmp_path: Path
) -> None:
    project = shutil.copytree(shop, tmp_path / "project")
    server = serving(project=project)
    with (project / "shop" / "settings.py").open("a") as settings:
        settings.write("AIOSERVE_WORKER = 2\n")
    server.signal(signal.SIGUSR2)
    server.wait_for_log(r"CommandError: AIOSERVE_WORKER \(Django settings\) is 2; expected .+", 20)
    assert server.get("/").text == "hello"
    wait_until(lambda: len(server.workers()) == 1, 20)


@pytest.mark.slow
def test_an_upgrade_shares_its_socket_file_until_the_end(
    shop: Path, serving: Start, tmp_path: Path
) -> None:
    path = tmp_path / "socket"
    server = serving(bind=(f"unix:{path}",), project=shop)
    old = server.workers()
    server.signal(signal.SIGUSR2)
    wait_until(lambda: len(server.urls) == 2, 20)
    (upgraded,) = set(server.workers()) - set(old)
    server.process.terminate()
    assert server.wait() == 0
    assert server.get("/").text == "hello"
    server.wait_for_log("Master has been promoted", 20)
    os.kill(upgraded, signal.SIGTERM)
    wait_until(lambda: not is_alive(upgraded), 20)
    assert not path.exists()


@pytest.mark.slow
def test_an_upgrade_is_not_stopped_by_the_pidfile_of_the_old_one(
    shop: Path, serving: Start, tmp_path: Path
) -> None:
    pidfile = tmp_path / "pid"
    server = serving(f"--pidfile={pidfile}", project=shop)
    assert int(pidfile.read_text()) == server.pid
    server.signal(signal.SIGUSR2)
    upgraded = int(wait_until(lambda: content(tmp_path / "pid.2"), 20))
    wait_until(lambda: children(upgraded), 20)
    server.process.terminate()
    assert server.wait() == 0
    wait_until(lambda: content(pidfile) == str(upgraded), 20)
    os.kill(upgraded, signal.SIGTERM)
    wait_until(lambda: not is_alive(upgraded), 20)
    assert not pidfile.exists()


def content(path: Path) -> str:
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return ""


# --- the arbiter's process --------------------------------------------------------------------


def test_the_arbiter_holds_no_code_of_the_project(shop: Path, serving: Start) -> None:
    hooks = "{'when_ready': 'hooks.when_ready', 'post_worker_init': 'hooks.post_worker_init'}"
    server = serving(project=shop, env={"MORE_SETTINGS": f"AIOSERVE_GUNICORN = {hooks}"})
    server.wait_for_log("^when_ready: the project is not here$")
    server.wait_for_log("^post_worker_init: the project is here$")


def test_a_hook_may_be_a_function_in_the_settings(shop: Path, serving: Start) -> None:
    settings = "import hooks; AIOSERVE_GUNICORN = {'when_ready': hooks.when_ready}"
    server = serving(project=shop, env={"MORE_SETTINGS": settings})
    server.wait_for_log("^when_ready: the project is not here$")


def test_the_command_line_reaches_an_application_that_asks_for_its_settings(
    looked_at: dict[str, Any],
) -> None:
    assert looked_at["threads"] == 3


def test_glibc_keeps_free_memory_unless_the_environment_says_otherwise(
    looked_at: dict[str, Any], shop: Path, serving: Start
) -> None:
    assert 16 << 20 <= int(looked_at["trim_threshold"]) <= 64 << 20
    server = serving(project=shop, env={"MALLOC_TRIM_THRESHOLD_": "131072"})
    assert about(server)["trim_threshold"] == "131072"


def test_many_workers_keep_less_free_memory_each() -> None:
    def kept(workers: int) -> int:
        return int(_malloc(Config(workers=workers))["MALLOC_TRIM_THRESHOLD_"])

    assert kept(1024) == 16 << 20 <= kept(1) <= 64 << 20


def test_the_launch_leaves_nothing_in_the_environment(looked_at: dict[str, Any]) -> None:
    passed = {"DJANGO_AIOSERVE_LAUNCH", "DJANGO_AIOSERVE_FILES", "GUNICORN_FD"}
    assert not passed & set(looked_at["environment"])


def test_the_import_path_is_that_of_manage(shop: Path, looked_at: dict[str, Any]) -> None:
    path = looked_at["path"]
    assert path[0] == "/nowhere/extra"
    assert str(shop) in path
    assert not [entry for entry in path if entry.endswith("/django_aioserve")]


def test_the_current_directory_is_that_of_the_command(
    shop: Path, looked_at: dict[str, Any]
) -> None:
    assert looked_at["cwd"] == str(shop)


def test_the_interpreter_keeps_its_flags(
    shop: Path, serving: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIO_TEST_PYTHON_FLAGS", "-O -X dev -W error::BytesWarning")
    found = about(serving(project=shop))
    assert (found["optimize"], found["dev_mode"]) == (1, True)
    assert "error::BytesWarning" in found["warnings"]


def test_neither_a_file_nor_a_variable_of_gunicorns_interferes(
    shop: Path, serving: Start, tmp_path: Path
) -> None:
    project = shutil.copytree(shop, tmp_path / "project")
    (project / "gunicorn.conf.py").write_text("raise SystemExit('read')\n")
    server = serving(project=project, env={"GUNICORN_CMD_ARGS": "--workers=7 --nonsense"})
    assert len(server.workers()) == 1
    assert server.get("/").text == "hello"


def test_an_aiohttp_application_is_served_as_it_is(
    shop: Path, serving: Start, tmp_path: Path
) -> None:
    project = shutil.copytree(shop, tmp_path / "project")
    (project / "shop" / "wsgi.py").write_text(
        textwrap.dedent("""\
            from aiohttp import web


            async def hello(request):
                return web.Response(text="aiohttp")


            application = web.Application()
            application.router.add_get("/", hello)
        """)
    )
    assert serving(project=project).get("/").text == "aiohttp"


@pytest.mark.parametrize("interface", ["wsgi", "asgi"])
def test_a_project_that_names_no_application_is_served(
    shop: Path, serving: Start, interface: str
) -> None:
    settings = {"MORE_SETTINGS": "WSGI_APPLICATION = None"}
    server = serving(f"--interface={interface}", project=shop, env=settings)
    assert f"Serving Django's {interface.upper()} application at " in server.log_text()
    assert server.get("/").text == "hello"


def test_asgi_application_is_served_with_interface_asgi(
    shop: Path, serving: Start, tmp_path: Path
) -> None:
    project = shutil.copytree(shop, tmp_path / "project")
    (project / "shop" / "asgi.py").write_text(WSGI.replace("wsgi", "asgi"))
    settings = "ASGI_APPLICATION = 'shop.asgi.application'"
    server = serving("--interface=asgi", project=project, env={"MORE_SETTINGS": settings})
    assert "Serving shop.asgi.application at " in server.log_text()
    assert server.get("/").text == "hello"


ASGI_WITHOUT_DJANGO = """
async def application(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"no Django"})
"""


def test_an_asgi_application_need_not_be_djangos(
    shop: Path, serving: Start, tmp_path: Path
) -> None:
    project = shutil.copytree(shop, tmp_path / "project")
    (project / "shop" / "asgi.py").write_text(ASGI_WITHOUT_DJANGO)
    settings = "ASGI_APPLICATION = 'shop.asgi.application'"
    server = serving("--interface=asgi", project=project, env={"MORE_SETTINGS": settings})
    assert server.get("/").text == "no Django"


# --- SIGHUP -----------------------------------------------------------------------------------


def test_a_release_goes_by_the_settings_of_the_new_code(
    shop: Path, serving: Start, tmp_path: Path
) -> None:
    project = shutil.copytree(shop, tmp_path / "project")
    server = serving(project=project)
    assert server.request("POST", "/", body=b"x" * 100).status == 200
    with (project / "shop" / "settings.py").open("a") as settings:
        settings.write("AIOSERVE_MAX_BODY_SIZE = 10\n")
    (old,) = server.workers()
    server.signal(signal.SIGHUP)
    wait_until(lambda: not is_alive(old), 20)
    assert server.request("POST", "/", body=b"x" * 100).status == 413


def test_a_reload_that_fails_leaves_gunicorns_settings_as_they_were(
    django_ready: None, caplog: pytest.LogCaptureFixture
) -> None:
    application = AioserveApplication(launch_of(Config(gunicorn={"umask": 7})))
    settings = application.cfg
    application.config = Config(gunicorn={"umask": "rw"})
    application.reload()
    assert application.cfg is settings
    assert "The settings stay as they were" in caplog.text


def launch_of(config: Config) -> Launch:
    return Launch(
        config=config,
        flags={"bind": ["8000"], "workers": "2"},
        application="shop.wsgi.application",
        listeners=[3, 4],
        files=["/run/x"],
        path=["/a", ""],
        command=["python", "manage.py", "runaio"],
    )


def test_what_the_arbiter_is_told_survives_the_exec() -> None:
    told = launch_of(Config(threads=3, gunicorn={"umask": 7}))
    assert Launch.load(told.dump()) == told


@pytest.mark.parametrize(
    ("option", "setting", "value", "given"),
    [
        ("timeout", "timeout", 0.5, 1),
        ("timeout", "timeout", 0.0, 0),
        ("graceful_timeout", "graceful_timeout", 2.1, 3),
        ("access_log", "accesslog", "", None),
        ("access_log", "accesslog", "-", "-"),
        ("pidfile", "pidfile", "", None),
        ("preload", "preload_app", True, True),
        ("log_level", "loglevel", "debug", "debug"),
    ],
)
def test_gunicorn_is_given_the_options_in_its_own_form(
    option: str, setting: str, value: Any, given: Any
) -> None:
    application = AioserveApplication(launch_of(Config(**{option: value})))
    assert application.cfg.settings[setting].get() == given


def test_gunicorns_control_socket_is_off_unless_it_is_named() -> None:
    off = AioserveApplication(launch_of(Config()))
    on = AioserveApplication(launch_of(Config(gunicorn={"control_socket": "/run/x.ctl"})))
    assert (off.cfg.control_socket_disable, on.cfg.control_socket_disable) == (True, False)

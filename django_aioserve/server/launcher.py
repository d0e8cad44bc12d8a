"""From ``manage.py runaio`` to Gunicorn's arbiter.

Rules:

* What can be wrong is found in the process of ``manage.py``, before anything is
  started: settings, Gunicorn's settings, files, addresses. The sockets are made there.
* Then that process *becomes* the arbiter, by exec. So the arbiter holds no code, no
  thread and no database connection of the project: a worker forked later has the
  code that is on the disk then.
* What was resolved travels in one environment variable, which is gone once read.
* Sockets passed by systemd, or by an arbiter that upgrades itself (USR2), take the
  place of ``--bind``.
* Neither a configuration file of Gunicorn's nor GUNICORN_CMD_ARGS is ever read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import importlib.util
import json
import logging
import math
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import gunicorn
import gunicorn.config
from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.errors import AppImportError
from gunicorn.sock import BaseSocket, TCP6Socket, TCPSocket, UnixSocket

from django_aioserve import conf, groups
from django_aioserve.conf import Config
from django_aioserve.exceptions import ConfigurationError, Problem
from django_aioserve.server.arbiter import RecyclingArbiter
from django_aioserve.server.listeners import (
    Permissions,
    bind_sockets,
    close_listeners,
    is_upgrade,
    passed_by_systemd,
    socket_files,
)
from django_aioserve.server.machine import pidfile_problems

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from aiohttp import web

__all__ = [
    "AioserveApplication",
    "Launch",
    "gunicorn_problems",
    "is_there",
    "launch",
    "load_application",
    "main",
]

VARIABLE = "DJANGO_AIOSERVE_LAUNCH"
"""The environment variable that carries a `Launch` over the exec."""

FILES_VARIABLE = "DJANGO_AIOSERVE_FILES"
"""The one that carries `Launch.files` over an upgrade: the sockets are not made anew then."""

KEPT_SHARE, LEAST_KEPT, MOST_KEPT = 32, 16 << 20, 64 << 20
"""Free memory that each worker keeps for the next large bodies: this part of the container's
memory for all workers together, and the bounds in bytes for one."""

WORKER_CLASS = "django_aioserve.server.worker.RecyclingWorker"


# --------------------------------------------------------------------------- Gunicorn's settings

_OWNED = {
    "backlog": "backlog",
    "workers": "workers",
    "timeout": "timeout",
    "graceful_timeout": "graceful_timeout",
    "max_requests": "max_requests",
    "max_requests_jitter": "max_requests_jitter",
    "preload_app": "preload",
    "certfile": "certfile",
    "keyfile": "keyfile",
    "accesslog": "access_log",
    "access_log_format": "access_log_format",
    "loglevel": "log_level",
    "pidfile": "pidfile",
}
"""Settings of Gunicorn's that are set from an option of ours."""

_WORKERS_OWN = {
    "bind": "bind",
    "threads": "threads",
    "keepalive": "keepalive",
    "forwarded_allow_ips": "forwarded_allow_ips",
    "asgi_loop": "loop",
    "websocket_max_message_size": "websocket_max_size",
}
"""Settings of Gunicorn's whose place an option of ours takes, without Gunicorn being told."""

_PARSER = "aiohttp speaks HTTP here, not Gunicorn, so that it would do nothing"
_REFUSED = {
    "config": "a configuration file of Gunicorn's is not read",
    "wsgi_app": "runaio serves WSGI_APPLICATION or ASGI_APPLICATION",
    "paste": "runaio serves WSGI_APPLICATION or ASGI_APPLICATION",
    "raw_paste_global_conf": "runaio serves WSGI_APPLICATION or ASGI_APPLICATION",
    "check_config": "use runaio --check-config",
    "print_config": "use runaio --print-config",
    "chdir": "runaio serves in the directory that it is started in",
    "pythonpath": "use runaio --pythonpath or PYTHONPATH",
    "daemon": "runaio stays in the foreground; systemd or a container runs it in the background",
    "reload": "runserver is for developing; SIGHUP loads new code",
    "reload_engine": "runserver is for developing; SIGHUP loads new code",
    "reload_extra_files": "runserver is for developing; SIGHUP loads new code",
    "spew": "it traces the arbiter, which runs no code of the project",
    "reuse_port": "connections in the accept queue of a leaving worker would be lost",
    "ssl_version": "Gunicorn ignores it; use the hook ssl_context",
    **dict.fromkeys(
        (
            "casefold_http_method",
            "do_handshake_on_connect",
            "forwarder_headers",
            "header_map",
            "protocol",
            "root_path",
            "secure_scheme_headers",
            "sendfile",
            "strip_header_spaces",
            "suppress_ragged_eofs",
            "tmp_upload_dir",
            "uwsgi_allow_ips",
            "worker_connections",
        ),
        _PARSER,
    ),
}
_REFUSED_PREFIXES = ("asgi_", "http2_", "http_", "permit_", "proxy_")


def gunicorn_problems(config: Config) -> Iterator[Problem]:
    """Find what is wrong in ``AIOSERVE_GUNICORN``: unknown, refused or not accepted by Gunicorn.

    Imports hooks and classes that are named there.
    """
    cfg = gunicorn.config.Config()
    for name, value in config.gunicorn.items():
        expected = _refusal(cfg, name, value)
        if expected:
            yield _gunicorn_problem(config, name, expected)


def _gunicorn_problem(config: Config, name: str, expected: str) -> Problem:
    problem = config.problem("gunicorn", expected, id="E004")
    return dataclasses.replace(
        problem, where=f'{problem.where}["{name}"]', value=config.gunicorn[name]
    )


def _refusal(cfg: gunicorn.config.Config, name: str, value: Any) -> str:
    """Tell what is expected where a setting of Gunicorn's cannot be as it is, else ""."""
    if name not in cfg.settings:
        near = difflib.get_close_matches(name, cfg.settings, 1, 0.5)
        known = f"a setting of Gunicorn {gunicorn.__version__}"
        return f"{known}; did you mean {near[0]}?" if near else known
    own = (_OWNED | _WORKERS_OWN).get(name)
    if own:
        return f"{conf.OPTIONS[own].setting} in its place"
    if name in _REFUSED or name.startswith(_REFUSED_PREFIXES):
        return f"it not to be set: {_REFUSED.get(name, _PARSER)}"
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return "plain values, dotted paths, or functions that can be imported by their name"
    try:
        cfg.set(name, value)
        if name == "worker_class":
            return _worker_class_refusal(cfg)
        if name == "logger_class" and not conf.can_be_called(cfg.logger_class, 1):
            return "gunicorn.glogging.Logger or a class like it"
    except Exception as error:  # noqa: BLE001  # a validator raises anything, an import too
        said = str(error).partition("[Traceback")[0]  # where it imports a class
        return f"what Gunicorn accepts: {' '.join(said.split()).rstrip(':')}"
    return ""


def _worker_class_refusal(cfg: gunicorn.config.Config) -> str:
    from django_aioserve.server.worker import RecyclingWorker

    if issubclass(cfg.worker_class, RecyclingWorker):
        return ""
    return f"{WORKER_CLASS} or a subclass of it"


class _Hook:
    """A hook that is imported in the process that calls it, when it does.

    The arbiter imports none of the project's code for the sake of a worker's hook, and
    a new worker calls the hook that is on the disk.
    """

    def __init__(self, setting: gunicorn.config.Setting, path: str) -> None:
        self._setting = setting
        self._path = path

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    @functools.cached_property
    def _function(self) -> Callable[..., Any]:
        # Gunicorn's validator also adapts a post_request of fewer parameters.
        validator: Callable[[str], Callable[..., Any]] = self._setting.validator
        return validator(self._path)


def _gunicorn_config(config: Config) -> gunicorn.config.Config:
    """Give Gunicorn's settings as this configuration has them."""
    cfg = gunicorn.config.Config()
    for name, option in _OWNED.items():
        value = getattr(config, option)
        if isinstance(value, float):  # 0 is "never", so 0.5 must not become it
            value = math.ceil(value)
        cfg.set(name, None if value == "" else value)
    cfg.set("bind", list(config.bind))  # for hooks to read; the sockets are there already
    cfg.set("worker_class", WORKER_CLASS)
    cfg.set("proc_name", "aioserve")
    cfg.set("control_socket_disable", "control_socket" not in config.gunicorn)
    for name, value in config.gunicorn.items():
        setting = cfg.settings[name]
        if setting.section in {"Server Hooks", "Dirty Arbiter Hooks"}:
            setting.value = _Hook(setting, value)
        else:
            setting.set(value)
    return cfg


def _permissions(config: Config) -> Permissions:
    """Give what Gunicorn would do to a socket file, where it is told what."""
    cfg = _gunicorn_config(config)
    told = config.gunicorn
    return Permissions(
        umask=cfg.umask if "umask" in told else None,
        user=cfg.uid if "user" in told else None,
        group=cfg.gid if "group" in told else None,
    )


# --------------------------------------------------------------------------- the exec


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What the arbiter is told by the process of ``manage.py`` that it was."""

    config: Config
    flags: conf.Flags
    application: str
    """Dotted path of WSGI_APPLICATION or ASGI_APPLICATION; "" for Django's own handler."""
    listeners: list[int]
    """Descriptors to listen on."""
    files: list[str]
    """Socket files to remove at the end."""
    path: list[str]
    """``sys.path``"""
    command: list[str]
    """The command line by which an upgrade (USR2) starts over, with all its checks."""

    def dump(self) -> str:
        """Give it as text."""
        rows = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return json.dumps(rows | {"config": self.config.dump()})

    @classmethod
    def load(cls, text: str) -> Launch:
        """Make it of the text that `dump` gave."""
        rows = json.loads(text)
        return cls(**rows | {"config": Config.load(rows["config"])})


def launch(config: Config, flags: conf.Flags, application: str) -> NoReturn:
    """Make the sockets and become the arbiter: this process is replaced.

    ``application`` is the dotted path of the project's application, "" for Django's own
    handler. Raises `ConfigurationError` where an address cannot be had, or where the process
    that has written the pidfile lives.
    """
    if problems := [*pidfile_problems(config)]:
        raise ConfigurationError(problems)
    environment = dict(os.environ)
    made: list[socket.socket] = []  # they would be closed if they were forgotten
    files: list[str] = json.loads(environment.pop(FILES_VARIABLE, "[]"))
    listeners = passed_by_systemd(environment)
    if listeners:
        source = config.source("bind")
        _say([f"Sockets are passed by systemd; {source.name} ({source}) does not count."])
    elif is_upgrade(environment):
        listeners = [int(number) for number in environment["GUNICORN_FD"].split(",")]
    else:
        made = bind_sockets(config, _permissions(config))
        files = socket_files(config)
        for listener in made:
            listener.set_inheritable(True)
        listeners = [listener.fileno() for listener in made]
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "GUNICORN_FD"):
        environment.pop(name, None)  # the numbers do not hold for long
    for name, value in _malloc(config).items():
        environment.setdefault(name, value)
    if not is_upgrade(environment):  # the new workers talk to the old ones
        environment[groups.HUB_VARIABLE] = groups.new_hub()
    environment[VARIABLE] = Launch(
        config=config,
        flags=flags,
        application=application,
        listeners=listeners,
        files=files,
        path=sys.path,
        command=[sys.executable, *sys.orig_argv[1:]],
    ).dump()
    # By its path: -m would look for the package in the current directory first.
    main_module = str(Path(__file__).parent.parent / "__main__.py")
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.flush()
    arguments = [sys.executable, *_interpreter_flags(), main_module]
    os.execve(sys.executable, arguments, environment)  # noqa: S606  # no shell is wanted


def _malloc(config: Config) -> dict[str, str]:
    """Give how glibc is to keep memory: the kernel gets no page back that is soon wanted again.

    With 32 responses of 1 MB under way each costs a third less processor time.
    """
    share = conf.memory_limit() // (KEPT_SHARE * config.workers)
    return {
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": str(LEAST_KEPT),
        "MALLOC_TRIM_THRESHOLD_": str(min(max(share, LEAST_KEPT), MOST_KEPT)),
    }


def _interpreter_flags() -> list[str]:
    # -O, -X dev, -W error …; multiprocessing starts its children with these.
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # noqa: SLF001
    return flags


def main() -> NoReturn:
    """Be the arbiter. Run by ``python -m django_aioserve`` with the data of `launch`."""
    text = os.environ.pop(VARIABLE, None)
    if text is None:
        sys.exit("Start the server by: manage.py runaio")
    data = Launch.load(text)
    sys.path[:] = data.path
    conf.set_flags(data.flags)
    AioserveApplication(data).run()
    sys.exit(0)


# --------------------------------------------------------------------------- the application


def is_there(path: str) -> bool:
    """Tell whether the module of a dotted path is there, without importing that module.

    The packages that it is in are imported. "" is Django's own handler, which is there.
    """
    try:
        return not path or importlib.util.find_spec(path.rpartition(".")[0]) is not None
    except (ImportError, ValueError):
        return False


_ARTICLE = {"wsgi": "a WSGI", "asgi": "an ASGI"}


def load_application(interface: str, path: str) -> web.Application:
    """Import the project's application and give the aiohttp application that serves it.

    ``interface`` is "wsgi" or "asgi", ``path`` its dotted path; "" is Django's own
    handler. An aiohttp application that is found there is served as it is. The settings
    are resolved here and now: a worker that a later SIGHUP starts goes by the new ones.

    Raises `ConfigurationError` where there is nothing at ``path``; what the project's
    code raises passes.
    """
    import django
    from aiohttp import web

    # An ASGI application need not be Django's, and then nobody else sets Django up.
    django.setup()
    found = _import_application(interface, path)
    if isinstance(found, web.Application):
        return found
    if not callable(found):
        expected = f"the dotted path of an application; what is there is {type(found).__name__}"
        raise ConfigurationError([_application_problem(interface, path, expected)])
    from django.core.handlers.wsgi import WSGIHandler

    from django_aioserve.application import build_application, is_asgi

    if is_asgi(found) if interface == "wsgi" else isinstance(found, WSGIHandler):
        other = "asgi" if interface == "wsgi" else "wsgi"
        expected = (
            f"{_ARTICLE[interface]} application; for {_ARTICLE[other]} application, such as "
            f'this one, set {other.upper()}_APPLICATION and AIOSERVE_INTERFACE = "{other}"'
        )
        raise ConfigurationError([_application_problem(interface, path, expected)])
    config = conf.resolve()
    if interface == "asgi":
        return build_application(config, asgi_application=found)
    return build_application(config, found)


def _import_application(interface: str, path: str) -> Any:
    if path:
        try:
            return conf.import_dotted(path)
        except ImportError as error:
            if error.__traceback__ is None or not _is_ours(error):
                raise
            expected = f"a dotted path that can be imported: {error}"
            problem = _application_problem(interface, path, expected)
            raise ConfigurationError([problem]) from error
    if interface == "asgi":
        from django.core.asgi import get_asgi_application

        return get_asgi_application()
    from django.core.wsgi import get_wsgi_application

    return get_wsgi_application()


def _application_problem(interface: str, path: str, expected: str) -> Problem:
    return Problem(f"{interface.upper()}_APPLICATION", "Django settings", path, expected)


def _is_ours(error: ImportError) -> bool:
    """Tell whether the dotted path was wrong, rather than code that it leads to."""
    frames = traceback.extract_tb(error.__traceback__)
    return frames[-1].filename == conf.__file__


class LaunchedArbiter(RecyclingArbiter):
    """The arbiter of a `Launch`: it upgrades by the same command, and tidies up its sockets."""

    LISTENERS: list[BaseSocket]

    def __init__(self, app: AioserveApplication) -> None:
        super().__init__(app)
        self.START_CTX["args"] = app.data.command
        # Gunicorn's own way leaves a socket open, and guesses the family from the name.
        self.LISTENERS = [_gunicorn_socket(number, self) for number in app.data.listeners]

    def spawn_worker(self) -> int:
        """Fork one worker; give its pid."""
        try:
            return super().spawn_worker()
        except SystemExit:  # this is the worker's process, and its end: in its boot, perhaps
            for listener in self.LISTENERS:
                listener.close()
            raise

    def stop(self, graceful: bool = True) -> None:
        """End all workers, and remove the socket files unless another arbiter goes on with them."""
        # Gunicorn's own would remove files of systemd's, and trips over abstract sockets.
        upgrading = self.reexec_pid or self.master_pid
        close_listeners(self.LISTENERS, [] if upgrading else self.app.data.files)
        self.LISTENERS = []
        super().stop(graceful)


def _gunicorn_socket(number: int, arbiter: Arbiter) -> BaseSocket:
    adopted = socket.socket(fileno=number)
    kinds = {socket.AF_INET6: TCP6Socket, socket.AF_UNIX: UnixSocket}
    kind = kinds.get(adopted.family, TCPSocket)
    name = adopted.getsockname()
    adopted.detach()
    return kind(name, arbiter.cfg, arbiter.log, fd=number)


class AioserveApplication(BaseApplication):  # type: ignore[misc]
    """What Gunicorn's arbiter runs: the settings and the project of one `Launch`."""

    arbiter_class: ClassVar[type[Arbiter]] = LaunchedArbiter

    def __init__(self, data: Launch) -> None:
        self.data = data
        self.config = data.config
        super().__init__()

    @property
    def config_command(self) -> list[str]:
        """The command that prints the settings as a start would find them now."""
        return [*self.data.command, "--print-config=json"]

    def do_load_config(self) -> None:
        """Give Gunicorn its settings. Unlike Gunicorn's own, this ends no process."""
        cfg = _gunicorn_config(self.config)
        when_ready = cfg.when_ready

        def announce(arbiter: Arbiter) -> None:
            _say(self._banner(arbiter.LISTENERS))
            when_ready(arbiter)

        cfg.set("when_ready", announce)
        cfg.env_orig[FILES_VARIABLE] = json.dumps(self.data.files)
        self.cfg = cfg

    def reload(self) -> None:
        """Set everything afresh for a SIGHUP; what fails leaves the settings as they are."""
        try:
            self.do_load_config()
        except Exception:
            # The service goes on, whatever a class or file that Gunicorn is told of has become.
            logging.getLogger("gunicorn.error").exception("The settings stay as they were")

    def load(self) -> web.Application:
        """Load the project; called in each worker, or in the arbiter with ``preload``."""
        try:
            return load_application(self.config.interface, self.data.application)
        except ConfigurationError as error:
            # Gunicorn prints this one without a traceback.
            raise AppImportError(str(error)) from error

    def run(self) -> None:
        """Run the arbiter until it is stopped; ends the process where it cannot start."""
        try:
            self.arbiter_class(self).run()
        except (RuntimeError, AppImportError) as error:
            sys.exit(f"Error: {str(error).removeprefix('Error: ')}")

    def _banner(self, listeners: Iterable[BaseSocket]) -> list[str]:
        import aiohttp
        import django

        config = self.config
        loop = "asyncio"
        if config.loop != "asyncio" and importlib.util.find_spec("uvloop") is not None:
            loop = "uvloop"
        versions = [
            f"Django {django.get_version()}",
            f"aiohttp {aiohttp.__version__}",
            f"Gunicorn {gunicorn.__version__}",
            "Python {}.{}.{}".format(*sys.version_info),
            loop,
        ]
        details = [_workers(config)]
        if config.max_requests:
            most = config.max_requests + config.max_requests_jitter
            span = f" to {most}" if config.max_requests_jitter else ""
            details.append(f"recycled after {config.max_requests}{span} requests")
        served = self.data.application or f"Django's {config.interface.upper()} application"
        lines = [f"Serving {served} at {_url(each, config)}" for each in listeners]
        lines[0] = " · ".join([lines[0], *details])
        return [" · ".join([f"django-aioserve {_version()}", *versions]), *lines]


def _workers(config: Config) -> str:
    workers = f"{config.workers} worker{'' if config.workers == 1 else 's'}"
    threads = f"{config.threads} thread{'' if config.threads == 1 else 's'}"
    return f"{workers} × {threads}"  # noqa: RUF001  # the sign is meant


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("django-aioserve")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _url(listener: BaseSocket, config: Config) -> str:
    name = listener.getsockname()
    if isinstance(name, bytes):
        return f"unix:@{os.fsdecode(name[1:])}"
    if isinstance(name, str):
        return f"unix:{name}"
    host, port = name[:2]
    scheme = "https" if config.certfile else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _say(lines: Iterable[str]) -> None:
    """Write to standard output; the server lives on where that is closed or speaks only ASCII."""
    stream = sys.stdout
    with contextlib.suppress(AttributeError, OSError, ValueError):
        text = "".join(f"{line}\n" for line in lines)
        stream.write(text.encode(stream.encoding, "replace").decode(stream.encoding))
        stream.flush()

"""The one table of settings.

Rules:

* An option is declared once, as a field of `Config`. Its Django setting
  (``AIOSERVE_<NAME>``), its environment variable (the same name), its flag of
  ``runaio``, its system check, its line of ``--print-config`` and its entry in the
  reference page are all made from that declaration.
* Flag > environment > Django setting > default.
* Nothing is coerced silently: a value is either of its kind or a `Problem`.
* Nothing is read at import. `resolve` reads afresh each time, so that
  ``override_settings`` works; what it gives is frozen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import inspect
import ipaddress
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast
from urllib.parse import urlsplit

import environ  # type: ignore[import-untyped]

from django_aioserve.exceptions import ConfigurationError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "OPTIONS",
    "PREFIX",
    "Config",
    "Flags",
    "Option",
    "Source",
    "available_cpus",
    "can_be_called",
    "import_dotted",
    "memory_limit",
    "memory_room",
    "parse_bind",
    "resolve",
    "set_flags",
]

PREFIX = "AIOSERVE_"

# --------------------------------------------------------------------------- kinds


class Kind:
    """A kind of value: how it is read, checked, shown and described."""

    expected: str = "a value"
    metavar: str = "VALUE"

    def parse(self, text: str) -> Any:
        """Take the text of a flag or an environment variable, give the value."""
        return self.clean(text)

    def clean(self, value: Any) -> Any:
        """Take a value as a Django setting may hold it, give it in its one form.

        Raises `ValueError` where it is not of this kind.
        """
        raise NotImplementedError

    def show(self, value: Any) -> str:
        """Give the text from which `parse` would make ``value`` again."""
        return str(value)


class Integer(Kind):
    metavar = "N"

    def __init__(self, low: int = 0, high: int | None = None) -> None:
        self.low, self.high = low, high
        above = f" and at most {high}" if high is not None else ""
        self.expected = f"a whole number of at least {low}{above}"

    def clean(self, value: Any) -> int:
        if isinstance(value, str) and re.fullmatch(r"[0-9]{1,18}", value.strip()):
            value = int(value)
        if (
            isinstance(value, bool)
            or not isinstance(value, int)
            or value < self.low
            or (self.high is not None and value > self.high)
        ):
            raise ValueError
        return value


class Workers(Integer):
    metavar = "N|auto"

    def __init__(self) -> None:
        super().__init__(low=1, high=1024)
        self.expected = 'a whole number from 1 to 1024, or "auto"'

    def clean(self, value: Any) -> int:
        if value == "auto":
            return available_cpus()
        return super().clean(value)


class Duration(Kind):
    metavar = "SECONDS"
    units: ClassVar[dict[str, float]] = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}

    def __init__(self, low: float = 0.0) -> None:
        self.low = low
        at_least = f" of at least {low:g} s" if low else ""
        self.expected = f"a duration{at_least} such as 90, 90s, 15m or 1h"

    def clean(self, value: Any) -> float:
        if isinstance(value, str):
            match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(ms|s|m|h|d)?\s*", value, re.ASCII)
            if match is None:
                raise ValueError
            value = float(match[1]) * self.units[match[2] or "s"]
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not math.isfinite(value)
            or value < self.low
        ):
            raise ValueError
        return float(value)

    def show(self, value: float) -> str:
        return f"{value:.6f}".rstrip("0").rstrip(".")


_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(?:i?B)?\s*", re.IGNORECASE | re.ASCII)
_SIZE_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def _size(value: Any) -> int:
    if isinstance(value, str):
        match = _SIZE.fullmatch(value)
        if match is None or ("." in match[1] and not match[2]):
            raise ValueError
        value = int(float(match[1]) * _SIZE_UNITS[match[2].upper()])
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError
    return value


def _show_size(value: int) -> str:
    for unit in ("T", "G", "M", "K"):
        if value and value % _SIZE_UNITS[unit] == 0:
            return f"{value // _SIZE_UNITS[unit]}{unit}"
    return str(value)


class Size(Kind):
    metavar = "SIZE"

    def __init__(self, low: int = 0) -> None:
        self.low = low
        at_least = f" of at least {low}" if low else ""
        self.expected = f"a size in bytes{at_least} such as 1048576, 512K, 512M or 2G"

    def clean(self, value: Any) -> int:
        size = _size(value)
        if size < self.low:
            raise ValueError
        return size

    def show(self, value: int) -> str:
        return _show_size(value)


class MemorySize(Kind):
    """A size, or a share of the memory that the container (or the host) may use."""

    metavar = "SIZE"
    expected = "a size such as 512M or 2G, or a share of the container's memory such as 20%"

    def clean(self, value: Any) -> int:
        if isinstance(value, str):
            match = re.fullmatch(r"\s*([0-9]{1,3}(?:\.[0-9]+)?)\s*%\s*", value, re.ASCII)
            if match is not None:
                share = float(match[1])
                if not 0 < share <= 100:
                    raise ValueError
                return int(memory_limit() * share / 100)
        return _size(value)

    def show(self, value: int) -> str:
        return _show_size(value)


class Boolean(Kind):
    metavar = "BOOL"
    expected = "true or false"
    words: ClassVar[dict[str, bool]] = {
        **dict.fromkeys(("true", "yes", "on", "1"), True),
        **dict.fromkeys(("false", "no", "off", "0"), False),
    }

    def parse(self, text: str) -> bool:
        try:
            return self.words[text.strip().lower()]
        except KeyError:
            raise ValueError from None

    def clean(self, value: Any) -> bool:
        if isinstance(value, str):
            return self.parse(value)
        if value is not True and value is not False:
            raise ValueError
        return bool(value)

    def show(self, value: bool) -> str:
        return "true" if value else "false"


class Choice(Kind):
    def __init__(self, *choices: str) -> None:
        self.choices = choices
        self.metavar = "|".join(choices)
        self.expected = "one of " + ", ".join(choices)

    def clean(self, value: Any) -> str:
        if not isinstance(value, str) or value.strip().lower() not in self.choices:
            raise ValueError
        return value.strip().lower()


class Text(Kind):
    def __init__(
        self, expected: str = "a text", metavar: str = "TEXT", *, empty: bool = False
    ) -> None:
        self.expected, self.metavar, self.empty = expected, metavar, empty

    def clean(self, value: Any) -> str:
        if not isinstance(value, str) or (not value and not self.empty) or "\0" in value:
            raise ValueError
        return value


class FilePath(Kind):
    """A path of a file system; "" where there is none.

    What is there is looked at when the server starts: ``migrate`` in a build
    container must not need the certificate.
    """

    metavar = "PATH"
    expected = "a path"

    def clean(self, value: Any) -> str:
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if not isinstance(value, str) or "\0" in value:
            raise ValueError
        return value


class AccessLog(Kind):
    metavar = "PATH"
    expected = 'true or "-" for standard output, a path, or false for none'

    def clean(self, value: Any) -> str:
        if isinstance(value, bool):
            return "-" if value else ""
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if not isinstance(value, str) or "\0" in value:
            raise ValueError
        word = Boolean.words.get(value.lower())
        return value if word is None else self.clean(word)

    def show(self, value: str) -> str:
        return value or "false"


class AccessLogFormat(Text):
    """Gunicorn's format: %(h)s, %({referer}i)s … (setting ``access_log_format``)."""

    def __init__(self) -> None:
        super().__init__(
            "a format of Gunicorn's access log, such as '%(h)s \"%(r)s\" %(s)s'", "FORMAT"
        )

    def clean(self, value: Any) -> str:
        text = super().clean(value)
        try:
            _ = text % _AnyAtom()
        except (TypeError, ValueError, KeyError):
            raise ValueError from None
        return text


class _AnyAtom(dict[str, str]):
    def __missing__(self, key: str) -> str:
        return "0"


class Items(Kind):
    """Several values of one kind: a list in Django's settings, else separated by commas."""

    def __init__(self, item: Kind, plural: str) -> None:
        self.item = item
        self.metavar = item.metavar
        self.expected = f"{plural}, each {item.expected}"

    def parse(self, text: str) -> tuple[Any, ...]:
        return tuple(self.item.clean(part.strip()) for part in text.split(",") if part.strip())

    def clean(self, value: Any) -> tuple[Any, ...]:
        if isinstance(value, str):
            return self.parse(value)
        if isinstance(value, (Mapping, bytes, bytearray)):
            raise ValueError  # noqa: TRY004  # what is not of a kind is a ValueError
        if not isinstance(value, Iterable):  # AIOSERVE_BIND = 8000
            return (self.item.clean(value),)
        return tuple(self.item.clean(part) for part in value)

    def show(self, value: tuple[Any, ...]) -> str:
        return ",".join(self.item.show(part) for part in value)


class Bind(Kind):
    metavar = "ADDRESS"
    expected = "PORT, HOST:PORT, [IPV6]:PORT, unix:PATH or fd://N"

    def clean(self, value: Any) -> str:
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        text = Text().clean(value)
        parse_bind(text)
        return text


class Network(Kind):
    metavar = "NETWORKS"
    expected = 'an IP address, a network such as 10.0.0.0/8, "unix" or "*"'

    def clean(self, value: Any) -> str:
        text = Text().clean(value)
        if text not in ("*", "unix"):
            ipaddress.ip_network(text)
        return text


class Origin(Kind):
    metavar = "ORIGINS"
    expected = 'an origin such as https://example.com or https://*.example.com, or "*"'

    def clean(self, value: Any) -> str:
        text = Text().clean(value)
        if text != "*":
            parts = urlsplit(text)
            _ = parts.port  # ValueError where it is none
            if not (parts.scheme and parts.hostname) or parts.path.strip("/") or parts.query:
                raise ValueError
        return text


class DottedPath(Kind):
    """A dotted path (``package.module.name``) or, in Django's settings, the object itself."""

    metavar = "DOTTED.PATH"
    expected = "a dotted path such as project.module.name"

    def clean(self, value: Any) -> str:
        if callable(value) and hasattr(value, "__qualname__"):
            value = f"{value.__module__}.{value.__qualname__}"
        text = Text(empty=True).clean(value)
        parts = text.split(".")
        if text and not (len(parts) > 1 and all(part.isidentifier() for part in parts)):
            raise ValueError
        return text


class UrlPath(Kind):
    metavar = "PATHS"
    expected = 'a path that begins with "/"'

    def clean(self, value: Any) -> str:
        if not isinstance(value, str) or not re.fullmatch(r"/[!-~]*", value):
            raise ValueError
        return value


class GunicornSettings(Kind):
    """Settings by Gunicorn's names; functions, classes and paths become their names.

    They travel to another process as text. Whether Gunicorn knows and accepts them
    is for the launcher to say, which may import Gunicorn.
    """

    metavar = ""
    expected = "a dictionary of Gunicorn's settings"

    def clean(self, value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise ValueError
        return {key: self._named(item) for key, item in value.items()}

    @staticmethod
    def _named(value: Any) -> Any:
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        if callable(value):
            with contextlib.suppress(ValueError):
                return DottedPath().clean(value)
        return value


# --------------------------------------------------------------------------- table


@dataclass(frozen=True, slots=True)
class Option:
    """One row of the table."""

    name: str
    kind: Kind
    default: Any
    help: str
    group: str
    flag: bool
    """Whether ``runaio`` takes it as a flag."""

    @property
    def setting(self) -> str:
        """The name of the Django setting and of the environment variable."""
        return PREFIX + self.name.upper()

    @property
    def flag_name(self) -> str:
        """The flag of ``runaio``."""
        return "--" + self.name.replace("_", "-")

    @property
    def default_text(self) -> str:
        """The default as a flag would spell it."""
        return self.kind.show(self.default)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a value came from: ``kind`` is flag, environment, setting or default."""

    kind: str
    name: str

    def __str__(self) -> str:
        return {
            "flag": "command line",
            "environment": "environment",
            "setting": "Django settings",
            "default": "default",
        }[self.kind]


def _option(default: Any, kind: Kind, group: str, help: str, *, flag: bool = True) -> Any:  # noqa: A002
    row = {"default": default, "kind": kind, "group": group, "help": help, "flag": flag}
    return field(default_factory=lambda: default, metadata=row)


_SOCKETS, _WORKERS, _TIMES, _RECYCLING = "Sockets", "Workers", "Times", "Recycling"
_LOGGING, _APPLICATION = "Logging", "Application"


@dataclass(frozen=True, kw_only=True)
class Config:
    """The resolved configuration: one typed value for each option.

    Made by `resolve`; ``sources`` tells for each field where its value came from.
    Sizes are in bytes, durations in seconds.
    """

    # Sockets
    bind: tuple[str, ...] = _option(
        ("127.0.0.1:8000",),
        Items(Bind(), "one or more addresses"),
        _SOCKETS,
        "Address to listen on: PORT, HOST:PORT, [IPV6]:PORT, unix:PATH or fd://N. May be repeated.",
    )
    backlog: int = _option(
        2048, Integer(1, 65535), _SOCKETS, "Connections that may wait to be accepted."
    )
    certfile: str = _option("", FilePath(), _SOCKETS, "TLS certificate (PEM); TLS is on with it.")
    keyfile: str = _option(
        "", FilePath(), _SOCKETS, "Key of the TLS certificate, where it is a file of its own."
    )
    forwarded_allow_ips: tuple[str, ...] = _option(
        ("127.0.0.1", "::1", "unix"),
        Items(Network(), "peers"),
        _SOCKETS,
        'Proxies whose X-Forwarded-* headers count: addresses, networks, "unix" for peers on '
        'Unix sockets, "*" for all. From other peers these headers are removed.',
    )
    max_body_size: int = _option(
        1 << 30, Size(1), _SOCKETS, "Largest request body; a larger one is answered with 413."
    )

    # Workers
    workers: int = _option(
        1, Workers(), _WORKERS, 'Worker processes; "auto": one for each CPU that the cgroup allows.'
    )
    threads: int = _option(
        8,
        Integer(1, 1024),
        _WORKERS,
        "Threads for synchronous Django code, at most, in each worker.",
    )
    queue_size: int = _option(
        1024,
        Integer(1),
        _WORKERS,
        "Requests that may wait for a thread of a worker; further ones get 503.",
    )
    loop: str = _option(
        "auto",
        Choice("auto", "uvloop", "asyncio"),
        _WORKERS,
        "Event loop; auto: uvloop where installed.",
    )
    preload: bool = _option(
        False,
        Boolean(),
        _WORKERS,
        "Load the project once, before the workers are forked: memory is shared, but HUP keeps the "
        "old code.",
    )

    # Times
    timeout: float = _option(
        30.0,
        Duration(),
        _TIMES,
        "A worker whose event loop stands still for longer is killed and replaced (0: never).",
    )
    graceful_timeout: float = _option(
        30.0,
        Duration(0.1),
        _TIMES,
        "Time that a stopping worker has to finish the requests it has begun.",
    )
    keepalive: float = _option(
        75.0,
        Duration(),
        _TIMES,
        "Time an idle connection stays open; longer than that of the proxy in front.",
    )
    header_timeout: float = _option(
        10.0, Duration(0.1), _TIMES, "Time for the header of a request to arrive once it has begun."
    )
    body_timeout: float = _option(
        15.0, Duration(0.1), _TIMES, "A request body that stalls for longer is answered with 408."
    )
    write_timeout: float = _option(
        30.0, Duration(0.1), _TIMES, "A client that reads nothing for longer is disconnected."
    )
    linger: float = _option(
        5.0,
        Duration(),
        _TIMES,
        "Time that a leaving worker keeps idle connections open to answer late requests on them.",
    )
    stream_linger: float = _option(
        10.0,
        Duration(),
        _TIMES,
        "Time over which a leaving worker closes its WebSockets and event streams, one by one.",
    )
    request_timeout: float = _option(
        0.0,
        Duration(),
        _TIMES,
        "Time for a request to be answered; after it the client gets 504 and the worker, "
        "in which something is stuck, is replaced (0: no limit).",
    )

    # Recycling
    max_requests: int = _option(
        0, Integer(), _RECYCLING, "Requests after which a worker is replaced (0: never)."
    )
    max_requests_jitter: int = _option(
        0, Integer(), _RECYCLING, "Up to so many requests more, drawn for each worker."
    )
    hold: float = _option(
        2.5,
        Duration(),
        _RECYCLING,
        "Longest pause that keeping exactly to max_requests may cost: where a replacement takes "
        "longer to boot, a worker at its limit serves on until it is there.",
    )
    max_rss: int = _option(
        0,
        MemorySize(),
        _RECYCLING,
        "Resident memory at which a worker is replaced: 512M, or 20% of the container's "
        "(0: never).",
    )
    max_rss_total: int = _option(
        0,
        MemorySize(),
        _RECYCLING,
        "Resident memory of all workers together, the one included that boots; before it is "
        "reached the largest is replaced (0: no limit).",
    )
    max_lifetime: float = _option(
        0.0, Duration(), _RECYCLING, "Age at which a worker is replaced (0: never)."
    )
    max_lifetime_jitter: float = _option(
        0.0, Duration(), _RECYCLING, "Up to so much older, drawn for each worker."
    )
    min_lifetime: float = _option(
        0.0,
        Duration(),
        _RECYCLING,
        "Age below which no worker is replaced for any limit, against storms.",
    )
    recycle_when: str = _option(
        "",
        DottedPath(),
        _RECYCLING,
        "A function of a worker's Sample that gives the reason to replace it, or None.",
    )
    recycle_dry_run: bool = _option(
        False, Boolean(), _RECYCLING, "Only report which workers would be replaced for a limit."
    )
    max_retiring: int = _option(
        1, Integer(1, 1024), _RECYCLING, "Workers that are replaced at the same time, at most."
    )
    boot_timeout: float = _option(
        60.0,
        Duration(0.1),
        _RECYCLING,
        "Time for a worker to boot; one that hangs for longer is killed.",
    )
    warmup: tuple[str, ...] = _option(
        (),
        Items(UrlPath(), "paths"),
        _RECYCLING,
        "Paths that a new worker asks itself for, and answers below 500, before it counts as "
        "ready.",
    )

    # Logging
    access_log: str = _option(
        "", AccessLog(), _LOGGING, 'Access log: a path, or "-" for standard output.'
    )
    access_log_format: str = _option(
        '%(h)s %(l)s %(u)s %(t)s "%(r)s" %(s)s %(b)s "%(f)s" "%(a)s"',
        AccessLogFormat(),
        _LOGGING,
        "Format of the access log, in Gunicorn's atoms.",
    )
    log_level: str = _option(
        "info",
        Choice("debug", "info", "warning", "error", "critical"),
        _LOGGING,
        "Level of the server's log.",
    )
    pidfile: str = _option("", FilePath(), _LOGGING, "File for the process id of the arbiter.")

    # Application
    interface: str = _option(
        "wsgi",
        Choice("wsgi", "asgi"),
        _APPLICATION,
        "Which application of the project is served: WSGI_APPLICATION or ASGI_APPLICATION.",
    )
    routes: tuple[str, ...] = _option(
        (),
        Items(DottedPath(), "dotted paths"),
        _APPLICATION,
        "aiohttp routes beside Django: a RouteTableDef, a list of RouteDef, a sub-application "
        "with its prefix, or a callable that takes the application.",
    )
    middlewares: tuple[str, ...] = _option(
        (),
        Items(DottedPath(), "dotted paths"),
        _APPLICATION,
        "aiohttp middlewares, outermost first.",
    )
    cleanup_ctx: tuple[str, ...] = _option(
        (),
        Items(DottedPath(), "dotted paths"),
        _APPLICATION,
        "Asynchronous generators that start and clean up what the aiohttp application needs.",
    )
    static: bool = _option(
        True,
        Boolean(),
        _APPLICATION,
        "Serve STATIC_URL from STATIC_ROOT (with DEBUG: from the finders).",
    )
    static_headers: str = _option(
        "",
        DottedPath(),
        _APPLICATION,
        "A function of (headers, path, url) that may change the headers of a static file.",
    )
    media: bool = _option(False, Boolean(), _APPLICATION, "Serve MEDIA_URL from MEDIA_ROOT.")
    websocket_origins: tuple[str, ...] = _option(
        (),
        Items(Origin(), "origins"),
        _APPLICATION,
        "Origins from which WebSockets may be opened, besides the host itself and "
        "CSRF_TRUSTED_ORIGINS.",
    )
    websocket_max_size: int = _option(
        1 << 20,
        Size(),
        _APPLICATION,
        "Largest WebSocket message; a larger one closes with 1009 (0: no limit).",
    )
    websocket_heartbeat: float = _option(
        20.0,
        Duration(),
        _APPLICATION,
        "Interval of WebSocket pings; a peer that answers none is gone (0: none).",
    )
    groups_url: str = _option(
        "",
        Text(
            '"redis://…", "rediss://…", "unix://…" or "hub:///DIRECTORY", or empty',
            "URL",
            empty=True,
        ),
        _APPLICATION,
        "What carries group messages: Redis, between machines; hub:///DIRECTORY, between the "
        "processes of this machine; empty: a hub within this server.",
    )
    groups_prefix: str = _option(
        "",
        Text("a text", "TEXT", empty=True),
        _APPLICATION,
        "Name space of this project's groups in a shared Redis; "
        "empty: made of the settings module's name and SECRET_KEY.",
    )
    groups_queue_size: int = _option(
        100,
        Integer(1),
        _APPLICATION,
        "Group messages that may wait for a slow subscriber; older ones are dropped.",
    )
    gunicorn: Mapping[str, Any] = _option(
        {},
        GunicornSettings(),
        _APPLICATION,
        "Any other of Gunicorn's settings, by Gunicorn's name; hooks as dotted paths.",
        flag=False,
    )

    sources: Mapping[str, Source] = field(default_factory=dict, compare=False, repr=False)

    def source(self, name: str) -> Source:
        """Tell where the value of the option ``name`` came from."""
        return self.sources.get(name) or Source("default", PREFIX + name.upper())

    def problem(self, name: str, expected: str, *, id: str = "E003") -> Problem:  # noqa: A002
        """Make a `Problem` of this configuration's value of the option ``name``."""
        source = self.source(name)
        option = OPTIONS[name]
        value = getattr(self, name)
        shown = value if isinstance(option.kind, GunicornSettings) else option.kind.show(value)
        return Problem(source.name, str(source), shown, expected, id)

    def imported(self, name: str, path: str) -> Any:
        """Import the dotted path that the option ``name`` has given.

        Raises what `import_dotted` does; what the module itself raises bears a note that
        names the option.
        """
        try:
            return import_dotted(path)
        except ImportError:
            raise  # the caller makes a `Problem` of it
        except Exception as error:
            source = self.source(name)
            error.add_note(f'{source.name} ({source}) is "{path}"')
            raise

    def dump(self) -> dict[str, Any]:
        """Give all values and their sources as JSON can carry them; `load` takes them back."""
        return {
            option.name: {
                "value": getattr(self, option.name),
                "source": self.source(option.name).kind,
                "name": self.source(option.name).name,
            }
            for option in OPTIONS.values()
        }

    @classmethod
    def load(cls, dumped: Mapping[str, Any]) -> Config:
        """Make the configuration that `dump` gave. The values are not checked again."""
        values: dict[str, Any] = {
            name: tuple(row["value"]) if isinstance(row["value"], list) else row["value"]
            for name, row in dumped.items()
        }
        sources = {name: Source(row["source"], row["name"]) for name, row in dumped.items()}
        return cls(**values, sources=sources)


def _table() -> dict[str, Option]:
    rows = {}
    for item in dataclasses.fields(Config):
        if "kind" in item.metadata:
            rows[item.name] = Option(item.name, **item.metadata)
    return rows


# --------------------------------------------------------------------------- resolution

Flags = Mapping[str, str | list[str]]

_process_flags: dict[str, str | list[str]] = {}


def set_flags(flags: Flags) -> None:
    """Make ``flags`` the command line of this process, which `resolve` goes by.

    ``runaio`` and its workers do so: `get_aio_application` in a project's ``wsgi.py``
    sees what was given on the command line, though it is given nothing.
    """
    _process_flags.clear()
    _process_flags.update(flags)


def resolve(
    flags: Flags | None = None,
    *,
    settings: object = None,
    environment: Mapping[str, str] | None = None,
) -> Config:
    """Resolve the configuration: flag > environment > Django setting > default.

    ``flags`` maps names of options to the texts given on the command line (a list
    for one that was repeated); left out, they are those of `set_flags`. ``settings``
    stands in for ``django.conf.settings`` and ``environment`` for ``os.environ``.

    Raises `ConfigurationError`, with every mistake that was found.
    """
    if settings is None:
        from django.conf import settings
    env = environ.Env()
    if environment is not None:
        env.ENVIRON = environment
    problems: list[Problem] = [*_unknown_names(settings, env.ENVIRON)]
    values: dict[str, Any] = {}
    sources: dict[str, Source] = {}
    flags = _process_flags if flags is None else flags
    for option in OPTIONS.values():
        raw, source = _find(option, flags, env, settings)
        sources[option.name] = source
        try:
            values[option.name] = _read(option.kind, raw, source)
        except ValueError:
            given = env.ENVIRON[source.name] if source.kind == "environment" else _plain(raw)
            problems.append(Problem(source.name, str(source), given, option.kind.expected))
    if not problems:
        config = Config(**values, sources=sources)
        problems.extend(_contradictions(config))
        if not problems:
            return config
    raise ConfigurationError(problems)


def _find(option: Option, flags: Flags, env: environ.Env, settings: object) -> tuple[Any, Source]:
    if flags.get(option.name) is not None:
        return flags[option.name], Source("flag", option.flag_name)
    if option.flag and option.setting in env.ENVIRON:
        return _environment(env, option.setting), Source("environment", option.setting)
    if hasattr(settings, option.setting):
        return getattr(settings, option.setting), Source("setting", option.setting)
    return option.default, Source("default", option.setting)


def _environment(env: environ.Env, name: str) -> str | None:
    try:
        return cast("str", env.str(name))
    except environ.ImproperlyConfigured:  # "$OTHER", and there is no OTHER
        return None


def _read(kind: Kind, raw: Any, source: Source) -> Any:
    if raw is None:
        raise ValueError
    if source.kind == "default":
        return kind.clean(raw) if isinstance(kind, Workers) else raw
    if source.kind == "setting":
        return kind.clean(raw)
    if isinstance(raw, list):  # a flag that was repeated
        return tuple(value for text in raw for value in kind.parse(text))
    return kind.parse(raw)


def _plain(raw: Any) -> object:
    return ",".join(raw) if isinstance(raw, list) and all(isinstance(x, str) for x in raw) else raw


def _unknown_names(settings: object, environment: Mapping[str, str]) -> Iterable[Problem]:
    known = {option.setting for option in OPTIONS.values()}
    from_environment = {option.setting for option in OPTIONS.values() if option.flag}
    places = (
        ("Django settings", (n for n in dir(settings) if n.startswith(PREFIX)), known),
        ("environment", (n for n in environment if n.startswith(PREFIX)), from_environment),
    )
    for source, names, allowed in places:
        for name in sorted(set(names) - allowed):
            value = getattr(settings, name) if source == "Django settings" else environment[name]
            if name in known:
                expected = f"{name} in the Django settings, for it is a dictionary"
            else:
                bare = [each.removeprefix(PREFIX) for each in allowed]
                near = difflib.get_close_matches(name.removeprefix(PREFIX).upper(), bare, 1)
                expected = (
                    f"a known option; did you mean {PREFIX}{near[0]}?" if near else "a known option"
                )
            yield Problem(name, source, value, expected, "E001")


def _contradictions(config: Config) -> Iterable[Problem]:
    if config.keyfile and not config.certfile:
        yield config.problem("keyfile", "AIOSERVE_CERTFILE to be set with it")
    for name in ("max_requests", "max_lifetime"):
        if getattr(config, f"{name}_jitter") and not getattr(config, name):
            yield config.problem(f"{name}_jitter", f"{PREFIX}{name.upper()} to be set with it")
    if 0 < config.max_lifetime < config.min_lifetime:
        yield config.problem("min_lifetime", f"no more than {PREFIX}MAX_LIFETIME")
    if 0 < config.max_rss_total < config.max_rss:
        yield config.problem("max_rss_total", "no less than AIOSERVE_MAX_RSS")
    if not config.bind:
        yield config.problem("bind", "at least one address")
    fixed = [address for address in map(parse_bind, config.bind) if not _is_any_port(address)]
    if len(set(fixed)) < len(fixed):
        yield config.problem("bind", "each address once")


# --------------------------------------------------------------------------- helpers


def parse_bind(text: str) -> tuple[str, int] | str | int:
    """Read an address to listen on.

    Gives ``(host, port)``, the path of a Unix socket (``unix:PATH``; ``unix:@NAME``
    is the abstract name space, given with a leading NUL), or the number of an
    inherited descriptor (``fd://N``). As with ``runserver``, a bare port means
    127.0.0.1. Raises `ValueError`.
    """
    if text.startswith("unix:"):
        path = text[5:].removeprefix("//")
        if not path or "\0" in path:
            raise ValueError(text)
        return "\0" + path[1:] if path.startswith("@") else path
    if text.startswith("fd://"):
        if not re.fullmatch(r"[0-9]{1,6}", text[5:]):
            raise ValueError(text)
        return int(text[5:])
    match = re.fullmatch(r"(?:(\[[0-9A-Fa-f:.%\w]+\]|[^\s:\[\]/@]*):)?([0-9]{1,5})", text, re.ASCII)
    if match is None or int(match[2]) > 65535:
        raise ValueError(text)
    host = match[1]
    if host is None:
        return "127.0.0.1", int(match[2])
    if host.startswith("["):
        ipaddress.IPv6Address(host[1:-1])
        return host[1:-1], int(match[2])
    return host or "0.0.0.0", int(match[2])  # noqa: S104  # as everybody reads ":8000"


def _is_any_port(address: tuple[str, int] | str | int) -> bool:
    return isinstance(address, tuple) and address[1] == 0


def import_dotted(path: str) -> Any:
    """Import ``package.module.name`` (or ``name.attribute``).

    Raises `ImportError` that names the part that is not there.
    """
    parts = path.split(".")
    for split in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:split])
        try:
            found: Any = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
                continue
            raise
        for attribute in parts[split:]:
            if not hasattr(found, attribute):
                raise ImportError(f'there is no "{attribute}" in {name}')
            found = getattr(found, attribute)
        return found
    raise ImportError(f'there is no module "{parts[0]}"')


def can_be_called(value: Any, arguments: int) -> bool:
    """Tell whether ``value`` is no coroutine function and takes so many arguments."""
    if not callable(value) or inspect.iscoroutinefunction(value):
        return False
    try:
        inspect.signature(value).bind(*[None] * arguments)
    except TypeError:
        return False
    except ValueError:  # written in C, without a signature
        return True
    return True


def available_cpus(cgroup: str = "/sys/fs/cgroup") -> int:
    """Count the CPUs that this process may use: its affinity and the cgroup's quota.

    Reads ``cpu.max`` (cgroup v2) or ``cpu.cfs_quota_us`` (v1); a quota of 1.5 CPUs
    counts as 2, never more than the affinity and at least 1.
    """
    try:
        cpus = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cpus = os.cpu_count() or 1
    root = Path(cgroup)
    shares = [
        *_cgroup_numbers(root, "cpu.max"),
        *(
            [*quota, *period]
            for quota, period in zip(
                _cgroup_numbers(root / "cpu", "cpu.cfs_quota_us"),
                _cgroup_numbers(root / "cpu", "cpu.cfs_period_us"),
                strict=False,
            )
        ),
    ]
    allowed = [math.ceil(row[0] / row[1]) for row in shares if len(row) == 2 and min(row) > 0]
    return max(1, min([cpus, *allowed]))


def memory_limit(cgroup: str = "/sys/fs/cgroup") -> int:
    """Give the memory, in bytes, that this container may use, else that of the host."""
    total: int = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    root = Path(cgroup)
    limits = [
        *_cgroup_numbers(root, "memory.max"),
        *_cgroup_numbers(root / "memory", "memory.limit_in_bytes"),
    ]
    return min([total, *(row[0] for row in limits if row[0] > 0)])


def memory_room(cgroup: str = "/sys/fs/cgroup") -> int | None:
    """Give the memory, in bytes, that this container can still take; None where it has no limit.

    What the page cache holds counts as room, for the kernel gives it back.
    """
    rooms = []
    for place in _cgroup_path(Path(cgroup)):
        limit = _numbers(place / "memory.max")
        current = _numbers(place / "memory.current")
        if limit and current:
            rooms.append(limit[0] - current[0] + _page_cache(place))
    return min(rooms, default=None)


def _page_cache(place: Path) -> int:
    try:
        lines = (place / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))


def _cgroup_numbers(root: Path, name: str) -> Iterator[list[int]]:
    """Read a file of numbers in this process's cgroup and in each above it."""
    for place in _cgroup_path(root):
        if numbers := _numbers(place / name):
            yield numbers


def _numbers(file: Path) -> list[int]:
    """Read a file of numbers; none where one is no number, such as "max"."""
    try:
        words = file.read_text(encoding="ascii").split()
    except OSError:
        return []
    return [int(word) for word in words] if all(map(_INTEGER.fullmatch, words)) else []


_INTEGER = re.compile("-?[0-9]+")


def _cgroup_path(root: Path) -> Iterator[Path]:
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    own = next((line[3:] for line in lines if line.startswith("0::")), "/")
    if ".." not in own:
        place = root / own.strip("/")
        while place != root:
            yield place
            place = place.parent
    yield root


OPTIONS: Mapping[str, Option] = _table()

"""What this machine must have for a configuration to be served on it."""

from __future__ import annotations

import importlib.util
import os
import ssl
from pathlib import Path
from typing import TYPE_CHECKING

from django_aioserve.exceptions import Problem
from django_aioserve.server.listeners import is_upgrade

if TYPE_CHECKING:
    from collections.abc import Iterator

    from django_aioserve.conf import Config

__all__ = ["machine_problems", "pidfile_problems"]


def machine_problems(config: Config) -> Iterator[Problem]:
    """Find what this machine lacks for ``config`` to be served here.

    Files that are not there or not what they should be, libraries that are not
    installed. What a running server holds, its addresses and its pidfile, is no mistake
    until another is started: `pidfile_problems`, `django_aioserve.server.listeners.bind_sockets`.
    """
    yield from _parser()
    if config.loop == "uvloop" and importlib.util.find_spec("uvloop") is None:
        yield config.problem("loop", "auto or asyncio, for uvloop is not installed", id="E005")
    yield from _certificate(config)
    if config.access_log not in ("", "-"):
        yield from _writable(config, "access_log")
    if config.pidfile:
        yield from _writable(config, "pidfile", anew=True)


def _parser() -> Iterator[Problem]:
    from aiohttp import helpers, http_parser

    # Whoever sets AIOHTTP_NO_EXTENSIONS asked aiohttp for the parser written in Python.
    slow = http_parser.HttpRequestParser is http_parser.HttpRequestParserPy
    if slow and not helpers.NO_EXTENSIONS:
        yield Problem(
            "aiohttp's HTTP parser",
            "installation",
            "pure Python",
            "the one in C: install aiohttp from a wheel, or set AIOHTTP_NO_EXTENSIONS=1 to "
            "accept a slow and lenient parser",
            "E005",
        )


def _certificate(config: Config) -> Iterator[Problem]:
    if not config.certfile:
        return
    missing = [
        name
        for name in ("certfile", "keyfile")
        if (path := getattr(config, name))
        and not (Path(path).is_file() and os.access(path, os.R_OK))
    ]
    for name in missing:
        yield config.problem(name, "the path of a readable file", id="E005")
    if missing or "ssl_context" in config.gunicorn:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_verify_locations(config.certfile)
    except ssl.SSLError:
        yield config.problem("certfile", "a certificate in PEM form", id="E005")
        return
    key = "keyfile" if config.keyfile else "certfile"
    try:
        context.load_cert_chain(config.certfile, config.keyfile or None, _no_passphrase)
    except _PassphraseWantedError:
        yield config.problem(key, "a key without a passphrase", id="E005")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            expected = "the key that belongs to the certificate"
        elif config.keyfile:
            expected = "a key in PEM form"
        else:
            expected = "a file that holds the key too, or AIOSERVE_KEYFILE to be set"
        yield config.problem(key, expected, id="E005")


class _PassphraseWantedError(Exception):
    pass


def _no_passphrase() -> str:
    raise _PassphraseWantedError  # else OpenSSL asks for it at the terminal


def _writable(config: Config, name: str, *, anew: bool = False) -> Iterator[Problem]:
    path = Path(getattr(config, name))
    if path.is_dir():
        yield config.problem(name, "a path that is no directory", id="E005")
    elif not path.parent.is_dir():
        yield config.problem(name, "a path in a directory that exists", id="E005")
    elif anew and not os.access(path.parent, os.W_OK):  # Gunicorn moves a new file there
        yield config.problem(name, "a path in a directory that this user may write to", id="E005")
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        yield config.problem(name, "a path that this user may write to", id="E005")


def pidfile_problems(config: Config) -> Iterator[Problem]:
    """Find a living process that has written the pidfile, which a start would not replace."""
    if not config.pidfile or is_upgrade(os.environ):  # its arbiter is the one to take over from
        return
    try:
        pid = int(Path(config.pidfile).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return
    if pid != os.getpid() and _is_alive(pid):
        expected = f"a file that no living process has written (process {pid} lives)"
        yield config.problem("pidfile", expected, id="E005")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True  # it is another user's
    except (OSError, OverflowError):
        return False
    return True

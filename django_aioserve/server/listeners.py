"""The listening sockets: made before anything forks, or passed by somebody else.

Rules:

* Who passes sockets decides: systemd (LISTEN_PID and LISTEN_FDS, sd_listen_fds(3)), or an
  arbiter that upgrades itself (GUNICORN_PID and GUNICORN_FD). Else ``--bind`` does.
* A socket file is replaced only where nobody listens on it, and removed at the end only
  where it was made here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from django_aioserve.conf import parse_bind
from django_aioserve.exceptions import ConfigurationError, Problem

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from django_aioserve.conf import Config

__all__ = [
    "Permissions",
    "bind_sockets",
    "close_listeners",
    "is_upgrade",
    "passed_by_systemd",
    "socket_files",
]

FIRST_PASSED = 3
"""SD_LISTEN_FDS_START"""


class Permissions(NamedTuple):
    """What a new socket file gets; None leaves it to the process: its umask, its user."""

    umask: int | None = None
    user: int | None = None
    group: int | None = None


DEFAULT = Permissions()


class Listener(Protocol):
    """What Gunicorn's sockets and Python's have in common."""

    def getsockname(self) -> object: ...
    def close(self) -> None: ...


def is_upgrade(environment: Mapping[str, str]) -> bool:
    """Tell whether an arbiter that upgrades itself (USR2) passes its sockets."""
    return "GUNICORN_PID" in environment and "GUNICORN_FD" in environment


def passed_by_systemd(environment: Mapping[str, str]) -> list[int]:
    """Give the descriptors of the sockets that systemd passes to this process.

    Raises `ConfigurationError` where one of them is not a stream socket.
    """
    if environment.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = environment.get("LISTEN_FDS", "")
    try:
        numbers = list(range(FIRST_PASSED, FIRST_PASSED + int(count)))
        for number in numbers:
            _adopt(number).detach()
    except (ValueError, OSError):
        expected = (
            f"the number of stream sockets that are passed, from descriptor {FIRST_PASSED} on"
        )
        problem = Problem("LISTEN_FDS", "environment", count, expected, "E005")
        raise ConfigurationError([problem]) from None
    return numbers


def bind_sockets(config: Config, permissions: Permissions = DEFAULT) -> list[socket.socket]:
    """Make the listening sockets of ``config.bind``; they listen already.

    Raises `ConfigurationError`, with every address that could not be had; then none of
    them is left behind.
    """
    made: list[socket.socket] = []
    problems: list[Problem] = []
    for text in config.bind:
        try:
            made.append(_listen(text, config, permissions))
        except OSError as error:
            problem = config.problem("bind", _explain(error, text), id="E005")
            problems.append(dataclasses.replace(problem, value=text))
    if problems:
        close_listeners(made, socket_files(config))
        raise ConfigurationError(problems)
    return made


def socket_files(config: Config) -> list[str]:
    """Give the socket files that `bind_sockets` makes, for `close_listeners` to remove."""
    addresses = map(parse_bind, config.bind)
    return [path for path in addresses if isinstance(path, str) and not path.startswith("\0")]


def close_listeners(listeners: Iterable[Listener], files: Collection[str]) -> None:
    """Close sockets, and remove the socket files of those that are among ``files``."""
    for listener in listeners:
        name = listener.getsockname()
        listener.close()
        if isinstance(name, str) and name in files:
            with contextlib.suppress(OSError):
                Path(name).unlink()


def _listen(text: str, config: Config, permissions: Permissions) -> socket.socket:
    address = parse_bind(text)
    if isinstance(address, int):
        return _adopt(address)
    if isinstance(address, str):
        return _listen_unix(address, config.backlog, permissions)
    host, port = address
    family, _, _, _, found = min(
        socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE),
        key=lambda info: info[0] != socket.AF_INET,  # of a name the IPv4 address, as Gunicorn
    )
    # "::" takes IPv4 too, as people expect, unless that port is bound for IPv4 as well.
    both = (
        host == "::"
        and socket.has_dualstack_ipv6()
        and not any(
            isinstance(other, tuple) and ":" not in other[0] and other[1] == port
            for other in map(parse_bind, config.bind)
        )
    )
    return socket.create_server(found, family=family, backlog=config.backlog, dualstack_ipv6=both)


def _adopt(number: int) -> socket.socket:
    adopted = socket.socket(fileno=number)
    if adopted.type != socket.SOCK_STREAM:
        adopted.detach()
        raise OSError(errno.EPROTOTYPE, os.strerror(errno.EPROTOTYPE))
    return adopted


def _listen_unix(path: str, backlog: int, permissions: Permissions) -> socket.socket:
    is_file = not path.startswith("\0")
    if is_file:
        _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    umask = None if permissions.umask is None else os.umask(permissions.umask)
    try:
        listener.bind(path)
        if is_file and not (permissions.user is None and permissions.group is None):
            user, group = permissions[1:]
            os.chown(path, -1 if user is None else user, -1 if group is None else group)
        listener.listen(backlog)
    except OSError:
        close_listeners([listener], [path])
        raise
    finally:
        if umask is not None:
            os.umask(umask)
    return listener


def _remove_stale(path: str) -> None:
    try:
        mode = Path(path).stat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink()
            return
        except BlockingIOError:
            pass  # a full queue is somebody's too
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def _explain(error: OSError, text: str) -> str:
    """Tell what would have to be otherwise for ``error`` not to happen."""
    if isinstance(error, socket.gaierror):
        return f"a host that can be looked up ({error.strerror})"
    expected = {
        errno.EADDRINUSE: "an address that is free; another process listens there",
        errno.EADDRNOTAVAIL: "an address of this machine",
        errno.EAFNOSUPPORT: "an address family of this machine",
        errno.EEXIST: "a path where there is nothing, or a socket",
        errno.ENOENT: "a path in a directory that exists",
        errno.ENOTDIR: "a path in a directory that exists",
        errno.EPERM: "a user and a group that this user may give a file to",
        errno.EACCES: "a path in a directory that this user may write to"
        if text.startswith("unix:")
        else "a port that this user may listen on, commonly from 1024 up",
        errno.EBADF: "the number of an open descriptor",
        errno.ENOTSOCK: "the descriptor of a socket",
        errno.EPROTOTYPE: "the descriptor of a stream socket",
    }
    if error.errno in expected:
        return expected[error.errno]
    return f"an address to listen on ({error.strerror or error})"

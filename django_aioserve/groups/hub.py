"""The local hub: group messages between the workers of one server, with nothing to install.

Rules:

1. There is no broker, so nobody's end interrupts anybody else. The server has a
   directory; a worker with subscribers has a listening socket in it; a worker that
   sends looks into the directory, connects to what is new there, and writes each
   message to every socket. A worker that comes is found by the next message.
2. The directory's name is chosen once for a server's life and handed on in the
   environment, so workers from before and after HUP and USR2 meet in the same one,
   and another server never does. It belongs to the user of the workers, mode 0700.
   The first who needs it makes it, the last who leaves removes it.
3. A socket appears under its final name only once it listens. Whoever is refused
   there knows that its owner was killed, and removes it.
4. Nobody waits for a worker that does not read: beyond a limit its messages are
   lost, and it is told so when it reads again.
5. A frame is the payload's length (4 bytes), the length of the group's name (1
   byte), the name, the payload. One without a name says that messages were lost.
   The form is in the suffix of the socket's name: releases that differ in it do
   not see each other.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import secrets
import socket
import stat
import struct
import sys
import tempfile
import threading
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

from django_aioserve.groups.switch import MAX_MESSAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from django_aioserve.groups.switch import Switch

__all__ = ["HUB_VARIABLE", "LocalHub", "OutsideHub", "find_hub", "new_hub"]

logger = logging.getLogger("django_aioserve.groups")

#: The environment variable that hands the hub's directory on to the workers. (Names
#: that begin with AIOSERVE_ are options.)
HUB_VARIABLE = "DJANGO_AIOSERVE_HUB"

_SUFFIX = ".v1"
_HEADER = struct.Struct("!IB")
_MOST_BYTES_WAITING = 8 << 20
_READ_SIZE = 64 << 10
_FLUSH_SECONDS = 1.0
_OUTSIDE_SECONDS = 1.0
_PAUSE_SECONDS = 1.0
_QUIET_SECONDS = 60.0
_LONGEST_NAME = len("4194304-01234567") + len(_SUFFIX)
#: The kernel's limit (sun_path) less the final NUL: 108 on Linux, 104 on the BSDs.
LONGEST_DIRECTORY = (108 if sys.platform == "linux" else 104) - 2 - _LONGEST_NAME

_GAP = _HEADER.pack(0, 0)


def new_hub() -> str:
    """Choose the directory for the hub of a server that is about to start; nothing is made."""
    return _temporary(f"aioserve-{secrets.token_hex(8)}")


def find_hub() -> str | None:
    """Find the directory of the hub of the server that this process is a worker of.

    ``runaio`` has put it into the environment. The workers of a plain Gunicorn know
    each other by their common parent. Any other process is on its own: None.
    """
    named = os.environ.get(HUB_VARIABLE)
    if named:
        return named
    # An arbiter sets the one, and only what was forked by it also has the other.
    gunicorn = os.environ.get("SERVER_SOFTWARE", "").startswith("gunicorn/")
    if not gunicorn or "gunicorn.arbiter" not in sys.modules:
        return None
    parent = os.getppid()
    return _temporary(f"aioserve-{parent}-{_started(parent)}")


def _temporary(name: str) -> str:
    path = str(Path(tempfile.gettempdir()) / name)
    # Some temporary directories have names too long for a socket.
    return path if len(os.fsencode(path)) <= LONGEST_DIRECTORY else f"/tmp/{name}"  # noqa: S108


def _started(pid: int) -> str:
    """Tell when a process was started, so that a number used again is not taken for it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:  # not Linux
        return "0"
    return fields.rpartition(")")[2].split()[19]


class LocalHub:
    """Carries messages between this worker and the others that share ``directory``.

    With ``directory`` None, or where it cannot be used (which is logged), messages
    stay in this process. ``ours`` tells that the directory is the server's own and
    not one that the project named: then it must be private, and is removed when it
    is empty. All members are for the thread of the switch's event loop.
    """

    def __init__(self, switch: Switch, directory: str | None, *, ours: bool) -> None:
        self._switch = switch
        self._directory = Path(directory) if directory is not None else None
        self._ours = ours
        self._loop = asyncio.get_running_loop()
        self._name: str | None = None
        self._listener: socket.socket | None = None
        self._inlets: set[_Inlet] = set()
        self._links: dict[str, _Link] = {}
        # Sockets that could not be reached just now, and so have missed something; "" where
        # the directory could not be read.
        self._missed: set[str] = set()

    async def join(self, group: str) -> None:
        """See to it that messages of the group come from the other workers."""
        if self._directory is None or self._listener is not None:
            return
        try:
            self._listen(self._directory)
        except OSError as error:
            logger.error(  # the reason says all
                "Group messages stay within this worker (pid %d), for %s cannot be used: %s",
                os.getpid(),
                self._directory,
                error,
            )
            self._directory = None

    def leave(self, group: str) -> None:
        """Take note that the last subscriber of the group has left."""

    def post(self, group: str, payload: bytes) -> None:
        """Send a message to the subscribers of every worker."""
        self._switch.arrive(group, payload)
        if self._directory is None:
            return
        frame = _frame(group, payload)
        for link in self._reach(self._directory):
            link.write(frame)

    async def close(self) -> None:
        """Leave; what is still to be written gets a moment."""
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
        if self._directory is not None and self._name is not None:
            (self._directory / self._name).unlink(missing_ok=True)
        for inlet in tuple(self._inlets):
            inlet.close()
        links = tuple(self._links.values())
        await asyncio.gather(*(link.finish(_FLUSH_SECONDS) for link in links))
        if self._directory is not None and self._ours:
            with contextlib.suppress(OSError):  # others are still there, or nobody ever was
                self._directory.rmdir()

    def _listen(self, directory: Path) -> None:
        name = f"{os.getpid()}-{secrets.token_hex(4)}"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.setblocking(False)
            while True:
                directory.mkdir(mode=0o700, exist_ok=True)
                if self._ours:
                    _check_private(directory)
                try:
                    listener.bind(str(directory / name))
                    break
                except FileNotFoundError:
                    continue  # the last one who left has removed it under our hands
            listener.listen(1024)
            self._name = name + _SUFFIX
            (directory / name).rename(directory / self._name)
        except BaseException:
            listener.close()
            raise
        self._listener = listener
        self._loop.add_reader(listener, self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:  # no descriptor is free: look again later rather than spin
            logger.warning("A worker's group messages have to wait: %s", error)
            self._loop.remove_reader(listener)
            self._loop.call_later(_PAUSE_SECONDS, self._accept_again, listener)
            return
        connection.setblocking(False)
        inlet = _Inlet(connection, self._switch, self._inlets.discard)
        self._inlets.add(inlet)

    def _accept_again(self, listener: socket.socket) -> None:
        if listener.fileno() >= 0:
            self._loop.add_reader(listener, self._accept, listener)

    def _reach(self, directory: Path) -> list[_Link]:
        """Connect to the workers that are new, and give all.

        Those that are gone drop out at the next write to them.
        """
        try:
            present = {name for name in _sockets(directory) if name != self._name}
        except OSError as error:
            self._miss("", error)
            return list(self._links.values())
        if "" in self._missed:  # for a while it was not known who was there
            self._missed |= present - self._links.keys()
        self._missed &= present
        for name in present - self._links.keys():
            connection = self._connect(directory / name, name)
            if connection is not None:
                self._links[name] = _Link(name, connection, self._forget, name in self._missed)
                self._missed.discard(name)
        return list(self._links.values())

    def _connect(self, path: Path, name: str) -> socket.socket | None:
        try:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:
            self._miss(name, error)
            return None
        connection.setblocking(False)
        try:
            connection.connect(str(path))
        except OSError as error:
            connection.close()
            if not _is_dead(path, error):
                self._miss(name, error)
            return None
        return connection

    def _miss(self, name: str, error: OSError) -> None:
        if name not in self._missed:
            self._missed.add(name)
            who = f"the worker {name}" if name else "workers"
            logger.warning("Group messages do not reach %s: %s", who, error)

    def _forget(self, name: str) -> None:
        self._links.pop(name, None)


class _Link:
    """The way out to one other worker."""

    def __init__(
        self, name: str, connection: socket.socket, forget: Callable[[str], None], missed: bool
    ) -> None:
        self._name = name
        self._socket = connection
        self._forget = forget
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[bytes] = deque()
        self._bytes = 0
        self._lost = False
        self._quiet_until = 0.0
        if missed:
            self.write(_GAP)

    def write(self, frame: bytes) -> None:
        if self._waiting:
            if self._bytes + len(frame) <= _MOST_BYTES_WAITING and not self._lost:
                self._waiting.append(frame)
                self._bytes += len(frame)
            else:
                self._lost = True
                self._complain()
            return
        sent = self._send(frame)
        if sent is not None and sent < len(frame):
            self._waiting.append(frame[sent:])
            self._bytes = len(frame) - sent
            self._loop.add_writer(self._socket, self._flush)

    async def finish(self, seconds: float) -> None:
        if self._waiting:
            self._loop.remove_writer(self._socket)
            with contextlib.suppress(OSError, TimeoutError):
                rest = b"".join(self._waiting) + (_GAP if self._lost else b"")
                await asyncio.wait_for(self._loop.sock_sendall(self._socket, rest), seconds)
            self._waiting.clear()
        self.close()

    def close(self) -> None:
        self._loop.remove_writer(self._socket)
        self._waiting.clear()
        self._socket.close()
        self._forget(self._name)

    def _send(self, data: bytes) -> int | None:
        """Give the number of bytes that were taken, None where the other one is gone."""
        try:
            return self._socket.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:
            self.close()
            return None

    def _flush(self) -> None:
        # Small messages leave together.
        parts = bytearray()
        while self._waiting and len(parts) < _READ_SIZE:
            parts += self._waiting.popleft()
        data = bytes(parts)
        sent = self._send(data)
        if sent is None:
            return
        self._bytes -= sent
        if sent < len(data):
            self._waiting.appendleft(data[sent:])
        if not self._waiting:
            self._loop.remove_writer(self._socket)
            if self._lost:
                self._lost = False
                self.write(_GAP)

    def _complain(self) -> None:
        if self._loop.time() >= self._quiet_until:
            self._quiet_until = self._loop.time() + _QUIET_SECONDS
            logger.warning(
                "The worker %s does not keep up; group messages to it are lost", self._name
            )


class _Inlet:
    """The way in from one other worker, or from a process outside of the server."""

    def __init__(
        self, connection: socket.socket, switch: Switch, forget: Callable[[_Inlet], None]
    ) -> None:
        self._socket = connection
        self._switch = switch
        self._forget = forget
        self._buffer = bytearray()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(connection, self._read)

    def close(self) -> None:
        self._loop.remove_reader(self._socket)
        self._socket.close()
        self._forget(self)

    def _read(self) -> None:
        if self._switch.congested:
            return  # the switch is at it; until then the sender keeps the rest
        try:
            data = self._socket.recv(_READ_SIZE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            if self._buffer:  # a sender was killed amid a message
                self._switch.gap()
            self.close()
            return
        self._buffer += data
        for group, payload in self._frames():
            if group:
                self._switch.arrive(group, payload)
            else:
                self._switch.gap()

    def _frames(self) -> Iterator[tuple[str, bytes]]:
        buffer = self._buffer
        start = 0
        while len(buffer) - start >= _HEADER.size:
            length, name_length = _HEADER.unpack_from(buffer, start)
            if length > MAX_MESSAGE_SIZE:
                logger.error("A sender of group messages is out of step; it is shut out")
                self.close()
                break
            name_end = start + _HEADER.size + name_length
            if len(buffer) < name_end + length:
                break
            group = bytes(buffer[start + _HEADER.size : name_end]).decode(errors="replace")
            start = name_end + length
            yield group, bytes(buffer[name_end:start])
        del buffer[:start]


class OutsideHub:
    """Sends messages to a hub from a process that has no part in the server. For any thread."""

    def __init__(self, directory: str) -> None:
        self._directory = Path(directory)
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._sockets: dict[str, socket.socket] = {}

    def post(self, group: str, payload: bytes) -> None:
        """Send a message; a worker that does not take it within a second does not get it."""
        frame = _frame(group, payload)
        with self._lock:
            if self._pid != os.getpid():  # a fork: these sockets are the parent's as well
                self._pid = os.getpid()
                self._drop(set(self._sockets))
            try:
                names = _sockets(self._directory)
            except OSError as error:
                logger.warning("A group message may not have reached all workers: %s", error)
                names = []
            for name in {*names, *self._sockets}:
                self._write(name, frame)

    def close(self) -> None:
        """Close the connections."""
        with self._lock:
            self._drop(set(self._sockets))

    def _write(self, name: str, frame: bytes) -> None:
        path = self._directory / name
        try:
            if name not in self._sockets:
                connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                self._sockets[name] = connection
                connection.settimeout(_OUTSIDE_SECONDS)
                connection.connect(str(path))
            self._sockets[name].sendall(frame)
        except OSError as error:
            # What was begun cannot be taken up again; the worker notices the gap.
            self._drop({name})
            if not _is_dead(path, error):
                logger.warning("A group message did not reach the worker %s: %s", name, error)

    def _drop(self, names: set[str]) -> None:
        for name in names:
            if name in self._sockets:
                self._sockets.pop(name).close()


def _frame(group: str, payload: bytes) -> bytes:
    name = group.encode()
    return _HEADER.pack(len(payload), len(name)) + name + payload


def _sockets(directory: Path) -> list[str]:
    try:
        # os.listdir: half the time of Path.iterdir, and this is done for each message
        return [name for name in os.listdir(directory) if name.endswith(_SUFFIX)]
    except FileNotFoundError:  # nobody has subscribed yet
        return []


def _is_dead(path: Path, error: OSError) -> bool:
    """Tell whether the owner of a socket is gone; what a killed one left is removed."""
    if error.errno == errno.ECONNREFUSED:
        with contextlib.suppress(OSError):
            path.unlink()
    return error.errno in {errno.ECONNREFUSED, errno.ENOENT, errno.EPIPE, errno.ECONNRESET}


def _check_private(directory: Path) -> None:
    found = directory.lstat()
    private = stat.S_IMODE(found.st_mode) & 0o077 == 0
    if not (stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and private):
        raise PermissionError(errno.EPERM, "it is not a directory of this user alone")

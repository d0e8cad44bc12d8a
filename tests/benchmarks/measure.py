"""One measurement: a load on a server for some seconds."""

import base64
import json
import os
import re
import resource
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.benchmarks import machine
from tests.benchmarks.environment import PYTHON, find_program
from tests.benchmarks.loads import MEGABYTE
from tests.benchmarks.native import PAUSE
from tests.benchmarks.servers import NotServing

SCRIPT = Path(__file__).with_name("wrk.lua")

#: Seconds that wrk waits for an answer.
PATIENCE = 20

#: Connections that are opened together, so that no backlog overflows.
_BATCH = 100


@dataclass(frozen=True)
class Sample:
    """What one run has shown."""

    requests: int
    per_second: float
    #: Microseconds of processor time, user and system, of all the server's processes.
    cpu: float | None
    #: The kernel's part of it.
    kernel: float | None
    p50: float
    p99: float
    #: Answers that were refusals, broken connections and answers that did not come.
    bad_status: int
    broken: int
    timed_out: int
    #: The part of the server's core that other processes have used.
    foreign: float
    #: The part of its own core that wrk has used: near 1 it is wrk that is measured.
    client: float

    @property
    def errors(self):
        return self.bad_status + self.broken + self.timed_out

    def as_dict(self):
        return asdict(self)


@dataclass(frozen=True)
class Crowd:
    """What many open connections have cost."""

    connections: int
    #: How many of them the server had closed before the end.
    lost: int
    #: Bytes of the server's processes for each of them; what the kernel holds does not count.
    memory: float
    #: A trivial view, asked by one client before they were opened, and while they were open.
    alone: Sample
    meanwhile: Sample

    def as_dict(self):
        return asdict(self)


@dataclass(frozen=True)
class Profile:
    """Where a server's time went: parts of 1, the largest first."""

    #: The part of the processor time that the event loop's thread has used.
    loop: float
    packages: list[tuple[str, float]]
    functions: list[tuple[str, float]]

    def as_dict(self):
        return asdict(self)


def check(running, load):
    """Give the length of one answer; raise NotServing unless it is as it should be."""
    method, body = ("POST", b"x" * MEGABYTE) if load.upload else ("GET", None)
    try:
        status, answer = running.request(method, load.path, body)
    except OSError as error:
        raise NotServing(f"no answer: {error}") from error
    if status != 200:
        raise NotServing(f"status {status}")
    if not load.correct(answer):
        raise NotServing(f"a wrong body of {len(answer)} bytes")
    return len(answer)


def _command(running, path, clients, seconds, upload):
    command = [
        find_program("wrk"), "--threads=1", f"--connections={clients}", f"--duration={seconds}s",
        f"--timeout={PATIENCE}s", f"--script={SCRIPT}", running.url(path),
    ]  # fmt: skip
    return [*command, "--", "upload"] if upload else command


def _pin(core):
    return lambda: os.sched_setaffinity(0, {core})


def wrk(running, path, *, clients, seconds, cores, upload=False, size=0):
    """Have wrk ask `running` for `path`; give a Sample.

    Raises NotServing, also where the answers had less than `size` bytes on average.
    """
    server_core, client_core = cores
    command = _command(running, path, clients, seconds, upload)
    root = running.process.pid
    before, busy = machine.cpu_seconds(root), machine.core_seconds(server_core)
    client = _children_seconds()
    began = time.monotonic()
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=seconds + 2 * PATIENCE,
            preexec_fn=_pin(client_core),
        )
    except subprocess.TimeoutExpired as error:
        raise NotServing("wrk did not come to an end") from error
    lasted = time.monotonic() - began
    after, busy = machine.cpu_seconds(root), machine.core_seconds(server_core) - busy
    cpu, kernel = sum(after) - sum(before), after[1] - before[1]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines or not running.alive:
        raise NotServing((done.stderr or done.stdout).strip() or "it ended under the load")
    found = json.loads(lines[-1])
    requests = found["requests"]
    if found["bytes"] < (requests - found["bad_status"]) * size:
        raise NotServing(f"answers of less than {size} bytes under the load")
    return Sample(
        requests=requests,
        per_second=requests / (found["microseconds"] / 1e6),
        cpu=cpu / requests * 1e6 if requests else None,
        kernel=kernel / cpu if cpu else None,
        p50=found["p50"] / 1000,
        p99=found["p99"] / 1000,
        bad_status=found["bad_status"],
        broken=found["broken"],
        timed_out=found["timed_out"],
        foreign=max(0.0, busy - cpu) / lasted,
        client=(_children_seconds() - client) / lasted,
    )


def _children_seconds():
    """Processor seconds of the children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def crowd(running, streams, *, seconds, cores):
    """Open the connections of `streams`; give a Crowd. Raises NotServing.

    `running` has served little so far: memory that it has to spare would not be counted.
    """
    count = sum(opening.count for opening in streams.openings)
    if machine.allow_many_files() < count + 100:
        raise NotServing(f"the limit of open files is too low for {count} connections")
    alone = wrk(running, streams.aside, clients=1, seconds=seconds, cores=cores)
    before = machine.memory(running.process.pid)
    connections = []
    try:
        for opening in streams.openings:
            for begin in range(0, opening.count, _BATCH):
                batch = min(_BATCH, opening.count - begin)
                connections += _open(running, opening, batch)
        time.sleep(1)  # let it come to rest
        after = machine.memory(running.process.pid)
        # As long as each of them needs to have its turn.
        meanwhile = wrk(running, streams.aside, clients=1, seconds=PAUSE, cores=cores)
        lost = sum(map(_is_closed, connections))
    finally:
        for connection in connections:
            connection.close()
    memory = (after - before) / count
    return Crowd(connections=count, lost=lost, memory=memory, alone=alone, meanwhile=meanwhile)


def _is_closed(connection):
    connection.setblocking(False)
    try:
        while connection.recv(65536):
            pass
    except BlockingIOError:
        return False
    except ConnectionError:
        pass
    return True


def profile(running, load, *, seconds, cores):
    """Have wrk ask as `load` says and look where the server's time goes; give a Profile.

    Raises NotServing.
    """
    command = _command(running, load.path, load.clients, seconds + 2, load.upload)
    with tempfile.NamedTemporaryFile("r") as found:
        watch = [
            PYTHON.with_name("py-spy"), "record", "--subprocesses", "--format=raw", "--rate=250",
            # To stop a process takes one thread after the other, the loop's first: it would be
            # seen far too often.
            "--gil", "--nonblocking",
            f"--pid={running.process.pid}", f"--duration={seconds}", f"--output={found.name}",
        ]  # fmt: skip
        quiet = {"stdout": subprocess.DEVNULL, "preexec_fn": _pin(cores[1])}
        before = machine.loop_seconds(running.process.pid)
        with subprocess.Popen(command, stderr=subprocess.DEVNULL, **quiet) as client:
            try:
                watched = subprocess.run(
                    watch, stderr=subprocess.PIPE, text=True, timeout=seconds + PATIENCE, **quiet
                )
            except subprocess.TimeoutExpired as error:
                raise NotServing("py-spy did not come to an end") from error
            finally:
                client.kill()
        after = machine.loop_seconds(running.process.pid)
        stacks = found.read().splitlines()
    if not stacks:
        raise NotServing(f"py-spy saw nothing: {(watched.stderr.strip() or '?').splitlines()[-1]}")
    spent = max(sum(after) - sum(before), 1e-3)
    return read_profile(stacks, (after[0] - before[0]) / spent)


#: The end of a stack: the function, and its file, as short as sys.path allows.
_FRAME = re.compile(r"(?P<function>[^;]*) \((?P<file>[^;()]*?)(?::\d+)?\) (?P<count>\d+)$")


def read_profile(stacks, loop):
    """Give the Profile of py-spy's raw lines: for each stack what its last function has used.

    `loop` is the event loop's part of the processor time.
    """
    packages, functions = Counter(), Counter()
    for line in stacks:
        if (frame := _FRAME.search(line)) is not None:
            count = int(frame["count"])
            package, inner, _ = frame["file"].partition("/")
            is_library = not inner or package in _LIBRARY
            packages["Python's library" if is_library else package] += count
            functions[f"{frame['function']} ({frame['file']})"] += count
    total = max(packages.total(), 1)
    return Profile(
        loop=loop,
        packages=[(name, count / total) for name, count in packages.most_common()],
        functions=[(name, count / total) for name, count in functions.most_common(12)],
    )


_LIBRARY = frozenset(sys.stdlib_module_names)


def _open(running, opening, count):
    head = f"GET {opening.path} HTTP/1.1\r\nHost: 127.0.0.1:{running.port}\r\n"
    if opening.websocket:
        key = base64.b64encode(os.urandom(16)).decode()
        head += (
            "Connection: Upgrade\r\nUpgrade: websocket\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n"
        )
    opened = []
    waiting = {}
    with selectors.DefaultSelector() as selector:
        for _ in range(count):
            connection = socket.create_connection(("127.0.0.1", running.port), PATIENCE)
            opened.append(connection)
            connection.sendall(f"{head}\r\n".encode())
            waiting[connection] = b""
            selector.register(connection, selectors.EVENT_READ)
        end = time.monotonic() + PATIENCE
        while waiting:
            ready = selector.select(max(0.0, end - time.monotonic()))
            for key, _ in ready:
                connection = key.fileobj
                received = connection.recv(65536)
                waiting[connection] += received
                if opening.begun in waiting[connection]:
                    del waiting[connection]
                    selector.unregister(connection)
                elif not received:
                    ready = []
                    break
            if not ready:
                for connection in opened:
                    connection.close()
                raise NotServing(f"{len(waiting)} of {count} connections got no beginning")
    return opened

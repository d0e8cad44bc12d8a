"""Recycle workers under load, for this project and for its peers, and print what clients noticed.

    python -m tests.soak [--requests N] [--seconds S] [--servers NAME,…] [--boots 0,3]
                         [--faults none|ours|all] [--json FILE]
    python -m tests.soak --million [--json FILE]

For each server and each time that a boot takes: clients with and without think time, careful and
blind reuse of connections, uploads, streams, and WebSockets where the server has them. A run ends
after so many requests or seconds, whichever comes first. Lost is what `tests.load` calls so; for
requests lost per million, answers of 500 and above count too.

With faults a run also suffers, one after the other and again and again: a release (HUP), a release
that cannot boot and its repair, one worker more (TTIN) and one less (TTOU), and a worker that is
killed (SIGKILL). What is lost within a second of a kill, one request of each client at most, is
counted apart ("killed") and not as lost. ``ours`` adds a run with faults of this project, ``all``
of each server.

``--million`` is one run of this project alone, with faults: 1,000,000 requests over more than 1,000
replacements. The exit status is 1 when this project lost a request.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.load import Habit, Load, Tally
from tests.processes import ENVIRONMENT, SOON, copy_kiosk, events, gunicorn, release
from tests.support import Runaio, children

OURS = "django-aioserve"

#: Seconds in which what a killed worker had under way is found to be lost.
KILL_SECONDS = 1.0

Args = Sequence[str]


Start = Callable[[Args, Path, dict[str, str]], Runaio]


@dataclass(frozen=True)
class Server:
    """A server to be run: how it is started, and whether it has WebSockets."""

    name: str
    start: Start
    websockets: bool = True
    #: What its log says of each worker that came up.
    sign: str = "Booting worker"


def _ours(args: Args, project: Path, env: dict[str, str]) -> Runaio:
    threads = [arg for arg in args if not arg.startswith("--keep-alive")]
    # It boots before it says where it serves.
    return Runaio(*threads, project=project, env={**ENVIRONMENT, **env}, start_deadline=SOON)


def _gunicorn(application: str, worker: str) -> Start:
    return lambda args, project, env: gunicorn(application, worker, *args, project=project, env=env)


SERVERS = {
    server.name: server
    for server in (
        Server(OURS, _ours, sign="is ready: boot"),
        Server(
            "gunicorn-gthread", _gunicorn("kiosk.wsgi:application", "gthread"), websockets=False
        ),
        Server("gunicorn-asgi", _gunicorn("kiosk.asgi:application", "asgi")),
        Server(
            "uvicorn-worker", _gunicorn("kiosk.asgi:application", "uvicorn_worker.UvicornWorker")
        ),
        Server("aiohttp-worker", _gunicorn("kiosk.aio:app", "aiohttp.GunicornWebWorker")),
    )
}


@dataclass
class Result:
    """What one run has shown."""

    server: str
    boot: float
    seconds: float
    replacements: int
    tally: Tally
    #: How often each fault was injected.
    faults: dict[str, int] = field(default_factory=dict)
    #: Requests that went down with workers that were killed.
    killed: int = 0
    #: Requests that the server itself says it gave up; None where it does not tell.
    given_up: int | None = None

    @property
    def lost(self) -> int:
        """Requests lost, but for those of killed workers."""
        return len(self.tally.lost) - self.killed

    @property
    def lost_per_million(self) -> float:
        """Requests lost, refused or answered with 5xx, of a million made."""
        bad = self.lost + self.errors
        return 1e6 * bad / max(self.tally.answered + len(self.tally.lost), 1)

    @property
    def errors(self) -> int:
        """Answers of 500 and above."""
        return sum(count for status, count in self.tally.statuses.items() if status >= 500)

    def figures(self) -> dict[str, Any]:
        """All figures, for JSON: times in milliseconds."""
        p50, p99, worst = (1e3 * self.tally.percentile(share) for share in (0.5, 0.99, 1.0))
        return {
            "server": self.server,
            "boot_seconds": self.boot,
            "seconds": round(self.seconds, 1),
            "answered": self.tally.answered,
            "replacements": self.replacements,
            "lost": self.lost,
            "errors": self.errors,
            "killed": self.killed,
            "given_up": self.given_up,
            "lost_per_million": round(self.lost_per_million, 1),
            "p50_ms": round(p50, 2),
            "p99_ms": round(p99, 2),
            "worst_ms": round(worst, 1),
            "requests_per_second": round(self.tally.answered / self.seconds, 1),
            "faults": self.faults,
        }

    def row(self) -> str:
        """One line of the table."""
        f = self.figures()
        return (
            f"{self.server:<17} {self.boot:>4g} {'yes' if self.faults else 'no':>6} "
            f"{f['answered']:>9} {f['replacements']:>8} {f['lost']:>7} {f['errors']:>6} "
            f"{f['killed']:>6} {f['lost_per_million']:>9.0f} {f['p50_ms']:>8.1f} "
            f"{f['p99_ms']:>9.1f} {f['worst_ms']:>9.0f} {f['requests_per_second']:>7.0f}"
        )


HEADER = (
    f"{'server':<17} {'boot':>4} {'faults':>6} {'answered':>9} {'replaced':>8} {'lost':>7} "
    f"{'5xx':>6} {'killed':>6} {'lost/1M':>9} {'p50 ms':>8} {'p99 ms':>9} {'worst ms':>9} "
    f"{'req/s':>7}"
)


class Faults:
    """Injects one fault after another into a server under load."""

    def __init__(self, server: Runaio, project: Path, *, waits: bool) -> None:
        self.counted: dict[str, int] = {}
        self.kills: list[float] = []
        self._server = server
        self._project = project
        self._waits = waits
        self._names = itertools.count(1)
        self._turns = itertools.cycle(
            [self.hup, self.kill, self.broken, self.ttin, self.hup, self.ttou]
        )

    def next(self) -> None:
        """Inject the next fault and wait until this project's server has come to terms with it."""
        fault = next(self._turns)
        self.counted[fault.__name__] = self.counted.get(fault.__name__, 0) + 1
        fault()

    def hup(self) -> None:
        release(self._project, f'NAME = "release-{next(self._names)}"')
        self._send(signal.SIGHUP, "Release: replacing")

    def broken(self) -> None:
        release(self._project, "raise RuntimeError('a broken release')")
        self._send(signal.SIGHUP, "degraded: ")
        release(self._project, 'NAME = "repaired"')
        self._send(signal.SIGHUP, "recovered: ")

    def ttin(self) -> None:
        self._send(signal.SIGTTIN, "Handling signal: ttin")

    def ttou(self) -> None:
        self._send(signal.SIGTTOU, "Handling signal: ttou")

    def kill(self) -> None:
        workers = children(self._server.pid)
        if workers:
            self.kills.append(time.monotonic())
            with contextlib.suppress(ProcessLookupError):
                os.kill(workers[-1], signal.SIGKILL)

    def _send(self, number: int, answer: str) -> None:
        start = len(self._server.log)
        with contextlib.suppress(ProcessLookupError):  # a broken release ends its peers
            self._server.signal(number)
        if self._waits:
            self._server.wait_for_log(answer, SOON, start=start)


def killed_among(lost_at: Sequence[float], kills: Sequence[float], clients: int) -> int:
    """How many of these moments follow a kill, one for each client at most."""
    return sum(
        min(sum(kill <= moment <= kill + KILL_SECONDS for moment in lost_at), clients)
        for kill in kills
    )


def clients(server: Server) -> list[Habit]:
    """All kinds of clients that this server can answer."""
    habits = [
        Habit(),
        Habit(),
        Habit("/async/"),
        Habit(think=0.01),
        Habit(think=0.05),
        Habit(think=0.01, blind=False),
        Habit(think=0.05, blind=False),
        Habit(keep=False),
        Habit("/upload/", upload=100_000, think=0.02),
        Habit("/stream/", think=0.02),
    ]
    if server.websockets:
        habits.append(Habit("/ws/", websocket=True, think=0.05))
    return habits


def run(server: Server, options: argparse.Namespace, *, boot: float, faults: bool) -> Result:
    """Serve until so many requests are made or so many seconds have passed."""
    args = [
        f"--workers={options.workers}",
        f"--max-requests={options.max_requests}",
        f"--max-requests-jitter={options.max_requests_jitter}",
        "--threads=8",
        "--keep-alive=75",  # as ours has it; Gunicorn's 2 s would lose more
    ]
    with tempfile.TemporaryDirectory(prefix="aioserve-") as directory:
        project = copy_kiosk(Path(directory))
        started = server.start(args, project, {"KIOSK_BOOT": f"{boot:g}"})
        started.start()
        try:
            return _run(server, started, project, options, boot=boot, faults=faults)
        finally:
            # A peer may not come to its end by itself: it is killed then.
            with contextlib.suppress(*([] if server.name == OURS else [AssertionError])):
                started.stop(SOON)


def _run(
    server: Server,
    started: Runaio,
    project: Path,
    options: argparse.Namespace,
    *,
    boot: float,
    faults: bool,
) -> Result:
    _wait_for_workers(started, options.workers)
    first = started.log_text().count(server.sign)
    began = time.monotonic()
    habits = clients(server)
    injected = Faults(started, project, waits=server.name == OURS)
    with Load(
        started.address,
        *habits,
        limit=options.requests,
        counts_bodies=False,
        loop_factory=_loop(),
    ) as load:
        end = began + options.seconds
        while time.monotonic() < end and load.running:
            pause = min(end - time.monotonic(), options.fault_interval)
            with contextlib.suppress(AssertionError):  # the time is over before the requests
                load.until(options.requests, pause)
            if faults and load.running and time.monotonic() < end:
                injected.next()
        tally = load.finish()
    last = max((moment for moment, _ in tally.latencies), default=time.monotonic())
    return Result(
        server.name,
        boot,
        last - began,
        started.log_text().count(server.sign) - first,
        tally,
        injected.counted,
        killed_among(tally.lost_at, injected.kills, len(habits)),
        sum(event["lost"] for event in events(started) if event["reason"] != "died")
        if server.name == OURS
        else None,
    )


def _wait_for_workers(server: Runaio, count: int) -> None:
    """Wait until all workers answer: until then a request waits for a boot."""
    seen: set[bytes] = set()
    end = time.monotonic() + SOON
    while len(seen) < count and time.monotonic() < end:
        with contextlib.suppress(OSError):
            seen.add(server.get("/").body)
    if not children(server.pid):
        raise AssertionError(f"{server} has no workers:\n{server.log_text()}")


def _loop() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    new_loop: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return new_loop


def soak(options: argparse.Namespace) -> Iterator[Result]:
    """Run each server with each boot time, one after another."""
    for boot in options.boots:
        for name in options.servers:
            if not options.million:
                yield run(SERVERS[name], options, boot=boot, faults=False)
            if options.faults == "all" or (options.faults == "ours" and name == OURS):
                yield run(SERVERS[name], options, boot=boot, faults=True)


MILLION = {
    "servers": [OURS],
    "boots": [0.0],
    "requests": 1_000_000,
    "seconds": 3600.0,
    "workers": 2,
    "max_requests": 600,
    "max_requests_jitter": 120,
    "faults": "ours",
}
"""The options of ``--million``: where no worker exceeds its limit, more than 1,400 replacements."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tests.soak", description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=50_000, help="of each run, at most")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each run, at most")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--max-requests", type=int, default=1000)
    parser.add_argument("--max-requests-jitter", type=int, default=200)
    parser.add_argument(
        "--servers", type=lambda text: text.split(","), default=list(SERVERS), help="by commas"
    )
    parser.add_argument(
        "--boots",
        type=lambda text: [float(part) for part in text.split(",")],
        default=[0.0, 3.0],
        help="seconds that a boot of the project takes, by commas",
    )
    parser.add_argument("--faults", choices=["none", "ours", "all"], default="ours")
    parser.add_argument("--fault-interval", type=float, default=5.0, help="seconds between two")
    parser.add_argument("--million", action="store_true", help="the long run of this project")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    return parser


def main(arguments: Args | None = None) -> int:
    """Print a row for each run; 1 when this project lost a request, else 0."""
    options = _parser().parse_args(arguments)
    unknown = set(options.servers) - set(SERVERS)
    if unknown:
        sys.exit(f"no such server: {', '.join(unknown)}; there are {', '.join(SERVERS)}")
    if options.million:
        vars(options).update(MILLION)
    print(HEADER, flush=True)
    figures = []
    status = 0
    for result in soak(options):
        print(result.row(), flush=True)
        figures.append(result.figures())
        if result.faults:
            print(f"    faults: {result.faults}", flush=True)
        for what in sorted(set(result.tally.lost))[: 3 if result.lost else 0]:
            print(f"    lost: {what[:150]}", flush=True)
        if result.server == OURS and (result.lost_per_million or result.given_up):
            status = 1
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())

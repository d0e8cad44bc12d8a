"""Run the measurements: see ``--help``."""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

from tests.benchmarks import environment, machine, measure
from tests.benchmarks.loads import LOADS, Load
from tests.benchmarks.report import Results
from tests.benchmarks.servers import SERVERS, NotServing, NotStarted, Running

#: What --quick asks for.
QUICK_LOADS = ("sync", "async", "json", "orm-sync", "orm-async", "wait-async", "upload", "response",
               "stream", "file", "native", "static-20k")  # fmt: skip
QUICK_PEERS = ("gunicorn-gthread", "uvicorn", "granian-wsgi-8", "aiohttp", "whitenoise-gthread")

#: Seconds, as they were found: to migrate and seed a database; to start a server and have
#: it warm; around a run of wrk; with thousands of connections; to see where time goes.
_SETUP, _START, _AROUND, _CROWD, _PROFILE = 6, 2, 0.15, 9, 6


class Session:
    """One run of the whole: servers are started when they are first needed."""

    def __init__(self, options, work, results):
        self.options = options
        self.work = work
        self.results = results
        self.cores = machine.cores()
        self.end = time.monotonic() + options.minutes * 60
        self._running = {}
        self._env = {}

    def expected_seconds(self, loads):
        """How long `loads` will take, if all servers start and none falls short."""
        starts = set()
        seconds = 0
        for load in loads:
            names = self._wanted(load)
            if isinstance(load, Load):
                starts |= {(load.setup, name) for name in names}
                each = self.options.seconds * load.longer + _AROUND
                seconds += len(names) * self.options.rounds * each
            else:
                seconds += len(names) * (_START + _CROWD + self.options.seconds)
        return seconds + _START * len(starts) + _SETUP * len({load.setup for load in loads})

    def measure(self, setup, loads):
        """Measure all `loads` of one setup; see where the time goes in those that fall short."""
        with ExitStack() as stack:
            stack.callback(self._stop_all)
            try:
                self._env = self._prepare(setup, stack)
            except (environment.Missing, subprocess.SubprocessError) as missing:
                for load in loads:
                    self.results.skipped[load.name] = str(missing)
                print(f"\nNot measured ({', '.join(load.name for load in loads)}): {missing}")
                return
            for load in loads:
                print(f"\n## {load.title}", flush=True)
                if isinstance(load, Load):
                    self._rounds(load)
                    print(self.results.table(load), flush=True)
                else:
                    self._crowds(load)
            self._profile({load.name: load for load in loads})

    def _prepare(self, setup, stack):
        work = self.work / setup
        work.mkdir()
        database = f"sqlite:///{work}/db.sqlite3"
        if setup == "postgres":
            database, version = stack.enter_context(environment.postgres(self.options.postgres))
            self.results.facts["versions"]["PostgreSQL"] = version
        env = environment.variables(work, database)
        environment.prepare_project(env, static=setup == "static")
        return env

    def _rounds(self, load):
        for number in range(self.options.rounds):
            for name in self._wanted(load):
                if (load.name, name) in self.results.failures:
                    continue
                if time.monotonic() > self.end:
                    self.results.skipped[load.name] = "the time was up"
                    return
                try:
                    running = self._server(load.setup, name)
                    size = measure.check(running, load)
                    sample = self._wrk(running, load, self.options.seconds * load.longer, size)
                    self.results.add(load.name, name, sample)
                    _tell(name, number, sample)
                    if not running.settles():
                        self._stop(name)  # its backlog would disturb the others
                except NotServing as failure:
                    self._failed(load, name, failure)

    def _crowds(self, load):
        for name in self._wanted(load):
            if time.monotonic() > self.end:
                self.results.skipped[load.name] = "the time was up"
                return
            self._stop(name)  # one that has served much has memory to spare
            try:
                running = self._server(load.setup, name)
                crowd = measure.crowd(running, load, seconds=self.options.seconds, cores=self.cores)
            except (NotServing, OSError) as failure:
                self._failed(load, name, failure)
                continue
            finally:
                self._stop(name)
            self.results.crowds[load.name, name] = crowd
            print(f"  {name:<20} {crowd.memory / 1024:8.1f} KiB each, p50 {crowd.alone.p50:.2f} → "
                  f"{crowd.meanwhile.p50:.2f} ms, p99 {crowd.alone.p99:.2f} → "
                  f"{crowd.meanwhile.p99:.2f} ms, {crowd.lost} lost", flush=True)  # fmt: skip

    def _profile(self, loads):
        for name in self.results.short():
            ours = self.results.ours(name)
            if name in loads and ours is not None and time.monotonic() < self.end:
                load = loads[name]
                print(f"\n## Where the time goes: {load.title}", flush=True)
                try:
                    running = self._server(load.setup, ours)
                    found = measure.profile(running, load, seconds=3, cores=self.cores)
                except NotServing as failure:
                    print(f"  not known: {failure}", flush=True)
                    continue
                self.results.profiles[name] = found
                print(self.results.profile(name), flush=True)

    def _wrk(self, running, load, seconds, size):
        return measure.wrk(running, load.path, clients=load.clients, seconds=seconds,
                           cores=self.cores, upload=load.upload, size=size)  # fmt: skip

    def _wanted(self, load):
        peers = self.options.peers
        return [
            name
            for name in load.servers
            if name.startswith("aioserve") or peers is None or name in peers
        ]

    def _server(self, setup, name):
        running = self._running.get(name)
        if running is not None and running.alive:
            return running
        if name in self.results.absent:
            raise NotStarted(self.results.absent[name])
        try:
            running = Running(SERVERS[name], self.work / setup, self._env, self.cores[0])
        except (NotStarted, environment.Missing) as failure:
            self.results.absent[name] = str(failure)
            raise NotStarted(str(failure)) from failure
        self._running[name] = running
        # To warm it up: its threads, their database connections, the interpreter's caches.
        measure.wrk(running, "/ping/", clients=32, seconds=1, cores=self.cores)
        return running

    def _failed(self, load, name, failure):
        if isinstance(failure, NotStarted):
            self.results.fail(load.name, name, "did not start")
        else:
            self.results.fail(load.name, name, f"did not pass: {failure}")
        print(f"  {name:<20} did not pass: {failure}", flush=True)
        self._stop(name)

    def _stop(self, name):
        running = self._running.pop(name, None)
        if running is not None:
            running.stop()

    def _stop_all(self):
        for running in self._running.values():
            running.stop()
        self._running.clear()


def _tell(name, number, sample):
    cpu = "" if sample.cpu is None else f"{sample.cpu:9,.0f} µs"
    errors = f"  {sample.errors:,} errors" if sample.errors else ""
    print(f"  {name:<20} round {number + 1}: {sample.per_second:9,.0f} req/s {cpu:>12}  "
          f"p99 {sample.p99:8.1f} ms{errors}", flush=True)  # fmt: skip


def _names(known):
    def parse(text):
        names = [name.strip() for name in text.split(",") if name.strip()]
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"unknown: {', '.join(unknown)}; known: {', '.join(known)}"
            )
        return names

    return parse


def _between(low, high):
    def parse(text):
        if not text.isdigit() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"a whole number from {low} to {high}, not {text!r}")
        return int(text)

    return parse


def _options(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description="Measure this project and its peers side by side.",
    )
    loads = [load.name for load in LOADS]
    peers = [name for name in SERVERS if not name.startswith("aioserve")]
    parser.add_argument("--loads", type=_names(loads), metavar="A,B", help=f"of {', '.join(loads)}")
    parser.add_argument("--peers", type=_names(peers), metavar="A,B", help=f"of {', '.join(peers)}")
    parser.add_argument("--rounds", type=_between(1, 20), metavar="N", help="default: 3")
    parser.add_argument("--seconds", type=_between(1, 60), metavar="N", help="of each, default: 2")
    parser.add_argument(
        "--minutes",
        type=_between(1, 240),
        default=30,
        metavar="N",
        help="what has not begun by then is left out; default: 30",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one round, fewer loads and peers: two or three minutes",
    )
    parser.add_argument(
        "--postgres",
        default="postgres://postgres@127.0.0.1:5432",
        metavar="URL",
        help="the server in which a database is made and dropped; default: %(default)s",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="where benchmarks.json and benchmarks.md go; default: docs/reference for a whole run, "
        "build/bench for a part",
    )
    options = parser.parse_args(arguments)
    whole = not (options.quick or options.loads or options.peers)
    options.output = options.output or environment.ROOT / (
        "docs/reference" if whole else "build/bench"
    )
    if options.quick:
        options.loads = options.loads or QUICK_LOADS
        options.peers = options.peers or QUICK_PEERS
    options.loads = options.loads or loads
    options.rounds = options.rounds or (1 if options.quick else 3)
    options.seconds = options.seconds or (1 if options.quick else 2)
    return options


def main(arguments=None):
    """Measure and write; give the exit status."""
    options = _options(arguments)
    try:
        environment.require_programs()
        environment.install()
    except environment.Missing as missing:
        print(missing, file=sys.stderr)
        return 2
    # The servers have sessions of their own: they would outlive us.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    server_core, client_core = machine.cores()
    machine.allow_many_files()
    if os.getloadavg()[0] > 0.5:
        print(f"Note: this machine is busy (load {os.getloadavg()[0]:.1f}).")
    if server_core == client_core:
        print("Note: server and client share the only core.")
    facts = {"rounds": options.rounds, "seconds": options.seconds, "loads": list(options.loads),
             "peers": options.peers, "shared_core": server_core == client_core}  # fmt: skip
    results = Results(machine.describe(), environment.versions(), facts)
    loads = [load for load in LOADS if load.name in options.loads]
    began = datetime.now(UTC)
    with tempfile.TemporaryDirectory(prefix="aioserve-bench-") as work:
        session = Session(options, Path(work), results)
        _foretell(session.expected_seconds(loads), began, options.minutes)
        try:
            for setup in dict.fromkeys(load.setup for load in loads):
                session.measure(setup, [load for load in loads if load.setup == setup])
        except BaseException:
            # What was measured so far is not lost, and is not the page of a whole run.
            _write(results, environment.ROOT / "build/bench", began)
            raise
    _write(results, options.output, began)
    return 0


def _foretell(seconds, began, minutes):
    end = began + timedelta(seconds=seconds)
    print(f"Expected: about {seconds / 60:.0f} minutes, until {end:%H:%M} UTC, and {_PROFILE} s "
          "more for each load that falls short.")  # fmt: skip
    if seconds > minutes * 60:
        print(f"Note: what has not begun after {minutes} minutes will be left out; see --minutes.")
    try:
        environment.find_program("nginx")
    except environment.Missing as missing:
        print(f"Note: {missing}.")


def _write(results, output, began):
    date = began.strftime("%Y-%m-%d %H:%M UTC")
    lasted = (datetime.now(UTC) - began).total_seconds()
    results.facts["options"]["minutes"] = round(lasted / 60, 1)
    output.mkdir(parents=True, exist_ok=True)
    data = json.dumps(results.as_dict(date), indent=1, ensure_ascii=False)
    (output / "benchmarks.json").write_text(data + "\n")
    (output / "benchmarks.md").write_text(results.page(date))
    print(f"\n{results.summary()}")
    print(f"\nWritten: {output / 'benchmarks.md'}, {output / 'benchmarks.json'}")


if __name__ == "__main__":
    sys.exit(main())

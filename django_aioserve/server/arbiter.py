"""The arbiter: Gunicorn's, with replacements that are ready before the old worker leaves.

Rules:

1. A worker *accepts* from the moment it is ready until it drains. When more workers
   accept than are wanted, one is told to drain: first one that retires, else the oldest.
2. When fewer workers stay than are wanted one is started. A worker that retires counts
   as staying, and asks for one more: make before break. So do at most ``max_retiring``
   workers at a time, and only where the memory of the container, and ``max_rss_total``,
   leave room for one more; where they do not, the old worker is told to drain, and is
   gone before the next is started.
3. A worker is ready when it says so, on the scoreboard.
4. Once a worker has been ready, no failure of another takes the server down. A boot
   that fails is tried again later and later; meanwhile what serves goes on serving.
5. A first start that fails ends the server, with the cause as the last line.
6. HUP is a release: every worker retires, by rule 2. The first boot that fails stops it.
7. Exit codes of workers mean nothing beyond having failed: any view may call ``os._exit``.
8. All times are of the monotonic clock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from gunicorn.arbiter import Arbiter
from gunicorn.errors import HaltServer

from django_aioserve import conf
from django_aioserve.conf import Config
from django_aioserve.server.recycling import Sample, backoff, expected_rss, over_budget
from django_aioserve.server.scoreboard import Scoreboard, Slot, State

__all__ = ["RecyclingArbiter"]

SPARE_SLOTS = 64
"""Slots beyond twice the workers: for workers that are still draining, and for TTIN."""

BUDGET_AHEAD = 3.0
"""Seconds, besides those of a boot, for which the growth of the workers is reckoned with when their
memory is looked at: that is once a second, and the old worker takes some time to leave."""

GROWTH_SECONDS = 0.5
"""Seconds, at least, between two looks that tell how fast a worker grows."""

HELD_SIGNALS = (
    *(signal.SIGTERM, signal.SIGINT, signal.SIGQUIT),
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP),
)
"""Held back from a new process until it has handlers of its own: it would take them with the
arbiter's, to no effect, or end by those that Gunicorn sets to their default for a moment."""

STOP_SECONDS = 2
"""Seconds past ``graceful_timeout`` in which workers tell what they have given up."""

KILLED_SECONDS = 1.0
"""Seconds for workers to end that were killed because they had not ended in time."""

LEAVING_TIMEOUTS = 4
"""How often ``graceful_timeout`` a worker may take to leave: it waits so long for its requests,
for the receivers of `worker_replaced`, for the bridge and for its threads."""

DRY_RUN_INTERVAL = 60.0
"""Seconds between two reports of a dry run about the same limit."""


class _Resolving(NamedTuple):
    """The process that reads the settings for a release; it writes into ``directory``."""

    pid: int
    directory: Path
    deadline: float


class _Grown(NamedTuple):
    """The memory of a worker at a moment, and by how many bytes a second it had grown to it."""

    at: float
    rss: int
    rate: float


class RecyclingArbiter(Arbiter):  # type: ignore[misc]
    """Keeps the workers of one server; the rules are in the module's head."""

    # Gunicorn's stubs do not tell their types.
    num_workers: int
    reexec_pid: int

    def __init__(self, app: Any) -> None:
        self.config: Config = app.config
        self.scoreboard = Scoreboard(2 * self.config.workers + SPARE_SLOTS)
        self._slots: dict[int, Slot] = {}
        # Pids that were told to drain, with the time they were told.
        self._told: dict[int, float] = {}
        # Pids that the arbiter itself wants to be replaced, with the reason.
        self._asked: dict[int, str] = {}
        self._release = 0
        self._resolving: _Resolving | None = None
        # A worker that was told to drain before its replacement is started, for want of memory.
        self._gives_way = 0
        self._has_served = False
        self._failures = 0
        self._failed_us = 0
        self._next_try = 0.0
        self._degraded = ""
        self._crowded = False
        self._next_report = 0.0
        self._grown: dict[int, _Grown] = {}
        self._stopping = False
        self._preloaded = False
        super().__init__(app)

    def setup(self, app: Any) -> None:
        """Take the settings; with ``preload`` load the project, once."""
        super().setup(app)
        if self.cfg.preload_app and not self._preloaded:
            self._preloaded = True
            self._make_fit_to_fork()

    def _make_fit_to_fork(self) -> None:
        """Leave nothing of the loaded project behind that must not be shared by a fork."""
        from django.core.cache import caches
        from django.db import connections
        from django.urls import get_resolver

        get_resolver().url_patterns  # noqa: B018  # the property imports it
        connections.close_all()
        caches.close_all()
        own = threading.main_thread()
        names = [thread.name for thread in threading.enumerate() if thread is not own]
        if names:
            self.log.warning(
                "The project has started threads when it was loaded, which no worker will have: %s",
                ", ".join(names),
            )
        # What is shared stays shared: the collector would write to every object it visits.
        gc.collect()
        gc.freeze()

    # ------------------------------------------------------------------ workers

    def spawn_worker(self) -> int:
        """Fork one worker with a slot on the scoreboard; give its pid.

        RuntimeError where there are too many already, OSError where the system has no more
        processes, memory or files to give; what a hook raises passes.
        """
        slot = self.scoreboard.take()
        if slot is None:
            raise RuntimeError(f"{len(self._slots)} workers have not ended yet")
        slot["release"] = self._release
        slot["started_us"] = _now_us()
        slot["listening"] = 1
        self.app.slot, self.app.scoreboard = slot, self.scoreboard
        # The worker's `init_signals` lets them through.
        signal.pthread_sigmask(signal.SIG_BLOCK, HELD_SIGNALS)
        try:
            pid: int = super().spawn_worker()
        except Exception:
            slot["listening"] = 0
            slot["state"] = State.FREE
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_SIGNALS)
        slot["pid"] = pid
        self._slots[pid] = slot
        return pid

    def manage_workers(self) -> None:
        """Bring the workers to what is wanted (rules 1 and 2)."""
        if self._stopping:
            return
        self._watch_release()
        self._note_ready()
        self._watch_budget()
        staying = {pid: slot for pid, slot in self._slots.items() if not self._leaves(pid, slot)}
        retiring = self._retiring(staying)
        # One that holds has stopped accepting: its place is to be filled in any case.
        holding = [pid for pid in retiring if staying[pid]["holding"]]
        others = [pid for pid in retiring if pid not in holding]
        replaced = holding + others[: max(self.config.max_retiring - len(holding), 0)]
        if self._gives_way in self.WORKERS:
            return
        if replaced and not self._has_room(staying):
            complete = len(staying) >= self.num_workers
            if complete and all(slot.state is not State.BOOTING for slot in staying.values()):
                self._gives_way = replaced[0]
                self._tell_to_drain(self._gives_way)
                return
            replaced = []  # one after another: the last one to give way is missing yet
        wanted = self.num_workers + len(replaced)
        while len(staying) < wanted and time.monotonic() >= self._next_try:
            try:
                pid = self.spawn_worker()
            except Exception as error:  # noqa: BLE001  # no failure takes the server down
                self._boot_failed("A worker", f"it cannot be started: {error}")
                break
            staying[pid] = self._slots[pid]
        accepting = [
            pid for pid, slot in staying.items() if slot.state in (State.READY, State.RETIRING)
        ]
        accepting.sort(key=lambda pid: self.WORKERS[pid].age)
        surplus = max(len(accepting) - self.num_workers, 0)
        leaving = [pid for pid in retiring if pid in accepting]
        leaving += [pid for pid in accepting if pid not in leaving]
        booting = [pid for pid, slot in staying.items() if slot.state is State.BOOTING]
        unwanted = max(len(staying) - surplus - wanted, 0)  # TTOU while one boots
        for pid in [*leaving[:surplus], *booting[:unwanted]]:
            self._tell_to_drain(pid)

    def spawn_workers(self) -> None:
        """Gunicorn's name for the first start; `manage_workers` does it all."""
        self.manage_workers()

    def _leaves(self, pid: int, slot: Slot) -> bool:
        return pid in self._told or slot.state is State.DRAINING

    def _retiring(self, staying: dict[int, Slot]) -> list[int]:
        """Give the workers to be replaced, those that ask for it before those of an old release."""
        if self._failures and time.monotonic() < self._next_try:
            return []
        asked = [
            pid
            for pid, slot in staying.items()
            if slot.state is State.RETIRING or (pid in self._asked and slot.state is State.READY)
        ]
        old = [
            pid
            for pid, slot in staying.items()
            if slot["release"] < self._release and slot.state is State.READY
        ]
        return asked + sorted(old, key=lambda pid: self.WORKERS[pid].age)

    def _tell_to_drain(self, pid: int) -> None:
        slot = self._slots[pid]
        if slot.state is not State.RETIRING:
            outdated = slot["release"] < self._release
            default = "release: HUP asked for a new one" if outdated else "surplus: TTOU"
            slot.text = self._asked.get(pid, default)
        slot["told"] = 1
        self._told[pid] = time.monotonic()
        self.kill_worker(pid, signal.SIGTERM)

    def _note_ready(self) -> None:
        fresh = [
            slot
            for slot in self._slots.values()
            if slot.state in (State.READY, State.RETIRING) and slot["release"] == self._release
        ]
        if fresh:
            self._has_served = True
        if self._degraded and any(slot["started_us"] > self._failed_us for slot in fresh):
            self._failures, self._next_try = 0, 0.0
            self._say_degraded("")

    # ------------------------------------------------------------------ failures

    def reap_workers(self) -> None:
        """Take leave of the workers that have ended (rules 4, 5 and 7)."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except OSError as error:
                if error.errno != errno.ECHILD:
                    raise
                return
            if not pid:
                return
            if pid == self.reexec_pid:
                self.reexec_pid = 0
                continue
            if self._resolving is not None and pid == self._resolving.pid:
                self._settings_are_read(self._resolving, status)
                continue
            worker = self.WORKERS.pop(pid, None)
            if worker is None:  # as PID 1 of a container the arbiter inherits orphans
                continue
            worker.tmp.close()
            self._call_hook("child_exit", worker)
            slot = self._slots.pop(pid)
            told = self._told.pop(pid, None) is not None
            self._asked.pop(pid, None)
            slot["listening"] = 0
            self._ended(pid, slot, status, told)
            slot["state"] = State.FREE

    def _ended(self, pid: int, slot: Slot, status: int, told: bool) -> None:
        how = _how(status)
        if slot.state is State.BOOTING:
            if not told and not self._stopping:
                self._boot_failed(f"Worker {pid}", slot.text or how)
        elif slot.state is not State.DRAINING or status:
            slot.add("replacements", 1)
            self.log.error("Worker %d died: %s", pid, how)
            self._report(slot, pid, "died", how, lost=slot["in_flight"])
        else:
            slot.add("replacements", 1)

    def _call_hook(self, name: str, *arguments: object) -> None:
        """Call a hook of Gunicorn's; what it raises is logged, for the server lives on."""
        try:
            getattr(self.cfg, name)(self, *arguments)
        except Exception:
            self.log.exception("The hook %s has failed", name)

    def _boot_failed(self, who: str, cause: str) -> None:
        if not self._has_served:
            raise HaltServer(cause, self.WORKER_BOOT_ERROR)
        self._failures += 1
        self._failed_us = _now_us()
        wait = backoff(self._failures)
        self._next_try = time.monotonic() + wait
        self._say_degraded(cause)
        if self._release and any(slot["release"] < self._release for slot in self._slots.values()):
            # The old code goes on: what serves now is the release that holds.
            for slot in self._slots.values():
                slot["release"] = self._release
            self.log.error(
                "The release stops at its first failure; the old code goes on serving. "
                "Send HUP again when it is repaired."
            )
            return
        self.log.warning("%s could not boot; next try in %.0f s", who, wait)

    def _say_degraded(self, cause: str) -> None:
        if cause and cause != self._degraded:
            self.log.error("degraded: no new worker can boot: %s", cause)
        elif self._degraded and not cause:
            self.log.info("recovered: workers boot again")
        self._degraded = cause
        self.scoreboard.degraded = bool(cause)

    def murder_workers(self) -> None:
        """End the workers that hang: in their boot, or with a loop that stands still."""
        now = time.monotonic()
        for pid, worker in [*self.WORKERS.items()]:
            slot = self._slots[pid]
            told = self._told.get(pid)
            leaving = LEAVING_TIMEOUTS * self.cfg.graceful_timeout + STOP_SECONDS
            if told is not None and now - told > leaving:
                self.log.critical("Worker %d does not leave; it is killed", pid)
                self.kill_worker(pid, signal.SIGKILL)
                continue
            if slot.state is State.BOOTING:
                age = now - slot["started_us"] / 1e6
                hangs = age > self.config.boot_timeout
                slow = f"its boot has taken more than {self.config.boot_timeout:g} s"
            elif self.timeout:
                hangs = now - worker.tmp.last_update() > self.timeout
                slow = f"its event loop has stood still for more than {self.timeout} s"
            else:
                continue
            if not hangs:
                continue
            if not worker.aborted:
                self.log.critical("WORKER TIMEOUT (pid:%s): %s", pid, slow)
                slot.text = slow
                worker.aborted = True
                self.kill_worker(pid, signal.SIGABRT)
            else:
                self.kill_worker(pid, signal.SIGKILL)

    # ------------------------------------------------------------------ memory

    def _has_room(self, staying: dict[int, Slot]) -> bool:
        """Tell whether there is memory for one more worker (rule 2)."""
        if len(staying) > self.num_workers:
            return True  # the replacement is there already
        need = self._need()
        room, whose = conf.memory_room(), "The container"
        if self.config.max_rss_total:
            left = self.config.max_rss_total - int(self._reckoned())
            if room is None or left < room:
                room, whose = max(left, 0), "AIOSERVE_MAX_RSS_TOTAL"
        crowded = room is not None and room < need
        if crowded and not self._crowded:
            self.log.warning(
                "%s has %d MiB of memory left, a worker needs %d MiB: "
                "workers leave before their replacements are started.",
                whose,
                (room or 0) >> 20,
                need >> 20,
            )
        self._crowded = crowded
        return not crowded

    def _need(self) -> int:
        """Give the memory, in bytes, that one more worker is reckoned to take."""
        return max((slot["rss_at_ready"] for slot in self._slots.values()), default=0)

    def _reckoned(self) -> float:
        """Give the memory, in bytes, that all workers have when one more has booted, without it."""
        return sum(
            self._expected(pid, slot) if self._stays(pid, slot) else self._passing(slot)
            for pid, slot in self._slots.items()
        )

    def _expected(self, pid: int, slot: Slot, more: float = 0.0) -> float:
        rate = self._grown[pid].rate if pid in self._grown else 0.0
        return expected_rss(_sample(slot, more), rate)

    def _watch_growth(self, now: float) -> None:
        """See by how much each worker has grown of late."""
        for pid, slot in self._slots.items():
            last = self._grown.get(pid)
            if last is None:
                self._grown[pid] = _Grown(now, slot["rss"], 0.0)
            elif now - last.at >= GROWTH_SECONDS:
                rate = (slot["rss"] - last.rss) / (now - last.at)
                self._grown[pid] = _Grown(now, slot["rss"], max(rate, 0.0) if last.rss else 0.0)
        for pid in self._grown.keys() - self._slots.keys():
            del self._grown[pid]

    def _passing(self, slot: Slot) -> int:
        """Give the memory, in bytes, of a worker that boots or leaves."""
        return self._need() if slot.state is State.BOOTING else slot["rss"]

    def _stays(self, pid: int, slot: Slot) -> bool:
        return slot.state in (State.READY, State.RETIRING) and pid not in self._told

    def _watch_budget(self) -> None:
        """Let the largest workers retire before all together are over their budget."""
        now = time.monotonic()
        budget = self.config.max_rss_total
        if not budget:
            return
        self._watch_growth(now)
        boots = sum(slot.state is State.BOOTING for slot in self._slots.values())
        if now < self._next_report or boots >= self.config.max_retiring:
            return
        staying = {pid: slot for pid, slot in self._slots.items() if self._stays(pid, slot)}
        sizes = {
            pid: (self._expected(pid, slot, BUDGET_AHEAD), slot["rss_at_ready"])
            for pid, slot in staying.items()
        }
        passing = sum(self._passing(s) for pid, s in self._slots.items() if pid not in staying)
        reserve = passing or self._next_need(staying)
        total = sum(slot["rss"] for slot in staying.values())
        for pid in over_budget(budget - reserve, sizes)[: self.config.max_retiring]:
            slot = staying[pid]
            young = now - slot["ready_us"] / 1e6 < self.config.min_lifetime
            if slot.state is State.READY and not young:
                text = (
                    f"max_rss_total: {total >> 20} MiB of memory in all workers of at most "
                    f"{budget >> 20} MiB; this is the largest with {slot['rss'] >> 20} MiB"
                )
                if self.config.recycle_dry_run:
                    self.log.info("Worker %d would be replaced (dry run): %s", pid, text)
                    self._next_report = now + DRY_RUN_INTERVAL
                    continue
                self._asked[pid] = text

    def _next_need(self, staying: dict[int, Slot]) -> int:
        """Give what of the budget is to be left for the next worker that boots.

        Where it never fits in, workers leave before their replacements are started (rule 2).
        """
        need = self._need()
        least = sum(slot["rss_at_ready"] for slot in staying.values())
        return need if least + need <= self.config.max_rss_total else 0

    # ------------------------------------------------------------------ signals

    def handle_hup(self) -> None:
        """HUP: a release, one worker after another (rule 6), by settings that are read afresh."""
        self._end_resolving()  # what it has read may be older than this signal
        self.log.info("Release: reading the settings")
        self.log.reopen_files()
        try:
            self._resolving = self._read_settings()
        except OSError as error:
            self._refuse_release(str(error))

    def _read_settings(self) -> _Resolving:
        """Let another process read the project's settings: the arbiter holds none of its code."""
        # A pipe would have to be emptied meanwhile.
        directory = Path(tempfile.mkdtemp(prefix="aioserve-"))
        try:
            with (directory / "out").open("wb") as out, (directory / "err").open("wb") as err:
                process = subprocess.Popen(  # noqa: S603  # the command that started this server
                    self.app.config_command, stdin=subprocess.DEVNULL, stdout=out, stderr=err
                )
        except OSError:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        # It is reaped with the workers; the object would warn, here and in a new worker.
        process.returncode = 0
        return _Resolving(process.pid, directory, time.monotonic() + self.config.boot_timeout)

    def _end_resolving(self) -> None:
        process, self._resolving = self._resolving, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            shutil.rmtree(process.directory, ignore_errors=True)

    def _watch_release(self) -> None:
        """Refuse the release where its settings take too long."""
        if self._resolving is not None and time.monotonic() > self._resolving.deadline:
            self._end_resolving()
            self._refuse_release(f"it has taken more than {self.config.boot_timeout:g} s")

    def _settings_are_read(self, process: _Resolving, status: int) -> None:
        """Begin the release with the settings that were read, or refuse it."""
        self._resolving = None
        output, errors = (
            (process.directory / name).read_text(encoding="utf-8", errors="replace")
            for name in ("out", "err")
        )
        shutil.rmtree(process.directory, ignore_errors=True)
        config = None if status else _printed_config(output)
        if config is None:
            self._refuse_release((errors.strip().splitlines() or [_how(status)])[-1])
            return
        self._take_config(config)
        self._release += 1
        self._next_try = 0.0
        self.log.info("Release: replacing %d workers one after another", self.num_workers)

    def _refuse_release(self, cause: str) -> None:
        self._failed_us = _now_us()
        self._say_degraded(f"the settings cannot be read: {cause}")
        self.log.error("The release is refused; the old code goes on serving.")

    def _take_config(self, config: Config) -> None:
        if config.bind != self.config.bind:
            self.log.warning("AIOSERVE_BIND has changed; that needs a restart, or USR2.")
        if config.preload != self.config.preload:
            self.log.warning("AIOSERVE_PRELOAD has changed; that needs a restart, or USR2.")
            config = dataclasses.replace(config, preload=self.config.preload)
        changed = config.workers != self.config.workers
        self.config = self.app.config = config
        workers = self.num_workers
        self.app.reload()
        self.setup(self.app)
        if not changed:
            self.num_workers = workers  # as TTIN and TTOU have left it
        self._call_hook("on_reload")

    def reexec(self) -> None:
        """USR2: start another arbiter; where that is not possible, this one goes on."""
        try:
            super().reexec()
        except Exception as error:  # noqa: BLE001  # no failure takes the server down
            self.log.error("The upgrade has failed: %s", error)
            if os.getpid() != self.pid:  # the new process, in which this would be the arbiter too
                os._exit(1)

    def stop(self, graceful: bool = True) -> None:
        """End all workers; each knows that nobody will accept after it."""
        self._stopping = True
        self._end_resolving()
        listening = [
            slot.index
            for pid, slot in self._slots.items()
            # One that was told to drain may be about to close its sockets. One that drains though
            # nobody told it had its signal together with the arbiter.
            if slot["listening"] and slot.state is not State.BOOTING and pid not in self._told
        ]
        self.scoreboard.closer = min(listening, default=0)
        self.scoreboard.stopping = True
        self.cfg.set("graceful_timeout", self.cfg.graceful_timeout + STOP_SECONDS)
        super().stop(graceful)
        until = time.monotonic() + KILLED_SECONDS
        while self.WORKERS and time.monotonic() < until:
            self.reap_workers()
            time.sleep(0.01)

    # ------------------------------------------------------------------ events

    def _report(self, slot: Slot, pid: int, kind: str, text: str, *, lost: int) -> None:
        self.log.info(
            "replacement %s",
            json.dumps(
                {
                    "pid": pid,
                    "reason": kind,
                    "text": text,
                    "served": slot["served"],
                    "age": round((_now_us() - slot["ready_us"]) / 1e6, 3),
                    "lost": lost,
                }
            ),
        )


def _sample(slot: Slot, more: float = 0.0) -> Sample:
    """Give what the scoreboard tells of a worker that is ready; ``more`` seconds to its boot."""
    ready = slot["ready_us"] / 1e6
    return Sample(
        requests=slot["served"],
        rss=slot["rss"],
        rss_at_ready=slot["rss_at_ready"],
        age=time.monotonic() - ready,
        boot=ready - slot["started_us"] / 1e6 + more,
    )


def _now_us() -> int:
    return time.monotonic_ns() // 1000


def _printed_config(text: str) -> Config | None:
    """Give the configuration that ``--print-config=json`` printed, whatever else was printed."""
    for start in [found.start() for found in re.finditer(r"^\{$", text, re.MULTILINE)]:
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
            return Config.load(json.JSONDecoder().raw_decode(text[start:])[0])
    return None


def _how(status: int) -> str:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        name = signal.Signals(number).name
        return f"killed by {name}" + (" (out of memory?)" if number == signal.SIGKILL else "")
    return f"exited with code {os.WEXITSTATUS(status)}"

"""The worker: aiohttp's Gunicorn worker, recycled without a request lost."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import faulthandler
import gc
import json
import math
import os
import random
import resource
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Awaitable, Callable
from functools import partial
from types import FrameType
from typing import Any, NoReturn

import gunicorn.config
from aiohttp import HttpVersion10, HttpVersion11, hdrs, web
from aiohttp.worker import GunicornWebWorker
from gunicorn.errors import AppImportError
from gunicorn.sock import ssl_context

from django_aioserve import conf
from django_aioserve.application import close_streams
from django_aioserve.bridge.environ import request_meta
from django_aioserve.bridge.threads import QueueFull, ThreadPool
from django_aioserve.conf import Config
from django_aioserve.keys import CONFIG, POOL, SHORT_WAY
from django_aioserve.server import recycling
from django_aioserve.server.accounts import (
    GunicornAccessLogger,
    GunicornRequest,
    GunicornResponse,
)
from django_aioserve.server.connection import Connection, Front, Limits, require_aiohttp
from django_aioserve.server.drain import ACCEPT_LOOK, drain
from django_aioserve.server.scoreboard import Scoreboard, Slot, State
from django_aioserve.server.warmup import warm_up
from django_aioserve.server.watchdog import Watchdog
from django_aioserve.signals import worker_replaced

__all__ = ["RecyclingWorker"]

HEARTBEAT = 1.0
"""Seconds between two signs of life to the arbiter."""

HOLD_LOOK = 0.02
"""Seconds between two looks whether the pause of a worker at its limit is over."""

QUICK_SECONDS = 0.5
"""Seconds that a worker takes to end what is under way when it is told to leave at once."""

GROUP_SECONDS = 0.5
"""Seconds that a worker which was told to leave, though not by its arbiter, keeps its sockets:
a signal to the whole group of processes reaches the arbiter too."""

SAMPLE_REQUESTS, SAMPLE_SECONDS = 32, 0.05
"""Requests and seconds between two looks at the limits: a leak may outrun the heartbeat."""

REQUEST_OBJECTS, MOST_OBJECTS = 100, 50_000
"""Objects that the collector knows of, of one request in flight, with Django's usual middlewares;
and of how many all together it takes no look at the most: streams may be in flight for hours."""

_PAGE = os.sysconf("SC_PAGE_SIZE")

DEFAULT_LINE_SIZE = 8190
"""Gunicorn's own default of 4094 refuses the long query strings of Django's admin."""

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class RecyclingWorker(GunicornWebWorker):
    """Serves an aiohttp application and leaves, when its time has come, without losing a request.

    For ``gunicorn project.wsgi:app --worker-class django_aioserve.server.RecyclingWorker``
    as for ``runaio``. Where the application was built by `get_aio_application` its
    ``AIOSERVE_*`` settings apply, except where Gunicorn's own settings say otherwise.

    .. versionadded:: 0.1
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Given by our arbiter; None under Gunicorn's own.
        self.slot: Slot | None = getattr(self.app, "slot", None)
        self.scoreboard: Scoreboard | None = getattr(self.app, "scoreboard", None)
        self.limits = recycling.Limits()
        self.front: Front | None = None
        self._pool: ThreadPool | None = None
        self._listeners: list[asyncio.Server] = []
        self._leave = asyncio.Event()
        self._reason: recycling.Reason | None = None
        self._quick = False
        self._ends_in_boot = False
        self._spawned = time.monotonic()
        self._ready = 0.0
        self._looked = math.inf  # not before it is ready
        self._rss_at_ready = 0
        self._reported = ""
        self._gc_threshold = gc.get_threshold()
        self._client: Callable[[web.BaseRequest], str] = lambda _: ""

    def init_process(self) -> None:
        """Boot: Gunicorn's part of it. The loop is made in `run`, once the settings are known."""
        try:
            # Past aiohttp's init_process, which would make a loop of its own choice.
            super(GunicornWebWorker, self).init_process()
        except (Exception, SystemExit) as error:
            slot = self.slot
            if slot is not None and slot.state is State.BOOTING and not self._ends_in_boot:
                slot.text = _cause(error)
            raise

    def init_signals(self) -> None:
        """Take signals at once, by Python's own handlers: a boot that hangs can be ended."""
        super(GunicornWebWorker, self).init_signals()
        # A subprocess of the project's code must find its own exit status.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        # They are for the arbiter; a closed terminal sends SIGHUP to the whole group.
        for number in (signal.SIGHUP, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        # Our arbiter held them back since the fork.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS)

    def run(self) -> None:
        """Serve until it is time to leave, then drain; called once, ends the process."""
        self.booted = False
        app = self.wsgi
        if not isinstance(app, web.Application):
            raise RuntimeError(  # noqa: TRY004  # as aiohttp's worker does
                f"The application is not an aiohttp application but {app!r}; "
                "wrap it: get_aio_application(application)."
            )
        require_aiohttp()
        config = self._overlay(app)
        # An exit within the loop's own beginning would leave it half begun: it could not be closed.
        signal.pthread_sigmask(signal.SIG_BLOCK, self.SIGNALS)
        self.loop = _new_loop(config.loop)
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_until_complete(self._serve(app, config))
            self.loop.run_until_complete(_end_tasks())
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        finally:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
                # Its end is near: a further signal must not make it look like a crash.
                self.loop.remove_signal_handler(number)
                signal.signal(number, signal.SIG_IGN)
            self.loop.close()
        sys.exit(self.exit_code)

    def _watch_signals(self) -> None:
        """Take signals on the loop from now on; SIGABRT comes when the loop is blocked.

        `run` has held them back.
        """
        for name, handler in (
            ("TERM", self.handle_exit),
            ("QUIT", self.handle_quit),
            ("INT", self.handle_quit),
            ("USR1", self.handle_usr1),
            ("WINCH", self.handle_winch),
        ):
            number = signal.Signals[f"SIG{name}"]
            self.loop.add_signal_handler(number, handler, number, None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS)

    async def _serve(self, app: web.Application, config: Config) -> None:
        self.front = front = Front(
            limits=Limits(
                header_timeout=config.header_timeout,
                body_timeout=config.body_timeout,
                write_timeout=config.write_timeout,
                line_size=_line_size(self.cfg),
                field_size=self.cfg.limit_request_field_size or 1 << 20,
                fields=self.cfg.limit_request_fields,
            ),
            log=self.log,
            answered=self._answered,
        )
        self._client = request_meta(config).client
        self._watch_signals()
        if self._ends_in_boot:
            self._end_boot()
        # drain() has given the handlers their time when the runner is cleaned up.
        runner = web.AppRunner(app, handle_signals=False, shutdown_timeout=QUICK_SECONDS)
        await runner.setup()
        server = runner.server
        if server is None:
            raise RuntimeError("aiohttp's runner has no server after its setup.")
        server.request_handler = self._with_hooks(server.request_handler)
        if config.request_timeout:
            watchdog = Watchdog(config.request_timeout, self.log, self._is_stuck)
            server.request_handler = watchdog.guard(server.request_handler)
        options: dict[str, Any] = {
            "loop": self.loop,
            "logger": self.log,
            "keepalive_timeout": config.keepalive,
            "access_log": None,
        }
        if not config.request_timeout and not self._has_request_hooks():
            front.short_way = app.get(SHORT_WAY)
        if self.log.access_log_enabled:
            options |= {
                "access_log": self.log.access_log,
                "access_log_class": partial(
                    GunicornAccessLogger, gunicorn=self.log, client=self._client
                ),
            }
        factory = partial(Connection, server, front, **options)
        for path in config.warmup:
            await warm_up(factory, path)
        self._pool = app.get(POOL)
        tls = ssl_context(self.cfg) if self.cfg.is_ssl else None
        self._factory, self._tls = factory, tls
        await self._accept()
        self._is_ready(config)
        await self._beat_until_leave()
        await self._drain(runner, config)

    async def _accept(self) -> None:
        """Begin to accept connections."""
        for sock in self.sockets:
            listener = await self.loop.create_server(
                self._factory, sock=sock.sock.dup(), ssl=self._tls, backlog=self.cfg.backlog
            )
            self._listeners.append(listener)
        if self._leave.is_set():  # told to leave meanwhile
            self._stop_accepting()

    def _stop_accepting(self) -> None:
        while self._listeners:
            self._listeners.pop().close()

    def _is_ready(self, config: Config) -> None:
        # What was loaded stays: the collector need not visit it again and again.
        gc.collect()
        gc.freeze()
        self._gc_threshold = gc.get_threshold()
        self.booted = True
        self.nr = 0
        self._ready = time.monotonic()
        self._rss_at_ready = resident_memory()
        when = conf.import_dotted(config.recycle_when) if config.recycle_when else None
        self.limits = recycling.draw(config, random.random, when)
        if self.slot is not None:
            self.slot["rss"] = self.slot["rss_at_ready"] = self._rss_at_ready
            self.slot["ready_us"] = int(self._ready * 1e6)
            self.slot["state"] = State.READY
        self.log.info(
            "Worker %d is ready: boot %.2f s, %d MiB",
            self.pid,
            self._ready - self._spawned,
            self._rss_at_ready >> 20,
        )
        # What the arbiter does about it comes behind that line in the log.
        if self.slot is not None:
            self._wake_arbiter()

    async def _beat_until_leave(self) -> None:
        while not self._leave.is_set():
            self.notify()
            self._publish()
            if self.ppid != os.getppid():
                self._go(recycling.Reason("orphaned", "its arbiter is gone"))
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._leave.wait(), HEARTBEAT)

    def _publish(self) -> None:
        """Write this worker's figures to the scoreboard, and see whether a limit is reached."""
        sample = self._look()
        slot, front, pool = self.slot, self.front, self._pool
        if front is None:
            return
        in_flight = sum(not connection.idle for connection in front.connections)
        self._spare_collector(in_flight)
        if slot is not None:
            slot.add("requests", sample.requests - slot["served"])
            slot["served"] = sample.requests
            slot["connections"] = len(front.connections)
            slot["in_flight"] = in_flight
            if pool is not None:
                slot["threads"], slot["threads_busy"] = pool.size, pool.busy
                slot["queued"] = pool.queued

    def _spare_collector(self, in_flight: int) -> None:
        """Have the garbage collector look when as much may be garbage as is in flight.

        At a fixed count of objects it looks the more often the more is in flight, and finds
        nothing: 256 requests that wait took a tenth of all processor time for it.
        """
        first, *others = self._gc_threshold
        if first:  # else the project has switched it off
            spared = min(in_flight * REQUEST_OBJECTS, MOST_OBJECTS)
            gc.set_threshold(max(first, spared), *others)

    def _look(self) -> recycling.Sample:
        """See whether a limit is reached; give what was seen."""
        self._looked = time.monotonic()
        sample = recycling.Sample(
            requests=self.nr,
            rss=resident_memory(),
            rss_at_ready=self._rss_at_ready,
            age=time.monotonic() - self._ready,
            # Gunicorn's own arbiter starts nothing before this worker is gone.
            boot=self._ready - self._spawned if self.slot is not None else 0.0,
        )
        if self.slot is not None:
            self.slot["rss"] = sample.rss
        if self._reason is None and (reason := self._decide(sample)) is not None:
            self._retire(reason)
        return sample

    def _decide(self, sample: recycling.Sample) -> recycling.Reason | None:
        try:
            return recycling.decide(self.limits, sample)
        except Exception:
            # It would end this worker, and each that comes after it, with what they answer.
            self.log.exception(
                "The function of AIOSERVE_RECYCLE_WHEN has failed; "
                "this worker asks it no more and goes by its other limits"
            )
            self.limits = dataclasses.replace(self.limits, when=None)
            return recycling.decide(self.limits, sample)

    async def _drain(self, runner: web.AppRunner, config: Config) -> None:
        front, reason = self.front, self._reason
        if front is None or reason is None:
            raise RuntimeError("A worker drains that has not served or has no reason.")
        began = time.monotonic()
        front.leaving = True
        in_flight = sum(not connection.idle for connection in front.connections)
        if self.slot is not None:
            self.slot["state"] = State.DRAINING
            self._wake_arbiter()
        beat = self.loop.create_task(self._beat())
        spread = 0.0 if self._quick else config.stream_linger
        closing = self.loop.create_task(close_streams(runner.app, spread))
        lost = await drain(
            front,
            await self._sockets_to_empty(reason),
            self._factory,
            self._tls,
            linger=0.0 if self._quick else config.linger,
            within=0.0 if self._quick else float(self.cfg.graceful_timeout),
            others_listen=self._others_listen,
        )
        closing.cancel()
        now = time.monotonic()
        event = {
            "pid": self.pid,
            "reason": reason.kind,
            "text": reason.text,
            "served": self.nr,
            "age": round(now - self._ready, 3),
            "boot": round(self._ready - self._spawned, 3),
            "drain": round(now - began, 3),
            "in_flight": in_flight,
            "rss": resident_memory(),
            "lost": lost,
        }
        if self.slot is not None:
            self.slot.add("requests", self.nr - self.slot["served"])
            self.slot["served"] = self.nr
            self.slot.add("lost", lost)
            self.slot["in_flight"] = 0  # told of: should the end be a crash, nothing more is lost
        what = "stop" if reason.kind == "stopped" else "replacement"
        self.log.info("%s %s", what, json.dumps(event))
        if self._pool is not None and not self._quick:
            tell = self._pool.run(partial(worker_replaced.send_robust, type(self), event=event))
            with contextlib.suppress(QueueFull, TimeoutError):  # its threads may all hang
                await asyncio.wait_for(tell, self.cfg.graceful_timeout)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(runner.cleanup(), QUICK_SECONDS if self._quick else None)
        beat.cancel()

    async def _sockets_to_empty(self, reason: recycling.Reason) -> list[socket.socket]:
        """Give the listening sockets that nobody accepts from but this worker; close them else."""
        sockets = [sock.sock for sock in self.sockets]
        if self.scoreboard is None or self.slot is None:
            last = reason.kind == "stopped"  # Gunicorn's own arbiter may be stopping
        else:
            if not self.slot["told"] and not self._quick:
                await self._wait_for_arbiter(self.scoreboard)
            last = self.scoreboard.stopping and self.scoreboard.closer == self.slot.index
        if last and not self._quick:
            return sockets
        if self.slot is not None:
            await asyncio.sleep(ACCEPT_LOOK)  # the loop closes its copies in its next round
        self._close_sockets()
        return []

    async def _wait_for_arbiter(self, scoreboard: Scoreboard) -> None:
        """Wait a moment to hear that the whole server stops."""
        until = time.monotonic() + GROUP_SECONDS
        # The arbiter tells by the scoreboard: there is nothing to await.
        while time.monotonic() < until and not scoreboard.stopping:  # noqa: ASYNC110
            await asyncio.sleep(ACCEPT_LOOK)

    def _close_sockets(self) -> None:
        """Close the listening sockets, and let those know that close theirs last."""
        for sock in self.sockets:
            sock.close()
        if self.slot is not None:
            self.slot["listening"] = 0

    def _others_listen(self) -> bool:
        if self.scoreboard is None:
            return False
        return any(slot["listening"] for slot in self.scoreboard.slots if slot is not self.slot)

    async def _beat(self) -> None:
        while True:
            self.notify()
            await asyncio.sleep(HEARTBEAT)

    # ------------------------------------------------------------------ when to leave

    def _answered(self) -> None:
        self.nr += 1
        if self.front is not None and self.front.leaving:
            self.front.changed.set()
        if self.nr == self.limits.requests:
            self._limit_is_reached()
        elif not self.nr % SAMPLE_REQUESTS and time.monotonic() - self._looked > SAMPLE_SECONDS:
            self._look()

    def _limit_is_reached(self) -> None:
        self._look()
        scoreboard = self.scoreboard
        if self._reason is None or scoreboard is None or self._leave.is_set():
            return
        if self.front is not None:
            self.front.leaving = True
        if self._ready - self._spawned <= self.hold and not scoreboard.degraded:
            self._stop_accepting()
            self._holding = self.loop.create_task(self._hold(scoreboard))

    async def _hold(self, scoreboard: Scoreboard) -> None:
        """Leave what comes to the replacement, so that the limit is kept, until that is ready.

        Where it is not in time, or cannot boot, this worker accepts again.
        """
        if self.slot is not None:
            self.slot["holding"] = 1
            self._wake_arbiter()
        until = time.monotonic() + self.hold
        # The arbiter tells by the scoreboard: there is nothing to await.
        while time.monotonic() < until and not scoreboard.degraded and not self._leave.is_set():  # noqa: ASYNC110
            await asyncio.sleep(HOLD_LOOK)
        if not self._leave.is_set():
            if self.slot is not None:
                self.slot["holding"] = 0
            await self._accept()

    def _is_stuck(self, line: str) -> None:
        """Ask to be replaced for a request that hangs; called from any thread."""
        if self._reason is None:
            self._retire(recycling.Reason("stuck", line))

    def _retire(self, reason: recycling.Reason) -> None:
        """Ask to be replaced; under Gunicorn's own arbiter leave at once."""
        if self.dry_run:
            if self._reported != reason.kind:
                self._reported = reason.kind
                self.log.info(
                    "Worker %d would be replaced (dry run): %s: %s",
                    self.pid,
                    reason.kind,
                    reason.text,
                )
            return
        self._reason = reason
        if self.slot is None:
            self.loop.call_soon_threadsafe(self._go, reason)
            return
        self.log.info("Worker %d retires: %s: %s", self.pid, reason.kind, reason.text)
        if self.front is not None:
            # One that asks early for its replacement keeps its clients until its limit.
            self.front.leaving = reason.kind != "max_requests"
        self.slot.text = f"{reason.kind}: {reason.text}"
        self.slot["state"] = State.RETIRING
        self._wake_arbiter()

    def _go(self, reason: recycling.Reason) -> None:
        if not self._leave.is_set():
            self._reason = reason
            self.alive = False
            self._leave.set()
            if self.front is not None:
                self.front.leaving = True
            self._stop_accepting()

    def _wake_arbiter(self) -> None:
        # A SIGCHLD makes Gunicorn's arbiter look at its workers, whoever sent it.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(self.ppid, signal.SIGCHLD)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM: leave gracefully."""
        if self.front is None:
            self._end_boot()
        kind, _, text = (self.slot.text if self.slot is not None else "").partition(": ")
        self._go(self._reason or recycling.Reason(kind or "stopped", text or "told by SIGTERM"))

    def handle_quit(self, sig: int, frame: FrameType | None) -> None:
        """SIGQUIT, SIGINT: leave at once."""
        self._quick = True
        self.cfg.worker_int(self)
        if self.front is None:
            self._end_boot()
        self._go(recycling.Reason("stopped", f"told by {signal.Signals(sig).name}"))

    def _end_boot(self) -> NoReturn:
        """End a process that still boots: there is nothing to drain.

        Code that is being imported may catch the exit (a bare ``except:``): `_serve` looks again.
        """
        self._ends_in_boot = True
        self._close_sockets()
        # A further one would interrupt the end. It is blocked, not ignored: Python prints a
        # traceback for one that came with this one and whose handler is gone when it is to run.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
        # What was being imported may have left a file open; the end closes it.
        warnings.simplefilter("ignore", ResourceWarning)
        sys.unraisablehook = _but_for_an_exit
        sys.exit(0)

    def handle_abort(self, sig: int, frame: FrameType | None) -> None:
        """SIGABRT: the arbiter has waited in vain for a sign of life; tell where it stands."""
        self.log.critical("Worker %d stands still; the stacks of its threads follow", self.pid)
        faulthandler.dump_traceback(all_threads=True)
        self.cfg.worker_abort(self)
        os._exit(1)

    # ------------------------------------------------------------------ Gunicorn's settings

    def _overlay(self, app: web.Application) -> Config:
        """Give the application's configuration, with what Gunicorn was told on its own."""
        config = app.get(CONFIG) or Config()
        told: dict[str, Any] = {}
        if _is_told(self.cfg, "keepalive"):
            told["keepalive"] = float(self.cfg.keepalive)
        if _is_told(self.cfg, "threads"):
            told["threads"] = self.cfg.threads
        if _is_told(self.cfg, "forwarded_allow_ips"):
            told["forwarded_allow_ips"] = tuple(self.cfg.forwarded_allow_ips)
        if self.slot is None and self.cfg.max_requests:
            told["max_requests"] = self.cfg.max_requests
            told["max_requests_jitter"] = self.cfg.max_requests_jitter
        config = dataclasses.replace(config, **told)
        self.hold = config.hold
        self.dry_run = config.recycle_dry_run
        if CONFIG in app:
            app[CONFIG] = config
        return config

    def _has_request_hooks(self) -> bool:
        return any(_is_told(self.cfg, hook) for hook in ("pre_request", "post_request"))

    def _with_hooks(self, handler: Handler) -> Handler:
        """Wrap aiohttp's handler: an exit asked for by a handler is an error, hooks are called."""
        before = self.cfg.pre_request if _is_told(self.cfg, "pre_request") else None
        if self.front is not None and _is_told(self.cfg, "post_request"):
            self.front.after = self._post_request

        async def guarded(request: web.BaseRequest) -> web.StreamResponse:
            if before is not None:
                before(self, GunicornRequest(request, self._client(request)))
            if request.version != HttpVersion11 and (status := _refusal_of_version(request)):
                refusal = web.Response(status=status)
                refusal.force_close()
                return refusal
            try:
                return await handler(request)
            except (SystemExit, KeyboardInterrupt) as error:
                raise RuntimeError(f"{type(error).__name__} was raised by a handler") from error

        return guarded

    def _post_request(self, request: web.BaseRequest, response: web.StreamResponse) -> None:
        described = GunicornRequest(request, self._client(request))
        self.cfg.post_request(self, described, described.environ, GunicornResponse(response))


def _refusal_of_version(request: web.BaseRequest) -> int:
    """Give the status by which a request of another version than HTTP/1.1 is refused, or 0."""
    if request.version != HttpVersion10:
        return 505
    # RFC 9112, section 6.1: its framing cannot be trusted.
    return 400 if hdrs.TRANSFER_ENCODING in request.headers else 0


async def _end_tasks() -> None:
    """Cancel whatever still runs on the loop, as `asyncio.run` does."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _new_loop(name: str) -> asyncio.AbstractEventLoop:
    if name != "asyncio":
        try:
            import uvloop
        except ImportError:
            if name == "uvloop":
                raise
        else:
            return uvloop.new_event_loop()
    return asyncio.new_event_loop()


def _but_for_an_exit(unraisable: sys.UnraisableHookArgs) -> None:
    """Say nothing of an exit that was raised where nothing can be, in a callback of a weak set."""
    if not issubclass(unraisable.exc_type, SystemExit):
        sys.__unraisablehook__(unraisable)


def _cause(error: BaseException) -> str:
    """Give the cause of a failed boot in one line, with the project's line that raised it."""
    if isinstance(error, AppImportError):
        return str(error)  # a mistake in the settings, told by what is expected
    while error.__cause__ is not None:
        error = error.__cause__
    frames = traceback.extract_tb(error.__traceback__)
    last = [frame for frame in frames if not frame.filename.startswith("<")][-1:]
    where = f" ({last[0].filename}, line {last[0].lineno})" if last else ""
    text = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
    return text + where


def resident_memory() -> int:
    """Give the resident memory of this process, in bytes."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * _PAGE
    except OSError:  # not Linux: the most it ever was, which macOS gives in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _is_told(cfg: gunicorn.config.Config, name: str) -> bool:
    """Tell whether a setting of Gunicorn's has another value than its default."""
    setting = cfg.settings[name]
    return bool(setting.get() != type(setting)().get())


def _line_size(cfg: gunicorn.config.Config) -> int:
    if not _is_told(cfg, "limit_request_line"):
        return DEFAULT_LINE_SIZE
    return int(cfg.limit_request_line) or 1 << 20

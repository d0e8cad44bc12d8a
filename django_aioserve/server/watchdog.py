"""What becomes of a request that takes too long: the client gets 504, the log says where it stands.

Rules:

1. A request is overdue when nothing of its answer has been written within
   ``request_timeout``. What streams, or is a WebSocket, has begun and is never overdue.
2. Where the loop runs it answers 504 itself and cancels the handler. A thread cannot be
   cancelled: it stays behind, its stack is in the log, the worker asks to be replaced.
3. Where the loop is blocked a thread of the watchdog's own answers, straight to the
   socket, and shuts it down: nothing that the loop writes later follows the 504.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable
from types import FrameType

from aiohttp import web

from django_aioserve.bridge.threads import ThreadPool

__all__ = ["Watchdog"]

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

LOOKS_IN_LIMIT = 10
"""How often within ``request_timeout`` the watchdog looks whether the loop runs."""

TIMEOUT_ANSWER = (
    b"HTTP/1.1 504 Gateway Timeout\r\nContent-Type: text/plain; charset=utf-8\r\n"
    b"Content-Length: 16\r\nConnection: close\r\n\r\nGateway Timeout\n"
)


class Watchdog:
    """Watches the requests of one worker.

    ``limit`` is ``request_timeout`` in seconds. ``stuck`` is called with a line that
    describes the request where something of it stays behind, from whichever thread
    found it.
    """

    def __init__(self, limit: float, log: logging.Logger, stuck: Callable[[str], None]) -> None:
        self._limit = limit
        self._log = log
        self._stuck = stuck
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        # A request cannot be hashed: by its id.
        self._began: dict[int, tuple[web.BaseRequest, float]] = {}
        self._beat = time.monotonic()
        self._over = threading.Event()
        threading.Thread(target=self._watch, name="aioserve-watchdog", daemon=True).start()

    def close(self) -> None:
        """Stop watching."""
        self._over.set()

    def guard(self, handler: Handler) -> Handler:
        """Wrap aiohttp's handler so that an overdue request is answered with 504."""

        async def guarded(request: web.BaseRequest) -> web.StreamResponse:
            task = asyncio.current_task()
            overdue = False

            def give_up() -> None:
                nonlocal overdue
                if task is not None and not request.writer.output_size:
                    overdue = True
                    stacks = self._late_threads()
                    self._report(request, self._limit, stacks or _stack_of(task))
                    if stacks:
                        self._stuck(_line(request, self._limit))
                    task.cancel()

            timer = self._loop.call_later(self._limit, give_up)
            self._began[id(request)] = request, time.monotonic()
            try:
                return await handler(request)
            except asyncio.CancelledError:
                if not overdue or task is None:
                    raise
                task.uncancel()
                answer = web.Response(status=504, text="Gateway Timeout\n")
                answer.force_close()
                return answer
            finally:
                timer.cancel()
                self._began.pop(id(request), None)

        return guarded

    def _report(self, request: web.BaseRequest, age: float, stacks: str) -> None:
        line = _line(request, age)
        self._log.error("Stuck: %s of at most %g s; it stands here:\n%s", line, self._limit, stacks)

    def _late_threads(self) -> str:
        """Give the stacks of the threads whose work is overdue."""
        frames = sys._current_frames().values()  # noqa: SLF001  # there is no public way to them
        return "\n".join(
            _text(frame) for frame in frames if _age_of_work(frame) >= 0.9 * self._limit
        )

    # ------------------------------------------------------------------ a blocked loop

    def _watch(self) -> None:
        while not self._over.wait(self._limit / LOOKS_IN_LIMIT):
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._sign)
            if time.monotonic() - self._beat > self._limit:
                self._answer_for_the_loop()

    def _sign(self) -> None:
        self._beat = time.monotonic()

    def _answer_for_the_loop(self) -> None:
        frame = sys._current_frames().get(self._loop_thread)  # noqa: SLF001
        stack = _text(frame) if frame is not None else ""
        now = time.monotonic()
        for key, (request, began) in [*self._began.items()]:
            if now - began > self._limit and not request.writer.output_size:
                self._report(request, now - began, stack)
                self._stuck(_line(request, now - began))
                self._began.pop(key, None)
                _answer(request)


def _answer(request: web.BaseRequest) -> None:
    transport = request.transport
    sock = transport.get_extra_info("socket") if transport is not None else None
    if sock is None or request.protocol.ssl_context is not None:
        return  # TLS needs the loop; the worker's end closes the connection
    with contextlib.suppress(OSError):
        copy = socket.socket(fileno=socket.dup(sock.fileno()))
        with copy:
            copy.send(TIMEOUT_ANSWER, socket.MSG_DONTWAIT)
            copy.shutdown(socket.SHUT_RDWR)


def _line(request: web.BaseRequest, age: float) -> str:
    return f"{request.method} {ascii(request.path)[1:-1]} has taken {age:.1f} s"


def _stack_of(task: asyncio.Task[object]) -> str:
    """Give where a suspended task waits, through all that it awaits."""
    from django_aioserve.bridge.home import Within  # Django, which the arbiter does without

    lines: list[str] = []
    waiting: object = task.get_coro()
    while waiting is not None:
        frame = getattr(waiting, "cr_frame", None)
        if frame is not None:
            lines += traceback.format_stack(frame, limit=1)
        waiting = getattr(waiting, "cr_await", None)
        inner = getattr(waiting, "gi_frame", None)
        if inner is not None and inner.f_code is Within.__await__.__code__:
            waiting = inner.f_locals["self"]._awaitable  # noqa: SLF001  # of this package
    return "".join(lines).rstrip()


def _text(frame: FrameType) -> str:
    return "".join(traceback.format_stack(frame)).rstrip()


def _age_of_work(frame: FrameType) -> float:
    """Give the seconds since the pool thread that ``frame`` belongs to was given its work."""
    found: FrameType | None = frame
    while found is not None:
        if found.f_code is ThreadPool._serve.__code__:  # noqa: SLF001  # of this package
            since = found.f_locals.get("since")
            work = found.f_locals.get("work")
            return time.monotonic() - since if since is not None and work is not None else 0.0
        found = found.f_back
    return 0.0

"""The threads that run synchronous code for one event loop.

Rules:

1. Work enters by ``submit`` on the loop's thread, runs on one pool thread, and
   leaves by a callback that runs on the loop. Nothing else crosses over.
2. All callbacks that are waiting are run by a single wake-up of the loop.
3. The books (how many pieces of work are under way) are kept by the loop's
   thread alone. A pool thread only appends to deques, which is atomic, so there
   is no lock. It notes that it is free *before* it asks for its callback to be
   run: whoever submits from that callback finds the idle thread.
4. No exception ends a pool thread, and none reaches the loop: not ``SystemExit``,
   not ``KeyboardInterrupt``.
5. The threads are daemons: one that hangs cannot hold up the end of the process.
   ``close`` and ``join`` let finish what can finish.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from time import monotonic
from typing import Any, TypeVar

logger = logging.getLogger("django_aioserve")

T = TypeVar("T")

#: What runs on the loop once work is done.
Callback = Callable[[], object]

#: What runs on a pool thread; it may return the callback to run on the loop afterwards.
Work = Callable[[], "Callback | None"]


class QueueFull(Exception):
    """No thread is free and the queue is full, or the pool was closed. Answer 503."""


class ThreadPool:
    """At most ``threads`` threads, started as they are needed, for the running event loop.

    ``queue_size`` is how many pieces of work may wait while every thread is busy.
    ``name`` begins the name of each thread. All members but ``call_soon`` are for the
    loop's thread only. Raises RuntimeError where no loop is running.

    .. versionadded:: 0.1
    """

    def __init__(self, threads: int, queue_size: int, name: str = "aioserve") -> None:
        self._loop = asyncio.get_running_loop()
        self._name = name
        self._limit = threads
        self._most_work = threads + queue_size
        self._closed = False
        self._threads: set[threading.Thread] = set()
        self._started = 0
        self._queue: SimpleQueue[tuple[Work, float] | None] = SimpleQueue()
        self._put = self._queue.put
        self._under_way = 0
        self._queue_seconds = 0.0
        # One entry, the seconds it was queued, for each piece of work that has ended.
        self._ended: deque[float] = deque()
        self._callbacks: deque[Callback] = deque()
        self._waking = False
        self._farewells: list[Callable[[], object]] = []
        self._all_gone = asyncio.Event()
        self._all_gone.set()

    @property
    def size(self) -> int:
        """The number of threads that exist."""
        return len(self._threads)

    @property
    def under_way(self) -> int:
        """The number of pieces of work that were submitted and have not ended."""
        self._settle()
        return self._under_way

    @property
    def busy(self) -> int:
        """The number of threads at work."""
        self._settle()
        return min(self._under_way, len(self._threads))

    @property
    def queued(self) -> int:
        """The number of pieces of work that no thread has taken up yet."""
        self._settle()
        return max(self._under_way - len(self._threads), 0)

    @property
    def queue_seconds(self) -> float:
        """The seconds that finished work had waited for a thread, cumulated."""
        self._settle()
        return self._queue_seconds

    def submit(self, work: Work) -> None:
        """Run ``work()`` on a pool thread; what it returns, if anything, then runs on the loop.

        The work runs in the thread's own context: whoever needs one of his own runs
        inside a ``contextvars.Context`` that he brings along. An exception that escapes
        from the work is logged and goes nowhere else. Raises QueueFull.
        """
        if self._ended:
            self._settle()
        under_way = self._under_way
        if under_way >= self._most_work or self._closed:
            raise QueueFull
        if under_way >= len(self._threads) < self._limit:
            self._start_thread()
        self._under_way = under_way + 1
        self._put((work, monotonic()))

    def call_soon(self, callback: Callback) -> None:
        """Run ``callback()`` on the loop, together with all others that wait. From any thread."""
        self._callbacks.append(callback)
        if not self._waking:
            # Two threads may both come here: the second wake-up finds nothing to do.
            self._waking = True
            try:
                self._loop.call_soon_threadsafe(self._run_callbacks)
            except RuntimeError:
                # A thread that outlived its loop has nobody left to tell.
                if not self._loop.is_closed():
                    raise

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """Return ``function(*args)``, run on a pool thread in a copy of the current context.

        Raises QueueFull, and what the function raises; an exception that would disturb
        the loop or its tasks (SystemExit, KeyboardInterrupt, CancelledError,
        GeneratorExit, StopIteration) comes as the cause of a RuntimeError. Cancelling
        leaves the thread to finish the function.
        """
        future: asyncio.Future[T] = self._loop.create_future()
        context = contextvars.copy_context()

        def work() -> Callback:
            try:
                result = context.run(function, *args)
            except BaseException as error:  # noqa: BLE001  # it is the caller's
                return partial(settle, future, harmless(error), None)
            return partial(settle, future, None, result)

        self.submit(work)
        return await future

    def at_exit(self, function: Callable[[], object]) -> None:
        """Run ``function()`` on each thread when it ends, to close what belongs to the thread."""
        self._farewells.append(function)

    def close(self) -> None:
        """Take no more work. What was submitted before is still done; then the threads end."""
        if not self._closed:
            self._closed = True
            for _ in self._threads:
                self._put(None)

    async def join(self, timeout: float) -> bool:
        """Wait for a closed pool's threads to end; tell whether they did in ``timeout`` seconds."""
        try:
            async with asyncio.timeout(timeout):
                # An event that is set is waited for without a pause.
                await self._all_gone.wait()
        except TimeoutError:
            return False
        return True

    def _settle(self) -> None:
        ended = self._ended
        for _ in range(len(ended)):
            self._queue_seconds += ended.popleft()
            self._under_way -= 1

    def _start_thread(self) -> None:
        self._started += 1
        thread = threading.Thread(
            target=self._serve, name=f"{self._name}-{self._started}", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:
            # The system has no more threads to give: those that exist have to do.
            if not self._threads:
                raise QueueFull from None
        else:
            self._threads.add(thread)
            self._all_gone.clear()

    def _serve(self) -> None:
        get = self._queue.get
        ended = self._ended.append
        while (item := get()) is not None:
            work, since = item
            waited = monotonic() - since
            callback = None
            try:
                callback = work()
            except BaseException:
                logger.exception("Exception in %s", threading.current_thread().name)
            ended(waited)
            if callback is not None:
                self.call_soon(callback)
            # An idle thread must not keep alive what its last work referred to.
            del item, work, callback
        for farewell in self._farewells:
            try:
                farewell()
            except BaseException:
                logger.exception("Exception at the end of %s", threading.current_thread().name)
        thread = threading.current_thread()
        self.call_soon(lambda: self._gone(thread))

    def _gone(self, thread: threading.Thread) -> None:
        thread.join()
        self._threads.discard(thread)
        if not self._threads:
            self._all_gone.set()

    def _run_callbacks(self) -> None:
        # The flag falls first: whatever is appended from here on wakes the loop anew.
        self._waking = False
        callbacks = self._callbacks
        for _ in range(len(callbacks)):
            callback = callbacks.popleft()
            try:
                callback()
            except BaseException as error:  # noqa: BLE001  # it must not end the loop
                self._loop.call_exception_handler(
                    {"message": f"Exception in callback {callback!r}", "exception": error}
                )


def carry_over(outer: contextvars.Context) -> None:
    """Set the variables of ``outer``, a context of the loop's thread, in the current one."""
    for variable, value in outer.items():
        # What asgiref's Locals hold belongs to the thread of the loop.
        if variable.name != "asgiref.local":
            variable.set(value)


def settle(future: asyncio.Future[Any], error: Exception | None, result: object) -> None:
    """Give ``future`` its exception or result, unless it was cancelled meanwhile."""
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)


def harmless(error: BaseException) -> Exception:
    """``error``, or a RuntimeError with it as its cause, if a task could not take it as a result.

    SystemExit and KeyboardInterrupt would end the loop, CancelledError and
    GeneratorExit would pass for something else, StopIteration cannot leave a coroutine.
    """
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    wrapper = RuntimeError(f"{type(error).__name__} was raised in a thread")
    wrapper.__cause__ = error
    return wrapper

"""Home threads: where the middleware around asynchronous views lives.

The rules are 2 and 4 to 7 of `django_aioserve.bridge.django`.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import sys
import threading
from collections import deque
from concurrent.futures import Executor, Future
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar, cast

from asgiref import local
from asgiref.sync import ThreadSensitiveContext
from django.core.cache import caches
from django.core.cache.backends.memcached import PyLibMCCache
from django.db import connections
from django.db.backends.signals import connection_created
from greenlet import greenlet

from django_aioserve.bridge.threads import QueueFull, ThreadPool, harmless, settle

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Generator, Iterator

    from django.db.backends.base.base import BaseDatabaseWrapper

    from django_aioserve.bridge.threads import Callback, Work
    from django_aioserve.conf import Config

__all__ = [
    "GUEST",
    "Chain",
    "Guest",
    "Home",
    "Homes",
    "Within",
    "keeping_connections",
    "open_caches",
    "open_connections",
    "rehome",
    "retire",
    "watch_connections",
]

logger = logging.getLogger("django_aioserve")

T = TypeVar("T")

#: Up to how many seconds a turn counts as short, and how many of those may wait in a row.
_QUICK_TURN = 0.0005
_QUICK_QUEUE = 16

#: How many seconds, and how many times as long as usual, a turn may take before new requests
#: are kept from waiting behind it.
_LONG_TURN = 0.005
_MUCH_LONGER = 8

#: How many greenlets a home keeps for the next requests. A new one costs four times as
#: much, for the memory that each has mapped: 16 KiB.
_SPARE_CHAINS = 32

# asgiref tags the values of its Locals with the thread that set them. Whoever moves a
# context to another thread has to tag them anew, and there is no public name for that.
# Older versions have no tags.
_tagged: Any = getattr(local, "_Storage", None)
_tag_anew: Any = getattr(local, "_rehome", None)

#: Seconds between two looks at what is left to do at the end.
_POLL = 0.005

#: What comes out of a view: its exception, or else its result.
Outcome = tuple[BaseException | None, Any]


class Guest:
    """A request that lives on a home thread."""

    __slots__ = ("ended",)

    def __init__(self) -> None:
        #: Whether its response was closed.
        self.ended = False


#: The request for which the current context works.
GUEST: contextvars.ContextVar[Guest] = contextvars.ContextVar("django_aioserve.guest")


class Chain(greenlet):
    """A greenlet on a home thread, in which a chain of middleware runs, and then another.

    A first ``switch()`` makes it ready. Each chain begins by ``switch((work, value))``, for
    ``work(value)``, in the context that was set before.
    """

    #: The view that is expected at its end, and whether a synchronous one was found there.
    view: Callable[..., Any] | None = None
    astray = False
    #: Whether the work has ended, and with what; see `Home.give_back`.
    ended = False
    result: Any = None

    def run(self) -> None:
        """Do one piece of work after another, until the greenlet is killed."""
        parent = cast("greenlet", self.parent)
        while True:
            # None of it comes with the first switch: a greenlet keeps the arguments of that one.
            work, value = parent.switch()
            self.result = work(value)
            # A spare one must not keep alive what its last work referred to.
            del work, value
            self.ended = True

    def wait(self, awaitable: Awaitable[T]) -> T:
        """Suspend the chain until the loop has run ``awaitable``; return or raise what it did."""
        __traceback_hide__ = True  # Django's debug page leaves this frame out.
        parent = cast("greenlet", self.parent)
        error, value = cast("Outcome", parent.switch(awaitable))
        rehome(contextvars.copy_context())
        try:
            if error is not None:
                raise error
            return cast("T", value)
        finally:
            del error, value


def rehome(context: contextvars.Context) -> None:
    """Let asgiref's Locals in ``context``, the current one, be seen on the current thread."""
    if _tagged is None:
        return
    thread = threading.get_ident()
    for variable, value in context.items():
        if type(value) is _tagged and value.thread_id != thread:
            variable.set(_tag_anew(value))


class Within:
    """Awaits ``awaitable`` in ``context``, within the running task.

    A second task would do that, too, but costs a round of the loop.
    """

    __slots__ = ("_awaitable", "_context")

    def __init__(self, context: contextvars.Context, awaitable: Awaitable[Any]) -> None:
        self._context = context
        self._awaitable = awaitable

    def __await__(self) -> Generator[Any, Any, Any]:
        __traceback_hide__ = True
        run = self._context.run
        try:
            run(rehome, self._context)
            steps = run(self._awaitable.__await__)
            waited = run(next, steps)
            while True:
                try:
                    received = yield waited
                except BaseException as error:  # noqa: BLE001  # it is the awaitable's
                    waited = run(steps.throw, error)
                else:
                    waited = run(steps.send, received)
        except StopIteration as stop:
            return stop.value


class Home:
    """One thread for the chains and the thread-sensitive jobs of many asynchronous requests.

    Made, and called, on the loop's thread. ``pool`` carries the callbacks to the loop;
    ``queue_size`` is how much work may wait before new requests are refused.

    .. versionadded:: 0.1
    """

    def __init__(self, name: str, pool: ThreadPool, queue_size: int) -> None:
        self._thread = ThreadPool(1, sys.maxsize, name)
        self._thread.at_exit(connections.close_all)
        self._thread.at_exit(self._kill_chains)
        self._spare: list[Chain] = []
        self._call_soon = pool.call_soon
        self._most_work = 1 + queue_size
        self._quick_queue = min(_QUICK_QUEUE, self._most_work)
        self._owner: Guest | None = None
        #: How many seconds a turn takes, as a moving average.
        self._pace = 0.0
        #: When the turn began that is being taken, else 0.
        self._begun = 0.0
        self._waiting: deque[tuple[Guest | None, Work]] = deque()
        #: How many requests are between begin() and end(); changed on the home thread only.
        self._guests = 0
        #: What the context of each request is a copy of.
        self._context = contextvars.Context()
        # Entered for good: each request's context inherits it.
        entering: Any = ThreadSensitiveContext(executor=_HomeExecutor(self))
        with contextlib.suppress(StopIteration):
            self._context.run(entering.__aenter__().send, None)
        self._thread.submit(partial(self._context.run, open_caches, shared=True))

    @property
    def load(self) -> int:
        """How many pieces of work were submitted and have not ended."""
        return self._thread.under_way

    @property
    def is_full(self) -> bool:
        """Whether new requests are to be refused."""
        return self.load >= self._most_work

    @property
    def owned(self) -> bool:
        """Whether an open transaction keeps the thread from working for other requests."""
        return self._owner is not None

    def is_ready(self) -> bool:
        """Whether it is better to have one more request here than on an idle thread.

        Short turns one after the other on one thread cost less than threads that take
        the interpreter from each other. Turns that wait for a database belong on many.
        """
        patience = self._quick_queue if self._pace < _QUICK_TURN else 1
        under_way = self._thread.under_way
        return (
            self._owner is None and under_way < patience and (under_way == 0 or not self.is_stuck())
        )

    def is_stuck(self) -> bool:
        """Whether what the thread is doing takes much longer than usual."""
        begun = self._begun
        return begun > 0 and monotonic() - begun > _LONG_TURN + _MUCH_LONGER * self._pace

    def submit(self, guest: Guest | None, work: Work) -> None:
        """Run ``work()`` for ``guest`` on the thread, and on the loop what it returns."""
        self._thread.submit(partial(self._take_turn, guest, work))

    def take_in(self, guest: Guest, context: contextvars.Context) -> None:
        """Have the thread-sensitive calls out of ``context`` run on the thread, until `let_out`."""
        self.submit(guest, self.arrive)
        for variable, value in self._context.items():
            # What asgiref's Locals hold belongs to the thread.
            if variable.name != "asgiref.local":
                context.run(variable.set, value)
        context.run(GUEST.set, guest)

    def let_out(self, guest: Guest) -> None:
        """Let go of a request that was taken in."""
        self.submit(guest, partial(self.depart, guest))

    def has_guests(self) -> bool:
        """Whether requests are between begin() and end(), or work is left to do."""
        return self._guests > 0 or self.load > 0

    def close(self) -> None:
        """Take no more work."""
        self._thread.close()

    async def join(self, timeout: float) -> bool:
        """Wait for the thread to end; tell whether it did within ``timeout`` seconds."""
        return await self._thread.join(timeout)

    # On the home thread.

    def begin(self, guest: Guest) -> contextvars.Context:
        """Take in a request; give the context in which it is to run."""
        self._guests += 1
        context = self._context.copy()
        context.run(GUEST.set, guest)
        return context

    def chain(self, context: contextvars.Context) -> Chain:
        """Give a chain that has nothing to do, to run in ``context``."""
        if self._spare:
            chain = self._spare.pop()
        else:
            chain = Chain()
            chain.switch()
        chain.gr_context = context
        return chain

    def give_back(self, chain: Chain) -> None:
        """Keep a chain that has ended for another request."""
        chain.gr_context = chain.view = chain.result = None
        chain.astray = chain.ended = False
        if len(self._spare) < _SPARE_CHAINS:
            self._spare.append(chain)
        else:
            chain.throw()

    def end(self, guest: Guest) -> None:
        """Let go of a request; a transaction that it left open is rolled back."""
        self._guests -= 1
        guest.ended = True

    def arrive(self) -> None:
        """Begin what is no chain, as ``request_started`` does with the connections."""
        self._guests += 1
        for connection in open_connections():
            connection.queries_log.clear()
            retire(connection, keep=self.is_shared())

    def depart(self, guest: Guest) -> None:
        """End it, as ``request_finished`` does with the connections."""
        for connection in open_connections():
            retire(connection, keep=self.is_shared())
        self.end(guest)

    def is_shared(self) -> bool:
        """Whether there is more than one guest."""
        return self._guests > 1

    def _kill_chains(self) -> None:
        # Only their own thread can do that.
        while self._spare:
            self._spare.pop().throw()

    def _take_turn(self, guest: Guest | None, work: Work) -> None:
        if self._owner is not None and self._owner is not guest:
            self._waiting.append((guest, work))
            return
        begun = self._begun = monotonic()
        try:
            self._perform(guest, work)
            self._pace += (monotonic() - begun - self._pace) / 16
            while self._owner is None and self._waiting:
                self._perform(*self._waiting.popleft())
        finally:
            self._begun = 0.0

    def _perform(self, guest: Guest | None, work: Work) -> None:
        callback = None
        try:
            callback = work()
        finally:
            self._owner = None
            if _thread.connections:
                self._look_for_transactions(guest)
            if callback is not None:
                self._call_soon(callback)

    def _look_for_transactions(self, guest: Guest | None) -> None:
        for connection in tuple(open_connections()):
            if connection.in_atomic_block or (
                connection.connection is not None and not connection.autocommit
            ):
                if guest is not None and not guest.ended:
                    self._owner = guest
                else:
                    _roll_back(connection)


class Homes:
    """The home threads of one application, started as they are needed.

    There are at most AIOSERVE_THREADS of them. Made, and called, on the loop's thread.

    .. versionadded:: 0.1
    """

    def __init__(self, config: Config, pool: ThreadPool) -> None:
        self._limit = config.threads
        self._queue_size = config.queue_size
        self._pool = pool
        self._all: list[Home] = []

    def choose(self) -> Home:
        """Give the first that is ready, or a new one, or the one with the least to do.

        Raises QueueFull.
        """
        for home in self._all:
            if home.is_ready():
                return home
        if len(self._all) < self._limit:
            name = f"aioserve-home-{len(self._all) + 1}"
            self._all.append(Home(name, self._pool, self._queue_size))
            return self._all[-1]
        best = min(self._all, key=lambda home: (home.owned, home.is_stuck(), home.load))
        if best.is_full:
            raise QueueFull
        return best

    def has_guests(self) -> bool:
        """Whether requests live on the threads, or work is left to do."""
        return any(home.has_guests() for home in self._all)

    async def close(self, timeout: float) -> bool:
        """End the threads; tell whether what they do was finished in ``timeout`` seconds.

        To be called when no more requests come, and before the pool is closed.
        """
        try:
            async with asyncio.timeout(timeout):
                # Handlers that were cancelled have yet to have their chains unwound.
                while self.has_guests():  # noqa: ASYNC110
                    await asyncio.sleep(_POLL)
        except TimeoutError:
            return False
        finally:
            for home in self._all:
                home.close()
        return all(await asyncio.gather(*(home.join(timeout) for home in self._all)))


class _HomeExecutor(Executor):
    """What asgiref hands the thread-sensitive calls of a home thread's requests to."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._loop = asyncio.get_running_loop()

    def submit(self, function: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        guest = GUEST.get(None)
        call = partial(function, *args, **kwargs)
        try:
            on_loop = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            on_loop = False
        if on_loop:
            # run_in_executor() gives a future of asyncio's on as it is: that way the result
            # comes back with all others that wait, not by a wake-up of its own.
            future: Any = self._loop.create_future()
            self._home.submit(guest, partial(_run_job, future, call))
        else:
            future = Future()
            self._loop.call_soon_threadsafe(
                self._home.submit, guest, partial(_run_job, future, call)
            )
        return cast("Future[T]", future)


class _Thread(threading.local):
    """What is known of the current thread."""

    def __init__(self) -> None:
        self.connections: dict[str, BaseDatabaseWrapper] = {}


_thread = _Thread()


def watch_connections() -> None:
    """From now on, know the database connections that threads open."""
    connection_created.connect(_note_connection, dispatch_uid="django_aioserve")


def open_connections() -> Collection[BaseDatabaseWrapper]:
    """The database connections that the current thread has ever opened.

    ``connections.all()`` gives these, too, and is slow.
    """
    return _thread.connections.values()


def retire(connection: BaseDatabaseWrapper, *, keep: bool) -> None:
    """Close ``connection`` if it is broken or, unless ``keep``, too old."""
    if not keep:
        connection.close_if_unusable_or_obsolete()
        return
    close_at, connection.close_at = connection.close_at, None
    try:
        connection.close_if_unusable_or_obsolete()
    finally:
        connection.close_at = close_at


@contextlib.contextmanager
def keeping_connections() -> Iterator[None]:
    """Let no connection of the current thread be closed for its age."""
    held = [(connection, connection.close_at) for connection in open_connections()]
    for connection, _ in held:
        connection.close_at = None
    try:
        yield
    finally:
        for connection, close_at in held:
            if connection.close_at is None:
                connection.close_at = close_at


def _note_connection(connection: BaseDatabaseWrapper, **_: object) -> None:
    _thread.connections[connection.alias] = connection


def _run_job(future: Any, call: Callable[[], Any]) -> Callback | None:
    if future.cancelled():
        return None
    try:
        result = call()
    except BaseException as error:  # noqa: BLE001  # it is the caller's
        return partial(settle, future, harmless(error), None)
    return partial(settle, future, None, result)


def _roll_back(connection: BaseDatabaseWrapper) -> None:
    usual = connection.settings_dict["AUTOCOMMIT"]
    if connection.in_atomic_block or connection.autocommit != usual:
        logger.error(
            "A request ended with an open transaction on %r: it is rolled back", connection.alias
        )
        connection.close()
        # What it remembers of the transaction would be in the way of the next one.
        del connections[connection.alias], _thread.connections[connection.alias]


def open_caches(*, shared: bool) -> None:
    """Make the cache objects of the current thread, in its current context.

    Django keeps them in a context variable; what is made in the context of one request
    would be made again, with new connections, for the next one. ``shared`` leaves out those
    that two threads may not use at a time.
    """
    for alias in caches:
        with contextlib.suppress(Exception):
            # A cache that cannot be made fails where it is used.
            cache = caches[alias]
            if shared and isinstance(cache, PyLibMCCache):
                del caches[alias]

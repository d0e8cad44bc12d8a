"""The subscribers of one process, and what is waiting for each of them.

Rules:

1. Whatever arrives, from this process or from another, passes through `Switch`
   in the order in which it arrived, and a limited number of messages in each
   pass of the event loop: a burst leaves room for its subscribers to read in
   between, so that only a subscriber that is really slow loses something.
2. A subscription keeps at most so many messages. The oldest give way.
3. Nothing is lost in silence: the subscriber gets `MessagesLost` in the place
   of what it did not get.
4. A message is kept as it was encoded and decoded for each subscriber anew;
   no two subscribers share an object that one of them may change.
5. A subscriber may live on another event loop than the switch (an asynchronous
   view under a WSGI server has a loop of its own).
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["MAX_MESSAGE_SIZE", "MessagesLost", "Subscription", "Switch"]

logger = logging.getLogger("django_aioserve.groups")

#: Bytes of JSON that one message may have.
MAX_MESSAGE_SIZE = 1 << 20

_MOST_IN_ONE_PASS = 64
_CONGESTED = 256
_MOST_BYTES_WAITING = 8 << 20


class MessagesLost(Exception):
    """Messages of the group were lost here; what depends on them should be fetched anew.

    Raised by the iteration over a `Subscription` in the place of the gap. The
    subscription goes on: a new ``async for`` over it gives the messages after the gap.

    .. versionadded:: 0.1
    """


class _Home(Protocol):
    async def join(self, subscription: Subscription) -> int:
        """Add the subscriber, and give the number of messages that may wait for it."""

    def leave(self, subscription: Subscription) -> None:
        """Remove the subscriber."""


class Subscription(AsyncIterator[Any]):
    """The messages of one group, from the moment it is entered; made by `groups.subscribe`.

    An asynchronous context manager that gives itself, and an asynchronous iterator
    for one reader. The iteration ends when the server stops.

    .. versionadded:: 0.1
    """

    def __init__(self, group: str, find_home: Callable[[], _Home]) -> None:
        self.group = group
        #: How many messages gave way to newer ones because the reader was slow.
        self.dropped = 0
        self._find_home = find_home
        self._lock = threading.Lock()
        # None stands for a gap.
        self._queue: deque[bytes | None] = deque()
        self._size = 1
        self._gap_first = False
        self._over = False
        self._home: _Home | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def __aenter__(self) -> Self:
        if self._loop is not None:
            raise RuntimeError("A subscription can be entered only once.")
        self._home = self._find_home()
        self._loop = asyncio.get_running_loop()
        self._size = await self._home.join(self)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.end()
        if self._home is not None:
            self._home.leave(self)

    async def __anext__(self) -> Any:
        """Wait for the next message and return it. Raises MessagesLost."""
        if self._loop is None:
            raise RuntimeError("Enter the subscription first: async with groups.subscribe(...)")
        while True:
            with self._lock:
                if self._waiter is not None:
                    raise RuntimeError("A subscription has one reader.")
                if self._gap_first:
                    self._gap_first = False
                    raise MessagesLost(self.group)
                if self._queue:
                    payload = self._queue.popleft()
                    if payload is None:
                        raise MessagesLost(self.group)
                    try:
                        return json.loads(payload)
                    except ValueError:
                        # Only a stranger on the same Redis channel can have sent it.
                        logger.warning("A message of group %r is no JSON; left out", self.group)
                        continue
                if self._over:
                    raise StopAsyncIteration
                waiter = self._waiter = self._loop.create_future()
            try:
                await waiter
            finally:
                self._waiter = None

    def put(self, payload: bytes) -> None:
        """Add a message; the oldest one gives way where too many wait."""
        with self._lock:
            self._queue.append(payload)
            if len(self._queue) > self._size:
                if self._queue.popleft() is not None:
                    self.dropped += 1
                self._gap_first = True
        self._wake()

    def put_gap(self) -> None:
        """Note that messages were lost at this point."""
        with self._lock:
            if not self._queue or self._queue[-1] is not None:
                self._queue.append(None)
        self._wake()

    def end(self) -> None:
        """Let the iteration end after the messages that wait."""
        self._over = True
        self._wake()

    def _wake(self) -> None:
        waiter, loop = self._waiter, self._loop
        if waiter is None or loop is None or waiter.done():
            return
        try:
            here = asyncio.get_running_loop() is loop
        except RuntimeError:
            here = False
        if here:
            _set(waiter)
        elif not loop.is_closed():
            loop.call_soon_threadsafe(_set, waiter)


def _set(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


class Switch:
    """Hands what arrives to the subscribers of this process.

    ``queue_size`` is the number of messages that may wait for each subscriber. All
    members are for the thread of the event loop in which it was made.
    """

    def __init__(self, queue_size: int) -> None:
        self.queue_size = queue_size
        self._loop = asyncio.get_running_loop()
        self._subscribers: dict[str, dict[Subscription, None]] = {}
        self._arrived: deque[tuple[str, bytes]] = deque()
        self._bytes = 0
        self._at_once = min(_MOST_IN_ONE_PASS, max(1, queue_size // 2))
        self._passing = False
        self._room = asyncio.Event()
        self._room.set()
        self._gap = False
        self._over = False

    @property
    def congested(self) -> bool:
        """Whether so much is waiting that more should not be fetched now."""
        return len(self._arrived) > _CONGESTED

    async def room(self) -> None:
        """Wait until there is no congestion."""
        await self._room.wait()

    def add(self, subscription: Subscription) -> None:
        """Add a subscriber."""
        self._subscribers.setdefault(subscription.group, {})[subscription] = None
        if self._over:
            subscription.end()

    def remove(self, subscription: Subscription) -> bool:
        """Remove a subscriber, and tell whether it was the last one of its group."""
        members = self._subscribers.get(subscription.group, {})
        members.pop(subscription, None)
        if members:
            return False
        return self._subscribers.pop(subscription.group, None) is not None

    def arrive(self, group: str, payload: bytes) -> None:
        """Pass a message on, behind those that arrived before it."""
        if group not in self._subscribers:
            return
        if self._bytes + len(payload) > _MOST_BYTES_WAITING:
            self._gap = True
            return
        self._arrived.append((group, payload))
        self._bytes += len(payload)
        if self.congested:
            self._room.clear()
        if not self._passing:
            self._passing = True
            self._loop.call_soon(self._pass)

    def gap(self, group: str | None = None) -> None:
        """Tell the subscribers of ``group``, or all of them, that messages were lost."""
        groups = [group] if group is not None else list(self._subscribers)
        for name in groups:
            for subscription in tuple(self._subscribers.get(name, ())):
                subscription.put_gap()

    def end(self) -> None:
        """Let every subscriber's iteration end, and those of later ones at once."""
        self._over = True
        for members in self._subscribers.values():
            for subscription in tuple(members):
                subscription.end()

    def _pass(self) -> None:
        for _ in range(min(len(self._arrived), self._at_once)):
            group, payload = self._arrived.popleft()
            self._bytes -= len(payload)
            for subscription in tuple(self._subscribers.get(group, ())):
                subscription.put(payload)
        if not self.congested:
            self._room.set()
        if self._arrived:
            self._loop.call_soon(self._pass)
            return
        self._passing = False
        if self._gap:
            self._gap = False
            self.gap()

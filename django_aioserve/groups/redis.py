"""Group messages through Redis, between the servers of a project on many machines.

Rules:

1. A message goes through Redis even to a subscriber in the worker that sent it:
   one way only, so nothing comes twice and everybody sees the same order.
2. One connection listens and one publishes; neither is opened before it is needed,
   so a worker starts and serves while Redis is away.
3. Nothing is ever sent twice. What is sent while Redis is away, or was on its way
   when the connection broke, is lost.
4. Every loss is told. A listener that had lost its connection tells its own
   subscribers once their channels are confirmed anew; a publisher that had to drop
   something says so on the control channel, which all listeners hear, once it can.
5. Reconnecting waits longer from time to time, up to `_LONGEST_PAUSE`, with jitter,
   and the log has one line when Redis goes away and one when it is back.
6. A channel's name is "aioserve", the number of the database, the name space and
   the group, with ":" between them; the control channel has an empty group. Redis
   itself knows no databases in publishing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import threading
from collections import Counter, deque
from time import monotonic
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import redis
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

if TYPE_CHECKING:
    from collections.abc import Iterable

    from redis.asyncio.connection import AbstractConnection

    from django_aioserve.groups.switch import Switch

__all__ = ["OutsideRedis", "RedisHub"]

logger = logging.getLogger("django_aioserve.groups")

_CONNECT_SECONDS = 5.0
_PUBLISH_SECONDS = 5.0
_OUTSIDE_SECONDS = 2.0
_FLUSH_SECONDS = 1.0
_SILENCE_SECONDS = 10.0
_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 5.0
_MOST_IN_ONE_BATCH = 100
_MOST_BYTES_WAITING = 8 << 20

_LOST = b"lost"
_FAILURES = (RedisError, OSError, TimeoutError)


class _State:
    """Whether Redis is there, for one connection; a change is logged once."""

    def __init__(self, doing: str) -> None:
        self.away = False
        self._doing = doing
        self._pause = _FIRST_PAUSE

    def failed(self, error: BaseException) -> None:
        if not self.away:
            self.away = True
            logger.warning(
                "Redis is away (%s group messages): %s. They are lost until it is back.",
                self._doing,
                str(error) or type(error).__name__,
                exc_info=None if isinstance(error, _FAILURES) else error,
            )

    def works(self) -> None:
        self._pause = _FIRST_PAUSE
        if self.away:
            self.away = False
            logger.warning("Redis is back (%s group messages)", self._doing)

    def next_pause(self) -> float:
        """Give the seconds to wait before the next attempt."""
        pause = self._pause * random.uniform(0.5, 1.0)  # noqa: S311
        self._pause = min(self._pause * 2, _LONGEST_PAUSE)
        return pause


class RedisHub:
    """Carries messages between this worker and all that use the same Redis and name space.

    All members are for the thread of the switch's event loop.
    """

    def __init__(self, switch: Switch, url: str, namespace: str) -> None:
        self._switch = switch
        self._loop = asyncio.get_running_loop()
        # RESP2: what Redis pushes comes in the order of all else. No retries: rule 3.
        self._pool = ConnectionPool.from_url(
            url,
            protocol=2,
            retry=AsyncRetry(NoBackoff(), 0),
            socket_connect_timeout=_CONNECT_SECONDS,
            socket_keepalive=True,
            health_check_interval=0,
        )
        # Also where the URL has one: a listener hears nothing for as long as nobody speaks.
        self._pool.connection_kwargs["socket_timeout"] = None
        self._prefix = _prefix(self._pool.connection_kwargs, namespace)
        # Listening: what is wanted, of that what was asked for on this connection,
        # how many replies to it are still to come, and who waits for them.
        self._wanted: dict[str, None] = {"": None}
        self._asked: set[str] = set()
        self._pending: Counter[str] = Counter()
        self._waiters: dict[str, list[asyncio.Future[None]]] = {}
        self._missed: set[str] = set()
        self._changed = asyncio.Event()
        self._heard = 0.0
        self._listening = _State("receiving")
        self._listener: asyncio.Task[None] | None = None
        # Publishing.
        self._outbox: deque[tuple[str, bytes]] = deque()
        self._bytes = 0
        self._lost = False
        self._posted = asyncio.Event()
        self._sent = asyncio.Event()
        self._publishing = _State("sending")
        self._publisher: asyncio.Task[None] | None = None

    # ------------------------------------------------------------------ receiving

    async def join(self, group: str) -> None:
        """Subscribe to the group's channel; return once messages come, or Redis is away."""
        if self._listener is None:
            self._listener = self._loop.create_task(self._listen())
        self._wanted[group] = None
        self._changed.set()
        if self._listening.away:
            self._missed.add(group)
            return
        if group in self._asked and not self._pending[group]:
            return
        waiter = self._loop.create_future()
        self._waiters.setdefault(group, []).append(waiter)
        await waiter

    def leave(self, group: str) -> None:
        """Unsubscribe from the group's channel."""
        self._wanted.pop(group, None)
        self._missed.discard(group)
        self._changed.set()

    async def _listen(self) -> None:
        while True:
            connection: AbstractConnection = self._pool.make_connection()  # type: ignore[no-untyped-call]
            try:
                async with asyncio.timeout(_CONNECT_SECONDS):
                    await connection.connect()  # type: ignore[no-untyped-call]
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._ask(connection))
                    tasks.create_task(self._watch(connection))
                    await self._hear(connection)
            except* Exception as errors:  # noqa: BLE001  # logged; this must not end
                self._listening.failed(_first(errors))
            finally:
                with contextlib.suppress(*_FAILURES):
                    await connection.disconnect(nowait=True)
            self._missed.update(self._wanted)
            self._asked.clear()
            self._pending.clear()
            for group in tuple(self._waiters):
                self._release(group)
            await asyncio.sleep(self._listening.next_pause())

    async def _ask(self, connection: AbstractConnection) -> None:
        """Keep the channels of the connection as they are wanted."""
        while True:
            self._changed.clear()
            await self._ask_for(connection, "SUBSCRIBE", self._wanted.keys() - self._asked)
            await self._ask_for(connection, "UNSUBSCRIBE", self._asked - self._wanted.keys())
            await self._changed.wait()

    async def _ask_for(
        self, connection: AbstractConnection, command: str, groups: Iterable[str]
    ) -> None:
        names = list(groups)
        if not names:
            return
        self._pending.update(names)
        if command == "SUBSCRIBE":
            self._asked.update(names)
        else:
            self._asked.difference_update(names)
        await connection.send_command(command, *(self._prefix + name for name in names))

    async def _watch(self, connection: AbstractConnection) -> None:
        """Notice a peer that has vanished without a word."""
        self._heard = self._loop.time()
        while True:
            await asyncio.sleep(_SILENCE_SECONDS)
            silence = self._loop.time() - self._heard
            if silence > 2.5 * _SILENCE_SECONDS:
                raise TimeoutError(f"no answer for {silence:.0f} s")
            if silence > 0.9 * _SILENCE_SECONDS:
                await connection.send_command("PING")

    async def _hear(self, connection: AbstractConnection) -> None:
        cut = len(self._prefix.encode())
        count = 0
        while True:
            reply: Any = await connection.read_response(disable_decoding=True)
            self._heard = self._loop.time()
            kind, channel, data = reply[0], reply[1], reply[-1]
            group = channel[cut:].decode(errors="replace")
            if kind == b"message":
                if group:
                    self._switch.arrive(group, data)
                else:
                    self._switch.gap()
            elif kind in {b"subscribe", b"unsubscribe"}:
                self._confirmed(group)
            # A reply that has arrived already is given without a pause.
            count += 1
            if count % _MOST_IN_ONE_BATCH == 0:
                await asyncio.sleep(0)
            await self._switch.room()

    def _confirmed(self, group: str) -> None:
        self._pending[group] -= 1
        if self._pending[group] > 0:
            return
        del self._pending[group]
        if not group:
            self._listening.works()
        if group in self._asked:
            if group in self._missed:
                self._missed.discard(group)
                self._switch.gap(group)
            self._release(group)

    def _release(self, group: str) -> None:
        for waiter in self._waiters.pop(group, ()):
            if not waiter.done():
                waiter.set_result(None)

    # ------------------------------------------------------------------ sending

    def post(self, group: str, payload: bytes) -> None:
        """Publish a message, behind those posted before it."""
        full = self._bytes + len(payload) > _MOST_BYTES_WAITING
        if self._publishing.away or full:
            self._lost = True
            return
        self._outbox.append((self._prefix + group, payload))
        self._bytes += len(payload)
        self._posted.set()
        self._sent.clear()
        if self._publisher is None:
            self._publisher = self._loop.create_task(self._publish())

    async def _publish(self) -> None:
        client = Redis(connection_pool=self._pool)
        while True:
            await self._posted.wait()
            size = min(len(self._outbox), _MOST_IN_ONE_BATCH)
            batch = [self._outbox.popleft() for _ in range(size)]
            self._bytes -= sum(len(payload) for _, payload in batch)
            if self._lost:
                self._lost = False
                batch.insert(0, (self._prefix, _LOST))
            try:
                await self._transmit(client, batch)
                self._publishing.works()
            except Exception as error:  # noqa: BLE001  # logged; this must not end
                self._publishing.failed(error)
                self._outbox.clear()
                self._bytes = 0
                self._lost = True
                with contextlib.suppress(*_FAILURES):
                    await self._pool.disconnect()
                await asyncio.sleep(self._publishing.next_pause())
            if not self._outbox and not self._lost:
                self._posted.clear()
                self._sent.set()

    async def _transmit(self, client: Redis, batch: list[tuple[str, bytes]]) -> None:
        async with asyncio.timeout(_PUBLISH_SECONDS):
            async with client.pipeline(transaction=False) as pipeline:
                for channel, payload in batch:
                    pipeline.publish(channel, payload)
                await pipeline.execute()

    async def close(self) -> None:
        """Leave; what is still to be published gets a moment."""
        if self._publisher is not None and not self._publishing.away:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._sent.wait(), _FLUSH_SECONDS)
        for task in (self._publisher, self._listener):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        with contextlib.suppress(*_FAILURES):
            await self._pool.disconnect()


class OutsideRedis:
    """Publishes messages from a process that has no part in a server. For any thread."""

    def __init__(self, url: str, namespace: str) -> None:
        self._client = redis.Redis.from_url(
            url,
            protocol=2,
            retry=Retry(NoBackoff(), 0),
            socket_connect_timeout=_OUTSIDE_SECONDS,
            socket_timeout=_OUTSIDE_SECONDS,
        )
        self._prefix = _prefix(self._client.connection_pool.connection_kwargs, namespace)
        self._lock = threading.Lock()
        self._state = _State("sending")
        self._not_before = 0.0
        self._lost = False

    def post(self, group: str, payload: bytes) -> None:
        """Publish a message; while Redis is away it is lost, and only some attempts are made."""
        with self._lock:
            if monotonic() < self._not_before:
                self._lost = True
                return
            try:
                with self._client.pipeline(transaction=False) as pipeline:
                    if self._lost:
                        pipeline.publish(self._prefix, _LOST)
                    pipeline.publish(self._prefix + group, payload)
                    pipeline.execute()
                self._lost = False
                self._state.works()
            except _FAILURES as error:
                self._lost = True
                self._state.failed(error)
                self._not_before = monotonic() + self._state.next_pause()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


def _prefix(connection: dict[str, Any], namespace: str) -> str:
    database = connection.get("db", 0)
    return f"aioserve:{database}:{quote(namespace, safe='')}:"


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error

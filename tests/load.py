"""Clients that ask without end and count what they lose.

Lost is a request that was sent, or whose connection was refused, and that did not get its
whole answer. What a client that closes its connections itself, or is told by
``Connection: close`` or a closing handshake, has to do again is not lost.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import aiohttp

from tests.support import Address

#: Seconds for one answer.
PATIENCE = 60.0


@dataclass(frozen=True)
class Habit:
    """How one client behaves.

    It thinks for `think` seconds between an answer and its next request; keeps its connection
    (`keep`) and reuses it without looking whether the server has closed it meanwhile (`blind`);
    uploads so many bytes, or speaks over a WebSocket.
    """

    target: str = "/"
    think: float = 0.0
    blind: bool = True
    keep: bool = True
    upload: int = 0
    websocket: bool = False


@dataclass
class Tally:
    """What became of the requests."""

    answered: int = 0
    lost: list[str] = field(default_factory=list)
    #: When each of them was found to be lost, by the monotonic clock.
    lost_at: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    bodies: Counter[bytes] = field(default_factory=Counter)
    #: When each answer was there, by the monotonic clock, and the seconds it took.
    latencies: list[tuple[float, float]] = field(default_factory=list)

    def lose(self, what: str) -> None:
        """Note that a request is lost."""
        self.lost.append(what)
        self.lost_at.append(time.monotonic())

    def percentile(self, share: float) -> float:
        """The latency, in seconds, that this share of the answers kept."""
        ordered = sorted(seconds for _, seconds in self.latencies)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0.0


class Load:
    """Clients in a thread of their own, from the `with` on until it ends.

    `limit` requests are made at most. `tally` may be read at any time; `counts_bodies` keeps the
    answers of plain GET requests.
    """

    def __init__(
        self,
        address: Address,
        *habits: Habit,
        limit: int | None = None,
        tls: ssl.SSLContext | None = None,
        counts_bodies: bool = True,
        loop_factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop,
    ) -> None:
        self.tally = Tally()
        self.address = address
        self.tls = tls
        self.counts_bodies = counts_bodies
        self.ends = False
        self._habits = habits
        self._left = limit
        self._stopped = False
        self._loop_factory = loop_factory
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)
        self._failure: BaseException | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.finish()

    def finish(self, deadline: float = 2 * PATIENCE) -> Tally:
        """Ask nothing more, wait for what was asked, and give the tally."""
        self._stopped = True
        return self.join(deadline)

    def join(self, deadline: float = 2 * PATIENCE) -> Tally:
        """Wait until all is asked and answered, or the server has ended; give the tally."""
        self._thread.join(deadline)
        if self._thread.is_alive():
            raise AssertionError(f"the clients have not come to an end within {deadline} s")
        if self._failure is not None:
            raise self._failure
        return self.tally

    @property
    def running(self) -> bool:
        """Whether there are requests left to be made."""
        return self._thread.is_alive()

    def expect_end(self) -> None:
        """From now on a refused connection is the end of the server, and of its client."""
        self.ends = True

    def more(self, count: int, deadline: float = 60.0) -> None:
        """Wait for so many further answers."""
        self.until(self.tally.answered + count, deadline)

    def until(self, count: int, deadline: float = 60.0) -> None:
        """Wait for so many answers altogether."""
        end = time.monotonic() + deadline
        while self.tally.answered < count and self.running:
            if time.monotonic() > end:
                raise AssertionError(f"{self.tally.answered} of {count} answers in {deadline} s")
            time.sleep(0.01)

    def take(self) -> bool:
        """Whether one more request is to be made."""
        if self._stopped or self._left == 0:
            return False
        if self._left is not None:
            self._left -= 1
        return True

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=self._loop_factory) as runner:
                runner.run(self._all())
        except BaseException as error:
            self._failure = error

    async def _all(self) -> None:
        plain = [
            _Client(self, habit, number)
            for number, habit in enumerate(self._habits)
            if not habit.websocket
        ]
        watch = asyncio.create_task(self._watch(plain))
        async with asyncio.TaskGroup() as group:
            for client in plain:
                group.create_task(client.run())
            for habit in self._habits:
                if habit.websocket:
                    group.create_task(_SocketClient(self, habit).run())
        watch.cancel()

    async def _watch(self, clients: Sequence[_Client]) -> None:
        """Give up what takes too long: cheaper than a timeout for each request."""
        while True:
            await asyncio.sleep(1.0)
            for client in clients:
                client.give_up_after(PATIENCE)


def mixture(count: int, *habits: Habit) -> Sequence[Habit]:
    """`count` clients that have these habits in turn."""
    return [habits[number % len(habits)] for number in range(count)]


#: The status, the body, and whether the connection closes.
Answer = tuple[int, bytes, bool]


class _Lost(Exception):
    pass


class _NotConnected(Exception):
    pass


class _Wire(asyncio.Protocol):
    """One connection, on which one request at a time is under way."""

    def __init__(self) -> None:
        self.ended = False
        self.transport: Any = None
        self._received = bytearray()
        self._answer: asyncio.Future[Answer] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def ask(self, request: bytes) -> asyncio.Future[Answer]:
        """Send a request; the future gives its answer, or why there is none."""
        self._answer = asyncio.get_running_loop().create_future()
        if not self.transport.is_closing():
            self.transport.write(request)
        self._look()
        return self._answer

    def data_received(self, data: bytes) -> None:
        self._received += data
        self._look()

    def eof_received(self) -> bool:
        self.ended = True
        self._look()
        return self.transport.get_extra_info("sslcontext") is None  # who is blind goes on

    def connection_lost(self, exc: BaseException | None) -> None:
        self.ended = True
        self._look(exc)

    def fail(self, error: BaseException) -> None:
        """Give up the request that is under way."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)

    def _look(self, error: BaseException | None = None) -> None:
        if self._answer is None or self._answer.done():
            return
        try:
            found = _answer_in(self._received)
        except (ValueError, _Lost) as mistake:
            self.fail(mistake)
            return
        if found is not None:
            answer, length = found
            del self._received[:length]
            self._answer.set_result(answer)
        elif self.ended:
            self.fail(error or asyncio.IncompleteReadError(bytes(self._received[:200]), None))


def _answer_in(data: bytearray) -> tuple[Answer, int] | None:
    """The answer with which the data begins, and its length, or None where it is not whole."""
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return None
    head = bytes(data[: end + 4]).lower()
    start = end + 4
    closes = b"\r\nconnection: close\r\n" in head or head.startswith(b"http/1.0")
    if b"\r\ntransfer-encoding: chunked\r\n" in head:
        body = b""
        while (line := data.find(b"\r\n", start)) >= 0:
            size = int(data[start:line], 16)
            start = line + 2 + size + 2
            if len(data) < start:
                return None
            if not size:
                return (int(head[9:12]), body, closes), start
            body += data[line + 2 : start - 2]
        return None
    if b"\r\ncontent-length: " not in head:
        raise _Lost("an answer without a length, whose end cannot be told")
    length = int(head.split(b"\r\ncontent-length: ")[1].split(b"\r\n")[0])
    if len(data) < start + length:
        return None
    return (int(head[9:12]), bytes(data[start : start + length]), closes), start + length


class _Client:
    """One client of plain HTTP."""

    def __init__(self, load: Load, habit: Habit, number: int) -> None:
        self._load = load
        self._habit = habit
        self._wire: _Wire | None = None
        self._began = math.inf
        body = bytes([number % 256]) * habit.upload
        self._digest = hashlib.sha256(body).hexdigest().encode()
        lines = [f"{'POST' if body else 'GET'} {habit.target} HTTP/1.1", "Host: localhost"]
        if body:
            lines.append(f"Content-Length: {len(body)}")
        if not habit.keep:
            lines.append("Connection: close")
        self._request = "\r\n".join([*lines, "", ""]).encode() + body

    async def run(self) -> None:
        tally, habit = self._load.tally, self._habit
        try:
            while self._load.take():
                self._began = began = time.monotonic()
                try:
                    status, body = await self._ask()
                except _NotConnected as error:
                    if self._load.ends:
                        return
                    tally.lose(f"{habit.target}: {error}, connecting")
                    await asyncio.sleep(0.05)
                    continue
                except (OSError, EOFError, ValueError, _Lost) as error:
                    self._close()
                    took = time.monotonic() - began
                    tally.lose(f"{habit.target}: {error!r}, after {took:.3f} s")
                    continue
                finally:
                    self._began = math.inf
                now = time.monotonic()
                tally.answered += 1
                tally.statuses[status] += 1
                tally.latencies.append((now, now - began))
                if self._load.counts_bodies and not habit.upload:
                    tally.bodies[body] += 1
                if habit.think:
                    await asyncio.sleep(habit.think)
        finally:
            self._close()

    def give_up_after(self, seconds: float) -> None:
        """Let a request that was begun so long ago be lost."""
        if self._wire is not None and time.monotonic() - self._began > seconds:
            self._wire.fail(TimeoutError())

    async def _ask(self) -> tuple[int, bytes]:
        if not self._habit.blind and self._wire is not None:
            await asyncio.sleep(0)  # let the loop see what has come
            if self._wire.ended:
                self._close()
        if self._wire is None:
            try:
                async with asyncio.timeout(PATIENCE):
                    self._wire = await self._connect()
            except ConnectionError as error:  # refused, or reset before anything was sent
                raise _NotConnected(repr(error)) from error
        status, body, closes = await self._wire.ask(self._request)
        if self._habit.upload and status == 200 and body != self._digest:
            raise _Lost(f"the upload arrived as something else: {body[:80]!r}")
        if closes:
            self._close()
        return status, body

    async def _connect(self) -> _Wire:
        address, tls = self._load.address, self._load.tls
        loop = asyncio.get_running_loop()
        if isinstance(address, str):
            return (await loop.create_unix_connection(_Wire, address, ssl=tls))[1]
        name = {"server_hostname": "localhost"} if tls else {}
        return (await loop.create_connection(_Wire, *address[:2], ssl=tls, **name))[1]

    def _close(self) -> None:
        if self._wire is not None and self._load.tls is not None:
            self._wire.transport.abort()  # a close over TLS would outlast the loop
        elif self._wire is not None:
            self._wire.transport.close()
        self._wire = None


class _SocketClient:
    """One client that sends messages over a WebSocket and wants each of them back."""

    def __init__(self, load: Load, habit: Habit) -> None:
        self._load = load
        self._habit = habit
        host, port = load.address
        self._url = f"http://{host}:{port}{habit.target}"

    async def run(self) -> None:
        async with aiohttp.ClientSession() as session:
            while not self._load._stopped and self._load._left != 0:
                try:
                    async with session.ws_connect(self._url) as socket:
                        await self._talk(socket)
                except aiohttp.ClientConnectorError as error:
                    if self._load.ends:
                        return
                    self._load.tally.lose(repr(error))
                    await asyncio.sleep(0.05)
                except (aiohttp.ClientError, OSError) as error:
                    self._load.tally.lose(f"WebSocket: {error!r}")

    async def _talk(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        tally = self._load.tally
        while self._load.take():
            began = time.monotonic()
            await socket.send_str(f"{began}")
            message = await socket.receive(PATIENCE)
            if message.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSING):
                return  # told in good order
            if message.data != f"{began}":
                tally.lose(f"WebSocket: {message!r} close code {socket.close_code}")
                return
            now = time.monotonic()
            tally.answered += 1
            tally.latencies.append((now, now - began))
            if self._habit.think:
                await asyncio.sleep(self._habit.think)

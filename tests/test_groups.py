"""Groups: between processes by the local hub and by Redis, and what is promised of both."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web
from django.test import override_settings

from django_aioserve import groups
from django_aioserve.conf import Config
from django_aioserve.exceptions import ConfigurationError
from tests import support
from tests.redis_server import RedisServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HUB = groups.HUB_VARIABLE


class Worker:
    """A process of its own that takes part in the groups; see groups_worker."""

    def __init__(
        self, nursery: socket.socket, hub: str | None = None, key: str = "key", **options: Any
    ) -> None:
        self.events: list[list[Any]] = []
        self.errors = b""
        theirs, self._input = os.pipe()
        output, their_output = os.pipe()
        errors, their_errors = os.pipe()
        files = [theirs, their_output, their_errors]
        socket.send_fds(nursery, [json.dumps([hub, key, options]).encode()], files)
        self.pid = int(nursery.recv(100))
        for file in files:
            os.close(file)
        self._threads = [
            threading.Thread(target=self._read_events, args=(output,), daemon=True),
            threading.Thread(target=self._read_errors, args=(errors,), daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def _read_events(self, output: int) -> None:
        with open(output, "rb") as lines:
            for line in lines:
                self.events.append(json.loads(line))

    def _read_errors(self, errors: int) -> None:
        with open(errors, "rb") as lines:
            for line in lines:
                self.errors += line

    def do(self, *command: Any) -> None:
        os.write(self._input, json.dumps(command).encode() + b"\n")

    def wait(self, *event: Any, deadline: float = 20.0) -> list[Any]:
        """Wait for an event that begins so, and return it."""

        def look() -> list[Any] | None:
            return next((e for e in list(self.events) if e[: len(event)] == [*event]), None)

        try:
            return support.wait_until(look, deadline)
        except AssertionError:
            pytest.fail(f"no {event} but {self.events[-20:]}; {self.errors.decode()}")

    def messages(self) -> list[Any]:
        return [event[2] for event in list(self.events) if event[0] == "message"]

    def subscribe(self, group: str = "room", pause: float = 0.0) -> None:
        self.do("subscribe", group, pause)
        self.wait("subscribed", group)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self._ended(10)
        self.events.append(["bye"])

    def stop(self) -> None:
        """Let it end, and see that it does so in good order."""
        if self._input >= 0:
            os.close(self._input)
            self._input = -1
        if not self._ended(20):
            os.kill(self.pid, signal.SIGKILL)
            self._ended(10)
        assert ["bye"] in self.events, self.errors.decode()
        assert support.UNEXPECTED.search(self.errors.decode()) is None, self.errors.decode()

    def _ended(self, timeout: float) -> bool:
        """Wait until it has closed its output, as its end does."""
        for thread in self._threads:
            thread.join(timeout)
        return not any(thread.is_alive() for thread in self._threads)


@pytest.fixture(scope="module")
def nursery() -> Iterator[socket.socket]:
    ours, theirs = socket.socketpair()
    env = {name: value for name, value in os.environ.items() if name != HUB}
    command = [*support.python_command(), "-m", "tests.groups_worker", str(theirs.fileno())]
    with ours, subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=support.ROOT, env=env):
        theirs.close()
        yield ours
        ours.close()


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A directory with a name short enough for Unix sockets in it."""
    with tempfile.TemporaryDirectory(prefix="groups-") as directory:
        yield Path(directory)


@pytest.fixture
def workers(nursery: socket.socket, tmp_path: Path) -> Iterator[Callable[..., list[Worker]]]:
    """Start processes that share one hub, or what else is said."""
    started: list[Worker] = []

    def start(number: int, **options: Any) -> list[Worker]:
        options.setdefault("hub", str(tmp_path / "hub"))
        new = [Worker(nursery, **options) for _ in range(number)]
        started.extend(new)
        for worker in new:
            worker.wait("ready")
        return new

    yield start
    for worker in started:
        worker.stop()


def app(**options: Any) -> web.Application:
    application = web.Application()
    groups.setup(application, Config(**options))
    return application


# --- the local hub -------------------------------------------------------------------------


def test_a_message_reaches_the_subscribers_of_every_worker(workers):
    first, second, third = workers(3)
    for worker in (first, second, third):
        worker.subscribe()
    second.do("send", "room", {"text": "Grüße"})
    for worker in (first, second, third):
        worker.wait("message", "room", {"text": "Grüße"})


def test_a_message_reaches_only_its_group(workers):
    first, second = workers(2)
    first.subscribe("a")
    first.subscribe("b")
    second.do("send", "a", 1)
    second.do("send", "b", 2)
    first.wait("message", "b", 2)
    assert first.messages() == [1, 2]


def test_what_is_sent_by_a_thread_reaches_every_worker(workers):
    first, second = workers(2)
    first.subscribe()
    second.subscribe()
    first.do("send_from_thread", "room", 1, 2, 3)
    for worker in (first, second):
        worker.wait("message", "room", 3)
        assert worker.messages() == [1, 2, 3]


@pytest.mark.slow
def test_the_order_of_each_sender_holds_for_sixteen_workers(workers):
    everybody = workers(16, groups_queue_size=1000)
    for worker in everybody:
        worker.do("count", "room", 4 * 100)
    for worker in everybody:
        worker.wait("subscribed", "room")
    for number, worker in enumerate(everybody[:4]):
        worker.do("send_range", "room", number, 100)
    for worker in everybody:
        _, _, received, gaps = worker.wait("counted", "room", deadline=60)
        assert gaps == 0
        for number in range(4):
            assert [m[1] for m in received if m[0] == number] == list(range(100))


def test_a_burst_loses_nothing_where_subscribers_are_quick(workers):
    first, second = workers(2, groups_queue_size=50)
    second.do("count", "room", 3000)
    second.wait("subscribed")
    first.do("send_range", "room", 0, 3000)
    _, _, received, gaps = second.wait("counted")
    assert gaps == 0
    assert [message[1] for message in received] == list(range(3000))


def test_a_worker_that_comes_later_gets_what_is_sent_from_then_on(workers):
    (first,) = workers(1)
    first.subscribe()
    first.do("send", "room", "before")
    first.wait("message", "room", "before")
    (second,) = workers(1)
    second.subscribe()
    first.do("send", "room", "after")
    second.wait("message", "room", "after")
    assert second.messages() == ["after"]


def test_a_receiver_that_is_killed_costs_the_others_nothing(workers, tmp_path):
    sender, victim, witness = workers(3, groups_queue_size=5000)
    victim.do("count", "room", 10**6)
    victim.wait("subscribed")
    witness.do("count", "room", 3001)
    witness.wait("subscribed")
    sender.do("send_range", "room", 0, 3000)
    victim.kill()
    sender.wait("sent")
    sender.do("send", "room", [0, 3000])
    _, _, received, gaps = witness.wait("counted")
    assert gaps == 0
    assert [message[1] for message in received] == list(range(3001))
    assert len(list((tmp_path / "hub").iterdir())) == 1  # what the killed one left is gone


def test_a_sender_that_is_killed_stops_nobody(workers):
    victim, sender, witness = workers(3)
    witness.subscribe()
    victim.do("send_range", "room", 0, 10**6)
    witness.wait("message", "room")
    victim.kill()
    sender.do("send", "room", "still here")
    witness.wait("message", "room", "still here")
    indices = [message[1] for message in witness.messages()[:-1]]
    assert indices == sorted(set(indices))


def test_workers_that_are_replaced_all_the_time_lose_no_message_to_one_that_stays(workers):
    (witness,) = workers(1, groups_queue_size=5000)
    witness.do("count", "room", 6 * 50)
    witness.wait("subscribed")
    for number in range(6):
        (worker,) = workers(1)
        worker.subscribe()
        worker.do("send_range", "room", number, 50)
        worker.wait("sent")
        worker.stop()
    _, _, received, gaps = witness.wait("counted")
    assert gaps == 0
    assert received == [[number, index, ""] for number in range(6) for index in range(50)]


def test_what_was_sent_just_before_a_worker_ends_still_arrives(workers):
    sender, receiver = workers(2, groups_queue_size=1000)
    receiver.do("count", "room", 20)
    receiver.wait("subscribed")
    sender.do("send_range", "room", 0, 20, 100_000)
    sender.wait("sent")
    sender.stop()
    _, _, received, gaps = receiver.wait("counted")
    assert (len(received), gaps) == (20, 0)


def test_a_slow_subscriber_is_told_of_its_loss_and_goes_on(workers):
    sender, receiver = workers(2, groups_queue_size=10)
    receiver.subscribe("room", pause=3600)
    receiver.do("count", "room", 501)
    support.wait_until(lambda: receiver.events.count(["subscribed", "room"]) == 2)
    sender.do("send_range", "room", 0, 500)
    sender.wait("sent")
    sender.do("send", "room", "end")
    _, _, received, gaps = receiver.wait("counted")
    assert (len(received), gaps) == (501, 0)  # the quick one beside it
    assert len(receiver.messages()) == 1
    receiver.kill()


def test_the_oldest_messages_of_a_slow_subscriber_give_way(app_server):
    async def scenario() -> None:
        async with groups.subscribe("room") as messages:
            for number in range(10):
                await groups.send("room", number)
            with pytest.raises(groups.MessagesLost):
                await anext(messages)
            assert [await anext(messages) for _ in range(4)] == [6, 7, 8, 9]
            assert messages.dropped == 6
            await groups.send("room", 10)
            assert await anext(messages) == 10

    app_server(lambda: app(groups_queue_size=4)).run(scenario())


def test_a_worker_that_does_not_keep_up_is_told_of_its_loss(workers):
    sender, receiver = workers(2, groups_queue_size=1000)
    receiver.subscribe()
    sender.do("send", "room", "first")
    receiver.wait("message", "room", "first")
    os.kill(receiver.pid, signal.SIGSTOP)
    sender.do("send_range", "room", 0, 20, 1_000_000)
    sender.wait("sent")
    os.kill(receiver.pid, signal.SIGCONT)
    receiver.wait("lost", "room")
    indices = [message[1] for message in receiver.messages()[1:]]
    assert indices == list(range(len(indices)))
    assert 0 < len(indices) < 20
    sender.do("send", "room", "again")
    receiver.wait("message", "room", "again")


def test_two_hubs_do_not_cross(workers, tmp_path):
    (first,) = workers(1, hub=str(tmp_path / "first"))
    (second,) = workers(1, hub=str(tmp_path / "second"))
    first.subscribe()
    second.subscribe()
    first.do("send", "room", "first")
    second.do("send", "room", "second")
    first.wait("message")
    second.wait("message")
    assert (first.messages(), second.messages()) == (["first"], ["second"])


def test_processes_without_a_hub_do_not_cross(workers):
    first, second = workers(2, hub=None)
    first.subscribe()
    second.subscribe()
    first.do("send", "room", "first")
    second.do("send", "room", "second")
    first.wait("message")
    second.wait("message")
    assert (first.messages(), second.messages()) == (["first"], ["second"])


def test_a_server_leaves_nothing_in_the_temporary_directory(workers, tmp_path):
    everybody = workers(3)
    for worker in everybody:
        worker.subscribe()
    everybody[0].do("send", "room", 1)
    everybody[1].wait("message")
    assert stat_mode(tmp_path / "hub") == 0o700
    for worker in everybody:
        worker.stop()
    assert list(tmp_path.iterdir()) == []


def test_each_server_has_a_hub_of_its_own():
    assert groups.new_hub() != groups.new_hub()
    assert not Path(groups.new_hub()).exists()


def test_a_temporary_directory_with_a_long_name_does_not_matter(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/" + "x" * 100)
    assert groups.new_hub().startswith("/tmp/aioserve-")


def test_a_project_without_groups_has_no_hub(workers, tmp_path):
    workers(1)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_others_may_enter_is_refused(workers, tmp_path):
    (tmp_path / "hub").mkdir(mode=0o755)
    (worker,) = workers(1)
    worker.subscribe()
    worker.do("send", "room", "alone")
    worker.wait("message", "room", "alone")
    assert b"not a directory of this user alone" in worker.errors


def test_a_worker_survives_garbage_from_a_stranger(workers, tmp_path):
    (worker,) = workers(1)
    worker.subscribe()
    (path,) = (tmp_path / "hub").iterdir()
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.settimeout(10)
        stranger.connect(str(path))
        stranger.sendall(b"\xff" * 100)
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(1) == b""
    worker.do("send", "room", "well")
    worker.wait("message", "room", "well")
    assert b"out of step" in worker.errors


def test_a_message_that_was_cut_off_is_told_as_a_loss(workers, tmp_path):
    (worker,) = workers(1)
    worker.subscribe()
    (path,) = (tmp_path / "hub").iterdir()
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(str(path))
        stranger.sendall(b"\0\0\0\x07\x04room{")
    worker.wait("lost", "room")


def test_a_worker_without_descriptors_gets_its_messages_once_it_has_some(workers):
    sender, receiver = workers(2)
    receiver.subscribe()
    receiver.do("exhaust")
    receiver.wait("exhausted")
    sender.do("send", "room", 1, 2)
    support.wait_until(lambda: b"have to wait" in receiver.errors)
    receiver.do("release")
    receiver.wait("message", "room", 2)
    assert receiver.messages() == [1, 2]


def test_what_a_worker_without_descriptors_could_not_send_is_told_as_a_loss(workers):
    sender, receiver = workers(2)
    receiver.subscribe()
    sender.do("exhaust")
    sender.wait("exhausted")
    sender.do("send", "room", 1, 2)
    sender.wait("sent")
    assert sender.errors.count(b"do not reach") == 1
    sender.do("release")
    sender.wait("released")
    sender.do("send", "room", 3)
    receiver.wait("message", "room", 3)
    assert [event[0] for event in receiver.events[-2:]] == ["lost", "message"]
    assert receiver.messages() == [3]


def test_the_workers_of_a_plain_gunicorn_find_each_other(tmp_path):
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    env.pop(HUB, None)
    command = [
        *support.python_command(), "-m", "gunicorn", "--workers=2", "--bind=127.0.0.1:0",
        "--worker-class=aiohttp.GunicornWebWorker", "tests.groups_worker:plain()",
    ]  # fmt: skip
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen(command, cwd=support.ROOT, env=env, stderr=log) as server,
    ):
        try:
            port = support.wait_until(lambda: gunicorn_port(tmp_path / "log"))
            with contextlib.ExitStack() as stack:
                waiting: dict[bytes, list[socket.socket]] = {}

                def two_workers_wait() -> bool:
                    connection = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                    connection.settimeout(10)
                    connection.sendall(b"GET /wait HTTP/1.0\r\nHost: localhost\r\n\r\n")
                    pid = read_until(connection, b"\n").split(b"\r\n\r\n")[1]
                    waiting.setdefault(pid, []).append(connection)
                    return len(waiting) == 2

                support.wait_until(two_workers_wait)
                support.raw(("127.0.0.1", port), b"GET /send HTTP/1.0\r\nHost: localhost\r\n\r\n")
                for connections in waiting.values():
                    for connection in connections:
                        assert read_until(connection, b"\n") == b'"sent"\n'
        finally:
            server.terminate()
            server.wait(20)
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def gunicorn_port(log: Path) -> int | None:
    text = log.read_text()
    at = text.find("Listening at: http://127.0.0.1:")
    return int(text[at:].split(":")[3].split()[0]) if at >= 0 else None


def read_until(connection: socket.socket, end: bytes) -> bytes:
    data = b""
    while not data.endswith(end) or data.endswith(b"\r\n"):
        part = connection.recv(1)
        assert part, data
        data += part
    return data


def stat_mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


# --- from outside of a server ----------------------------------------------------------------

OUTSIDE = """
import os, sys
from django.conf import settings
settings.configure(SECRET_KEY="key")
from django_aioserve import groups
for number in range(5):
    groups.send_sync("room", number)
if sys.argv[1:] == ["fork"]:
    child = os.fork()
    groups.send_sync("room", "parent" if child else "child")
    if child:
        os.waitpid(child, 0)
"""


def outside(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*support.python_command(), "-c", OUTSIDE, *args],
        cwd=support.ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_named_hub_is_reached_from_outside(workers, tmp_path):
    url = f"hub://{tmp_path}/named"
    first, second = workers(2, groups_url=url)
    first.subscribe()
    second.subscribe()
    result = outside(AIOSERVE_GROUPS_URL=url)
    assert (result.returncode, result.stderr) == (0, "")
    for worker in (first, second):
        worker.wait("message", "room", 4)
        assert worker.messages() == [0, 1, 2, 3, 4]


def test_a_named_hub_is_reached_by_a_process_and_its_fork(workers, tmp_path):
    url = f"hub://{tmp_path}/named"
    (worker,) = workers(1, groups_url=url)
    worker.subscribe()
    result = outside("fork", AIOSERVE_GROUPS_URL=url)
    assert (result.returncode, result.stderr) == (0, "")
    worker.wait("message", "room", "parent")
    worker.wait("message", "room", "child")
    assert len(worker.messages()) == 7


def test_a_process_started_by_a_worker_reaches_its_hub(workers, tmp_path):
    (worker,) = workers(1)
    worker.subscribe()
    result = outside(**{HUB: str(tmp_path / "hub")})
    assert (result.returncode, result.stderr) == (0, "")
    worker.wait("message", "room", 4)


def test_a_named_hub_whose_workers_were_killed_is_no_error(workers, tmp_path):
    url = f"hub://{tmp_path}/named"
    (worker,) = workers(1, groups_url=url)
    worker.subscribe()
    worker.kill()
    result = outside(AIOSERVE_GROUPS_URL=url)
    assert (result.returncode, result.stderr) == (0, "")
    assert list((tmp_path / "named").iterdir()) == []


def test_outside_of_a_server_without_configuration_the_log_says_once_that_nobody_is_reached():
    result = outside()
    assert result.returncode == 0
    assert result.stderr.count("reach nobody") == 1
    assert "AIOSERVE_GROUPS_URL" in result.stderr


def test_asynchronous_code_outside_of_a_server_sends_as_synchronous_code_does(workers, tmp_path):
    url = f"hub://{tmp_path}/named"
    (worker,) = workers(1, groups_url=url)
    worker.subscribe()
    with override_settings(AIOSERVE_GROUPS_URL=url):
        asyncio.run(groups.send("room", "from a task"))
    worker.wait("message", "room", "from a task")


def test_subscribing_outside_of_a_server_says_where_one_can(django_ready):
    async def scenario() -> None:
        with pytest.raises(RuntimeError, match="only where the aiohttp application runs"):
            await groups.subscribe("room").__aenter__()

    asyncio.run(scenario())


# --- in one process --------------------------------------------------------------------------


def test_subscribers_do_not_share_what_they_may_change(app_server):
    async def scenario() -> None:
        async with groups.subscribe("room") as first, groups.subscribe("room") as second:
            await groups.send("room", {"names": ["a"]})
            (await anext(first))["names"].append("b")
            assert await anext(second) == {"names": ["a"]}

    app_server(app).run(scenario())


def test_a_message_may_hold_what_django_can_encode(app_server):
    import datetime
    import decimal
    import uuid

    async def scenario() -> None:
        async with groups.subscribe("room") as messages:
            day = datetime.date(2024, 2, 29)
            await groups.send("room", [day, decimal.Decimal("1.50"), uuid.UUID(int=1)])
            expected = ["2024-02-29", "1.50", "00000000-0000-0000-0000-000000000001"]
            assert await anext(messages) == expected

    app_server(app).run(scenario())


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (object(), TypeError),
        (b"bytes", TypeError),
        (float("nan"), ValueError),
        ("\ud800", ValueError),
        ("x" * groups.MAX_MESSAGE_SIZE, ValueError),
    ],
    ids=["object", "bytes", "nan", "surrogate", "long"],
)
def test_what_cannot_be_a_message_is_refused(message, error):
    with pytest.raises(error):
        groups.send_sync("room", message)


def test_the_longest_message_arrives(app_server):
    message = "x" * (groups.MAX_MESSAGE_SIZE - 2)

    async def scenario() -> None:
        async with groups.subscribe("room") as messages:
            await groups.send("room", message)
            assert await anext(messages) == message

    app_server(app).run(scenario())


@pytest.mark.parametrize(
    ("name", "error"), [("", ValueError), ("é" * 128, ValueError), (7, TypeError)]
)
def test_what_cannot_be_a_group_is_refused(name, error):
    with pytest.raises(error):
        groups.subscribe(name)
    with pytest.raises(error):
        groups.send_sync(name, 1)


def test_a_subscription_is_entered_before_it_is_read(app_server):
    async def scenario() -> None:
        with pytest.raises(RuntimeError, match="async with"):
            await anext(groups.subscribe("room"))

    app_server(app).run(scenario())


def test_a_subscription_is_entered_once(app_server):
    async def scenario() -> None:
        async with groups.subscribe("room") as messages:
            with pytest.raises(RuntimeError, match="once"):
                await messages.__aenter__()

    app_server(app).run(scenario())


def test_a_subscription_has_one_reader(app_server):
    async def scenario() -> None:
        async with groups.subscribe("room") as messages:
            reader = asyncio.ensure_future(anext(messages))
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="one reader"):
                await anext(messages)
            await groups.send("room", 1)
            assert await reader == 1

    app_server(app).run(scenario())


def test_waiting_for_a_message_with_a_timeout_loses_none(app_server):
    async def scenario() -> None:
        async with groups.subscribe("room") as messages:
            for number in range(20):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0):
                        await anext(messages)
                await groups.send("room", number)
                assert await anext(messages) == number

    app_server(app).run(scenario())


def test_subscriptions_end_with_the_application(app_server):
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        async with groups.subscribe("room") as messages:
            await response.write(b"entered")
            async for _ in messages:
                pass
        await response.write(b"ended")
        return response

    def factory() -> web.Application:
        application = app()
        application.router.add_get("/", handler)
        return application

    server = app_server(factory)
    with server.connect() as connection:
        connection.send(b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n")
        assert read_until(connection.socket, b"entered").endswith(b"entered")
        server.run(server._runner.cleanup())
        assert read_until(connection.socket, b"ended") == b"ended"


def test_subscriptions_are_ended_for_a_worker_that_drains(app_server):
    server = app_server(app)

    async def scenario() -> None:
        async with groups.subscribe("room") as messages:
            waiting = asyncio.ensure_future(anext(messages, "nothing"))
            await asyncio.sleep(0)
            groups.end(server.app)
            assert await waiting == "nothing"
        async with groups.subscribe("room") as messages:
            assert [message async for message in messages] == []

    server.run(scenario())


def test_an_application_that_never_ran_can_be_ended():
    groups.end(app())


def test_an_event_loop_in_another_thread_takes_part(app_server):
    entered = threading.Event()
    received: list[Any] = []

    async def elsewhere() -> None:
        async with groups.subscribe("room") as messages:
            entered.set()
            received.append(await anext(messages))
            await groups.send("room", "answer")
            received.append(await anext(messages))

    server = app_server(app)
    thread = threading.Thread(target=asyncio.run, args=(elsewhere(),))
    thread.start()
    assert entered.wait(10)
    server.run(groups.send("room", "question"))
    thread.join(10)
    assert received == ["question", "answer"]


def test_a_thread_that_outlives_the_loop_is_not_troubled(django_ready):
    with support.AppServer(app):
        hub = groups._hub_here()
    hub.post("room", b"1")


def test_a_process_forked_by_a_worker_has_no_part_in_its_loop(app_server, django_ready):
    app_server(app)
    hub = groups._hub_here()
    hub.pid += 1
    assert groups._hub_here() is None


# --- configuration ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://localhost", '"redis://"'),
        ("hub://relative", "hub:///DIRECTORY"),
        ("hub:///" + "x" * 100, "bytes"),
    ],
)
def test_a_wrong_url_is_named(url, expected):
    with pytest.raises(ConfigurationError, match="AIOSERVE_GROUPS_URL") as caught:
        groups.setup(web.Application(), Config(groups_url=url))
    assert expected in str(caught.value)


def test_redis_that_is_not_installed_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(ConfigurationError, match=r"django-aioserve\[redis\]") as caught:
        groups.setup(web.Application(), Config(groups_url="redis://:secret@localhost"))
    assert "secret" not in str(caught.value)


def test_outside_of_a_server_a_wrong_url_is_named_too(django_ready):
    with (
        override_settings(AIOSERVE_GROUPS_URL="http://localhost"),
        pytest.raises(ConfigurationError, match="AIOSERVE_GROUPS_URL"),
    ):
        groups.send_sync("room", 1)


# --- Redis -----------------------------------------------------------------------------------


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path) as server:
        yield server


def wait_for_lost(worker: Worker, number: int = 1) -> None:
    support.wait_until(lambda: [e[0] for e in list(worker.events)].count("lost") >= number, 30)


@pytest.mark.redis
def test_through_redis_a_message_reaches_the_workers_of_other_servers_once(
    workers, redis, tmp_path
):
    (first,) = workers(1, hub=str(tmp_path / "first"), groups_url=redis.url)
    (second,) = workers(1, hub=str(tmp_path / "second"), groups_url=redis.url)
    first.subscribe()
    second.subscribe()
    first.do("send", "room", 1, 2)
    second.wait("message", "room", 2)
    second.do("send_from_thread", "room", 3)
    for worker in (first, second):
        worker.wait("message", "room", 3)
        assert worker.messages() == [1, 2, 3]


@pytest.mark.redis
def test_through_redis_a_burst_keeps_its_order_and_loses_nothing(workers, redis):
    first, second, third = workers(3, groups_url=redis.url, groups_queue_size=50)
    second.do("count", "room", 2000)
    second.wait("subscribed")
    first.do("send_range", "room", 1, 1000)
    third.do("send_range", "room", 3, 1000)
    _, _, received, gaps = second.wait("counted")
    assert gaps == 0
    for sender in (1, 3):
        assert [m[1] for m in received if m[0] == sender] == list(range(1000))


@pytest.mark.redis
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"groups_prefix": "one"}, {"groups_prefix": "other"}),
        ({"groups_prefix": "one"}, {"groups_prefix": "one:room"}),
        ({"key": "one"}, {"key": "other"}),
        ({"database": "/1"}, {"database": "/2"}),
    ],
    ids=["prefix", "nested", "secret key", "database"],
)
def test_projects_that_share_a_redis_do_not_cross(workers, redis, one, other):
    (first,) = workers(1, groups_url=redis.url + one.pop("database", ""), **one)
    (second,) = workers(1, groups_url=redis.url + other.pop("database", ""), **other)
    for worker in (first, second):
        worker.subscribe("room")
        worker.subscribe("room:room")
    first.do("send", "room", "first")
    first.do("send", "room:room", "first")
    second.do("send", "room", "second")
    second.do("send", "room:room", "second")
    for worker in (first, second):
        support.wait_until(lambda worker=worker: len(worker.messages()) == 2)
    assert first.messages() == ["first", "first"]
    assert second.messages() == ["second", "second"]


@pytest.mark.redis
def test_subscribers_are_told_when_redis_was_away_and_get_what_is_sent_afterwards(workers, redis):
    first, second = workers(2, groups_url=redis.url)
    first.subscribe()
    second.subscribe()
    first.do("send", "room", "before")
    second.wait("message", "room", "before")
    redis.kill()
    support.wait_until(lambda: b"Redis is away" in first.errors and b"away" in second.errors)
    redis.start()
    for worker in (first, second):
        wait_for_lost(worker)
    first.do("send", "room", "after")
    for worker in (first, second):
        worker.wait("message", "room", "after")
        for what in (b"Redis is away (receiving", b"Redis is back (receiving"):
            support.wait_until(lambda w=worker, t=what: t in w.errors)
            assert worker.errors.count(what) == 1


@pytest.mark.redis
def test_what_is_sent_while_redis_is_away_is_lost_and_told(workers, redis):
    sender, receiver = workers(2, groups_url=redis.url)
    receiver.subscribe()
    sender.do("send", "room", "before")
    receiver.wait("message", "room", "before")
    redis.kill()
    sender.do("send", "room", "meanwhile", "and more")
    sender.do("send_from_thread", "room", "meanwhile")
    support.wait_until(lambda: b"away (sending" in sender.errors)
    assert sender.errors.count(b"Redis is away") == 1
    redis.start()
    support.wait_until(lambda: b"back (sending" in sender.errors)
    wait_for_lost(receiver)
    sender.do("send", "room", "after")
    receiver.wait("message", "room", "after")
    assert receiver.messages() == ["before", "after"]


@pytest.mark.redis
def test_a_sender_that_alone_lost_redis_tells_all_subscribers(workers, redis):
    import redis as client_library

    sender, receiver = workers(2, groups_url=redis.url)
    receiver.subscribe()
    with client_library.Redis.from_url(redis.url) as client:
        # Redis takes no message but answers those who listen.
        client.execute_command("ACL", "SETUSER", "default", "-publish")
        sender.do("send", "room", "meanwhile")
        support.wait_until(lambda: b"away (sending" in sender.errors)
        client.execute_command("ACL", "SETUSER", "default", "+publish")
    wait_for_lost(receiver)

    def arrives() -> bool:
        # What is sent before the sender is back is one more loss, and told.
        sender.do("send", "room", "after")
        return ["message", "room", "after"] in [event[:3] for event in list(receiver.events)]

    support.wait_until(arrives, 20)
    assert receiver.messages() == ["after"]
    assert b"away" not in receiver.errors


@pytest.mark.redis
def test_a_worker_that_starts_while_redis_is_away_serves_and_recovers(workers, redis):
    redis.kill()
    first, second = workers(2, groups_url=redis.url)
    first.subscribe()
    second.do("send", "room", "lost")
    second.wait("sent")
    redis.start()
    wait_for_lost(first)
    support.wait_until(lambda: b"Redis is back" in second.errors)
    second.do("send", "room", "after")
    first.wait("message", "room", "after")


@pytest.mark.redis
def test_a_group_that_is_left_and_entered_again_goes_on(app_server, redis):
    async def scenario() -> None:
        for number in range(50):
            async with groups.subscribe("room") as messages:
                await groups.send("room", number)
                assert await anext(messages) == number

    app_server(lambda: app(groups_url=redis.url, groups_prefix="p")).run(scenario())


@pytest.mark.redis
def test_redis_is_reached_from_outside_of_a_server(workers, redis):
    (worker,) = workers(1, groups_url=redis.url)
    worker.subscribe()
    result = outside("fork", AIOSERVE_GROUPS_URL=redis.url)
    assert (result.returncode, result.stderr) == (0, "")
    worker.wait("message", "room", "parent")
    worker.wait("message", "room", "child")
    assert Counter(map(str, worker.messages())).most_common(1)[0][1] == 1


@pytest.mark.redis
def test_from_outside_a_redis_that_is_away_raises_nothing(redis):
    redis.kill()
    result = outside(AIOSERVE_GROUPS_URL=redis.url)
    assert result.returncode == 0
    assert result.stderr.count("Redis is away") == 1


@pytest.mark.redis
def test_what_is_no_json_on_the_channel_is_left_out(workers, redis):
    import redis as client_library

    (worker,) = workers(1, groups_url=redis.url, groups_prefix="shop")
    worker.subscribe()
    with client_library.Redis.from_url(redis.url) as client:
        client.publish("aioserve:0:shop:room", b"\xff")
        client.publish("aioserve:0:shop:room", b'{"from": "elsewhere"}')
    worker.wait("message", "room", {"from": "elsewhere"})
    assert b"is no JSON" in worker.errors


def test_a_redis_that_falls_silent_is_noticed(app_server, monkeypatch):
    """One that answered the subscription, and then nothing at all."""
    from django_aioserve.groups import redis as module

    monkeypatch.setattr(module, "_SILENCE_SECONDS", 0.05)
    connections = []

    def serve(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                connections.append(connection)
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

    def answer(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection.makefile("rb") as lines:
            for line in lines:
                word = line.strip()
                if word in {b"CLIENT", b"SELECT"}:
                    connection.sendall(b"+OK\r\n")
                elif word.startswith(b"aioserve:"):
                    name = b"$%d\r\n%s\r\n" % (len(word), word)
                    connection.sendall(b"*3\r\n$9\r\nsubscribe\r\n" + name + b":1\r\n")

    async def scenario() -> None:
        async with groups.subscribe("room") as messages:
            with pytest.raises(groups.MessagesLost):
                await anext(messages)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        url = f"redis://127.0.0.1:{listener.getsockname()[1]}"
        server = app_server(lambda: app(groups_url=url, groups_prefix="p"))
        server.run(scenario())
        server.run(server._runner.cleanup())
        listener.shutdown(socket.SHUT_RDWR)
    assert len(connections) > 1
    for connection in connections:
        connection.close()

"""Testproject's chat, event stream and long poll, over real servers with several workers."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.sync.client import ClientConnection
from websockets.sync.client import connect as websocket_connect
from websockets.typing import Origin

from tests import support
from tests.redis_server import RedisServer
from tests.support import Runaio, Visitor, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WORKERS = 4


@pytest.fixture(scope="module")
def server() -> Iterator[Runaio]:
    with Runaio(f"--workers={WORKERS}", "--threads=4") as running:
        yield running
    running.check_log()


# --- clients --------------------------------------------------------------------------------


def log_in(server: Runaio) -> Visitor:
    visitor = Visitor(server.address)
    assert visitor.login("/accounts/login/").status == 302
    visitor.close()
    return visitor


@pytest.fixture
def visitor(server: Runaio) -> Visitor:
    return log_in(server)


def new_topic(server: Runaio) -> int:
    """A topic of the test's own, made in the admin."""
    title = f"Topic {uuid.uuid4()}"
    with log_in(server) as visitor:
        visitor.get("/admin/board/topic/add/")
        assert visitor.post("/admin/board/topic/add/", {"title": title}).status == 302
        topics = json.loads(visitor.get("/api/topics/").body)["topics"]
    return next(topic["id"] for topic in topics if topic["title"] == title)


@pytest.fixture
def topic(server: Runaio) -> int:
    return new_topic(server)


def post(server: Runaio, topic: int, text: str) -> None:
    """Fill in the form on the topic's page, on connections of its own."""
    with Visitor(server.address) as author:
        author.get(f"/topics/{topic}/")
        author.close()
        response = author.post(f"/topics/{topic}/", {"author": "hedy", "text": text})
        assert response.status == 302


def open_chat(
    server: Runaio, topic: int, visitor: Visitor | None, after: int = 0, origin: str | None = None
) -> contextlib.AbstractContextManager[ClientConnection]:
    cookie = {"Cookie": f"sessionid={visitor.cookies['sessionid']}"} if visitor else {}
    return websocket_connect(
        f"ws://{server.host}:{server.port}/topics/{topic}/socket/?after={after}",
        origin=Origin(origin or server.url),
        additional_headers=cookie,
        open_timeout=20,
        close_timeout=5,
    )


def say(chat: ClientConnection, text: str, key: str | None = None) -> str:
    key = key or str(uuid.uuid4())
    chat.send(json.dumps({"key": key, "text": text}))
    return key


def hear(chat: ClientConnection) -> dict[str, Any]:
    event: dict[str, Any] = json.loads(chat.recv(timeout=10))
    return event


class EventSource:
    """One connection of an event stream."""

    def __init__(self, server: Runaio, topic: int, last: int = 0) -> None:
        headers = {"Last-Event-ID": str(last)} if last else {}
        with contextlib.ExitStack() as stack:
            self.connection = http.client.HTTPConnection(server.host, server.port, timeout=20)
            stack.callback(self.connection.close)
            self.connection.request("GET", f"/topics/{topic}/events/", headers=headers)
            self.socket = self.connection.sock
            self.response = self.connection.getresponse()
            stack.callback(self.response.close)
            self._closing = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._closing.close()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for line in self.response:
            if line.startswith(b"data: "):
                yield json.loads(line.removeprefix(b"data: "))

    def next(self) -> dict[str, Any]:
        return next(iter(self))


class Poll:
    """One request of a long poll, which may not be answered yet."""

    def __init__(self, server: Runaio, seen: str) -> None:
        with contextlib.ExitStack() as stack:
            self.connection = http.client.HTTPConnection(server.host, server.port, timeout=40)
            stack.callback(self.connection.close)
            self.connection.request("GET", f"/counts/?seen={seen.replace(' ', '+')}")
            self.socket = self.connection.sock
            self._closing = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._closing.close()

    def answer(self) -> dict[str, Any]:
        with contextlib.closing(self.connection.getresponse()) as response:
            assert response.status == 200
            found: dict[str, Any] = json.loads(response.read())
            return found


def counts(server: Runaio, seen: str = "") -> dict[str, Any]:
    with Poll(server, seen) as poll:
        return poll.answer()


def worker_of(server: Runaio, sock: socket.socket) -> int:
    """The worker at the other end of a connection."""
    here, there = sock.getsockname()[1], server.port

    def find() -> int | None:
        inode = None
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            ports = [int(fields[n].rpartition(":")[2], 16) for n in (1, 2)]
            if ports == [there, here] and fields[9] != "0":
                inode = fields[9]
        for pid in server.workers():
            with contextlib.suppress(OSError):
                for file in Path(f"/proc/{pid}/fd").iterdir():
                    with contextlib.suppress(OSError):
                        if str(file.readlink()) == f"socket:[{inode}]":
                            return pid
        return None

    return wait_until(find, message="no worker has accepted the connection")


def in_every_worker(
    server: Runaio,
    opener: Callable[[], contextlib.AbstractContextManager[Any]],
    stack: contextlib.ExitStack,
) -> list[Any]:
    """Open one connection to each worker."""
    opened, having = [], set()
    for _ in range(WORKERS):
        with stopped(having):
            client = stack.enter_context(opener())
            having.add(worker_of(server, client.socket))
        opened.append(client)
    assert having == set(server.workers())
    return opened


@contextlib.contextmanager
def stopped(workers: set[int]) -> Iterator[None]:
    """Let these workers accept nothing meanwhile."""
    held = list(workers)
    for pid in held:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in held:
            os.kill(pid, signal.SIGCONT)


# --- across workers --------------------------------------------------------------------------


def test_native_route_of_aioserve_routes_is_answered(server: Runaio) -> None:
    assert server.get("/native/ping/").body == b"pong"


def test_chat_reaches_pages_in_every_worker(server: Runaio, topic: int, visitor: Visitor) -> None:
    with contextlib.ExitStack() as stack:
        chats = in_every_worker(server, lambda: open_chat(server, topic, visitor), stack)
        key = say(chats[0], "Grüße & <b>signals</b>")
        heard = [hear(chat) for chat in chats]
    assert all(event == heard[0] for event in heard)
    assert heard[0]["key"] == key
    assert heard[0]["author"] == "admin"
    assert heard[0]["text"] == "Grüße & <b>signals</b>"
    assert heard[0]["version"] == 1


def test_form_reaches_event_streams_in_every_worker(server: Runaio, topic: int) -> None:
    with contextlib.ExitStack() as stack:
        streams = in_every_worker(server, lambda: EventSource(server, topic), stack)
        post(server, topic, "to all")
        heard = [stream.next() for stream in streams]
    assert {(event["version"], event["text"]) for event in heard} == {(1, "to all")}


def test_form_answers_long_polls_in_every_worker(server: Runaio, topic: int) -> None:
    before = counts(server)
    assert before["topics"][str(topic)] == 0
    with contextlib.ExitStack() as stack:
        polls = in_every_worker(server, lambda: Poll(server, before["seen"]), stack)
        post(server, topic, "counted")
        answers = [poll.answer() for poll in polls]
    assert all(answer["topics"][str(topic)] == 1 for answer in answers)
    assert all(answer["seen"] != before["seen"] for answer in answers)


def test_change_and_deletion_in_the_admin_reach_the_stream(
    server: Runaio, topic: int, visitor: Visitor
) -> None:
    with visitor, EventSource(server, topic) as stream:
        post(server, topic, "first")
        message = stream.next()["id"]
        page = f"/admin/board/message/{message}/change/"
        visitor.get(page)
        fields = {
            "topic": str(topic),
            "author": "hedy",
            "text": "second",
            "attachments-TOTAL_FORMS": "0",
            "attachments-INITIAL_FORMS": "0",
        }
        assert visitor.post(page, fields).status == 302
        changed = stream.next()
        visitor.get(f"/admin/board/message/{message}/delete/")
        response = visitor.post(f"/admin/board/message/{message}/delete/", {"post": "yes"})
        assert response.status == 302
        deleted = stream.next()
    assert (changed["id"], changed["version"], changed["text"]) == (message, 2, "second")
    assert deleted == {"id": message, "version": 3, "deleted": True}


def test_topic_with_messages_can_be_deleted(server: Runaio, topic: int, visitor: Visitor) -> None:
    post(server, topic, "soon gone")
    with visitor:
        visitor.get(f"/admin/board/topic/{topic}/delete/")
        response = visitor.post(f"/admin/board/topic/{topic}/delete/", {"post": "yes"})
        assert response.status == 302
        assert visitor.get(f"/topics/{topic}/events/").status == 404


def test_stream_goes_on_after_the_last_event_that_the_page_has(server: Runaio, topic: int) -> None:
    for text in ("one", "two", "three"):
        post(server, topic, text)
    with EventSource(server, topic, last=1) as stream:
        post(server, topic, "four")
        events = [stream.next() for _ in range(3)]
    assert [(event["version"], event["text"]) for event in events] == [
        (2, "two"),
        (3, "three"),
        (4, "four"),
    ]


def test_page_that_missed_very_many_changes_gets_them_all(
    server: Runaio, topic: int, visitor: Visitor
) -> None:
    with open_chat(server, topic, visitor) as chat:
        for number in range(450):
            say(chat, str(number))
        for _ in range(450):
            hear(chat)
    with EventSource(server, topic) as stream:
        texts = [stream.next()["text"] for _ in range(450)]
    assert texts == [str(number) for number in range(450)]


def test_pages_see_what_all_workers_say_at_once_in_one_order(
    server: Runaio, topic: int, visitor: Visitor
) -> None:
    with contextlib.ExitStack() as stack:
        chats = in_every_worker(server, lambda: open_chat(server, topic, visitor), stack)
        said = [f"{number} {index}" for number in range(10) for index in range(len(chats))]
        for number in range(10):
            for index, chat in enumerate(chats):
                say(chat, f"{number} {index}")
        heard = [[hear(chat) for _ in said] for chat in chats]
    for events in heard:
        assert [event["version"] for event in events] == list(range(1, len(said) + 1))
        assert events == heard[0]
    assert sorted(event["text"] for event in heard[0]) == sorted(said)


# --- refusals ---------------------------------------------------------------------------------


def test_foreign_origin_is_refused(server: Runaio, topic: int, visitor: Visitor) -> None:
    elsewhere = "https://elsewhere.example"
    with (
        pytest.raises(InvalidStatus) as refused,
        open_chat(server, topic, visitor, origin=elsewhere),
    ):
        pass
    assert refused.value.response.status_code == 403


def test_chat_asks_for_a_login(server: Runaio, topic: int) -> None:
    page = server.get(f"/topics/{topic}/chat/")
    assert page.status == 302
    assert page.header("Location") == f"/accounts/login/?next=/topics/{topic}/chat/"
    with pytest.raises(InvalidStatus) as refused, open_chat(server, topic, None):
        pass
    assert refused.value.response.status_code == 401


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/topics/123456789/events/", 404),
        ("/topics/1/events/?after=some", 400),
        ("/topics/some/events/", 404),
    ],
)
def test_wrong_stream_is_refused(server: Runaio, target: str, status: int) -> None:
    assert server.get(target).status == status


@pytest.mark.parametrize(
    "text",
    ["", "no JSON", "[]", '{"text": "no key"}', '{"key": "no UUID", "text": ""}', '{"key": 1}'],
)
def test_chat_tells_what_is_wrong_with_a_frame(
    server: Runaio, topic: int, visitor: Visitor, text: str
) -> None:
    with open_chat(server, topic, visitor) as chat:
        chat.send(text)
        assert "A message is" in hear(chat)["error"]


@pytest.mark.parametrize("text", ["", "x" * 2001])
def test_chat_tells_what_is_wrong_with_a_text(
    server: Runaio, topic: int, visitor: Visitor, text: str
) -> None:
    with open_chat(server, topic, visitor) as chat:
        key = say(chat, text)
        told = hear(chat)
        assert told["key"] == key
        assert told["error"]
        say(chat, "right")
        assert hear(chat)["text"] == "right"


def test_message_that_is_sent_twice_is_saved_once(
    server: Runaio, topic: int, visitor: Visitor
) -> None:
    with open_chat(server, topic, visitor) as first:
        key = say(first, "once")
    with open_chat(server, topic, visitor) as second:
        say(second, "once", key)
        say(second, "end")
        assert [hear(second)["text"] for _ in range(2)] == ["once", "end"]


# --- through a release -------------------------------------------------------------------------


class Page(threading.Thread):
    """A page that reconnects as testproject's JavaScript does, and keeps what it is told."""

    def __init__(self, server: Runaio, topic: int) -> None:
        super().__init__(daemon=True)
        self.server, self.topic = server, topic
        self.events: list[dict[str, Any]] = []
        self.connections = 0
        self.left = threading.Event()
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.left.is_set():
                try:
                    self.follow()
                except (OSError, http.client.HTTPException, WebSocketException):
                    self.left.wait(0.1)
        except BaseException as error:  # shown by the test
            self.failure = error

    def follow(self) -> None:
        raise NotImplementedError

    @property
    def version(self) -> int:
        return self.events[-1]["version"] if self.events else 0


class StreamPage(Page):
    def follow(self) -> None:
        with EventSource(self.server, self.topic, self.version) as stream:
            if stream.response.status != 200:
                raise http.client.HTTPException(stream.response.status)
            self.connections += 1
            for event in stream:
                self.events.append(event)
                if self.left.is_set():
                    return


class ChatPage(Page):
    def __init__(self, server: Runaio, topic: int, visitor: Visitor) -> None:
        super().__init__(server, topic)
        self.visitor = visitor
        self.closed: list[int] = []
        self.unconfirmed: dict[str, str] = {}
        self.said = 0

    def follow(self) -> None:
        with open_chat(self.server, self.topic, self.visitor, self.version) as chat:
            self.connections += 1
            for key, text in self.unconfirmed.items():
                say(chat, text, key)
            due = 0.0
            while not self.left.is_set():
                # Something is on its way at any time.
                if not self.unconfirmed and time.monotonic() > due:
                    self.said += 1
                    key = str(uuid.uuid4())
                    self.unconfirmed[key] = f"chat {self.said}"
                    say(chat, self.unconfirmed[key], key)
                    due = time.monotonic() + 0.2
                try:
                    event = json.loads(chat.recv(timeout=0.1))
                except TimeoutError:
                    continue
                except ConnectionClosed as closed:
                    self.closed.append(closed.rcvd.code if closed.rcvd else 1006)
                    raise
                self.events.append(event)
                self.unconfirmed.pop(event.get("key"), None)


class CountingPage(Page):
    def follow(self) -> None:
        seen = self.events[-1]["seen"] if self.events else ""
        self.events.append(counts(self.server, seen))
        self.connections += 1


@pytest.mark.slow
def test_pages_miss_nothing_while_every_worker_is_replaced(runaio: Callable[..., Runaio]) -> None:
    server = runaio(f"--workers={WORKERS}", "--threads=4", "--stream-linger=2")
    topic = new_topic(server)
    visitor = log_in(server)
    streams = [StreamPage(server, topic) for _ in range(4)]
    chats = [ChatPage(server, topic, visitor) for _ in range(4)]
    polls = [CountingPage(server, topic) for _ in range(4)]
    pages = [*streams, *chats, *polls]
    for page in pages:
        page.start()
    wait_until(lambda: all(page.connections for page in pages), 20)
    before = set(server.workers())

    server.signal(signal.SIGHUP)

    posted = 0

    def replaced() -> bool:
        nonlocal posted
        posted += 1
        post(server, topic, f"form {posted}")
        workers = set(server.workers())
        return len(workers) == WORKERS and not workers & before

    wait_until(replaced, 60, "the workers are not replaced")
    # A page that was sent away has come back, and one more round of messages has reached all.
    wait_until(lambda: all(page.connections > 1 for page in pages), 30)
    for chat in chats:
        chat.left.set()
    for chat in chats:
        chat.join(20)
    post(server, topic, "form last")
    wait_until(lambda: all(page.events[-1]["text"] == "form last" for page in streams), 30)
    total = streams[0].version
    wait_until(lambda: all(page.events[-1]["topics"][str(topic)] == total for page in polls), 30)
    for page in pages:
        page.left.set()

    assert [page.failure for page in pages] == [None] * len(pages)
    for page in [*streams, *chats]:
        versions = [event["version"] for event in page.events]
        assert versions == list(range(1, len(versions) + 1))
    texts = [event["text"] for event in streams[0].events]
    assert [text for text in texts if text.startswith("form")] == [
        *(f"form {number + 1}" for number in range(posted)),
        "form last",
    ]
    # Each message of the chats was saved once, however often it was sent.
    keys = [event["key"] for event in streams[0].events if "key" in event]
    assert len(keys) == len(set(keys))
    assert all(chat.said - len(keys) <= 1 for chat in chats)
    assert {code for chat in chats for code in chat.closed} == {1012}


@pytest.mark.slow
def test_pages_are_told_everything_until_their_leaving_worker_closes_them(
    runaio: Callable[..., Runaio],
) -> None:
    server = runaio("--workers=1", "--threads=2", "--stream-linger=10")
    topic = new_topic(server)
    pages = [StreamPage(server, topic) for _ in range(20)]
    readers = [threading.Thread(target=page.follow, daemon=True) for page in pages]
    for reader in readers:
        reader.start()
    wait_until(lambda: all(page.connections for page in pages))
    server.signal(signal.SIGHUP)
    wait_until(lambda: not all(reader.is_alive() for reader in readers), 30, "none is closed")
    post(server, topic, "to those who are left")
    wait_until(lambda: any(page.events for page in pages), message="none is told of it")
    for reader in readers:
        reader.join(20)


# --- Redis -----------------------------------------------------------------------------------


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path) as server:
        yield server


@pytest.mark.redis
@pytest.mark.slow
def test_two_servers_share_the_chat_through_redis_that_goes_and_comes_back(
    runaio: Callable[..., Runaio], redis: RedisServer, tmp_path: Path
) -> None:
    database = tmp_path / "shared.sqlite3"
    shutil.copy(support.template_database(), database)
    env = {"AIOSERVE_GROUPS_URL": redis.url, "DATABASE_URL": f"sqlite:///{database}"}
    servers = [runaio("--workers=2", "--threads=2", env=env) for _ in range(2)]
    topic = new_topic(servers[0])
    visitor = log_in(servers[0])
    with contextlib.ExitStack() as stack:
        chats = [
            stack.enter_context(open_chat(server, topic, visitor))
            for server in servers
            for _ in range(2)
        ]
        say(chats[0], "from the first")
        assert [hear(chat)["text"] for chat in chats] == ["from the first"] * 4
        say(chats[-1], "from the second")
        assert [hear(chat)["text"] for chat in chats] == ["from the second"] * 4

        redis.kill()
        for server in servers:
            server.wait_for_log("Redis is away")
        # Saved, though nobody can be told of it now.
        say(chats[0], "meanwhile")
        wait_until(lambda: "meanwhile" in servers[1].get(f"/topics/{topic}/").text)
        redis.start()
        assert [hear(chat)["text"] for chat in chats] == ["meanwhile"] * 4

        say(chats[-1], "afterwards")
        assert [hear(chat)["text"] for chat in chats] == ["afterwards"] * 4


# --- many ------------------------------------------------------------------------------------


def test_sync_view_answers_beside_many_open_pages(server: Runaio, visitor: Visitor) -> None:
    topic = new_topic(server)
    with contextlib.ExitStack() as stack:
        # Raw sockets: 200 clients with a thread each would be busy with themselves.
        upgrade = (
            f"GET /topics/{topic}/socket/ HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n"
            "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
            f"Cookie: sessionid={visitor.cookies['sessionid']}\r\n\r\n"
        )
        stream = f"GET /topics/{topic}/events/ HTTP/1.1\r\nHost: localhost\r\n\r\n"
        pages = []
        for request, answer in ((upgrade, b" 101 "), (stream, b" 200 ")):
            opened = [stack.enter_context(server.connect(20)) for _ in range(200)]
            for page in opened:
                page.send(request.encode())
            for page in opened:
                assert answer in page.recv_until(b"\r\n\r\n").partition(b"\r\n")[0]
            pages += opened
        assert [server.get("/ping/").body for _ in range(50)] == [b"pong"] * 50
        post(server, topic, "to four hundred")
        assert [server.get("/ping/").body for _ in range(50)] == [b"pong"] * 50
        for page in pages:
            page.recv_until(b"to four hundred")


# --- another server --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runserver() -> Iterator[support.Address]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address: tuple[str, int] = free.getsockname()
    server = Runaio(f"{address[0]}:{address[1]}", "--noreload", bind=(), command="runserver")
    server.launch()

    def is_there() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(address) == 0

    try:
        wait_until(is_there, 30, "runserver does not listen")
        yield address
    finally:
        server.stop()


@pytest.mark.parametrize("path", ["/counts/", "/topics/1/events/", "/topics/1/socket/"])
def test_under_runserver_a_native_url_says_where_it_is_served(
    runserver: support.Address, path: str
) -> None:
    with Visitor(runserver) as visitor:
        response = visitor.get(path)
    assert response.status == 501
    assert re.search(r"aiohttp handler board\.live\.\w+, which runs only", response.text)
    assert '"manage.py runaio"' in response.text

"""The soak run in short, and that it would notice a loss."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
from collections.abc import Iterator

import pytest

from tests.load import Habit, Load
from tests.soak.__main__ import SERVERS, killed_among, main
from tests.support import Address


def rows(output: str) -> list[list[str]]:
    """The rows of the table, in columns, without its head."""
    return [line.split() for line in output.splitlines()[1:] if not line.startswith(" ")]


@pytest.mark.slow
def test_a_few_thousand_requests_over_many_replacements_lose_nothing(capsys):
    arguments = ["--servers=django-aioserve", "--requests=3000", "--seconds=120", "--faults=none"]
    status = main([*arguments, "--max-requests=150", "--max-requests-jitter=30", "--boots=0"])
    output = capsys.readouterr().out
    ((name, _boot, _faults, answered, replaced, *lost),) = rows(output)
    assert (name, status) == ("django-aioserve", 0), output
    assert lost[:4] == ["0", "0", "0", "0"], output  # lost, 5xx, killed, lost of a million
    assert int(answered) >= 2900  # a WebSocket that is closed has its message to send again
    assert int(replaced) >= 10


@pytest.mark.slow
def test_faults_lose_nothing_but_what_a_killed_worker_had_in_flight(capsys, tmp_path):
    path = tmp_path / "figures.json"
    arguments = ["--servers=django-aioserve", "--seconds=120", "--requests=6000", "--boots=0"]
    status = main([*arguments, "--max-requests=300", "--fault-interval=0.1", f"--json={path}"])
    assert status == 0, capsys.readouterr().out
    without, faulty = json.loads(path.read_text())
    assert without["faults"] == {}
    assert {"hup", "kill", "broken"} <= set(faulty["faults"])
    assert (faulty["lost"], faulty["errors"], faulty["given_up"]) == (0, 0, 0)
    assert faulty["answered"] >= 5900
    assert faulty["replacements"] >= 2  # HUP alone has replaced both workers


@pytest.mark.parametrize(
    ("lost_at", "kills", "killed"),
    [
        ([], [5.0], 0),
        ([5.1, 5.2], [5.0], 2),
        ([5.1] * 9, [5.0], 4),  # there are four clients
        ([4.9, 6.1], [5.0], 0),
        ([5.1, 9.1], [5.0, 9.0], 2),
    ],
)
def test_only_so_much_is_put_down_to_a_kill(lost_at, kills, killed):
    assert killed_among(lost_at, kills, 4) == killed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gunicorn-gthread", "gunicorn-asgi", "aiohttp-worker"])
def test_its_peers_answer_the_same_clients(name, capsys):
    arguments = [f"--servers={name}", "--requests=200", "--seconds=20", "--workers=1"]
    assert main([*arguments, "--max-requests=0", "--max-requests-jitter=0", "--boots=0"]) == 0
    output = capsys.readouterr().out
    ((_name, _boot, _faults, answered, replaced, lost, *_),) = rows(output)
    assert (int(answered) >= 190, replaced, lost) == (True, "0", "0"), output


def test_an_unknown_server_is_told():
    with pytest.raises(SystemExit, match=re.escape("no such server: nginx")):
        main(["--servers=nginx"])


def test_its_peers_are_those_that_people_use():
    assert list(SERVERS) == [
        *("django-aioserve", "gunicorn-gthread", "gunicorn-asgi", "uvicorn-worker"),
        "aiohttp-worker",
    ]


# --- whether a loss is noticed ------------------------------------------------------------

WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@contextlib.contextmanager
def serving(*replies: bytes | None) -> Iterator[Address]:
    """A server that gives these replies, one to each request, and closes after None or the last."""
    listener = socket.create_server(("127.0.0.1", 0))
    waiting = list(replies)

    def serve() -> None:
        while waiting:
            connection, _ = listener.accept()
            with connection:
                while waiting:
                    reply = waiting.pop(0)
                    if reply is None or not connection.recv(65536):
                        break
                    connection.sendall(reply)
        listener.close()

    thread = threading.Thread(target=serve)
    thread.start()
    yield listener.getsockname()
    thread.join()


@pytest.mark.parametrize(
    ("reply", "what"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nok", "IncompleteReadError"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", "Incomplete"),
        (b"HTTP/1.1 200 OK\r\n", "IncompleteReadError"),
        (b"HTTP/1.1 200 OK\r\n\r\nok", "without a length"),
    ],
    ids=["cut off", "no last chunk", "half a head", "no length"],
)
def test_a_truncated_answer_is_lost(reply, what):
    with serving(reply) as address, Load(address, Habit(), limit=1) as load:
        tally = load.join()
    assert (tally.answered, len(tally.lost)) == (0, 1)
    assert what in tally.lost[0]


def test_a_connection_that_was_closed_without_a_word_loses_the_next_request():
    with serving(WHOLE, None, WHOLE) as address, Load(address, Habit(think=0.05), limit=3) as load:
        tally = load.join()
    assert (tally.answered, len(tally.lost)) == (2, 1)


def test_a_careful_client_looks_before_it_sends():
    habit = Habit(think=0.05, blind=False)
    with serving(WHOLE, None, WHOLE) as address, Load(address, habit, limit=2) as load:
        tally = load.join()
    assert (tally.answered, tally.lost) == (2, [])


def test_a_connection_that_was_announced_to_close_loses_nothing():
    last = WHOLE.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    with serving(last, None, WHOLE) as address, Load(address, Habit(), limit=2) as load:
        tally = load.join()
    assert (tally.answered, tally.lost) == (2, [])


def test_a_refused_connection_is_lost_until_the_end_is_expected():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    with Load(address, Habit(), limit=3) as load:
        tally = load.join()
    assert len(tally.lost) == 3
    with Load(address, Habit()) as load:
        load.expect_end()
        before = len(load.join().lost)
    assert before <= 1  # that of the moment before


def test_an_upload_that_arrives_otherwise_is_lost():
    with serving(WHOLE) as address, Load(address, Habit(upload=10), limit=1) as load:
        tally = load.join()
    assert "arrived as something else" in tally.lost[0]

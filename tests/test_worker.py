"""The worker: it keeps its limit, loses nothing, and honours what Gunicorn is told."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import ssl
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from django_aioserve.server.connection import LINGER_SECONDS
from django_aioserve.server.drain import CLOSING_SECONDS
from tests.load import Habit, Load, Tally, mixture
from tests.processes import ENVIRONMENT, KIOSK, SOON, Process, events, gunicorn
from tests.support import Runaio, is_alive, raw, wait_until

Start = Callable[..., Any]

#: The worker class as it is named in a command line of Gunicorn's.
OURS = "django_aioserve.server.RecyclingWorker"
# Gunicorn's own arbiter loses a SIGTERM to a worker between its fork and its first handler.
SOON_OVER = ("--graceful-timeout=5",)

#: A worker at its limit waits for its replacement, however slow this machine is.
EXACT = "--hold=60"


@pytest.fixture
def kiosk(runaio: Start) -> Start:
    """Starts `runaio` of the kiosk project."""

    def start(*args: str, env: dict[str, str] | None = None, **options: Any) -> Runaio:
        options.setdefault("project", KIOSK)
        server: Runaio = runaio(*args, env={**ENVIRONMENT, **(env or {})}, **options)
        return server

    return start


@pytest.fixture
def process(request: pytest.FixtureRequest) -> Iterator[Start]:
    """Starts other servers: `process(gunicorn(…))`."""
    allowed = request.node.get_closest_marker("allow_tracebacks") is not None
    with contextlib.ExitStack() as stack:

        def start(server: Process) -> Process:
            server.allow_tracebacks = allowed
            stack.callback(server.check_log)
            return stack.enter_context(server)

        yield start


def answers_by_worker(tally: Tally) -> Counter[int]:
    """How many requests each worker has answered, of those that name it."""
    counted: Counter[int] = Counter()
    for body, count in tally.bodies.items():
        counted[int(body.split()[-1])] += count
    return counted


def nothing_lost(tally: Tally) -> None:
    """Every request was answered, and well."""
    assert tally.lost == []
    assert set(tally.statuses) <= {200}


# --- its limit ----------------------------------------------------------------------------


def test_a_worker_answers_as_many_requests_as_its_limit_says(kiosk):
    server = kiosk("--max-requests=15", EXACT)
    with Load(server.address, Habit(keep=False), limit=60) as load:
        tally = load.join()
    nothing_lost(tally)
    # The next request may be on its way when the answer that reaches the limit is read.
    *done, _last = answers_by_worker(tally).values()
    assert {15, 16} >= set(done)
    assert len(done) >= 3


def test_the_jitter_is_added_to_the_limit(kiosk):
    server = kiosk("--max-requests=10", "--max-requests-jitter=5", EXACT)
    with Load(server.address, Habit(keep=False), limit=60) as load:
        tally = load.join()
    nothing_lost(tally)
    *done, _last = answers_by_worker(tally).values()
    assert all(10 <= count <= 16 for count in done), done


@pytest.mark.slow
def test_no_request_is_lost_and_the_limit_is_kept_under_load(kiosk):
    """Clients that think 0, 10 and 50 ms and reuse their connections blindly."""
    clients = 8
    server = kiosk("--workers=2", "--max-requests=100", "--max-requests-jitter=20", EXACT)
    habits = mixture(clients, Habit(), Habit(think=0.01), Habit(think=0.05))
    with Load(server.address, *habits, limit=900) as load:
        tally = load.join()
    nothing_lost(tally)
    counted = answers_by_worker(tally)
    assert max(counted.values()) <= 120 + clients, counted
    done = {event["pid"]: event["served"] for event in events(server)}
    assert all(count >= 100 for count in done.values()), done
    assert len(counted) >= 900 // (120 + clients)


@pytest.mark.slow
def test_uploads_streams_and_new_connections_survive_replacements(kiosk):
    server = kiosk("--workers=2", "--max-requests=60", "--stream-linger=0.5")
    habits = mixture(
        8,
        Habit("/upload/", upload=300_000),
        Habit("/stream/"),
        Habit(keep=False),
        Habit("/ws/", websocket=True, think=0.01),
        Habit("/async/", think=0.01),
        Habit("/slow/?seconds=0.02"),
        Habit("/slow-async/?seconds=0.02", blind=False),
        Habit("/upload/", upload=3_000_000, think=0.05),
    )
    with Load(server.address, *habits, limit=700, counts_bodies=False) as load:
        tally = load.join()
    nothing_lost(tally)
    assert len(events(server)) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "closed"])
def test_no_request_is_lost_over_tls(kiosk, certificate, keep):
    server = kiosk(
        "--workers=2", "--max-requests=50", f"--certfile={certificate}/cert.pem", "--log-level=info"
    )
    context = ssl.create_default_context(cafile=certificate / "cert.pem")
    habits = mixture(6, Habit(keep=keep), Habit(keep=keep, think=0.01))
    with Load(server.address, *habits, limit=400, tls=context) as load:
        tally = load.join()
    nothing_lost(tally)
    assert len(events(server)) >= 4


def test_no_request_is_lost_on_a_unix_socket(kiosk, tmp_path):
    server = kiosk("--max-requests=50", bind=[f"unix:{tmp_path}/socket"])
    with Load(server.address, *mixture(6, Habit(), Habit(think=0.01)), limit=350) as load:
        tally = load.join()
    nothing_lost(tally)
    assert len(events(server)) >= 4


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a certificate and its key in `cert.pem`."""
    directory = tmp_path_factory.mktemp("certificate")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost", "-out", "cert", "-keyout", "key"),
        ],
        cwd=directory,
        check=True,
        capture_output=True,
    )
    both = (directory / "cert").read_bytes() + (directory / "key").read_bytes()
    (directory / "cert.pem").write_bytes(both)
    return directory


# --- the ways to serve the application ----------------------------------------------------


@pytest.mark.slow
def test_plain_gunicorn_recycles_our_worker_without_a_loss(process):
    options = ("--workers=2", "--max-requests=60", *SOON_OVER)
    server = process(gunicorn("kiosk.aio:app", OURS, *options))
    with Load(server.address, *mixture(6, Habit(), Habit(think=0.01)), limit=600) as load:
        tally = load.join()
    nothing_lost(tally)
    served = [event["served"] for event in events(server)]
    assert len(served) >= 5
    assert max(served) <= 60 + 2 * 6


def test_plain_gunicorn_without_recycling_serves(process):
    server = process(gunicorn("kiosk.aio:app", OURS))
    assert server.get("/").text.startswith("one ")
    assert server.get("/async/").status == 200


@pytest.mark.parametrize("worker", ["aiohttp.GunicornWebWorker", "aiohttp.GunicornUVLoopWebWorker"])
def test_aiohttps_own_worker_serves_the_application(process, worker):
    server = process(gunicorn("kiosk.aio:app", worker))
    assert server.get("/").text.startswith("one ")
    assert server.get("/async/").status == 200
    assert server.request("POST", "/upload/", body=b"x").status == 200


def test_run_app_serves_the_application(process):
    server = process(Process("-m", "kiosk.standalone"))
    assert server.get("/").text == f"one {server.pid}"
    assert server.request("POST", "/upload/", body=b"x").status == 200
    assert server.stop() == 0


@pytest.mark.allow_tracebacks
def test_our_worker_says_so_when_it_is_given_no_aiohttp_application(process):
    server = gunicorn("kiosk.wsgi:application", OURS)
    server.launch()
    try:
        server.wait_for_log("not an aiohttp application", SOON)
        assert server.wait(SOON)
    finally:
        server.stop()


# --- what views may do --------------------------------------------------------------------


@pytest.mark.allow_tracebacks
@pytest.mark.parametrize(
    "target",
    [
        "/exit/?code=0",
        "/exit/?code=3",
        "/exit/?code=4",
        "/raise/?what=KeyboardInterrupt",
        "/raise/?what=MemoryError",
        "/raise/?what=RecursionError",
        "/raise/?what=GeneratorExit",
        "/raise/?what=BaseException",
        "/raise/?what=StopIteration",
    ],
)
def test_line_40_what_a_view_raises_is_a_500_and_nothing_else(shared, target):
    server = shared
    workers = server.workers()
    assert server.get(target).status == 500
    assert server.get("/").status == 200
    assert server.workers() == workers


@pytest.fixture(scope="module")
def shared() -> Iterator[Runaio]:
    """One server for what changes nothing in it."""
    with Runaio(project=KIOSK, env=ENVIRONMENT) as server:
        server.get("/")
        yield server


@pytest.mark.parametrize("code", [0, 3, 4])
def test_a_worker_that_a_view_ends_is_replaced_whatever_its_code(kiosk, code):
    """Gunicorn's own arbiter stops altogether at 3 and 4."""
    server = kiosk("--workers=2")
    wait_until(lambda: len(server.workers()) == 2, SOON)
    with server.connect() as connection:
        connection.send(f"GET /die/?code={code} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv_to_eof() == b""
    server.wait_for_log(rf"died: exited with code {code}", SOON)
    server.wait_for_log(r'"reason": "died"', SOON)
    wait_until(lambda: server.log_text().count("is ready") == 3, SOON)
    assert server.get("/").status == 200
    assert is_alive(server.pid)


# --- Gunicorn's settings ------------------------------------------------------------------


def test_the_access_log_has_gunicorns_atoms(kiosk, tmp_path):
    path = tmp_path / "access.log"
    atoms = [
        *("%(h)s", "%(l)s", "%(u)s", "%(t)s", "%(r)s", "%(m)s", "%(U)s", "%(q)s", "%(H)s"),
        *("%(s)s", "%(B)s", "%(b)s", "%(f)s", "%(a)s", "%(T)s", "%(M)s", "%(D)s", "%(L)s"),
        *("%(p)s", "%({x-custom}i)s", "%({content-type}o)s", "%({remote_addr}e)s"),
    ]
    server = kiosk(
        f"--access-log={path}", "--access-log-format", "|".join(atoms), env={"TZ": "UTC"}
    )
    headers = [
        ("Referer", "http://localhost/before"),
        ("User-Agent", 'a "browser"'),
        ("X-Custom", "own"),
        ("Authorization", "Basic bWU6c2VjcmV0"),
    ]
    answer = server.request("GET", "/slow/?seconds=0.05", headers)
    line = wait_until(lambda: path.read_text().strip() if path.exists() else "", SOON)
    values = dict(zip(atoms, line.split("|"), strict=True))
    length = str(len(answer.body))
    assert values | {"%(t)s": "", "%(T)s": "", "%(M)s": "", "%(D)s": "", "%(L)s": ""} == {
        "%(h)s": "127.0.0.1",
        "%(l)s": "-",
        "%(u)s": "me",
        "%(t)s": "",
        "%(r)s": "GET /slow/?seconds=0.05 HTTP/1.1",
        "%(m)s": "GET",
        "%(U)s": "/slow/",
        "%(q)s": "seconds=0.05",
        "%(H)s": "HTTP/1.1",
        "%(s)s": "200",
        "%(B)s": length,
        "%(b)s": length,
        "%(f)s": "http://localhost/before",
        "%(a)s": r"a \"browser\"",
        "%(T)s": "",
        "%(M)s": "",
        "%(D)s": "",
        "%(L)s": "",
        "%(p)s": f"<{answer.text.split()[1]}>",
        "%({x-custom}i)s": "own",
        "%({content-type}o)s": "text/plain",
        "%({remote_addr}e)s": "127.0.0.1",
    }
    assert re.fullmatch(r"\[\d\d/\w{3}/\d{4}:\d\d:\d\d:\d\d [+-]\d{4}\]", values["%(t)s"])
    assert int(values["%(M)s"]) >= 50
    assert int(values["%(D)s"]) >= 50_000
    assert 0.05 <= float(values["%(L)s"]) < SOON


@pytest.mark.parametrize("bind", ["127.0.0.1:0", "unix:{directory}/socket"])
def test_the_access_log_has_the_address_that_the_view_has(kiosk, tmp_path, bind):
    path = tmp_path / "access.log"
    bind = bind.format(directory=tmp_path)
    server = kiosk(f"--access-log={path}", "--access-log-format=%(h)s", bind=(bind,))
    server.request("GET", "/", [("X-Forwarded-For", "203.0.113.9, 198.51.100.7")])
    server.get("/")
    wait_until(lambda: path.exists() and len(path.read_text().splitlines()) == 2, SOON)
    assert path.read_text().splitlines() == ["198.51.100.7", "127.0.0.1"]


def test_each_request_has_its_line_in_the_access_log(kiosk, tmp_path):
    path = tmp_path / "access.log"
    server = kiosk(f"--access-log={path}", "--access-log-format=%(r)s %(s)s")
    server.get("/")
    server.get("/async/?a=%0Ab")
    server.get("/none/")
    raw(server.address, b"nonsense\r\n\r\n")
    wait_until(lambda: path.exists() and len(path.read_text().splitlines()) >= 4, SOON)
    lines = path.read_text().splitlines()
    assert lines[:3] == [
        "GET / HTTP/1.1 200",
        "GET /async/?a=%0Ab HTTP/1.1 200",
        "GET /none/ HTTP/1.1 404",
    ]
    assert len(lines) == 4
    assert lines[3].endswith(" 400")


def collector(server: Runaio, query: str = "") -> tuple[int, int, int]:
    """The collector's first threshold; the connections and the requests that it knows of."""
    threshold, connections, requests = map(int, server.get(f"/collector/{query}").text.split())
    return threshold, connections, requests


def test_a_closed_connection_needs_no_collector(kiosk):
    server = kiosk()
    _, before, _ = collector(server, "?off")
    for _ in range(5):
        assert server.get("/").status == 200
    # An answer is there before its connection is closed on both sides.
    wait_until(lambda: collector(server)[1] <= before, SOON)


def test_an_idle_connection_keeps_nothing_of_its_last_request(kiosk):
    server = kiosk()
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            connection = stack.enter_context(server.connect())
            connection.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.read_response().status == 200
        _, connections, requests = collector(server)
        assert connections >= 6
        assert requests == 1


def test_the_collector_is_spared_while_much_is_in_flight(kiosk):
    server = kiosk("--threads=2", "--request-timeout=60")
    usual, _, _ = collector(server)
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            connection = stack.enter_context(server.connect())
            connection.send(b"GET /slow-async/?seconds=60 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        wait_until(lambda: collector(server)[0] >= max(usual, 20 * 100), SOON)
    wait_until(lambda: collector(server)[0] == usual, SOON)


def test_usr1_reopens_the_logs_of_arbiter_and_workers(kiosk, tmp_path):
    path = tmp_path / "access.log"
    server = kiosk(f"--access-log={path}", "--access-log-format=%(U)s")
    server.get("/first/")
    wait_until(lambda: path.exists() and path.read_text() == "/first/\n", SOON)
    path.rename(tmp_path / "access.log.1")
    server.signal(signal.SIGUSR1)

    def reopened() -> bool:
        server.get("/again/")
        return path.exists() and "/again/\n" in path.read_text()

    wait_until(reopened, SOON)
    assert "/first/" not in path.read_text()


def test_gunicorns_hooks_are_called(kiosk):
    names = [
        *("on_starting", "when_ready", "pre_fork", "post_fork", "post_worker_init"),
        *("pre_request", "post_request", "worker_exit", "child_exit", "nworkers_changed"),
        *("on_reload", "on_exit"),
    ]
    import json

    hooks = {name: f"kiosk.hooks.{name}" for name in names}
    server = kiosk(env={"KIOSK_GUNICORN": json.dumps(hooks)})
    answer = server.get("/")
    pid = int(answer.text.split()[1])
    server.wait_for_log(rf"hook post_fork pid={pid} {pid}$", SOON)
    server.wait_for_log(rf"hook post_worker_init pid={pid} {pid}$", SOON)
    server.wait_for_log(rf"hook pre_request pid={pid} {pid} GET /$", SOON)
    server.wait_for_log(rf"hook post_request pid={pid} {pid} GET / 200 OK$", SOON)
    server.signal(signal.SIGTTIN)
    server.wait_for_log(rf"hook nworkers_changed pid={server.pid} 1 2$", SOON)
    server.signal(signal.SIGHUP)
    server.wait_for_log(rf"hook on_reload pid={server.pid}$", SOON)
    server.wait_for_log(rf"hook worker_exit pid={pid} {pid}$", SOON)
    server.wait_for_log(rf"hook child_exit pid={server.pid} {pid}$", SOON)
    assert server.stop() == 0
    text = server.log_text()
    missing = [name for name in names if f"hook {name} " not in text]
    assert missing == []


def test_worker_int_is_called_for_a_quick_end(kiosk):
    server = kiosk(env={"KIOSK_GUNICORN": '{"worker_int": "kiosk.hooks.worker_int"}'})
    pid = int(server.get("/").text.split()[1])
    server.signal(signal.SIGINT)
    server.wait_for_log(rf"hook worker_int pid={pid} {pid}$", SOON)
    assert server.wait(SOON) == 0


def test_a_worker_that_is_told_to_leave_as_its_loop_begins_leaves_well(kiosk, tmp_path):
    """uvloop cannot be closed where an exit came in its beginning; the log has no traceback."""
    server = kiosk(
        env={
            "KIOSK_GUNICORN": '{"post_worker_init": "kiosk.hooks.told_as_its_loop_begins"}',
            "KIOSK_TOLD": str(tmp_path / "told"),
        }
    )
    server.wait_for_log(r"hook told pid=\d+", SOON)
    assert server.get("/").status == 200
    assert server.stop() == 0


def test_hooks_of_plain_gunicorn_are_called(process, tmp_path):
    config = tmp_path / "gunicorn.conf.py"
    config.write_text("from kiosk.hooks import pre_request, post_request, post_fork\n")
    server = process(gunicorn("kiosk.aio:app", OURS, f"--config={config}"))
    pid = int(server.get("/").text.split()[1])
    server.wait_for_log(rf"hook pre_request pid={pid} {pid} GET /$", SOON)
    server.wait_for_log(rf"hook post_request pid={pid} {pid} GET / 200 OK$", SOON)


@pytest.mark.parametrize(
    ("allowed", "expected"),
    [("127.0.0.1", "198.51.100.7"), ("192.0.2.1", "127.0.0.1"), ("127.0.0.0/8", "198.51.100.7")],
)
def test_forwarded_headers_count_from_trusted_peers(process, tmp_path, allowed, expected):
    path = tmp_path / "access.log"
    server = process(
        gunicorn(
            *("kiosk.aio:app", OURS, f"--forwarded-allow-ips={allowed}"),
            *(f"--access-logfile={path}", "--access-logformat=%(h)s"),
        )
    )
    server.get("/", [("X-Forwarded-For", "198.51.100.7"), ("X-Forwarded-Proto", "https")])
    line = wait_until(lambda: path.read_text().strip() if path.exists() else "", SOON)
    # The access log tells who connected; what Django sees is in META.
    assert line in ("127.0.0.1", expected)
    answer = server.get(
        "/meta/", [("X-Forwarded-For", "198.51.100.7"), ("X-Forwarded-Proto", "https")]
    )
    scheme = "https" if expected != "127.0.0.1" else "http"
    assert answer.text == f"{expected} {scheme}"


@pytest.mark.parametrize(
    ("option", "target", "headers"),
    [
        ("--limit-request-line=100", "/?" + "a" * 200, []),
        ("--limit-request-fields=5", "/", [(f"X-{number}", "a") for number in range(10)]),
        ("--limit-request-field_size=100", "/", [("X-Long", "a" * 200)]),
    ],
)
def test_gunicorns_limits_of_a_request_hold(process, option, target, headers):
    server = process(gunicorn("kiosk.aio:app", OURS, option))
    assert server.get("/").status == 200
    assert server.request("GET", target, headers).status in (400, 414, 431)


def test_threads_of_plain_gunicorn_are_the_pools(process):
    server = process(gunicorn("kiosk.aio:app", OURS, "--threads=2"))
    habits = [Habit("/slow/?seconds=0.1")] * 6
    with Load(server.address, *habits, limit=12) as load:
        tally = load.join()
    nothing_lost(tally)
    ends = sorted(moment for moment, _ in tally.latencies)
    # Two threads sleep for two requests after another: for the other ten five times.
    assert ends[-1] - ends[0] >= 0.1 * 5 * 0.9


@pytest.mark.parametrize(
    "frame",
    [b"\x81\x02hi", b"\x88\x82\x00\x00\x00\x00\x03\xee"],
    ids=["without a mask", "a code that is never sent"],
)
def test_a_native_websocket_is_closed_for_what_aiohttp_would_let_pass(kiosk, frame):
    server = kiosk()
    handshake = [
        ("Connection", "Upgrade"),
        ("Upgrade", "websocket"),
        ("Sec-WebSocket-Version", "13"),
        ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ]
    with server.connect() as connection:
        assert connection.request("GET", "/ws/", handshake).status == 101
        connection.send(b"\x81\x82\x00\x00\x00\x00ok" + frame)
        assert connection.recv_exactly(4) == b"\x81\x02ok"
        opcode, size = connection.recv_exactly(2)
        assert (opcode, connection.recv_exactly(size)[:2]) == (0x88, b"\x03\xea")


# --- its end ------------------------------------------------------------------------------


def test_line_52_workers_end_when_their_arbiter_is_killed(kiosk):
    server = kiosk("--workers=2")
    workers = wait_until(lambda: len(server.workers()) == 2 and server.workers(), SOON)
    server.get("/")
    os.kill(server.pid, signal.SIGKILL)
    wait_until(lambda: not any(map(is_alive, workers)), SOON)


@pytest.mark.slow
def test_a_worker_that_still_boots_ends_when_its_arbiter_is_killed(kiosk):
    server = kiosk(env={"KIOSK_BOOT": "2"})
    (worker,) = wait_until(server.workers, SOON)
    os.kill(server.pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(worker), SOON)


@pytest.mark.slow
def test_an_orphan_finishes_what_it_has_begun(kiosk):
    server = kiosk()
    server.get("/")
    with server.connect(SOON) as connection:
        connection.send(b"GET /slow/?seconds=2.5 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        wait_until(lambda: _took(server))
        os.kill(server.pid, signal.SIGKILL)
        assert connection.read_response().status == 200


def _took(server: Runaio) -> bool:
    return server.get("/").status == 200  # what was sent before has been read, too


def test_a_leaving_worker_says_so_with_every_answer(kiosk):
    """Also with those that a handler begins itself: streams, downloads, native ones."""
    server = kiosk()
    targets = ["/", "/async/", "/stream/", "/slow/?seconds=0", "/none/"]
    with contextlib.ExitStack() as stack:
        kept = [stack.enter_context(server.connect()) for _ in targets]
        for connection in kept:
            answer = connection.request("GET", "/")
            assert answer.header("Connection") is None
        server.process.terminate()
        server.wait_for_log("Handling signal: term", SOON)
        wait_until(lambda: _is_closed(server), SOON)
        for connection, target in zip(kept, targets, strict=True):
            answer = connection.request("GET", target)
            assert (target, answer.header("Connection")) == (target, "close")
            assert connection.at_eof()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_the_end_of_an_answer_over_tls_is_told_at_once(kiosk, certificate, loop):
    """The body of an HTTP/1.0 stream has no other end than that of the connection."""
    server = kiosk(f"--certfile={certificate}/cert.pem", f"--loop={loop}")
    with _over_tls(server, certificate) as sock:
        sock.sendall(b"GET /stream/ HTTP/1.0\r\nHost: localhost\r\n\r\n")
        began = time.monotonic()
        while sock.recv(65536):
            pass
    assert time.monotonic() - began < LINGER_SECONDS / 2


def test_idle_connections_over_tls_are_told_of_the_end_before_the_worker_ends(kiosk, certificate):
    server = kiosk(f"--certfile={certificate}/cert.pem", "--linger=0")
    with _over_tls(server, certificate) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert sock.recv(65536)
        server.process.terminate()
        while sock.recv(65536):
            pass
    server.wait()
    (event,) = events(server)
    assert event["drain"] < CLOSING_SECONDS


def _over_tls(server: Runaio, certificate: Path) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=certificate / "cert.pem")
    sock = socket.create_connection((server.host, server.port), SOON)
    # A connection that ends without TLS's own message is an error here.
    return context.wrap_socket(sock, server_hostname="localhost", suppress_ragged_eofs=False)


def test_a_body_that_is_skipped_as_its_worker_leaves_is_not_waited_for_twice(runaio):
    server = runaio("--linger=0", "--graceful-timeout=20")
    with server.connect() as connection:
        connection.send(
            b"GET /native/ping/ HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n"
        )
        assert connection.read_response().status == 200
        server.process.terminate()
        wait_until(lambda: _is_closed(server), SOON)
        connection.send(b"hello")
        assert connection.at_eof()
    assert server.wait(10) == 0


def _is_closed(server: Runaio) -> bool:
    try:
        server.connect().close()
    except ConnectionError:
        return True
    return False


# --- requests that take too long ----------------------------------------------------------


@pytest.mark.allow_tracebacks
@pytest.mark.parametrize(
    ("target", "where"),
    [
        ("/slow/?seconds=30", "in slow"),
        ("/slow-async/?seconds=30", "in slow_async"),
        ("/block/?seconds=30", "in block"),
    ],
    ids=["thread", "suspended", "blocked loop"],
)
def test_line_43_a_request_that_takes_too_long_is_504_and_its_stack_is_logged(kiosk, target, where):
    server = kiosk("--workers=2", "--request-timeout=1", "--graceful-timeout=1")
    wait_until(lambda: server.log_text().count("is ready") == 2, SOON)
    with server.connect(SOON) as connection:
        answer = connection.request("GET", target)
        assert answer.status == 504
        assert connection.at_eof()
    server.wait_for_log(rf"Stuck: GET {target.split('?')[0]} has taken", SOON)
    server.wait_for_log(rf"urls\.py\", line \d+, {where}$", SOON)
    for _ in range(5):
        assert server.get("/").status == 200


@pytest.mark.allow_tracebacks
@pytest.mark.parametrize("target", ["/slow/?seconds=30", "/block/?seconds=30"])
def test_line_43_what_stays_stuck_is_replaced_and_hurts_no_other_worker(kiosk, target):
    server = kiosk("--workers=2", "--request-timeout=1", "--graceful-timeout=1", "--timeout=3")
    wait_until(lambda: server.log_text().count("is ready") == 2, SOON)
    with server.connect(SOON) as connection:
        connection.send(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        with Load(server.address, Habit(keep=False, think=0.01), limit=300) as load:
            wait_until(lambda: server.log_text().count("is ready") == 3, SOON)
            tally = load.finish()
        assert connection.read_response().status == 504
    assert set(tally.statuses) <= {200, 504}
    wait_until(lambda: [e for e in events(server) if e["reason"] in ("stuck", "died")], SOON)


def test_the_figures_of_a_replacement_are_in_the_log_and_in_the_signal(kiosk, tmp_path):
    import json

    path = tmp_path / "events"
    server = kiosk("--max-requests=5", EXACT, env={"KIOSK_EVENTS": str(path)})
    with Load(server.address, Habit(keep=False), limit=6) as load:
        nothing_lost(load.join())
    wait_until(lambda: events(server) and path.exists() and path.read_text(), SOON)
    (logged,) = events(server)
    signalled = json.loads(path.read_text())
    assert signalled.pop("sender") == "RecyclingWorker"
    assert signalled == logged
    assert logged["reason"] == "max_requests"
    assert "5" in logged["text"]
    assert (logged["served"] in (5, 6), logged["lost"]) == (True, 0)
    assert {"pid", "age", "boot", "drain", "in_flight", "rss"} <= set(logged)
    assert logged["boot"] > 0
    assert logged["rss"] > 1 << 20

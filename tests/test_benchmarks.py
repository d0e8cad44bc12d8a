"""What ``make bench`` makes of its figures, and that it notices wrong answers."""

from __future__ import annotations

import argparse
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from tests.benchmarks import environment, machine, measure
from tests.benchmarks.__main__ import Session
from tests.benchmarks.loads import CLAIMS, COST, LOADS, Load
from tests.benchmarks.measure import Crowd, Sample
from tests.benchmarks.report import Results
from tests.benchmarks.servers import SERVERS, NotServing, NotStarted, Running, Server

LOAD = {load.name: load for load in LOADS}

SAMPLE = Sample(requests=1000, per_second=1000.0, cpu=100.0, kernel=0.25, p50=1.0, p99=2.0,
                bad_status=0, broken=0, timed_out=0, foreign=0.0, client=0.5)  # fmt: skip

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the benchmarks need Linux")
needs_wrk = pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed")


@pytest.fixture
def results() -> Results:
    options = {"rounds": 3, "seconds": 2, "shared_core": False, "minutes": 1.0}
    return Results("a machine", {"Python": "3"}, options)


def add(results: Results, load: str, server: str, *rates: float, **others: float) -> None:
    for rate in rates:
        results.add(load, server, replace(SAMPLE, per_second=rate, **others))


def claim(results: Results, load: str, target: float) -> dict:
    [found] = [
        claim for claim in results.claims() if (claim["load"], claim["target"]) == (load, target)
    ]
    return found


# --- what the samples say ---------------------------------------------------------------------


def test_a_ratio_is_the_median_of_the_ratios_of_each_round(results):
    add(results, "json", "aioserve", 1000, 500, 900)
    add(results, "json", "granian-wsgi-8", 500, 500, 300)
    found = claim(results, "json", 1.1)
    assert (found["measured"], found["range"]) == (2.0, [1.0, 3.0])


def test_the_better_setting_of_a_peer_counts(results):
    add(results, "json", "aioserve", 1000)
    add(results, "json", "granian-wsgi-1", 500)
    add(results, "json", "granian-wsgi-8", 2000)
    found = claim(results, "json", 1.1)
    assert (found["best"], found["met"]) == ("Granian WSGI, 8 threads", False)


def test_a_peer_that_errs_is_not_the_best_one(results):
    add(results, "json", "aioserve", 1000)
    add(results, "json", "granian-wsgi-1", 500)
    add(results, "json", "granian-wsgi-8", 2000, bad_status=11)
    found = claim(results, "json", 1.1)
    assert (found["best"], found["met"]) == ("Granian WSGI, 1 thread", True)
    assert "11 errors (1.1%), does not count" in results.table(LOAD["json"])


def test_whoever_errs_falls_short_though_it_is_fast(results):
    add(results, "json", "aioserve", 9000, timed_out=11)
    add(results, "json", "granian-wsgi-8", 500)
    assert claim(results, "json", 1.1)["met"] is False


def test_whoever_does_not_serve_falls_short(results):
    results.fail("json", "aioserve", "did not pass: status 500")
    add(results, "json", "granian-wsgi-8", 500)
    assert claim(results, "json", 1.1)["met"] is False
    assert results.short() == ["json"]


def test_what_was_not_measured_neither_passes_nor_falls_short(results):
    assert {claim["met"] for claim in results.claims()} == {None}


def test_the_page_names_what_falls_short_and_where_its_time_goes(results):
    add(results, "json", "aioserve", 1000)
    add(results, "json", "granian-wsgi-8", 1000)
    results.profiles["json"] = measure.read_profile(["run (threading.py:1) 1"], 0.4)
    page = results.page("today")
    assert "### JSON, sync view: short\n" in page
    assert "- Against Granian WSGI, its better setting: Granian WSGI, 8 threads: 1.1 asked" in page
    assert "25% is the kernel's, and 40% is that of the event loop's thread" in page
    assert "By package: Python's library 100%" in page


def test_the_page_tells_of_peers_that_do_not_start(results):
    results.fail("json", "waitress", "did not start")
    results.absent["waitress"] = "ended with status 1: no such module"
    page = results.page("today")
    assert "| waitress, 8 threads |" in results.table(LOAD["json"])
    assert "did not start" in results.table(LOAD["json"])
    assert "- waitress, 8 threads: ended with status 1: no such module" in page


def test_the_page_tells_what_open_connections_cost(results):
    slower = replace(SAMPLE, p50=3.0, p99=4.0)
    results.crowds["streams", "aioserve"] = Crowd(2000, 5, 10240.0, SAMPLE, slower)
    [row] = [line for line in results.page("today").splitlines() if "KiB" in line]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2:] == ["10.0 KiB", "1.00 → 3.00", "2.00 → 4.00", "5 closed early"]


def test_a_run_that_wrk_could_not_drive_harder_is_marked(results):
    add(results, "static-2k", "nginx", 60000, client=0.99)
    assert "wrk was the limit" in results.table(LOAD["static-2k"])


def test_a_profile_counts_what_each_stack_ends_in():
    found = measure.read_profile(
        [
            "process 1:python;run (threading.py:9);get (django/http/request.py:2) 3",
            "process 1:python;run (threading.py:9);get (django/http/request.py:7) 3",
            "process 1:python;run (threading.py:9) 1",
            "process 1:python;step (asyncio/events.py:5) 1",
        ],
        0.4,
    )
    assert found.packages == [("django", 0.75), ("Python's library", 0.25)]
    assert found.functions[0] == ("get (django/http/request.py)", 0.75)


# --- what is asked ----------------------------------------------------------------------------


def test_all_servers_that_are_named_are_known():
    named = {server for load in LOADS for server in load.servers}
    named |= {peer for claim in CLAIMS for peer in claim.peers}
    assert named - SERVERS.keys() == set()


def test_what_is_claimed_is_measured_with_those_it_is_claimed_against():
    assert [
        (claim.load, peer)
        for claim in CLAIMS
        for peer in claim.peers
        if peer not in LOAD[claim.load].servers
    ] == []


def test_the_cost_is_measured_with_as_many_clients_as_is_said():
    assert [
        (clients, load)
        for loads in COST.values()
        for clients, load in loads.items()
        if LOAD[load].clients != clients
    ] == []


@pytest.fixture
def session(tmp_path, results) -> Session:
    options = argparse.Namespace(peers=None, rounds=3, seconds=2, minutes=1)
    (tmp_path / "sqlite").mkdir()
    return Session(options, tmp_path, results)


def test_the_expected_time_grows_with_the_rounds(session):
    few = session.expected_seconds(LOADS)
    session.options.rounds *= 2
    samples = sum(len(load.servers) * load.longer * 3 for load in LOADS if isinstance(load, Load))
    assert session.expected_seconds(LOADS) - few >= samples * session.options.seconds


def test_a_server_that_does_not_start_is_noted_and_the_others_are_measured(
    session, results, monkeypatch
):
    monkeypatch.setitem(SERVERS, "waitress", Server("waitress", "waitress", [], program="false"))
    session._rounds(replace(LOAD["json"], servers=("waitress",)))
    assert results.absent == {"waitress": "ended with status 1: it said nothing"}
    assert results.failures == {("json", "waitress"): "did not start"}


def test_a_program_that_is_missing_is_named_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(environment, "_SBIN", str(tmp_path))
    with pytest.raises(environment.Missing, match=r"nginx is not .* `apt-get install nginx-light`"):
        environment.find_program("nginx")
    with pytest.raises(environment.Missing, match=r"wrk is not .* `apt-get install wrk`"):
        environment.require_programs()


def test_a_server_is_pinned_to_its_core(tmp_path):
    core = machine.cores()[0]
    with pytest.raises(NotStarted, match=f"ended with status 0: {core}$"):
        Running(
            Server("taskset", "", ["-c", "taskset -cp $$ | sed 's/.*: //'"], program="sh"),
            tmp_path, {"PATH": "/usr/bin:/bin"}, core,
        )  # fmt: skip


# --- measuring --------------------------------------------------------------------------------


@dataclass
class Answer:
    status: int = 200
    body: bytes = b"pong"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        answer = self.server.answer
        self.send_response(answer.status)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serving(answer: Answer) -> Iterator[Running]:
    """A server in this process that gives one answer, as if it were one of the peers'."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.answer = answer
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        running = object.__new__(Running)
        running.port = server.server_port
        # A process that is there as long as it is asked for.
        running.process = SimpleNamespace(pid=1, poll=lambda: None)
        try:
            yield running
        finally:
            server.shutdown()
            thread.join()


def test_the_right_answer_passes():
    with serving(Answer()) as running:
        assert measure.check(running, LOAD["sync"]) == 4


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(Answer(status=503), "status 503"), (Answer(body=b"pang"), "a wrong body of 4 bytes")],
    ids=["status", "body"],
)
def test_a_wrong_answer_is_not_measured(answer, reason):
    with serving(answer) as running, pytest.raises(NotServing, match=reason):
        measure.check(running, LOAD["sync"])


@needs_wrk
def test_refusals_under_the_load_are_counted():
    with serving(Answer(status=503)) as running:
        sample = measure.wrk(running, "/", clients=2, seconds=1, cores=machine.cores(), size=4)
    assert sample.errors == sample.bad_status == sample.requests > 0


@needs_wrk
def test_answers_that_are_cut_short_under_the_load_do_not_pass():
    with serving(Answer()) as running, pytest.raises(NotServing, match="less than 1000 bytes"):
        measure.wrk(running, "/", clients=2, seconds=1, cores=machine.cores(), size=1000)

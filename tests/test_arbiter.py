"""The arbiter: whoever replaces a worker is ready first, and fails without a client noticing."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.load import Habit, Load, Tally, mixture
from tests.processes import ENVIRONMENT, KIOSK, SOON, copy_kiosk, events, release
from tests.support import Runaio, children, is_alive, wait_until

Start = Callable[..., Any]

#: Clients that think 0, 5 and 20 ms, keep their connections and reuse them blindly.
HABITS = mixture(6, Habit(), Habit(think=0.005), Habit(think=0.02))

BROKEN = "raise RuntimeError('a broken release')"


@pytest.fixture
def kiosk(runaio: Start) -> Start:
    """Starts `runaio` of the kiosk project, with all its workers ready."""

    def start(*args: str, env: dict[str, str] | None = None, **options: Any) -> Runaio:
        options.setdefault("project", KIOSK)
        server: Runaio = runaio(*args, env={**ENVIRONMENT, **(env or {})}, **options)
        workers = int(next((a[10:] for a in args if a.startswith("--workers=")), "1"))
        ready(server, workers)
        return server

    return start


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the kiosk project, whose releases the test makes."""
    return copy_kiosk(tmp_path)


def ready(server: Runaio, count: int, *, start: int = 0) -> None:
    """Wait until so many workers have told that they are ready, from the log's line on."""
    server.wait_for_log(rf"(?s:.*is ready){{{count}}}", SOON, start=start)


def nothing_lost(tally: Tally) -> None:
    """Every request was answered, and well."""
    assert tally.lost == []
    assert set(tally.statuses) <= {200}


def releases(tally: Tally) -> set[str]:
    """The releases that have answered."""
    return {body.split()[0].decode() for body in tally.bodies}


def longest_gap(tally: Tally) -> float:
    """The longest time, in seconds, in which nobody was answered."""
    moments = sorted(moment for moment, _ in tally.latencies)
    return max(after - before for before, after in itertools.pairwise(moments))


# --- make before break --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_slow_boot_is_no_pause(kiosk, workers):
    """While a replacement boots for 1.5 s the old worker answers; nothing waits for the boot."""
    server = kiosk(
        f"--workers={workers}",
        *("--max-lifetime=0.3", "--max-lifetime-jitter=0.3"),
        env={"KIOSK_BOOT": "1.5"},
    )
    with Load(server.address, *HABITS) as load:
        wait_until(lambda: len(events(server)) >= 3, SOON)
        tally = load.finish()
    nothing_lost(tally)
    # Far below the boot, far above what a busy machine does.
    assert longest_gap(tally) < 1.0


@pytest.mark.slow
def test_a_boot_slower_than_the_hold_is_no_pause_at_the_limit_of_requests(kiosk):
    server = kiosk("--max-requests=100", "--hold=0.2", env={"KIOSK_BOOT": "1.5"})
    with Load(server.address, *HABITS) as load:
        wait_until(lambda: len(events(server)) >= 2, SOON)
        tally = load.finish()
    nothing_lost(tally)
    assert longest_gap(tally) < 1.0


@pytest.mark.slow
def test_a_replacement_is_ready_before_the_old_worker_drains(kiosk):
    server = kiosk("--workers=2", "--max-requests=40", "--hold=60")
    with Load(server.address, *HABITS, limit=400) as load:
        nothing_lost(load.join())
    retired: set[str] = set()
    spare = 0
    for line in server.log_text().splitlines():
        if "is ready" in line:
            spare += 1
        elif found := re.search(r"replacement .*\"pid\": (\d+)", line):
            spare -= 1
            retired.add(found[1])
            assert spare >= 2, line  # two are wanted
    assert len(retired) >= 3


@pytest.mark.slow
def test_no_more_than_max_retiring_are_replaced_at_once(kiosk):
    """Eight workers that reach their age in the same moment."""
    server = kiosk("--workers=8", "--threads=1", "--max-lifetime=1", "--max-retiring=2")
    most = 0

    def replaced() -> bool:
        nonlocal most
        most = max(most, len(server.workers()))
        return len(events(server)) >= 8

    with Load(server.address, Habit(think=0.01), Habit(think=0.01)) as load:
        wait_until(replaced, 2 * SOON)
        tally = load.finish()
    nothing_lost(tally)
    assert most_booting(server) <= 2
    assert all(event["reason"] == "max_lifetime" for event in events(server))


def most_booting(server: Runaio) -> int:
    """How many workers booted at the same time, at most, after the first start.

    One fewer than the log has at once: the arbiter knows that a worker is ready, and starts the
    next, before that worker's line is written.
    """
    lines = server.log_text().splitlines()
    first = next(number for number, line in enumerate(lines) if "is ready" in line)
    started = sum("Booting worker" in line for line in lines[:first])
    now = most = 0
    waiting = started - 1  # of the first start
    for line in lines[first + 1 :]:
        if "Booting worker" in line:
            now += 1
            most = max(most, now)
        elif "is ready" in line:
            if waiting:
                waiting -= 1
            else:
                now -= 1
    return max(most - 1, 1)


def test_the_youngest_worker_is_not_replaced_below_the_minimum_lifetime(kiosk):
    server = kiosk("--max-requests=5", "--min-lifetime=60")
    with Load(server.address, Habit(), limit=200) as load:
        tally = load.join()
    nothing_lost(tally)
    assert len(tally.bodies) == 1
    assert events(server) == []


def test_a_dry_run_replaces_nobody_and_says_who_would_be(kiosk):
    server = kiosk("--max-requests=5", "--recycle-dry-run")
    with Load(server.address, Habit(), limit=200) as load:
        tally = load.join()
    nothing_lost(tally)
    assert len(tally.bodies) == 1
    assert server.log_text().count("would be replaced (dry run): max_requests") == 1


def test_the_users_predicate_decides(kiosk, project):
    code = "def when(sample):\n    return 'thirty' if sample.requests >= 30 else None\n"
    (project / "kiosk" / "policy.py").write_text(code)
    server = kiosk("--recycle-when=kiosk.policy.when", project=project)
    with Load(server.address, *HABITS) as load:
        wait_until(lambda: len(events(server)) >= 2, SOON)
        tally = load.finish()
    nothing_lost(tally)
    assert events(server)[0]["reason"] == "recycle_when"
    assert events(server)[0]["text"] == "thirty"


@pytest.mark.allow_tracebacks
def test_a_predicate_that_raises_ends_no_worker(kiosk, project):
    code = "def when(sample):\n    raise ValueError('no such figure')\n"
    (project / "kiosk" / "policy.py").write_text(code)
    server = kiosk("--recycle-when=kiosk.policy.when", "--max-requests=100", project=project)
    with Load(server.address, *HABITS) as load:
        wait_until(lambda: len(events(server)) >= 2, SOON)
        tally = load.finish()
    nothing_lost(tally)
    assert {event["reason"] for event in events(server)} == {"max_requests"}
    assert "died" not in server.log_text()
    pids = re.findall(
        r"\[(\d+)\] \[ERROR\] The function of AIOSERVE_RECYCLE_WHEN", server.log_text()
    )
    assert pids
    assert len(pids) == len(set(pids))


def test_warmup_paths_are_asked_before_a_worker_counts_as_ready(kiosk, tmp_path):
    path = tmp_path / "access.log"
    server = kiosk(
        *("--warmup=/,/async/", f"--access-log={path}", "--access-log-format=%(U)s %(a)s")
    )
    server.get("/stream/")
    wait_until(lambda: "/stream/" in path.read_text(), SOON)
    paths = [line.split()[0] for line in path.read_text().splitlines()]
    assert paths == ["/", "/async/", "/stream/"]


# --- containment --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.allow_tracebacks
@pytest.mark.parametrize(
    ("code", "cause"),
    [
        (BROKEN, "RuntimeError: a broken release"),
        ("import os; os._exit(3)", "exited with code 3"),
        ("import sys; sys.exit(4)", "4"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL"),
    ],
)
def test_a_broken_release_reaches_nobody(kiosk, project, code, cause):
    """Broken on disk, the limit reached, HUP: the old code serves on; repaired, HUP: the new."""
    server = kiosk("--workers=2", "--max-requests=30", project=project)
    with Load(server.address, *HABITS) as load:
        load.more(10)
        release(project, code)
        load.more(100)
        server.signal(signal.SIGHUP)
        server.wait_for_log(rf"degraded: .*{re.escape(cause)}", SOON)
        load.more(100)
        server.signal(signal.SIGHUP)
        load.more(100)
        tally = load.tally
        assert releases(tally) == {"one"}
        # Once for each change, however often it was tried.
        assert server.log_text().count("degraded: ") == 1
        start = len(server.log)
        release(project, 'NAME = "two"')
        server.signal(signal.SIGHUP)
        server.wait_for_log("recovered", SOON, start=start)
        wait_until(lambda: not outdated(server, start), SOON)
        before = load.tally.bodies.copy()
        load.more(60)
        after = load.tally.bodies - before
        tally = load.finish()
    nothing_lost(tally)
    assert {body.split()[0] for body in after} == {b"two"}
    assert is_alive(server.pid)


def outdated(server: Runaio, start: int) -> set[int]:
    """The workers that live and were booted before this line of the log."""
    told = "".join(server.log[start:])
    fresh = {int(pid) for pid in re.findall(r"Booting worker with pid: (\d+)", told)}
    return set(server.workers()) - fresh


@pytest.mark.slow
@pytest.mark.allow_tracebacks
def test_a_boot_that_hangs_is_ended_and_tried_again_later(kiosk, project):
    server = kiosk("--boot-timeout=4", project=project)
    with Load(server.address, *HABITS) as load:
        release(project, "import time; time.sleep(3600)")
        server.signal(signal.SIGHUP)
        server.wait_for_log("degraded: .*boot has taken more than 4 s", SOON)
        wait_until(lambda: len(server.workers()) == 1, SOON)
        load.more(50)
        release(project, 'NAME = "two"')
        server.signal(signal.SIGHUP)
        server.wait_for_log("recovered", SOON)
        wait_until(lambda: "two" in releases(load.tally), SOON)
        tally = load.finish()
    nothing_lost(tally)


@pytest.mark.slow
@pytest.mark.allow_tracebacks
def test_a_boot_that_ignores_its_end_is_killed(kiosk, project):
    server = kiosk("--boot-timeout=4", project=project)
    release(
        project,
        "import signal, time\n"
        "signal.signal(signal.SIGABRT, signal.SIG_IGN)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "time.sleep(3600)",
    )
    server.signal(signal.SIGHUP)
    server.wait_for_log("degraded: .*killed by SIGKILL|degraded: .*more than 4 s", SOON)
    wait_until(lambda: len(server.workers()) == 1, SOON)
    assert server.get("/").text.startswith("one")


@pytest.mark.allow_tracebacks
def test_a_warmup_that_fails_leaves_the_old_code_serving(kiosk, project):
    server = kiosk("--warmup=/warm/", project=project)
    with Load(server.address, *HABITS) as load:
        load.more(10)
        broken = project / "kiosk" / "urls.py"
        good = broken.read_text()
        broken.write_text(good + '\nurlpatterns.insert(0, path("warm/", raise_view))\n')
        server.signal(signal.SIGHUP)
        server.wait_for_log("degraded: .*AIOSERVE_WARMUP: /warm/ .*500", SOON)
        load.more(50)
        broken.write_text(good.replace("release.NAME", "'mended'"))
        server.signal(signal.SIGHUP)
        wait_until(lambda: "mended" in releases(load.tally), SOON)
        tally = load.finish()
    nothing_lost(tally)


@pytest.mark.slow
@pytest.mark.allow_tracebacks
def test_the_next_try_comes_later_and_later(kiosk, project):
    server = kiosk("--max-requests=10", project=project)
    release(project, BROKEN)
    with Load(server.address, Habit(think=0.01)) as load:
        server.wait_for_log(r"(?s:could not boot; next try in 1 s.*next try in 2 s.*in 4 s)", SOON)
        tally = load.finish()
    nothing_lost(tally)


@pytest.mark.allow_tracebacks
def test_a_worker_killed_while_nothing_can_boot_leaves_the_others_serving(kiosk, project):
    server = kiosk("--workers=2", project=project)
    release(project, BROKEN)
    victim, survivor = server.workers()
    os.kill(victim, signal.SIGKILL)
    server.wait_for_log("degraded: ", SOON)
    for _ in range(10):
        assert server.get("/").text == f"one {survivor}"
    release(project, 'NAME = "two"')
    server.wait_for_log("recovered", SOON)
    wait_until(lambda: len(server.workers()) == 2, SOON)


@pytest.mark.allow_tracebacks
def test_all_workers_killed_while_nothing_can_boot_is_no_end(kiosk, project):
    server = kiosk(project=project)
    release(project, BROKEN)
    (victim,) = server.workers()
    os.kill(victim, signal.SIGKILL)
    server.wait_for_log("degraded: ", SOON)
    release(project, 'NAME = "two"')
    server.wait_for_log("recovered", SOON)
    assert server.get("/").text.startswith("two")
    assert server.stop() == 0


def hooks(**named: str) -> dict[str, str]:
    """The environment that gives Gunicorn these hooks of the kiosk."""
    return {"KIOSK_GUNICORN": json.dumps({k: f"kiosk.hooks.{v}" for k, v in named.items()})}


def test_a_fork_that_fails_leaves_the_old_worker_serving(kiosk, tmp_path):
    full = tmp_path / "full"
    env = {**hooks(pre_fork="fork_that_fails"), "KIOSK_FULL": str(full)}
    server = kiosk("--max-requests=30", env=env)
    full.touch()
    with Load(server.address, *HABITS) as load:
        server.wait_for_log("degraded: .*cannot be started: .*Cannot allocate memory", SOON)
        load.more(100)
        full.unlink()
        server.wait_for_log("recovered", SOON)
        wait_until(lambda: events(server), SOON)
        tally = load.finish()
    nothing_lost(tally)


@pytest.mark.allow_tracebacks
def test_hooks_that_fail_end_no_server(kiosk):
    server = kiosk(env=hooks(child_exit="exit_fails", on_reload="reload_fails"))
    with Load(server.address, *HABITS) as load:
        load.more(10)
        server.signal(signal.SIGHUP)
        server.wait_for_log("The hook child_exit has failed", SOON)
        load.more(50)
        tally = load.finish()
    nothing_lost(tally)
    assert "The hook on_reload has failed" in server.log_text()
    assert is_alive(server.pid)


def test_an_upgrade_that_cannot_start_leaves_the_old_arbiter_serving(kiosk, project, tmp_path):
    """As where a deployment has removed the directory of the old release."""
    server = kiosk(project=project)
    with Load(server.address, *HABITS) as load:
        load.more(10)
        project.rename(tmp_path / "gone")
        server.signal(signal.SIGUSR2)
        server.wait_for_log("The upgrade has failed: .*No such file", SOON)
        load.more(50)
        tally = load.finish()
    nothing_lost(tally)
    assert len(tally.bodies) == 1


@pytest.mark.allow_tracebacks
@pytest.mark.parametrize(
    ("code", "cause"),
    [
        (BROKEN, r"RuntimeError: a broken release \(.*boot\.py, line 1\)"),
        ("import no_such", r"ModuleNotFoundError: No module named 'no_such' \(.*, line 1\)"),
        ("import os; os._exit(0)", "exited with code 0"),
    ],
)
def test_a_first_start_that_cannot_boot_ends_with_its_cause(project, code, cause):
    server = Runaio("--workers=2", project=project, env=ENVIRONMENT)
    # Django's checks, which come first, do not import what wsgi.py does.
    (project / "kiosk" / "boot.py").write_text(f"{code}\n")
    server.launch()
    try:
        assert server.wait(SOON) != 0
        server._reader.join(SOON)
        assert re.search(cause, server.log[-1]), server.log_text()
    finally:
        server.stop()


# --- releases -----------------------------------------------------------------------------


def test_hup_is_a_rolling_release(kiosk, project):
    server = kiosk("--workers=3", project=project)
    with Load(server.address, *HABITS) as load:
        load.more(20)
        release(project, 'NAME = "two"')
        start = len(server.log)
        server.signal(signal.SIGHUP)
        wait_until(lambda: len(server.workers()) == 3 and not outdated(server, start), SOON)
        tally = load.finish()
    nothing_lost(tally)
    assert releases(tally) == {"one", "two"}
    assert most_booting(server) == 1
    assert [event["reason"] for event in events(server)] == ["release"] * 3


def test_a_second_hup_amid_a_release_ends_with_the_last_code(kiosk, project):
    server = kiosk("--workers=2", project=project, env={"KIOSK_BOOT": "0.3"})
    with Load(server.address, *HABITS) as load:
        load.more(20)
        release(project, 'NAME = "two"')
        server.signal(signal.SIGHUP)
        server.wait_for_log("Release: ", SOON)
        release(project, 'NAME = "three"')
        start = len(server.log)
        server.signal(signal.SIGHUP)
        server.wait_for_log("Release: ", SOON, start=start)
        wait_until(lambda: len(server.workers()) == 2 and not outdated(server, start), SOON)
        before = load.tally.bodies.copy()
        load.more(40)
        after = load.tally.bodies - before
        tally = load.finish()
    nothing_lost(tally)
    assert {body.split()[0] for body in after} == {b"three"}


def settings(project: Path, more: str) -> None:
    """Append to the settings of the project."""
    with (project / "kiosk" / "settings.py").open("a") as file:
        file.write(f"{more}\n")


def test_hup_takes_new_settings(kiosk, project):
    server = kiosk(project=project)
    settings(project, "AIOSERVE_WORKERS = 2\nAIOSERVE_MAX_REQUESTS = 50")
    with Load(server.address, *HABITS) as load:
        server.signal(signal.SIGHUP)
        ready(server, 3)
        wait_until(lambda: any(e["reason"] == "max_requests" for e in events(server)), SOON)
        tally = load.finish()
    nothing_lost(tally)
    assert len(server.workers()) >= 2


@pytest.mark.allow_tracebacks
@pytest.mark.parametrize(
    ("more", "cause"),
    [
        ("raise RuntimeError('no settings')", "no settings"),
        ("AIOSERVE_THREADS = 'many'", "AIOSERVE_THREADS"),
        ("import os; os._exit(0)", "exited with code 0"),
    ],
)
def test_hup_with_wrong_settings_changes_nothing(kiosk, project, more, cause):
    server = kiosk("--max-requests=40", project=project)
    good = (project / "kiosk" / "settings.py").read_text()
    with Load(server.address, Habit(think=0.01)) as load:
        settings(project, more)
        server.signal(signal.SIGHUP)
        server.wait_for_log(f"degraded: .*{cause}", SOON)
        load.more(10)
        (project / "kiosk" / "settings.py").write_text(good)
        server.signal(signal.SIGHUP)
        server.wait_for_log("recovered", SOON)
        tally = load.finish()
    nothing_lost(tally)


def test_settings_that_print_hinder_no_release(kiosk, project):
    server = kiosk(project=project)
    settings(project, "print('hello'); import atexit; atexit.register(print, 'good bye')")
    release(project, 'NAME = "two"')
    server.signal(signal.SIGHUP)
    wait_until(lambda: server.get("/").text.startswith("two"), SOON)


def test_settings_that_print_much_hinder_no_release(kiosk, project):
    """More than a pipe holds."""
    server = kiosk(project=project)
    settings(project, "import sys; print('x' * 300_000); print('y' * 300_000, file=sys.stderr)")
    release(project, 'NAME = "two"')
    server.signal(signal.SIGHUP)
    wait_until(lambda: server.get("/").text.startswith("two"), SOON)


def test_a_worker_may_be_started_and_all_stopped_while_the_settings_are_read(kiosk, project):
    server = kiosk(project=project)
    here = project / "reading"
    settings(project, f"open({str(here)!r}, 'w').close(); import time; time.sleep(3600)")
    server.signal(signal.SIGHUP)
    wait_until(here.exists, SOON)
    (project / "kiosk" / "settings.py").write_text((KIOSK / "kiosk" / "settings.py").read_text())
    server.signal(signal.SIGTTIN)
    ready(server, 2)
    server.signal(signal.SIGTTOU)
    # Its end would be told of in the log, were it to warn of what it has inherited.
    wait_until(lambda: server.log_text().count("Worker exiting") == 1, SOON)
    reading = set(children(server.pid)) - {
        int(pid) for pid in re.findall(r"Booting worker with pid: (\d+)", server.log_text())
    }
    assert len(reading) == 1
    assert server.stop() == 0
    assert not any(map(is_alive, reading))


def test_turning_preload_on_needs_a_restart(kiosk, project):
    server = kiosk(project=project)
    settings(project, "AIOSERVE_PRELOAD = True")
    release(project, 'NAME = "two"')
    server.signal(signal.SIGHUP)
    server.wait_for_log("AIOSERVE_PRELOAD has changed; that needs a restart", SOON)
    wait_until(lambda: server.get("/").text.startswith("two"), SOON)


# --- signals ------------------------------------------------------------------------------


def test_term_to_the_whole_group_loses_nothing(kiosk):
    """As systemd does it by its default, and a terminal."""
    server = kiosk("--workers=2", "--max-requests=60", env={"KIOSK_BOOT": "0.3"})
    with Load(server.address, *HABITS, Habit(keep=False)) as load:
        load.more(150)
        load.expect_end()
        os.killpg(server.pid, signal.SIGTERM)
        assert server.wait(SOON) == 0
        tally = load.join()
    nothing_lost(tally)


def test_ttin_and_ttou_change_the_number_of_workers(kiosk):
    server = kiosk("--workers=1")
    with Load(server.address, *HABITS) as load:
        load.more(20)
        for count in (2, 3):
            server.signal(signal.SIGTTIN)
            ready(server, count)
        wait_until(lambda: len(server.workers()) == 3, SOON)
        load.more(100)
        for count in (2, 1):
            server.signal(signal.SIGTTOU)
            wait_until(lambda count=count: len(server.workers()) == count, SOON)
        load.more(50)
        tally = load.finish()
    nothing_lost(tally)
    assert len(tally.bodies) == 3


def test_ttou_amid_a_boot_keeps_those_that_serve(kiosk):
    server = kiosk("--workers=1", env={"KIOSK_BOOT": "1"})
    (first,) = server.workers()
    server.signal(signal.SIGTTIN)
    wait_until(lambda: len(server.workers()) == 2, SOON)
    server.signal(signal.SIGTTOU)
    wait_until(lambda: server.workers() == [first], SOON)
    assert server.get("/").text == f"one {first}"


def test_usr2_and_term_hand_over_to_a_new_arbiter(kiosk, project):
    server = kiosk("--workers=2", project=project)
    try:
        with Load(server.address, *HABITS) as load:
            load.more(20)
            release(project, 'NAME = "two"')
            start = len(server.log)
            server.signal(signal.SIGUSR2)
            ready(server, 2, start=start)
            load.more(50)
            old = server.workers()
            server.process.terminate()
            assert server.wait(SOON) == 0
            assert not any(map(is_alive, old)) or children(server.pid) == []
            before = load.tally.bodies.copy()
            load.more(50)
            after = load.tally.bodies - before
            tally = load.finish()
        nothing_lost(tally)
        assert {body.split()[0] for body in after} == {b"two"}
    finally:
        # The new arbiter is no child of this process any more.
        started = re.findall(r"\[(\d+)\] \[INFO\] Starting gunicorn", server.log_text())
        for pid in map(int, started[1:]):
            os.kill(pid, signal.SIGTERM)
            wait_until(lambda pid=pid: not is_alive(pid), SOON)


def test_a_killed_worker_loses_only_what_it_had_in_flight(kiosk):
    server = kiosk("--workers=2")
    clients = len(HABITS)
    with Load(server.address, *HABITS) as load:
        load.more(50)
        victim = server.workers()[0]
        os.kill(victim, signal.SIGKILL)
        server.wait_for_log(f"Worker {victim} died: killed by SIGKILL", SOON)
        ready(server, 3)
        load.more(100)
        tally = load.finish()
    assert len(tally.lost) <= clients, tally.lost
    assert set(tally.statuses) <= {200}
    (event,) = events(server)
    assert (event["pid"], event["reason"]) == (victim, "died")


@pytest.mark.parametrize("workers", [1, 2])
def test_term_under_load_loses_nothing_that_was_sent(kiosk, workers):
    server = kiosk(f"--workers={workers}")
    habits = [*HABITS, Habit(keep=False), Habit("/slow/?seconds=0.1"), Habit("/stream/")]
    with Load(server.address, *habits) as load:
        load.more(50)
        load.expect_end()
        server.process.terminate()
        assert server.wait(SOON) == 0
        tally = load.join()
    nothing_lost(tally)


def test_term_while_workers_are_replaced_loses_nothing(kiosk):
    server = kiosk("--workers=2", "--max-requests=20", env={"KIOSK_BOOT": "0.3"})
    with Load(server.address, *HABITS) as load:
        load.more(150)
        load.expect_end()
        server.process.terminate()
        assert server.wait(SOON) == 0
        tally = load.join()
    nothing_lost(tally)


def test_term_while_a_boot_does_not_hear_it_loses_nothing(kiosk):
    """What still boots holds the listening sockets: whoever closes them last waits for it."""
    server = kiosk("--workers=1", env={"KIOSK_BOOT": "1.5", "KIOSK_DEAF": "1"})
    with Load(server.address, *HABITS, Habit(keep=False)) as load:
        load.more(50)
        server.signal(signal.SIGTTIN)
        wait_until(lambda: len(server.workers()) == 2, SOON)
        load.expect_end()
        server.process.terminate()
        assert server.wait(SOON) == 0
        tally = load.join()
    nothing_lost(tally)


@pytest.mark.parametrize("catches", ["", "1"], ids=["", "bare except"])
def test_term_amid_a_boot_ends_at_once(kiosk, catches):
    server = kiosk("--workers=1", env={"KIOSK_BOOT": "2", "KIOSK_BARE": catches})
    server.signal(signal.SIGTTIN)
    wait_until(lambda: len(server.workers()) == 2, SOON)
    began = time.monotonic()
    server.process.terminate()
    assert server.wait(SOON) == 0
    assert time.monotonic() - began < 20  # graceful_timeout is 30 s


def test_two_signals_at_once_end_a_boot_without_a_traceback(project):
    with Runaio(project=project, env={"KIOSK_TWICE": "1"}) as server:
        server.wait_for_log("Shutting down: Master", SOON)
    server.check_log()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
def test_int_and_quit_end_at_once(kiosk, number):
    server = kiosk("--workers=2")
    with server.connect() as connection:
        connection.send(b"GET /slow/?seconds=30 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        server.get("/")
        server.signal(number)
        assert server.wait(20) == 0


@pytest.mark.slow
def test_a_slow_request_outlives_hup(kiosk):
    server = kiosk("--workers=1")
    with server.connect(SOON) as connection:
        connection.send(b"GET /slow/?seconds=5 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        server.get("/")
        server.signal(signal.SIGHUP)
        ready(server, 2)
        assert connection.read_response().status == 200
    event = wait_until(lambda: events(server), SOON)[0]
    assert (event["in_flight"], event["lost"]) == (1, 0)


@pytest.mark.slow
def test_what_outlasts_the_graceful_timeout_is_counted_as_lost(kiosk):
    server = kiosk("--graceful-timeout=1")
    with server.connect() as connection:
        connection.send(b"GET /slow/?seconds=30 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        server.get("/")
        server.signal(signal.SIGHUP)
        server.wait_for_log('replacement .*"lost": 1', SOON)
        wait_until(lambda: len(server.workers()) == 1, SOON)


# --- WebSockets and event streams ---------------------------------------------------------


@pytest.mark.slow
def test_line_50_websockets_are_closed_one_after_another(kiosk):
    server = kiosk("--stream-linger=4")

    async def moments() -> list[float]:
        found: list[float] = []

        async def note(websocket: aiohttp.ClientWebSocketResponse) -> None:
            message = await websocket.receive()
            assert (message.type, message.data) == (aiohttp.WSMsgType.CLOSE, 1012)
            found.append(time.monotonic())

        async with aiohttp.ClientSession() as session, asyncio.timeout(SOON):
            opened = [await session.ws_connect(f"{server.url}/ws/") for _ in range(4)]
            server.signal(signal.SIGHUP)
            await asyncio.gather(*map(note, opened))
        return found

    found = asyncio.run(moments())
    # One each second: not all of them at once, however slow this machine is.
    assert found[-1] - found[0] > 1
    (event,) = wait_until(lambda: events(server), SOON)
    assert event["lost"] == 0


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
@pytest.mark.parametrize("target", ["/ws/", "/channel/"], ids=["native", "asgi"])
def test_what_a_handler_does_for_a_websocket_that_was_closed_is_waited_for(kiosk, target, number):
    server = kiosk("--interface=asgi", "--stream-linger=0")

    async def leave() -> None:
        async with aiohttp.ClientSession() as session, asyncio.timeout(SOON):
            websocket = await session.ws_connect(f"{server.url}{target}?farewell=1")
            server.signal(number)
            message = await websocket.receive()
            assert (message.type, message.data) == (aiohttp.WSMsgType.CLOSE, 1012)

    asyncio.run(leave())
    server.wait_for_log("Farewell", SOON)
    (event,) = wait_until(lambda: events(server), SOON)
    assert (event["in_flight"], event["lost"]) == (1, 0)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_event_streams_come_to_a_clean_end(kiosk, number):
    server = kiosk("--stream-linger=0.5")
    streams = [Habit("/events/")] * 3
    with Load(server.address, *streams, limit=3) as load:
        wait_until(lambda: open_connections(server) >= 3, SOON)
        server.signal(number)
        tally = load.join()
    nothing_lost(tally)
    assert tally.answered == 3
    (event,) = wait_until(lambda: events(server), SOON)
    assert (event["in_flight"], event["lost"]) == (3, 0)


def open_connections(server: Runaio) -> int:
    """How many connections the first worker has open."""
    inodes = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        words = line.split()
        if int(words[1].split(":")[1], 16) == server.port and words[3] == "01":  # ESTABLISHED
            inodes.add(f"socket:[{words[9]}]")
    return sum(str(target) in inodes for target in descriptors(server.workers()[0]))


def descriptors(pid: int) -> list[str]:
    """What the descriptors of a process stand for."""
    found = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(path))
    return found


# --- clocks -------------------------------------------------------------------------------


@pytest.mark.parametrize("jump", [86400, -86400], ids=["forward", "back"])
def test_a_clock_that_jumps_a_day_replaces_nobody(kiosk, tmp_path, jump):
    clock = tmp_path / "clock"
    clock.write_text("0")
    env = {**hooks(on_starting="clock_that_jumps"), "KIOSK_CLOCK": str(clock)}
    server = kiosk("--workers=2", "--max-lifetime=1h", "--timeout=5", env=env)
    before = server.workers()
    with Load(server.address, *HABITS) as load:
        load.more(50)
        new = tmp_path / "new"
        new.write_text(str(jump))
        new.replace(clock)
        # All of them look once a second.
        server.signal(signal.SIGTTIN)
        ready(server, 3)
        server.signal(signal.SIGTTOU)
        wait_until(lambda: len(events(server)) == 1, SOON)
        load.more(500)
        tally = load.finish()
    nothing_lost(tally)
    wait_until(lambda: len(set(before) & set(server.workers())) == 1, SOON)
    assert [event["reason"] for event in events(server)] == ["surplus"]


# --- preload ------------------------------------------------------------------------------


def test_preload_loads_once_and_leaves_nothing_behind(kiosk, tmp_path):
    loaded, database = tmp_path / "loaded", tmp_path / "db.sqlite3"
    env = {
        **hooks(pre_fork="say_frozen"),
        "KIOSK_LOADED": str(loaded),
        "KIOSK_DATABASE": str(database),
    }
    server = kiosk("--workers=2", "--preload", env=env)
    assert loaded.read_text().split() == [str(server.pid)]
    assert database.exists()
    for pid in [server.pid, *server.workers()]:
        assert str(database) not in descriptors(pid)
    assert "has started threads" not in server.log_text()
    frozen = [int(count) for count in re.findall(r"hook frozen \S+ (\d+)", server.log_text())]
    assert len(frozen) == 2
    assert min(frozen) > 10_000
    answered = {server.get("/").text for _ in range(20)}
    assert answered <= {f"one {pid}" for pid in server.workers()}


def test_preload_warns_of_threads(kiosk):
    server = kiosk("--preload", env={"KIOSK_THREAD": "1"})
    assert re.search(r"has started threads .*: kiosk-thread", server.log_text())


def test_preloaded_workers_are_replaced_and_hup_keeps_the_code(kiosk, project):
    server = kiosk("--workers=2", "--preload", "--max-requests=60", project=project)
    with Load(server.address, *HABITS) as load:
        wait_until(lambda: len(events(server)) >= 2, SOON)
        release(project, BROKEN)
        start = len(server.log)
        server.signal(signal.SIGHUP)
        server.wait_for_log("Release: replacing", SOON, start=start)
        wait_until(lambda: not outdated(server, start), SOON)
        load.more(50)
        tally = load.finish()
    nothing_lost(tally)
    assert releases(tally) == {"one"}


@pytest.mark.slow
def test_what_outlasts_the_stop_is_counted_as_lost(kiosk):
    server = kiosk("--graceful-timeout=1")
    with server.connect() as connection:
        connection.send(b"GET /slow/?seconds=3600 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        server.get("/")
        server.process.terminate()
        server.wait_for_log('stop .*"lost": 1', SOON)
        assert server.wait(SOON) == 0


@pytest.mark.slow
@pytest.mark.allow_tracebacks
def test_a_worker_that_does_not_leave_is_killed(kiosk):
    server = kiosk("--graceful-timeout=1", env={"KIOSK_STAYS": "1"})
    (old,) = server.workers()
    with Load(server.address, *HABITS) as load:
        server.signal(signal.SIGHUP)
        server.wait_for_log(f"Worker {old} does not leave; it is killed", SOON)
        wait_until(lambda: old not in server.workers(), SOON)
        tally = load.finish()
    nothing_lost(tally)


# --- memory -------------------------------------------------------------------------------


def test_where_memory_has_no_room_the_old_worker_is_gone_before_the_next_is_started(kiosk):
    env = hooks(on_starting="little_memory")
    server = kiosk("--workers=2", "--max-requests=50", env=env)
    with Load(server.address, *HABITS) as load:
        wait_until(lambda: len(events(server)) >= 3, SOON)
        tally = load.finish()
    nothing_lost(tally)
    living = most = serving = 0
    least = 2
    for line in server.log_text().splitlines():
        living += ("Booting worker" in line) - ("Worker exiting" in line)
        most = max(most, living)
        serving += ("is ready" in line) - ("replacement {" in line)
        least = min(least, serving) if most == 2 and "replacement {" in line else least
    assert most == 2
    assert least >= 1
    said = server.log_text().count("workers leave before their replacements are started")
    assert said == 1
    assert re.search(r"has 1 MiB of memory left, a worker needs \d+ MiB", server.log_text())


def test_a_leaking_worker_is_replaced_at_max_rss(kiosk):
    limit = 110
    server = kiosk(f"--max-rss={limit}M")
    most = 0

    def replaced() -> bool:
        nonlocal most
        most = max([most, *map(resident_mib, server.workers())])
        return len(events(server)) >= 3

    leaking = Habit("/leak/?kb=64", think=0.005)
    with Load(server.address, leaking, leaking) as load:
        wait_until(replaced, SOON)
        tally = load.finish()
    nothing_lost(tally)
    event = events(server)[0]
    assert event["reason"] == "max_rss"
    assert f"at most {limit} MiB" in event["text"]
    assert re.search(r"\d+ MiB of memory", event["text"])
    # It goes on serving, and leaking, while its replacement boots.
    assert most < 3 * limit


@pytest.mark.slow
def test_the_largest_worker_is_replaced_when_all_are_over_the_budget(kiosk):
    server = kiosk("--workers=2", "--max-rss-total=230M")
    with Load(server.address, Habit("/leak/?kb=128", think=0.002)) as load:
        wait_until(lambda: len(events(server)) >= 2, SOON)
        tally = load.finish()
    nothing_lost(tally)
    event = events(server)[0]
    assert event["reason"] == "max_rss_total"
    assert "of at most 230 MiB" in event["text"]


@pytest.mark.slow
def test_all_workers_together_keep_within_the_budget_those_included_that_boot(kiosk):
    budget = 420
    server = kiosk("--workers=4", f"--max-rss-total={budget}M")
    most = 0.0
    leaking = Habit("/leak/?kb=128", think=0.02)
    with Load(server.address, *[leaking] * 3) as load:
        end = time.monotonic() + SOON
        while len(events(server)) < 6 and time.monotonic() < end:
            most = max(most, sum(map(resident_mib, server.workers())))
            time.sleep(0.02)
        tally = load.finish()
    nothing_lost(tally)
    assert {event["reason"] for event in events(server)} == {"max_rss_total"}
    assert most <= budget


def test_a_budget_without_room_for_a_replacement_has_the_old_worker_gone_first(kiosk):
    server = kiosk("--workers=2", "--max-rss-total=160M")
    leaking = Habit("/leak/?kb=64", think=0.01)
    with Load(server.address, leaking) as load:
        wait_until(lambda: len(events(server)) >= 2, SOON)
        tally = load.finish()
    nothing_lost(tally)
    said = r"AIOSERVE_MAX_RSS_TOTAL has \d+ MiB of memory left, a worker needs \d+ MiB"
    assert re.search(said, server.log_text())


def resident_mib(pid: int) -> float:
    """Resident memory of a process, in MiB; 0 when it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


# --- stuck workers ------------------------------------------------------------------------


def test_a_loop_that_stands_still_is_ended_with_its_stack(kiosk):
    server = kiosk("--workers=2", "--timeout=1")
    with server.connect() as connection:
        connection.send(b"GET /block/?seconds=3600 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        server.wait_for_log("WORKER TIMEOUT", SOON)
        server.wait_for_log(r"urls\.py.* in block", SOON)
        ready(server, 3)
    assert server.get("/").status == 200


@pytest.mark.allow_tracebacks
def test_a_worker_whose_threads_all_hang_comes_to_its_end(kiosk):
    server = kiosk("--threads=1", "--request-timeout=1", "--graceful-timeout=1")
    (stuck,) = server.workers()
    assert server.get("/slow/?seconds=3600").status == 504
    wait_until(lambda: stuck not in server.workers(), SOON)
    (event,) = events(server)
    assert (event["pid"], event["reason"]) == (stuck, "stuck")
    assert server.get("/").status == 200


# --- events -------------------------------------------------------------------------------


@pytest.mark.slow
def test_each_replacement_is_one_event_with_its_figures(kiosk, tmp_path):
    path = tmp_path / "events"
    server = kiosk("--workers=2", "--max-requests=40", env={"KIOSK_EVENTS": str(path)})
    with Load(server.address, *HABITS, limit=400) as load:
        nothing_lost(load.join())
    assert server.stop() == 0
    told = events(server)
    assert len({event["pid"] for event in told}) == len(told)
    assert {event["lost"] for event in told} == {0}
    reasons = {event["reason"] for event in told}
    # One that has reached its limit when the server stops gives that as its reason.
    assert {"max_requests"} <= reasons <= {"max_requests", "stopped", "surplus"}
    assert sum(event["served"] for event in told) == 400
    signalled = [json.loads(line) for line in path.read_text().splitlines()]
    assert {event["pid"] for event in signalled} == {event["pid"] for event in told}


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_sync_event_streams_come_to_a_clean_end(kiosk, number):
    server = kiosk("--stream-linger=0.5")
    streams = [Habit("/events-sync/")] * 3
    with Load(server.address, *streams, limit=3) as load:
        wait_until(lambda: open_connections(server) >= 3, SOON)
        server.signal(number)
        tally = load.join()
    nothing_lost(tally)
    assert tally.answered == 3

"""The policy of replacement: plain values in, a decision out; time is passed in."""

from __future__ import annotations

import ast
import inspect
import random

import pytest

from django_aioserve.conf import Config
from django_aioserve.server import recycling
from django_aioserve.server.recycling import (
    BACKOFF_FIRST,
    BACKOFF_MOST,
    Limits,
    Sample,
    backoff,
    decide,
    draw,
    expected_rss,
    over_budget,
)

MIB = 1 << 20
DAY = 86_400.0


def sample(
    requests: int = 0,
    rss: int = 50 * MIB,
    rss_at_ready: int = 50 * MIB,
    age: float = 100.0,
    boot: float = 0.0,
) -> Sample:
    """A worker that has done nothing yet, but for what is said."""
    return Sample(requests, rss, rss_at_ready, age, boot)


def kind(limits: Limits, of: Sample) -> str | None:
    """The kind of the reason, or None."""
    reason = decide(limits, of)
    return None if reason is None else reason.kind


# --- requests -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("requests", "expected"), [(0, None), (99, None), (100, "max_requests"), (101, "max_requests")]
)
def test_a_worker_retires_with_the_request_that_reaches_its_limit(requests, expected):
    assert kind(Limits(requests=100), sample(requests=requests)) == expected


def test_without_limits_nothing_is_a_reason():
    busy = sample(requests=10**9, rss=1 << 40, age=10**9, boot=10**6)
    assert decide(Limits(), busy) is None


def test_a_worker_whose_replacement_boots_slowly_asks_for_it_early():
    # 10 requests a second, a boot of 3 s: 30 requests before the limit.
    early = Limits(requests=100)
    assert kind(early, sample(requests=76, age=7.6, boot=3.0)) == "max_requests"
    assert kind(early, sample(requests=60, age=6.0, boot=3.0)) is None


def test_no_worker_asks_before_half_of_its_limit():
    # A boot that takes longer than the whole life of a worker.
    limits = Limits(requests=100)
    assert kind(limits, sample(requests=49, age=1.0, boot=60.0)) is None
    assert kind(limits, sample(requests=50, age=1.0, boot=60.0)) == "max_requests"


def test_the_limit_is_in_the_text():
    reason = decide(Limits(requests=100), sample(requests=100))
    assert reason is not None
    assert "100" in reason.text


# --- memory -------------------------------------------------------------------------------


@pytest.mark.parametrize(("rss", "expected"), [(99, None), (100, "max_rss"), (300, "max_rss")])
def test_a_worker_that_has_grown_to_the_limit_retires(rss, expected):
    assert kind(Limits(rss=100 * MIB), sample(rss=rss * MIB)) == expected


def test_a_leak_is_foreseen_by_its_pace():
    # 1 MiB a second since it was ready, a boot of 10 s.
    limits = Limits(rss=100 * MIB)
    assert kind(limits, sample(rss=92 * MIB, age=42.0, boot=10.0)) == "max_rss"
    assert kind(limits, sample(rss=80 * MIB, age=30.0, boot=10.0)) is None


def test_a_worker_that_began_above_the_limit_is_not_replaced_for_its_size():
    limits = Limits(rss=100 * MIB)
    assert decide(limits, sample(rss=500 * MIB, rss_at_ready=120 * MIB)) is None


def test_a_worker_that_shrank_has_no_pace():
    limits = Limits(rss=100 * MIB)
    assert decide(limits, sample(rss=60 * MIB, rss_at_ready=90 * MIB, age=1, boot=60)) is None


def test_the_figures_of_the_memory_are_in_the_text():
    reason = decide(Limits(rss=100 * MIB), sample(rss=128 * MIB, rss_at_ready=64 * MIB))
    assert reason is not None
    assert [figure for figure in ("128 MiB", "100 MiB", "64 MiB") if figure in reason.text] == [
        "128 MiB",
        "100 MiB",
        "64 MiB",
    ]


# --- age ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("age", "expected"), [(59.9, None), (60.0, "max_lifetime")])
def test_a_worker_retires_at_its_age(age, expected):
    assert kind(Limits(lifetime=60.0), sample(age=age)) == expected


@pytest.mark.parametrize(
    ("limits", "worker"),
    [
        (Limits(requests=1, min_lifetime=30.0), sample(requests=1000, age=29.9)),
        (Limits(rss=MIB * 60, min_lifetime=30.0), sample(rss=MIB * 999, age=29.9)),
        (Limits(lifetime=1.0, min_lifetime=30.0), sample(age=29.9)),
        (Limits(when=lambda _: "always", min_lifetime=30.0), sample(age=29.9)),
    ],
    ids=["requests", "memory", "lifetime", "predicate"],
)
def test_below_the_minimum_lifetime_there_is_no_reason(limits, worker):
    assert decide(limits, worker) is None


def test_from_the_minimum_lifetime_on_the_limits_count():
    assert kind(Limits(requests=1, min_lifetime=30.0), sample(requests=1, age=30.0)) is not None


# --- a predicate of the user's --------------------------------------------------------------


def test_the_users_predicate_sees_the_sample_and_gives_the_reason():
    seen = []

    def when(of: Sample) -> str | None:
        seen.append(of)
        return "too many threads"

    worker = sample(requests=7)
    reason = decide(Limits(when=when), worker)
    assert seen == [worker]
    assert reason is not None
    assert (reason.kind, reason.text) == ("recycle_when", "too many threads")


@pytest.mark.parametrize("answer", [None, ""])
def test_a_predicate_that_says_nothing_replaces_nobody(answer):
    assert decide(Limits(when=lambda _: answer), sample()) is None


# --- the clock ----------------------------------------------------------------------------


@pytest.mark.parametrize("jump", [DAY, -DAY], ids=["forward", "back"])
def test_a_wall_clock_that_jumps_a_day_is_not_seen(jump, monkeypatch):
    import time

    wall = time.time()
    monkeypatch.setattr(time, "time", lambda: wall + jump)
    limits = Limits(requests=1000, lifetime=3600.0)
    assert decide(limits, sample(requests=10, age=100.0)) is None


def test_neither_the_policy_nor_who_feeds_it_reads_a_wall_clock():
    from django_aioserve.server import arbiter, scoreboard, worker

    for module in (recycling, arbiter, worker, scoreboard):
        tree = ast.parse(inspect.getsource(module))
        read = {
            f"{node.value.id}.{node.attr}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        }
        assert not read & {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow"}, module


@pytest.mark.parametrize("age", [0.0, -1.0], ids=["just ready", "before it"])
def test_an_age_that_is_not_positive_divides_nothing(age):
    assert decide(Limits(requests=10, rss=60 * MIB), sample(requests=1, age=age, boot=5)) is None


# --- jitter -------------------------------------------------------------------------------


def test_the_jitter_is_drawn_within_its_bounds():
    config = Config(
        max_requests=100, max_requests_jitter=20, max_lifetime=60, max_lifetime_jitter=6
    )
    drawn = [draw(config, random.Random(seed).random) for seed in range(300)]
    assert {limits.requests for limits in drawn} == set(range(100, 121))
    assert all(60 <= limits.lifetime <= 66 for limits in drawn)


@pytest.mark.parametrize(("number", "requests"), [(0.0, 100), (1 - 2**-53, 120)])
def test_both_ends_of_the_jitter_are_possible(number, requests):
    config = Config(max_requests=100, max_requests_jitter=20)
    assert draw(config, lambda: number).requests == requests


def test_no_limit_gets_no_jitter():
    limits = draw(Config(), lambda: 0.9)
    assert (limits.requests, limits.rss, limits.lifetime) == (0, 0, 0.0)


def test_the_other_limits_are_those_of_the_configuration():
    def when(_: Sample) -> str | None:
        return None

    limits = draw(Config(max_rss=MIB, min_lifetime=5.0), random.random, when)
    assert (limits.rss, limits.min_lifetime, limits.when) == (MIB, 5.0, when)


def test_eight_workers_started_together_do_not_retire_together():
    """Eight workers of one age and one load: how many retire in the same second."""
    config = Config(
        max_requests=1000, max_requests_jitter=500, max_lifetime=3600, max_lifetime_jitter=1800
    )
    luck = random.Random(1)
    for field, pace in (("requests", 10), ("lifetime", 1)):
        seconds = []
        for _ in range(8):
            limits = draw(config, luck.random)
            alone = Limits(**{field: getattr(limits, field)})
            seconds.append(
                next(
                    second
                    for second in range(1, 10_000)
                    if decide(alone, sample(requests=second * pace, age=float(second)))
                )
            )
        assert len(set(seconds)) >= 6, seconds


# --- the budget of all together -------------------------------------------------------------


def test_within_the_budget_nobody_goes():
    assert over_budget(300, {1: (100, 50), 2: (200, 50)}) == []


def test_the_largest_goes_first():
    assert over_budget(299, {1: (90, 50), 2: (120, 50), 3: (90, 50)}) == [2]


def test_as_many_go_as_are_needed():
    sizes = {1: (100, 50), 2: (120, 50), 3: (110, 50)}
    # 330; without 2: 260; without 3: 200.
    assert over_budget(200, sizes) == [2, 3]
    assert over_budget(260, sizes) == [2]


def test_one_that_has_not_grown_is_left_though_it_is_the_largest():
    assert over_budget(100, {1: (200, 200), 2: (60, 50)}) == [2]


def test_a_budget_that_nothing_can_keep_replaces_only_those_that_have_grown():
    assert over_budget(1, {1: (50, 50), 2: (50, 60)}) == []


def test_a_worker_is_reckoned_by_what_it_grows_while_a_replacement_boots():
    grown = sample(rss=150 * MIB, rss_at_ready=50 * MIB, age=10.0, boot=2.0)
    assert expected_rss(grown) == 170 * MIB


def test_a_worker_that_grows_faster_of_late_is_reckoned_by_that():
    grown = sample(rss=150 * MIB, rss_at_ready=50 * MIB, age=10.0, boot=2.0)
    assert expected_rss(grown, rate=30.0 * MIB) == 210 * MIB


def test_one_that_has_shrunk_is_reckoned_as_it_is():
    assert expected_rss(sample(rss=40 * MIB, rss_at_ready=50 * MIB, boot=2.0)) == 40 * MIB


# --- failures -----------------------------------------------------------------------------


def test_the_waits_after_failed_boots_grow_to_their_most():
    waits = [backoff(failures) for failures in range(1, 12)]
    assert waits[0] == BACKOFF_FIRST
    assert waits == sorted(waits)
    assert waits[-1] == BACKOFF_MOST
    assert backoff(10**6) == BACKOFF_MOST


def test_the_first_wait_is_short_and_the_second_longer():
    assert 0 < backoff(1) < backoff(2) < backoff(3)


def test_a_worker_that_has_just_become_ready_is_not_retired_for_what_its_boot_took():
    young = sample(rss=71 * MIB, rss_at_ready=70 * MIB, age=0.001, boot=2.0)
    assert kind(Limits(rss=130 * MIB), young) is None

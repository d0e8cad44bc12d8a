"""When a worker is to be replaced: pure functions over plain values.

Rules:

1. Time comes from outside, as seconds of the monotonic clock: a wall clock that jumps
   replaces nobody.
2. A limit is drawn once for each worker, with its jitter, so that workers which were
   started together do not retire together.
3. A worker may retire a little before its limit, so early that its replacement is
   ready when the limit is reached: the time a boot takes is known from its own.
4. A worker that was as large when it began is not replaced for its size: its
   replacement would be no smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from django_aioserve.conf import Config

__all__ = [
    "Limits",
    "Reason",
    "Sample",
    "backoff",
    "decide",
    "draw",
    "expected_rss",
    "over_budget",
]

EARLIEST_SHARE = 0.5
"""Share of a limit before which no worker retires early."""

BACKOFF_FIRST, BACKOFF_MOST = 1.0, 60.0
"""Seconds from a failed boot to the next try: the first time, and at most."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What is known of a worker at one moment.

    ``requests`` answered; ``rss`` and ``rss_at_ready`` in bytes; ``age`` since it was
    ready and ``boot`` (what its boot took) in seconds.
    """

    requests: int
    rss: int
    rss_at_ready: int
    age: float
    boot: float


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a worker is replaced: ``kind`` for machines, ``text`` with the figures for people."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one worker, jitter included; 0 is no limit."""

    requests: int = 0
    rss: int = 0
    lifetime: float = 0.0
    min_lifetime: float = 0.0
    when: Callable[[Sample], str | None] | None = None


def draw(
    config: Config,
    random: Callable[[], float],
    when: Callable[[Sample], str | None] | None = None,
) -> Limits:
    """Draw one worker's limits; ``random`` gives numbers in [0, 1)."""
    requests, lifetime = config.max_requests, config.max_lifetime
    if requests:
        requests += int(random() * (config.max_requests_jitter + 1))
    if lifetime:
        lifetime += random() * config.max_lifetime_jitter
    return Limits(requests, config.max_rss, lifetime, config.min_lifetime, when)


def decide(limits: Limits, sample: Sample) -> Reason | None:
    """Tell why this worker is to be replaced now, or None."""
    if sample.age < limits.min_lifetime:
        return None
    if limits.requests:
        soon = sample.requests * (1 + _ahead(sample))
        if soon >= limits.requests <= sample.requests / EARLIEST_SHARE:
            return Reason("max_requests", f"its limit is {limits.requests} requests")
    can_shrink = sample.rss_at_ready < limits.rss
    if can_shrink and expected_rss(sample) >= limits.rss <= sample.rss / EARLIEST_SHARE:
        return Reason(
            "max_rss",
            f"{_mib(sample.rss)} of memory of at most {_mib(limits.rss)}, "
            f"{_mib(sample.rss_at_ready)} when it was ready",
        )
    if limits.lifetime and sample.age >= limits.lifetime:
        return Reason("max_lifetime", f"{sample.age:.0f} s of at most {limits.lifetime:.0f} s")
    if limits.when is not None and (text := limits.when(sample)):
        return Reason("recycle_when", str(text))
    return None


def expected_rss(sample: Sample, rate: float = 0.0) -> float:
    """Give the memory, in bytes, of a worker when a replacement asked for now has booted.

    ``rate`` is by how many bytes a second it has grown of late.
    """
    growth = max(sample.rss - sample.rss_at_ready, 0) * _ahead(sample)
    return sample.rss + max(growth, rate * sample.boot)


def _ahead(sample: Sample) -> float:
    """Give the share of its age in which a replacement boots."""
    # What is known of a worker younger than its boot took says nothing about the next boot.
    return min(sample.boot / sample.age, 1.0) if sample.age > 0 else 0.0


def over_budget(budget: float, sizes: Mapping[int, tuple[float, int]]) -> list[int]:
    """Tell which workers must go so that all together fit into ``budget`` bytes.

    ``sizes`` maps each worker to its size and its size when it was ready. The largest go
    first; what replaces one is reckoned as large as that one began.
    """
    total = sum(size for size, _ in sizes.values())
    going: list[int] = []
    for worker in sorted(sizes, key=lambda worker: sizes[worker][0], reverse=True):
        size, at_ready = sizes[worker]
        if total <= budget:
            break
        if size > at_ready:
            going.append(worker)
            total -= size - at_ready
    return going


def backoff(failures: int) -> float:
    """Give the seconds to wait after so many boots have failed one after another."""
    doublings = min(max(failures - 1, 0), 16)  # a float has an end, failures need not
    return float(min(BACKOFF_FIRST * 2**doublings, BACKOFF_MOST))


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.0f} MiB"

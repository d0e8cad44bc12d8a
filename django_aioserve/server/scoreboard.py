"""What the workers of one server tell about themselves, in memory that all of them share.

Rules:

1. The arbiter makes the mapping before it forks; it outlives every worker.
2. A slot has a single writer: the worker that holds it. Before the fork, and after
   the worker is gone, that is the arbiter.
3. Anyone may read. A field is eight bytes, aligned, and copied as one machine word:
   a reader sees the old value or the new one.
4. Counters belong to the slot and not to the worker: they go on over replacements
   and never fall.
"""

from __future__ import annotations

import enum
import mmap

__all__ = ["COUNTERS", "FIELDS", "Scoreboard", "Slot", "State"]


class State(enum.IntEnum):
    """The life of a worker, in its order."""

    FREE = 0
    BOOTING = 1
    READY = 2
    RETIRING = 3
    DRAINING = 4


COUNTERS = ("requests", "replacements", "lost")
"""Fields that never fall: requests answered, workers replaced, requests given up at a drain."""

FIELDS = (
    "pid",
    "state",
    "age",
    "served",
    "in_flight",
    "connections",
    "threads_busy",
    "threads",
    "queued",
    "rss",
    "started_us",
    "ready_us",
    "rss_at_ready",
    "release",
    "listening",
    "holding",
    "told",
    *COUNTERS,
)
"""All fields, in their order: times in microseconds of the monotonic clock, sizes in bytes."""

_WORD = 8
_TEXT = 1024
"""Bytes for a slot's text: why its worker retires, or why it could not boot."""


class Slot:
    """One worker's row. Fields are read and written as attributes."""

    __slots__ = ("_base", "_text", "_words", "index")

    def __init__(self, words: memoryview, text: memoryview, index: int) -> None:
        self._words = words
        self._text = text
        self._base = index * len(FIELDS)
        self.index = index

    def __getitem__(self, name: str) -> int:
        return int(self._words[self._base + _INDEX[name]])

    def __setitem__(self, name: str, value: int) -> None:
        self._words[self._base + _INDEX[name]] = value

    def add(self, name: str, count: int) -> None:
        """Add to a counter; for the slot's writer only."""
        self._words[self._base + _INDEX[name]] += count

    @property
    def text(self) -> str:
        """Why the worker retires, or why it could not boot."""
        return bytes(self._text).split(b"\0", 1)[0].decode(errors="replace")

    @text.setter
    def text(self, text: str) -> None:
        data = text.encode(errors="replace")[: _TEXT - 1]
        self._text[:] = data + b"\0" * (_TEXT - len(data))

    @property
    def state(self) -> State:
        """The state of the worker that holds the slot."""
        return State(self["state"])

    def clear(self) -> None:
        """Forget the worker; the counters stay."""
        for name in FIELDS:
            if name not in COUNTERS:
                self[name] = 0
        self.text = ""


_INDEX = {name: index for index, name in enumerate(FIELDS)}


class Scoreboard:
    """``size`` slots in one anonymous shared mapping, to be made before the fork."""

    def __init__(self, size: int) -> None:
        row = len(FIELDS) * _WORD
        whole = memoryview(mmap.mmap(-1, size * (row + _TEXT) + _WORD))
        words = whole[: size * row].cast("q")
        texts = whole[size * row : -_WORD]
        self._flags = whole[-_WORD:]
        self.slots = tuple(
            Slot(words, texts[index * _TEXT : (index + 1) * _TEXT], index) for index in range(size)
        )

    @property
    def stopping(self) -> bool:
        """Whether the whole server stops: nobody will accept after these workers."""
        return self._flags[0] != 0

    @stopping.setter
    def stopping(self, value: bool) -> None:
        self._flags[0] = value

    @property
    def closer(self) -> int:
        """The slot whose worker closes the listening sockets last when the server stops."""
        return self._flags[2]

    @closer.setter
    def closer(self, index: int) -> None:
        self._flags[2] = index & 0xFF

    @property
    def degraded(self) -> bool:
        """Whether new workers fail to boot: a worker that leaves would not be replaced."""
        return self._flags[1] != 0

    @degraded.setter
    def degraded(self, value: bool) -> None:
        self._flags[1] = value

    def take(self) -> Slot | None:
        """Give a free slot, its state booting, or None where all are held."""
        for slot in self.slots:
            if slot["state"] == State.FREE:
                slot.clear()
                slot["state"] = State.BOOTING
                return slot
        return None

    def total(self, name: str) -> int:
        """Give the sum of a field over all slots."""
        return sum(slot[name] for slot in self.slots)

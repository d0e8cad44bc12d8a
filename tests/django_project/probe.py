"""What the views and middlewares tell the test, which runs in the same process."""

from __future__ import annotations

import threading
import weakref
from contextvars import ContextVar
from typing import Any

#: What happened, in order.
events: list[str] = []

#: The views of "/wait/" and "/hold/" go on when this is set.
go_on = threading.Event()

#: The requests that there were, and what somebody keeps of them.
requests: list[weakref.ref[Any]] = []
kept: list[Any] = []

#: Set by middleware for the view to see, and the other way round.
inward: ContextVar[str] = ContextVar("inward", default="")
outward: ContextVar[str] = ContextVar("outward", default="")

#: Set by nobody within the project.
native: ContextVar[str] = ContextVar("native", default="")


def tell(*words: object) -> None:
    """Record an event."""
    events.append(" ".join(map(str, words)))


def thread() -> str:
    """The name of the current thread."""
    return threading.current_thread().name


def reset() -> None:
    """Forget everything; for the beginning of a test."""
    events.clear()
    requests.clear()
    kept.clear()
    go_on.clear()

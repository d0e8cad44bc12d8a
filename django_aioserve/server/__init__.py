"""Gunicorn's side: the worker, the arbiter and how they are launched."""

from __future__ import annotations

from typing import Any

__all__ = ["RecyclingWorker"]


def __getattr__(name: str) -> Any:
    # Gunicorn loads "django_aioserve.server.RecyclingWorker"; whoever imports another
    # module of this package need not have Gunicorn's modules loaded for it.
    if name == "RecyclingWorker":
        from django_aioserve.server.worker import RecyclingWorker

        return RecyclingWorker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

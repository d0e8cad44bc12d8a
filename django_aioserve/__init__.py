from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from django_aioserve.application import get_aio_application

__all__ = ["get_aio_application"]


def __getattr__(name: str) -> Any:
    # Lazy: Django imports this package to find its AppConfig, long before aiohttp is wanted.
    if name == "get_aio_application":
        from django_aioserve.application import get_aio_application

        return get_aio_application
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

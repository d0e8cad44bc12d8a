"""What the aiohttp application keeps for its handlers, by typed key."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp import web

from django_aioserve.bridge.home import Homes
from django_aioserve.bridge.threads import ThreadPool
from django_aioserve.conf import Config

__all__ = ["CANCELLABLE", "CONFIG", "HOMES", "POOL", "SHORT_WAY", "ShortWay"]

CONFIG: web.AppKey[Config] = web.AppKey("CONFIG", Config)
POOL: web.AppKey[ThreadPool] = web.AppKey("POOL", ThreadPool)
HOMES: web.AppKey[Homes] = web.AppKey("HOMES", Homes)

#: Set on a request whose handler is to be given up when the client is gone.
CANCELLABLE: web.RequestKey[bool] = web.RequestKey("CANCELLABLE", bool)


@dataclass(frozen=True, slots=True)
class ShortWay:
    """The way past aiohttp's router, for requests that no native route can be meant by.

    ``handler`` is the bridge's; ``others`` are the beginnings of the paths that have to
    go through the router.
    """

    handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
    others: tuple[str, ...]


#: There from start-up on, unless middlewares or signals of the project see every request.
SHORT_WAY: web.AppKey[ShortWay] = web.AppKey("SHORT_WAY", ShortWay)

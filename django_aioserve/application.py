"""The aiohttp application that serves a Django project beside native routes."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, cast

from aiohttp import web
from django.db import connections

from django_aioserve import conf, groups, routes, static, websocket
from django_aioserve.bridge.home import Homes
from django_aioserve.bridge.threads import ThreadPool
from django_aioserve.conf import Config
from django_aioserve.keys import CONFIG, HOMES, POOL, SHORT_WAY, ShortWay

__all__ = ["build_application", "close_streams", "get_aio_application", "is_asgi"]

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
WSGICallable = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def get_aio_application(wsgi_application: WSGICallable | None = None) -> web.Application:
    """Build the aiohttp application of this Django project from its ``AIOSERVE_*`` settings.

    ``wsgi_application`` is the WSGI callable (PEP 3333) to serve; without it the
    project's ``WSGI_APPLICATION`` is. WSGI middleware around Django's handler counts
    and is run. The result is an ordinary aiohttp application: it is served by
    ``runaio``, by Gunicorn with `django_aioserve.server.worker.RecyclingWorker` or
    with aiohttp's own worker, and by `aiohttp.web.run_app`.

    Raises `ConfigurationError` where a setting is wrong, `TypeError` where what it
    was given is no WSGI callable.

    .. versionadded:: 0.1
    """
    config = conf.resolve()
    if wsgi_application is None:
        if config.interface == "asgi":
            asgi_application = _project_application("ASGI_APPLICATION")
            return build_application(config, asgi_application=asgi_application)
        wsgi_application = _project_application("WSGI_APPLICATION")
    return build_application(config, wsgi_application)


def build_application(
    config: Config,
    wsgi_application: WSGICallable | None = None,
    *,
    asgi_application: Any = None,
) -> web.Application:
    """Build the aiohttp application around one WSGI callable or one ASGI application.

    Raises `ConfigurationError` and `TypeError` as `get_aio_application` does.
    """
    if asgi_application is None:
        _require_wsgi(wsgi_application)
    app = web.Application(
        middlewares=routes.load_middlewares(config), client_max_size=config.max_body_size
    )
    app[CONFIG] = config
    app.cleanup_ctx.append(_pool)
    app.cleanup_ctx.extend(routes.load_cleanup_ctx(config))
    websocket.setup(app, config)
    groups.setup(app, config)
    routes.setup(app, config)
    static.setup(app, config)
    bridge = _Bridge(wsgi_application, asgi_application)
    app[_BRIDGE] = bridge
    app.cleanup_ctx.append(bridge.context)
    app.on_startup.append(_load_urls)
    routes.add_bridge(app, bridge.answer)
    own_receivers = len(app.on_response_prepare)

    async def look_for_short_way(_: web.Application) -> None:
        # Middlewares, and receivers that are not this package's, are to see every request.
        if len(app.middlewares) == 0 and len(app.on_response_prepare) == own_receivers:
            app[SHORT_WAY] = ShortWay(cast("Any", bridge.handle), _beginnings(app))

    app.on_startup.append(look_for_short_way)
    return app


async def close_streams(app: web.Application, within: float) -> None:
    """Close all WebSockets (1012) and event streams, spread over ``within`` seconds.

    For a server that is about to stop. Does nothing for an application that is not
    `build_application`'s.
    """
    if _BRIDGE not in app:
        return
    closing = [websocket.close_all(app, within)]
    served = app[_BRIDGE].served
    if hasattr(served, "close_streams"):
        closing.append(served.close_streams(within))
    await asyncio.gather(*closing)
    # Only now: a handler whose subscription ends would end by itself, and all of them at once.
    groups.end(app)


def _beginnings(app: web.Application) -> tuple[str, ...]:
    """Give with what the paths begin that may be another's than the bridge's."""
    found: list[str] = []
    for resource in app.router.resources():
        beginnings = getattr(resource, "beginnings", None)
        found += [resource.canonical.partition("{")[0]] if beginnings is None else beginnings
    return tuple(found)


class _Bridge:
    """The bridge of one application; made at start-up, when configuration and loop are final."""

    def __init__(self, wsgi_application: WSGICallable | None, asgi_application: Any) -> None:
        # A module is imported here, and not at start-up, so that ``preload`` shares it.
        self._application = asgi_application or wsgi_application
        self._kind: Any
        if asgi_application is not None:
            from django_aioserve.bridge.asgi import ASGIBridge

            self._kind = ASGIBridge
        else:
            from django_aioserve.bridge.django import DjangoBridge, is_plain
            from django_aioserve.bridge.wsgi import WSGIBridge

            self._kind = DjangoBridge if is_plain(wsgi_application) else WSGIBridge
        self.handle: Handler = self._not_started
        self.served: Any = None

    async def context(self, app: web.Application) -> AsyncIterator[None]:
        """Be the bridge while the application runs."""
        config, pool = app[CONFIG], app[POOL]
        bridge = self.served = self._kind(self._application, config, pool)
        self.handle = bridge.handle
        # A view and a native handler have their threads, and so their connections, in common.
        homes = app[HOMES] = getattr(bridge, "homes", None) or Homes(config, pool)
        if hasattr(bridge, "prepare"):
            await bridge.prepare()
        if hasattr(bridge, "lifespan"):
            async with bridge.lifespan(app):
                yield
        else:
            yield
        if hasattr(bridge, "close"):
            await bridge.close(config.graceful_timeout)
        await homes.close(config.graceful_timeout)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Answer a request: aiohttp's handler of the catch-all route."""
        return await self.handle(request)

    async def _not_started(self, _: web.Request) -> web.StreamResponse:
        raise RuntimeError("The application has not been started.")


_BRIDGE: web.AppKey[_Bridge] = web.AppKey("_BRIDGE", _Bridge)


async def _pool(app: web.Application) -> AsyncIterator[None]:
    config = app[CONFIG]
    pool = app[POOL] = ThreadPool(config.threads, config.queue_size)
    pool.at_exit(connections.close_all)
    yield
    pool.close()
    await pool.join(config.graceful_timeout)


async def _load_urls(_: web.Application) -> None:
    """Import the URLconf and with it the views, so that a broken release fails here.

    Django imports them with the first request.
    """
    from django.conf import settings
    from django.urls import get_resolver

    if getattr(settings, "ROOT_URLCONF", None):
        get_resolver().url_patterns  # noqa: B018  # the property imports it


def _require_wsgi(application: object) -> None:
    if isinstance(application, web.Application):
        raise TypeError("get_aio_application() takes a WSGI callable, no aiohttp application.")
    if not callable(application) or is_asgi(application):
        raise TypeError(
            f"get_aio_application() takes a WSGI callable, not {application!r}; "
            'for an ASGI application set AIOSERVE_INTERFACE = "asgi".'
        )


def is_asgi(application: object) -> bool:
    """Tell whether this is a coroutine function or, as Django's ASGIHandler, is called like one."""
    call = getattr(application, "__call__", None)  # noqa: B004
    return inspect.iscoroutinefunction(application) or inspect.iscoroutinefunction(call)


def _project_application(setting: str) -> Any:
    from django.conf import settings

    path = getattr(settings, setting, None)
    if path:
        return conf.import_dotted(path)
    if setting == "ASGI_APPLICATION":
        from django.core.asgi import get_asgi_application

        return get_asgi_application()
    from django.core.wsgi import get_wsgi_application

    return get_wsgi_application()

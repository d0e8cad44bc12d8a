"""Groups: messages to every subscriber of a name, in every worker.

In an aiohttp handler, a WebSocket or an asynchronous view::

    async with groups.subscribe("room:7") as messages:
        async for message in messages:
            await websocket.send_json(message)

(a long poll waits for one: ``await anext(messages, None)``; None is what it gets when
the server stops) and from anywhere::

    await groups.send("room:7", {"text": "Hello"})
    groups.send_sync("room:7", {"text": "Hello"})

A message is a value that JSON can carry (also dates, UUIDs and decimals, as
Django's encoder writes them) of at most `MAX_MESSAGE_SIZE` bytes; a group's name is
a text of 1 to 255 bytes.

**What is promised**

* *At most once.* A subscriber gets a message once or not at all, never twice.
* *Order.* What one sender (one task, one thread) sends to a group arrives in the
  order in which it was sent, gaps aside. Messages of different senders may arrive
  in different orders at different subscribers of the local hub; through Redis all
  see one order.
* *From the moment of entering.* Once ``async with groups.subscribe(...)`` has been
  entered, messages that are sent later arrive: enter first, then read the state
  from the database, and nothing falls between the two.
* *A loss is told.* Where messages were lost, the iteration raises `MessagesLost` in
  the place of the gap. A subscription goes on after it; left alone, the exception
  ends the handler, and the page that reconnects fetches its state anew. It is
  raised when the subscriber was slow and more than ``AIOSERVE_GROUPS_QUEUE_SIZE``
  messages waited (the oldest are dropped, ``messages.dropped`` counts them), when
  the connection to Redis was lost and is there again, and when a sender had to drop
  messages because Redis was away or this worker did not keep up.
* *Losses that are not told*, because nobody is there who could tell or be told:

  - what is sent to a page while it has no subscription: after its worker has closed the
    stream or the WebSocket, and before it has subscribed again in another one;
  - what a process had just sent, or still had to tell, when it was killed, or when a
    command that could not reach Redis ended (the log has a line of it);
  - what is sent by a process that is in no server and has no way to one (the log has a
    line of that, too).

  So a message is a hint and not the record. A page that must not have gaps takes what
  counts from the database, where changes are numbered, and says how far it has come; see
  "Without gaps" in docs/howto/live.md.
* Sending never fails for the state of the receivers or of Redis, and never waits
  for them.

**Which way they take.** Without configuration: a hub between the workers of one
server, also over reloads and upgrades. ``AIOSERVE_GROUPS_URL="redis://..."`` (or
``rediss://``, ``unix://``): Redis, for several machines. ``"hub:///run/project"``: the local
hub in a directory that other processes of this machine can find.

**From outside of a server** (a management command, a Celery worker, another
server): through Redis and through a named ``hub://`` messages arrive as from
anywhere else. The unnamed hub of a server cannot be found from outside; a message
reaches nobody then, and the log says so once.

**From a signal handler** send when the transaction is committed, for a subscriber
that looks into the database at once would see the state before it::

    @receiver(post_save, sender=Message)
    def announce(instance, **kwargs):
        transaction.on_commit(
            partial(groups.send_sync, f"room:{instance.room_id}", {"id": instance.pk})
        )
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import os
import re
import threading
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

from aiohttp import web
from django.core.serializers.json import DjangoJSONEncoder

from django_aioserve.exceptions import ConfigurationError, Problem
from django_aioserve.groups.hub import (
    HUB_VARIABLE,
    LONGEST_DIRECTORY,
    LocalHub,
    OutsideHub,
    find_hub,
    new_hub,
)
from django_aioserve.groups.switch import MAX_MESSAGE_SIZE, MessagesLost, Subscription, Switch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from django_aioserve.conf import Config

__all__ = [
    "HUB_VARIABLE",
    "MAX_MESSAGE_SIZE",
    "MessagesLost",
    "Subscription",
    "check",
    "end",
    "new_hub",
    "send",
    "send_sync",
    "setup",
    "subscribe",
]

logger = logging.getLogger("django_aioserve.groups")

_REDIS_SCHEMES = ("redis://", "rediss://", "unix://")
_HUB_SCHEME = "hub://"


# --------------------------------------------------------------------------- public


async def send(group: str, message: Any) -> None:
    """Send a message to every subscriber of a group.

    Gives way to the event loop once, so that a loop of sends starves nobody. Raises
    TypeError or ValueError for a message that JSON cannot carry or that is too long,
    and for a bad name.

    .. versionadded:: 0.1
    """
    payload = _encode(group, message)
    hub = _hub_here()
    if hub is not None:
        hub.post(group, payload)
        await hub.give_way()
    else:
        await asyncio.to_thread(_outside.post, group, payload)


def send_sync(group: str, message: Any) -> None:
    """Send a message to every subscriber of a group, from synchronous code.

    For any thread of any process; see the module for what reaches whom. In a worker it
    returns at once. Raises as `send` does.

    .. versionadded:: 0.1
    """
    payload = _encode(group, message)
    hub = _hub_here()
    if hub is not None:
        hub.post(group, payload)
    else:
        _outside.post(group, payload)


def subscribe(group: str) -> Subscription:
    """Subscribe to a group: ``async with groups.subscribe(name) as messages: ...``.

    Entering raises RuntimeError in a process that does not run the aiohttp application.
    Raises TypeError or ValueError for a bad name.

    .. versionadded:: 0.1
    """
    _check_name(group)
    return Subscription(group, _home)


def setup(app: web.Application, config: Config) -> None:
    """Give the aiohttp application its part in the groups while it runs.

    Subscriptions end when the application shuts down (``on_shutdown``); messages can be
    sent until it is cleaned up. Raises ConfigurationError.
    """
    problems = [*check(config)]
    if problems:
        raise ConfigurationError(problems)

    part = app[_PART] = _Part(config)
    app.cleanup_ctx.append(part.take)
    app.on_shutdown.append(part.end)


def end(app: web.Application) -> None:
    """Let every subscription of the application end, and later ones at once.

    For a worker that drains: event streams and long polls that wait for a message are
    over then. `setup` must have been called on the application.
    """
    app[_PART].leave()


def check(config: Config) -> Iterable[Problem]:
    """Find mistakes in the configuration of the groups."""
    url = config.groups_url
    if not url:
        return
    expected = None
    if url.startswith(_HUB_SCHEME):
        directory = url.removeprefix(_HUB_SCHEME)
        if not PurePosixPath(directory).is_absolute():
            expected = "hub:///DIRECTORY with an absolute path"
        elif len(os.fsencode(directory)) > LONGEST_DIRECTORY:
            expected = f"a directory whose path has at most {LONGEST_DIRECTORY} bytes"
    elif not url.startswith(_REDIS_SCHEMES):
        expected = 'a URL that begins with "redis://", "rediss://", "unix://" or "hub://"'
    elif importlib.util.find_spec("redis") is None:
        expected = "the redis client to be installed: pip install django-aioserve[redis]"
    elif not _is_redis_url(url):
        expected = (
            "redis://USER:PASSWORD@HOST:PORT/DATABASE or the like, with %2F for a slash in a "
            "password, %23 for # and %3F for ?"
        )
    if expected is not None:
        source = config.source("groups_url")
        shown = re.sub(r"//.*@", "//***@", url)
        yield Problem(source.name, str(source), shown, expected, "E003")


def _is_redis_url(url: str) -> bool:
    from redis.asyncio.connection import parse_url

    try:
        parse_url(url)
    except ValueError:
        return False
    return True


# --------------------------------------------------------------------------- inside


class _Transport(Protocol):
    async def join(self, group: str) -> None: ...
    def leave(self, group: str) -> None: ...
    def post(self, group: str, payload: bytes) -> None: ...
    async def close(self) -> None: ...


class _Hub:
    """The part of one running application in the groups. Made on its event loop."""

    def __init__(self, config: Config) -> None:
        self.loop = asyncio.get_running_loop()
        self.pid = os.getpid()
        self.switch = Switch(config.groups_queue_size)
        self._transport = self._connect(config)

    def _connect(self, config: Config) -> _Transport:
        url = config.groups_url
        if not url:
            return LocalHub(self.switch, find_hub(), ours=True)
        if url.startswith(_HUB_SCHEME):
            return LocalHub(self.switch, url.removeprefix(_HUB_SCHEME), ours=False)
        from django_aioserve.groups.redis import RedisHub

        return RedisHub(self.switch, url, _namespace(config))

    def is_here(self) -> bool:
        """Tell whether the calling thread is that of the event loop."""
        return _running_loop() is self.loop

    def post(self, group: str, payload: bytes) -> None:
        if self.is_here():
            self._transport.post(group, payload)
        else:
            self._call(self._transport.post, group, payload)

    async def give_way(self) -> None:
        await asyncio.sleep(0)
        if self.is_here():
            await self.switch.room()

    async def join(self, subscription: Subscription) -> int:
        if self.is_here():
            await self._join(subscription)
        else:
            there = asyncio.run_coroutine_threadsafe(self._join(subscription), self.loop)
            await asyncio.wrap_future(there)
        return self.switch.queue_size

    async def _join(self, subscription: Subscription) -> None:
        self.switch.add(subscription)
        try:
            await self._transport.join(subscription.group)
        except BaseException:
            self._leave(subscription)
            raise

    def leave(self, subscription: Subscription) -> None:
        if self.is_here():
            self._leave(subscription)
        else:
            self._call(self._leave, subscription)

    def _leave(self, subscription: Subscription) -> None:
        if self.switch.remove(subscription):
            self._transport.leave(subscription.group)

    def _call(self, function: Any, *args: Any) -> None:
        try:
            self.loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            # A thread that outlived the loop; the worker is about to go.
            if not self.loop.is_closed():
                raise

    async def close(self) -> None:
        self.switch.end()
        await self._transport.close()


class _Part:
    """What an application has of the groups before it runs, while it does, and afterwards."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._hub: _Hub | None = None

    async def take(self, _: web.Application) -> AsyncIterator[None]:
        hub = self._hub = _Hub(self._config)
        _running.append(hub)
        yield
        _running.remove(hub)
        await hub.close()

    async def end(self, _: web.Application) -> None:
        self.leave()

    def leave(self) -> None:
        if self._hub is not None:
            self._hub.switch.end()


_PART: web.AppKey[_Part] = web.AppKey("PART", _Part)

#: The applications that run in this process, the latest last.
_running: list[_Hub] = []


def _hub_here() -> _Hub | None:
    """Find the application on this event loop, else the latest one of this process."""
    loop, pid = _running_loop(), os.getpid()
    found = None
    for hub in reversed(_running):
        if hub.pid == pid:  # a process forked by a worker has no part in its loop
            if hub.loop is loop:
                return hub
            found = found or hub
    return found


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _home() -> _Hub:
    hub = _hub_here()
    if hub is None:
        raise RuntimeError(
            "Groups can be subscribed to only where the aiohttp application runs "
            "(manage.py runaio, get_aio_application or AioLiveServerTestCase)."
        )
    return hub


# --------------------------------------------------------------------------- outside


class _Outside:
    """The way of messages out of a process that does not run the application."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._key: tuple[object, ...] | None = None
        self._sender: OutsideHub | Any | None = None

    def post(self, group: str, payload: bytes) -> None:
        with self._lock:
            key = self._current_key()
            if key != self._key:
                if self._sender is not None:
                    self._sender.close()
                self._sender = self._connect()
                self._key = key
            sender = self._sender
        if sender is not None:
            sender.post(group, payload)

    @staticmethod
    def _current_key() -> tuple[object, ...]:
        """Give what the sender depends on, without the cost of resolving all options."""
        from django.conf import settings

        names = ("AIOSERVE_GROUPS_URL", "AIOSERVE_GROUPS_PREFIX")
        return (
            *(getattr(settings, name, None) for name in names),
            *(os.environ.get(name) for name in (*names, HUB_VARIABLE)),
        )

    @staticmethod
    def _connect() -> OutsideHub | Any | None:
        from django_aioserve.conf import resolve

        config = resolve()
        problems = [*check(config)]
        if problems:
            raise ConfigurationError(problems)
        url = config.groups_url
        if url.startswith(_REDIS_SCHEMES):
            from django_aioserve.groups.redis import OutsideRedis

            return OutsideRedis(url, _namespace(config))
        directory = url.removeprefix(_HUB_SCHEME) or os.environ.get(HUB_VARIABLE)
        if directory:  # the variable is there in what a worker has started
            return OutsideHub(directory)
        logger.warning(
            "Group messages sent by this process (pid %d) reach nobody: it is not a worker of "
            'the server. Set AIOSERVE_GROUPS_URL to "hub:///DIRECTORY" or "redis://HOST" to '
            "reach the server from outside.",
            os.getpid(),
        )
        return None


_outside = _Outside()


# --------------------------------------------------------------------------- helpers


def _namespace(config: Config) -> str:
    """Give what keeps this project's channels apart from those of others in one Redis."""
    if config.groups_prefix:
        return config.groups_prefix
    from django.conf import settings
    from django.utils.crypto import salted_hmac

    # Many projects call their settings module "config.settings".
    key = salted_hmac("django_aioserve.groups", "name space", algorithm="sha256").hexdigest()
    return f"{getattr(settings, 'SETTINGS_MODULE', None) or ''}-{key[:16]}"


def _encode(group: str, message: Any) -> bytes:
    _check_name(group)
    text = json.dumps(
        message,
        cls=DjangoJSONEncoder,
        ensure_ascii=False,
        allow_nan=False,
        separators=(",", ":"),
    )
    payload = text.encode()
    if len(payload) > MAX_MESSAGE_SIZE:
        raise ValueError(
            f"A group message has {len(payload)} bytes of JSON; {MAX_MESSAGE_SIZE} are allowed."
        )
    return payload


def _check_name(group: str) -> None:
    if not isinstance(group, str):
        raise TypeError(f"A group's name is a text, not {type(group).__name__}.")
    if not 1 <= len(group.encode()) <= 255:
        raise ValueError("A group's name has 1 to 255 bytes.")

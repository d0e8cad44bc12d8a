"""How a worker leaves: it stops accepting, answers what was asked of it, and closes softly."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Sequence

from django_aioserve.server.connection import Connection, Front

__all__ = ["drain"]

CLOSING_SECONDS = 0.5
"""Time for the clients of idle connections to close their side, once told."""

ACCEPT_LOOK = 0.01
"""Seconds between two looks into the accept queue of a server that stops."""


async def drain(
    front: Front,
    sockets: Sequence[socket.socket],
    factory: Callable[[], Connection],
    tls: ssl.SSLContext | None,
    *,
    linger: float,
    within: float,
    others_listen: Callable[[], bool],
) -> int:
    """Bring a worker's connections to their end; give the number of requests given up.

    The worker accepts no more. ``sockets`` are the listening sockets that nobody else
    will accept from: what comes in while ``others_listen`` tells that other processes
    still hold them is taken too, for the kernel resets what is left in their queues.
    Idle connections are read for ``linger`` seconds: a client may have sent a request
    before it learned that the connection closes. Requests under way have ``within``
    seconds, and so have handlers whose client has left.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + within
    # A worker that still boots may take long to hear that it is to end.
    while sockets and others_listen() and loop.time() < deadline - CLOSING_SECONDS:
        for sock in sockets:
            await _empty_accept_queue(loop, sock, factory, tls)
        await asyncio.sleep(ACCEPT_LOOK)
    for sock in sockets:
        await _empty_accept_queue(loop, sock, factory, tls, close=True)
    lingering = min(loop.time() + linger, deadline)
    while front.connections and loop.time() < deadline:
        if all(connection.idle for connection in front.connections):
            if loop.time() >= lingering:
                break
            limit = lingering
        else:
            limit = deadline
        front.changed.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(front.changed.wait(), max(limit - loop.time(), 0.001))
    for connection in [*front.connections]:
        if connection.idle:
            connection.say_goodbye()
    closing = loop.time() + CLOSING_SECONDS
    while any(connection.idle for connection in front.connections) and loop.time() < closing:
        front.changed.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(front.changed.wait(), max(closing - loop.time(), 0.001))
    return sum(
        not connection.idle and connection.transport is not None for connection in front.connections
    )


async def _empty_accept_queue(
    loop: asyncio.AbstractEventLoop,
    sock: socket.socket,
    factory: Callable[[], Connection],
    tls: ssl.SSLContext | None,
    *,
    close: bool = False,
) -> None:
    """Take what waits now; with ``close`` the kernel refuses whoever comes later."""
    waiting = []
    while True:
        try:
            accepted, _ = sock.accept()
        except ConnectionAbortedError:
            continue
        except OSError:  # the queue is empty; or descriptors have run out
            break
        accepted.setblocking(False)
        waiting.append(accepted)
    if close:
        sock.close()
    for accepted in waiting:
        await loop.connect_accepted_socket(factory, accepted, ssl=tls)

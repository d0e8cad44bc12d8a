"""A new worker asks itself for a page before it counts as ready."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from django_aioserve.server.connection import Connection

__all__ = ["warm_up"]


async def warm_up(factory: Callable[[], Connection], path: str) -> None:
    """Ask for ``path`` over a connection of its own; RuntimeError at an answer of 500 or above.

    The request names a host that ``ALLOWED_HOSTS`` admits and says that it came by
    HTTPS, so that it is not only redirected there.
    """
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setblocking(False)
    await loop.connect_accepted_socket(factory, theirs)
    reader, writer = await asyncio.open_unix_connection(sock=ours)
    try:
        writer.write(
            f"GET {path} HTTP/1.1\r\nHost: {_host()}\r\nX-Forwarded-Proto: https\r\n"
            "User-Agent: django-aioserve (warm-up)\r\nConnection: close\r\n\r\n".encode()
        )
        line = await reader.readline()
        await reader.read()
    finally:
        writer.close()
    words = line.split()
    if len(words) < 2 or not words[1].isdigit() or int(words[1]) >= 500:
        said = line.decode("latin-1").strip() or "nothing"
        raise RuntimeError(f"AIOSERVE_WARMUP: {path} was answered with {said}; expected below 500.")


def _host() -> str:
    from django.conf import settings

    hosts = getattr(settings, "ALLOWED_HOSTS", [])
    named = [host.lstrip(".") for host in hosts if host and "*" not in host]
    return named[0] if named else "localhost"

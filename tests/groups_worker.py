"""Processes that take part in the groups, in place of workers; told what to do line by line.

Each line of a process's input is a JSON list, a command and its arguments; each line of its
output is one event. It ends when its input does. The processes are forked from one that has
imported everything, as workers are.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import sys
import time
from typing import Any

from aiohttp import web
from django.conf import settings

from django_aioserve import groups
from django_aioserve.conf import Config


def say(*event: Any) -> None:
    os.write(1, json.dumps(event).encode() + b"\n")


async def subscribe(group: str, pause: float = 0.0) -> None:
    async with groups.subscribe(group) as messages:
        say("subscribed", group)
        while True:
            try:
                async for message in messages:
                    say("message", group, message)
                    await asyncio.sleep(pause)
                break
            except groups.MessagesLost:
                say("lost", group, messages.dropped)
    say("ended", group)


async def count(group: str, expected: int) -> None:
    """Receive without a word until all have come, or the end."""
    received, gaps = [], 0
    async with groups.subscribe(group) as messages:
        say("subscribed", group)
        while len(received) < expected:
            try:
                received.append(await anext(messages))
            except groups.MessagesLost:
                gaps += 1
            except StopAsyncIteration:
                break
    say("counted", group, received, gaps)


async def send(group: str, *messages: Any) -> None:
    for message in messages:
        await groups.send(group, message)
    say("sent", group)


async def send_range(group: str, sender: int, number: int, padding: int = 0) -> None:
    start = time.perf_counter()
    for index in range(number):
        await groups.send(group, [sender, index, "x" * padding])
    say("sent", group, time.perf_counter() - start)


async def send_from_thread(group: str, *messages: Any) -> None:
    def work() -> None:
        for message in messages:
            groups.send_sync(group, message)

    await asyncio.to_thread(work)
    say("sent", group)


async def exhaust() -> None:
    """Use up all file descriptors."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
    with contextlib.suppress(OSError):
        while True:
            DESCRIPTORS.append(os.dup(2))
    say("exhausted")


async def release() -> None:
    while DESCRIPTORS:
        os.close(DESCRIPTORS.pop())
    say("released")


DESCRIPTORS: list[int] = []
COMMANDS = {
    function.__name__: function
    for function in (subscribe, count, send, send_range, send_from_thread, exhaust, release)
}


def plain() -> web.Application:
    """Make what a plain Gunicorn serves: /wait gives pid and message, /send sends one."""

    async def wait(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        async with groups.subscribe("room") as messages:
            await response.write(b"%d\n" % os.getpid())
            await response.write(json.dumps(await anext(messages)).encode() + b"\n")
        return response

    async def send(request: web.Request) -> web.Response:
        await groups.send("room", "sent")
        return web.Response()

    app = web.Application()
    groups.setup(app, Config())
    app.router.add_get("/wait", wait)
    app.router.add_get("/send", send)
    return app


async def main(options: dict[str, Any]) -> None:
    app = web.Application()
    groups.setup(app, Config(**options))
    runner = web.AppRunner(app, handle_signals=False)
    await runner.setup()
    reader = asyncio.StreamReader(limit=1 << 24)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    say("ready")
    tasks: set[asyncio.Task[None]] = set()
    async for line in reader:
        command, *arguments = json.loads(line)
        task = loop.create_task(COMMANDS[command](*arguments))
        tasks.add(task)
        task.add_done_callback(lambda task: (tasks.discard(task), task.result()))
    await runner.shutdown()
    if tasks:
        await asyncio.wait(tasks)
    await runner.cleanup()
    say("bye")


def nursery(channel: socket.socket) -> None:
    """Fork a process for each request: its three standard files, and what `begin` takes."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        request, files, _, _ = socket.recv_fds(channel, 1 << 16, 3)
        if not request:
            return
        pid = os.fork()
        if not pid:
            break
        for file in files:
            os.close(file)
        channel.sendall(b"%d" % pid)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    channel.close()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    begin(*json.loads(request))


def begin(hub: str | None, key: str, options: dict[str, Any]) -> None:
    if hub is not None:
        os.environ[groups.HUB_VARIABLE] = hub
    settings.configure(SECRET_KEY=key)
    asyncio.run(main(options))


if __name__ == "__main__":
    nursery(socket.socket(fileno=int(sys.argv[1])))

"""aiohttp handlers beside Django's views: a chat, a live list, and a long poll.

A group message may get lost, a worker be replaced, a connection break: what counts is in the
database, and each page says how far it has come. So each handler first subscribes, then
reads what the page has missed, and goes on with what arrives.
"""

import asyncio
import contextlib
import json
import uuid

from aiohttp import web

from board.forms import MessageForm
from board.models import Change, Message, Topic
from board.signals import BOARD, topic_group
from django_aioserve import groups
from django_aioserve.auth import get_user, login_required
from django_aioserve.websocket import EventStream

#: Seconds after which a long poll is answered though nothing has changed.
POLL_SECONDS = 25

#: Rows that are read at once by whoever has missed many.
BATCH = 200


async def changes(topic, version):
    """Give every change of a topic after `version`, in order; ends when the server stops."""
    async with groups.subscribe(topic_group(topic)) as messages:
        is_behind = True
        while True:
            while is_behind:
                missed = Change.objects.filter(topic_id=topic, version__gt=version)[:BATCH]
                rows = [change async for change in missed]
                for change in rows:
                    version = change.version
                    yield change.as_event()
                is_behind = len(rows) == BATCH
            try:
                event = await anext(messages, None)
            except groups.MessagesLost:
                is_behind = True
                continue
            if event is None:
                return
            # Of two changes made by two workers, the later one may be heard of first.
            is_behind = event["version"] > version + 1
            if event["version"] == version + 1:
                version += 1
                yield event


def _version(text):
    """How far a page says that it has come."""
    try:
        return max(int(text), 0)
    except ValueError:
        raise web.HTTPBadRequest(text="A version is a number.") from None


async def _require(topic):
    if not await Topic.objects.filter(pk=topic).aexists():
        raise web.HTTPNotFound


# The live list: an event stream.


async def topic_events(request, topic):
    """Stream the changes of a topic; the browser comes back with the last one that it has."""
    await _require(topic)
    version = _version(request.headers.get("Last-Event-ID") or request.query.get("after", "0"))
    async with (
        EventStream(request, retry=0.5) as stream,
        contextlib.aclosing(changes(topic, version)) as events,
    ):
        async for event in events:
            await stream.send(json.dumps(event), id=str(event["version"]))
    return stream


# The chat: a WebSocket.


@login_required
async def topic_chat(request, topic):
    """Take messages for a topic and give its changes."""
    await _require(topic)
    version = _version(request.query.get("after", "0"))
    author = (await get_user(request)).get_username()[:50]
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    async with asyncio.TaskGroup() as tasks:
        telling = tasks.create_task(_tell(socket, topic, version))
        async for frame in socket:
            if frame.type is web.WSMsgType.TEXT:
                problem = await _take(frame.data, topic, author)
                if problem is not None:
                    await _send(socket, problem)
        telling.cancel()
    return socket


async def _tell(socket, topic, version):
    """Send a page every change, until it or the server leaves."""
    async with contextlib.aclosing(changes(topic, version)) as events:
        async for event in events:
            await _send(socket, event)


async def _send(socket, content):
    # Whoever reads from the socket learns that it is closed.
    with contextlib.suppress(ConnectionError):
        await socket.send_json(content)


async def _take(text, topic, author):
    """Save a message from a page; give what is wrong with it, or None."""
    try:
        said = json.loads(text)
        key = uuid.UUID(said["key"])
        form = MessageForm({"author": author, "text": said["text"]})
    except (ValueError, TypeError, KeyError, AttributeError):
        return {"error": "A message is an object with a key, which is a UUID, and a text."}
    if not form.is_valid():
        return {"key": str(key), "error": " ".join(form.errors["text"])}
    # A page that was cut off sends again what it has not seen arrive.
    await Message.objects.aget_or_create(
        key=key, defaults={"topic_id": topic, "author": author, "text": form.cleaned_data["text"]}
    )
    return None


# The numbers on the first page: a long poll.


async def counts(request):
    """Answer as soon as the numbers of messages are others than those that the page has seen."""
    seen = request.query.get("seen")
    async with groups.subscribe(BOARD) as messages:
        found = await _counts()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(POLL_SECONDS):
                while found["seen"] == seen and await _something(messages):
                    found = await _counts()
    return web.json_response(found)


async def _something(messages):
    """Wait for news; False when the server stops. The page asks again then, and another worker."""
    try:
        return await anext(messages, None) is not None
    except groups.MessagesLost:
        return True


async def _counts():
    rows = [row async for row in Topic.objects.with_numbers()]
    return {
        "seen": " ".join(f"{row.pk}.{row.version}" for row in rows),
        "topics": {row.pk: row.number for row in rows},
    }

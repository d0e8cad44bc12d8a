"""Views that a server is tried and measured with: slow, leaking, failing, streaming, huge."""

import asyncio
import hashlib
import os
import sys
import time

from django.conf import settings
from django.http import (
    FileResponse,
    HttpResponse,
    HttpResponseBadRequest,
    JsonResponse,
    StreamingHttpResponse,
)
from django.views.decorators.csrf import csrf_exempt

from board.models import Message

LONGEST = 60.0
MEGABYTE = 1024 * 1024
BLOCK = b"x" * (64 * 1024)

#: What the leaking view never gives back.
leaked = []


def _number(request, name, default, largest):
    """A number in the query string, between 0 and `largest`; None when it is not one."""
    try:
        value = float(request.GET.get(name, default))
    except ValueError:
        return None
    return value if 0 <= value <= largest else None


def ping(request):
    """The least a sync view can do."""
    return HttpResponse("pong", content_type="text/plain")


async def ping_async(request):
    """The least an async view can do."""
    return HttpResponse("pong", content_type="text/plain")


def _row(message):
    return {"author": message.author, "text": message.text, "topic": message.topic.title}


def orm(request):
    """A handful of rows."""
    rows = Message.objects.select_related("topic")[:5]
    return JsonResponse({"messages": [_row(message) for message in rows]})


async def orm_async(request):
    """A handful of rows, by the async ORM."""
    rows = Message.objects.select_related("topic")[:5]
    return JsonResponse({"messages": [_row(message) async for message in rows]})


def slow(request):
    """Occupy a thread for `seconds`."""
    seconds = _number(request, "seconds", 1, LONGEST)
    if seconds is None:
        return HttpResponseBadRequest(f"seconds must be a number from 0 to {LONGEST:.0f}")
    time.sleep(seconds)
    return HttpResponse(f"slept {seconds:g} s", content_type="text/plain")


async def slow_async(request):
    """Wait for `seconds` without occupying anything."""
    seconds = _number(request, "seconds", 1, LONGEST)
    if seconds is None:
        return HttpResponseBadRequest(f"seconds must be a number from 0 to {LONGEST:.0f}")
    await asyncio.sleep(seconds)
    return HttpResponse(f"slept {seconds:g} s", content_type="text/plain")


def leak(request):
    """Leak `kb` kilobytes, as real projects do by accident."""
    kilobytes = _number(request, "kb", 100, 100 * 1024)
    if kilobytes is None:
        return HttpResponseBadRequest("kb must be a number from 0 to 102400")
    # Filled, so that the pages are really there.
    leaked.append(bytearray(os.urandom(16) * int(kilobytes * 64)))
    total = sum(map(len, leaked))
    return HttpResponse(f"{total // 1024} KB leaked in {os.getpid()}", content_type="text/plain")


def pid(request):
    """The process that answers."""
    return HttpResponse(str(os.getpid()), content_type="text/plain")


@csrf_exempt
def echo(request):
    """What arrived: the method, every string in META, and the body's length and hash."""
    digest = hashlib.sha256()
    length = 0
    while block := request.read(64 * 1024):
        digest.update(block)
        length += len(block)
    return JsonResponse(
        {
            "method": request.method,
            "path": request.path,
            "scheme": request.scheme,
            "meta": {key: value for key, value in request.META.items() if isinstance(value, str)},
            "length": length,
            "sha256": digest.hexdigest(),
        }
    )


def crash(request):
    """Raise."""
    raise RuntimeError("this view always fails")


async def crash_async(request):
    """Raise, in an async view."""
    raise RuntimeError("this async view always fails")


def exit_view(request):
    """Try to end the process, as a careless script called from a view would."""
    code = _number(request, "code", 0, 255)
    if code is None:
        return HttpResponseBadRequest("code must be a number from 0 to 255")
    sys.exit(int(code))


def megabyte(request):
    """A response of one megabyte at once."""
    return HttpResponse(BLOCK * (MEGABYTE // len(BLOCK)), content_type="application/octet-stream")


def _lines():
    for number in range(10):
        yield f"line {number}\n"


async def _async_lines():
    for number in range(10):
        yield f"line {number}\n"
        await asyncio.sleep(0)


def stream(request):
    """Ten lines, one by one, from a generator."""
    return StreamingHttpResponse(_lines(), content_type="text/plain")


async def stream_async(request):
    """Ten lines, one by one, from an async generator."""
    return StreamingHttpResponse(_async_lines(), content_type="text/plain")


async def _events(count, pause):
    for number in range(count):
        yield f"id: {number}\ndata: event {number}\n\n"
        await asyncio.sleep(pause)


async def events(request):
    """`count` events with `pause` seconds between them, as an event stream."""
    count = _number(request, "count", 5, 1000)
    pause = _number(request, "pause", 0.05, LONGEST)
    if count is None or pause is None:
        return HttpResponseBadRequest("count must be up to 1000 and pause up to 60")
    return StreamingHttpResponse(
        _events(int(count), pause),
        content_type="text/event-stream",
        headers={"Cache-Control": "no-store"},
    )


def _blocks(count):
    for _ in range(count):
        yield BLOCK


def big_stream(request):
    """A stream of `mb` megabytes (10 unless told), in blocks of 64 KB."""
    megabytes = _number(request, "mb", 10, 1024)
    if megabytes is None:
        return HttpResponseBadRequest("mb must be a number from 0 to 1024")
    return StreamingHttpResponse(
        _blocks(int(megabytes * MEGABYTE) // len(BLOCK)), content_type="application/octet-stream"
    )


def big_file(request):
    """A file of 10 megabytes, made when it is first asked for."""
    path = settings.MEDIA_ROOT / "big-file.bin"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Written aside and renamed, so that another worker never sees half of it.
        part = path.with_suffix(f".{os.getpid()}")
        part.write_bytes(BLOCK * (10 * MEGABYTE // len(BLOCK)))
        part.replace(path)
    return FileResponse(path.open("rb"), content_type="application/octet-stream")

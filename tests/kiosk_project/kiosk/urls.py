"""Pages of the kiosk."""

import asyncio
import gc
import hashlib
import os
import sys
import time

from django.http import HttpResponse, StreamingHttpResponse
from django.urls import path
from django.views.decorators.csrf import csrf_exempt

from kiosk import release

leaked = []


def index(request):
    """The release and the process that answers."""
    return HttpResponse(f"{release.NAME} {os.getpid()}", content_type="text/plain")


async def index_async(request):
    """The same by an async view."""
    return index(request)


def meta(request):
    """Who asked, and how."""
    text = f"{request.META['REMOTE_ADDR']} {request.META['wsgi.url_scheme']}"
    return HttpResponse(text, content_type="text/plain")


@csrf_exempt
def upload(request):
    """The hash of what was sent."""
    digest = hashlib.sha256()
    while block := request.read(65536):
        digest.update(block)
    return HttpResponse(digest.hexdigest(), content_type="text/plain")


def _lines(pause):
    for number in range(20):
        yield f"line {number}\n"
        time.sleep(pause)


def stream(request):
    """Twenty lines, `pause` seconds between them."""
    pause = float(request.GET.get("pause", "0.002"))
    return StreamingHttpResponse(_lines(pause), content_type="text/plain")


def slow(request):
    """Occupy a thread for `seconds`."""
    time.sleep(float(request.GET["seconds"]))
    return index(request)


async def slow_async(request):
    """Wait for `seconds`."""
    await asyncio.sleep(float(request.GET["seconds"]))
    return index(request)


async def block(request):
    """Block the event loop for `seconds`, as a mistaken async view does."""
    time.sleep(float(request.GET["seconds"]))
    return index(request)


async def _events():
    while True:
        yield "data: tick\n\n"
        await asyncio.sleep(0.05)


async def events(request):
    """Events without end."""
    return StreamingHttpResponse(_events(), content_type="text/event-stream")


def _ticks():
    while True:
        yield "data: tick\n\n"
        time.sleep(0.05)


def events_sync(request):
    """The same by a thread."""
    return StreamingHttpResponse(_ticks(), content_type="text/event-stream")


def leak(request):
    """Leak `kb` kilobytes."""
    leaked.append(bytearray(os.urandom(16) * int(request.GET["kb"]) * 64))
    return index(request)


def collector(request):
    """The collector's first threshold, and of some objects how many it knows; `off` stops it."""
    if "off" in request.GET:
        gc.disable()
    names = [type(each).__name__ for each in gc.get_objects()]
    counts = [names.count(name) for name in ("Connection", "BaseRequest")]
    text = " ".join(map(str, (gc.get_threshold()[0], *counts)))
    return HttpResponse(text, content_type="text/plain")


def exit_view(request):
    """sys.exit with `code`."""
    sys.exit(int(request.GET["code"]))


def die(request):
    """os._exit with `code`."""
    os._exit(int(request.GET["code"]))


def raise_view(request):
    """Raise the built-in exception `what`."""
    import builtins

    raise getattr(builtins, request.GET["what"])("raised by a view")


urlpatterns = [
    path("", index),
    path("async/", index_async),
    path("meta/", meta),
    path("upload/", upload),
    path("stream/", stream),
    path("slow/", slow),
    path("slow-async/", slow_async),
    path("block/", block),
    path("events/", events),
    path("events-sync/", events_sync),
    path("leak/", leak),
    path("collector/", collector),
    path("exit/", exit_view),
    path("die/", die),
    path("raise/", raise_view),
]

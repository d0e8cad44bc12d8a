"""Views of the project that the bridges are tested with: most of them twice, sync and async."""

from __future__ import annotations

import asyncio
import io
import tempfile

from asgiref.sync import async_to_sync, sync_to_async
from django.contrib.auth.models import Group
from django.core.cache import cache
from django.core.exceptions import PermissionDenied, SuspiciousOperation
from django.core.handlers.wsgi import WSGIRequest
from django.db import connection, transaction
from django.http import (
    FileResponse,
    Http404,
    HttpResponse,
    HttpResponseNotModified,
    JsonResponse,
    StreamingHttpResponse,
)
from django.template import engines
from django.template.response import TemplateResponse
from django.utils import timezone, translation

from tests.django_project import probe


def both(name, view):
    """The view under its own name, and an asynchronous one that does the same."""

    async def asynchronous(request, *args, **kwargs):
        return view(request, *args, **kwargs)

    asynchronous.__name__ = f"async_{view.__name__}"
    return [(name, view), (f"async-{name}", asynchronous)]


def hello(request):
    return HttpResponse("hello", content_type="text/plain")


def describe(request, **kwargs):
    """All of the request that a view may want to know."""
    return JsonResponse(
        {
            "is_wsgi": isinstance(request, WSGIRequest),
            "environ_is_meta": request.environ is request.META,
            "meta": {key: value for key, value in request.META.items() if isinstance(value, str)},
            "headers": dict(request.headers),
            "method": request.method,
            "path": request.path,
            "path_info": request.path_info,
            "full_path": request.get_full_path(),
            "uri": request.build_absolute_uri(),
            "scheme": request.scheme,
            "secure": request.is_secure(),
            "host": request.get_host(),
            "port": request.get_port(),
            "get": request.GET.dict(),
            "cookies": request.COOKIES,
            "content_type": request.content_type,
            "content_params": request.content_params,
            "encoding": request.encoding,
            "route": request.resolver_match.route,
            "kwargs": kwargs,
        }
    )


def read_form(request):
    return JsonResponse(
        {
            "form": request.POST.dict(),
            "files": {
                name: [file.name, file.size, file.read(10).decode(), type(file).__name__]
                for name, file in request.FILES.items()
            },
        }
    )


def read_body(request):
    return HttpResponse(request.body, content_type="application/octet-stream")


def read_some(request):
    """Read in bits, then fail to have it as a whole."""
    first, line, rest = request.read(3), request.readline(), request.read()
    try:
        _ = request.body
        error = ""
    except Exception as exception:
        error = type(exception).__name__
    return JsonResponse([first.decode(), line.decode(), rest.decode(), error], safe=False)


def cookies(request):
    response = hello(request)
    response.set_cookie("one", "1", max_age=10, httponly=True)
    response.set_cookie("two", "zwei und drei")
    return response


def status(request, code):
    if code == 304:
        return HttpResponseNotModified()
    return HttpResponse(b"body" if "body" in request.GET else b"", status=code)


def head(request):
    """Headers and reason phrase as asked for."""
    response = HttpResponse("hello", content_type="text/plain")
    kind = request.GET["kind"]
    if kind == "reason":
        response.reason_phrase = "All\r\nSet-Cookie: a=b"
    elif kind == "nul":
        response["X-Bad"] = "a\0b"
    elif kind == "name":
        response["X Bad"] = "a"
    elif kind == "hop":
        response["Connection"] = "close"
    elif kind == "long":
        response["Content-Length"] = "3"
    elif kind == "short":
        response["Content-Length"] = "7"
    elif kind == "latin":
        response["X-Latin"] = "\xe9"
    elif kind == "status":
        response.status_code = 101
    elif kind == "empty-reason":
        response.reason_phrase = ""
    elif kind == "own":
        response["Server"] = "mine"
        response["Date"] = "today"
    return response


def size(request, number):
    return HttpResponse(b"x" * number, content_type="application/octet-stream")


ERRORS = {
    "404": lambda: Http404("not here"),
    "403": lambda: PermissionDenied,
    "400": lambda: SuspiciousOperation("suspicious"),
    "500": lambda: ValueError("deliberate"),
    "exit": lambda: SystemExit(3),
    "interrupt": lambda: KeyboardInterrupt,
    "memory": lambda: MemoryError,
    "recursion": lambda: RecursionError,
    "stop": lambda: StopIteration,
    "cancelled": lambda: asyncio.CancelledError,
    "connection": lambda: ConnectionResetError("deliberate"),
}


def fail(request, kind):
    error = ERRORS[kind]()
    raise error


def template(request):
    return TemplateResponse(request, engines["django"].from_string("{{ who }}"), {"who": "view"})


def nothing(request):
    return None


def language(request):
    return HttpResponse(translation.get_language())


def activate(request):
    """Change what would outlive the request if it belonged to the thread."""
    translation.activate("fr")
    timezone.activate("Asia/Tokyo")
    return hello(request)


def active(request):
    return HttpResponse(f"{translation.get_language()} {timezone.get_current_timezone_name()}")


def context(request):
    probe.outward.set("view")
    return HttpResponse(f"{probe.inward.get()}|{probe.native.get()}")


def answer(request):
    return HttpResponse(request.answer)


def cache_identity(request):
    cache.get("x")
    from django.core.cache import caches

    return HttpResponse(str(id(caches["default"])))


class File(io.BytesIO):
    """A file in memory that tells when it is closed."""

    def close(self):
        if not self.closed:
            probe.tell("file closed")
        super().close()


def file(request):
    content = tempfile.TemporaryFile()  # noqa: SIM115 - the response closes it
    content.write(b"0123456789" * 20_000)
    content.seek(int(request.GET.get("offset", "0")))
    return FileResponse(content, content_type="application/x-test")


def memory_file(request):
    return FileResponse(File(b"0123456789" * 20_000), content_type="application/x-test")


class Chunks:
    """An iterator of chunks, the second of which comes when the test wants it."""

    def __init__(self, wait=True):
        self.number = 0
        self.wait = wait

    def __iter__(self):
        return self

    def __next__(self):
        self.number += 1
        if self.number == 1:
            return b"one,"
        if self.number == 2:
            if self.wait and not probe.go_on.wait(10):
                raise RuntimeError("the test does not want the second chunk")
            return b"two"
        raise StopIteration

    def close(self):
        probe.tell("iterator closed")


class AsyncChunks(Chunks):
    def __aiter__(self):
        return self

    __iter__ = None

    async def __anext__(self):
        if self.number == 1:
            while self.wait and not probe.go_on.is_set():
                await asyncio.sleep(0.005)
        try:
            return next(self)
        except StopIteration:
            raise StopAsyncIteration from None


def stream(request):
    probe.tell("view", probe.thread())
    return StreamingHttpResponse(Chunks("fast" not in request.GET))


def stream_async(request):
    probe.tell("view", probe.thread())
    return StreamingHttpResponse(AsyncChunks("fast" not in request.GET))


def stream_size(request, number):
    return StreamingHttpResponse(b"x" * number for _ in range(3))


def endless(request):
    def generate():
        try:
            while True:
                yield b"x" * 65536
        finally:
            probe.tell("generator closed")

    return StreamingHttpResponse(generate())


def endless_async(request):
    async def generate():
        try:
            while True:
                yield b"x" * 65536
        finally:
            probe.tell("generator closed")
            if "kind" in request.GET:
                error = ERRORS[request.GET["kind"]]()
                raise error

    return StreamingHttpResponse(generate())


def silent_async(request):
    async def generate():
        try:
            yield b"one"
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            probe.tell("generator cancelled")
            raise
        finally:
            probe.tell("generator closed")

    return StreamingHttpResponse(generate())


def broken_stream(request):
    def generate():
        if "late" in request.GET:
            yield b"one"
            probe.go_on.wait(10)
        raise ValueError("deliberate")

    return StreamingHttpResponse(generate())


def broken_stream_async(request):
    async def generate():
        yield b"one"
        while not probe.go_on.is_set():
            await asyncio.sleep(0.005)
        error = ERRORS[request.GET.get("kind", "500")]()
        raise error

    return StreamingHttpResponse(generate())


class Told(HttpResponse):
    """A response that tells of each time it is closed."""

    def close(self):
        probe.tell("closed", probe.thread())
        super().close()


def told(request):
    return Told("told")


class MomentConverter:
    """Says in what zone and for whom it was called."""

    regex = "[0-9]+"

    def to_python(self, value):
        return f"{value} {timezone.get_current_timezone_name()} {probe.inward.get()}"

    def to_url(self, value):
        return value


def moment(request, moment):
    return HttpResponse(moment)


def stream_connection(request):
    """A stream that uses the database, asynchronously or not."""

    def connect():
        connection.ensure_connection()
        return b"connected"

    def generate():
        yield connect()

    async def agenerate():
        yield await sync_to_async(connect)()

    return StreamingHttpResponse(agenerate() if "async" in request.GET else generate())


def stream_in_transaction(request):
    def generate():
        with transaction.atomic():
            Group.objects.create(name="streamed")
            while True:
                yield b"x" * 65536

    return StreamingHttpResponse(generate())


class ToldStream(StreamingHttpResponse):
    """A stream that tells what language is active when it is closed."""

    def close(self):
        probe.tell("closed", translation.get_language())
        super().close()


def stream_language(request):
    translation.activate("fr")

    async def generate():
        yield b"one"

    return ToldStream(generate() if "async" in request.GET else iter([b"one"]))


def wrapped_close(request):
    """A response of which somebody has wrapped the method."""
    response = hello(request)
    close = response.close

    def close_and_tell():
        probe.tell("closed")
        close()

    response.close = close_and_tell
    return response


# --- only synchronous, or only asynchronous -------------------------------------------------


def hold(request):
    """Occupy the thread until the test lets go."""
    probe.tell("held", probe.thread())
    probe.go_on.wait(10)
    return Told("held")


async def wait(request):
    """Wait, occupying nothing, until the test lets go."""
    probe.tell("waiting", request.GET.get("name", ""))
    language = translation.get_language()
    try:
        while not probe.go_on.is_set():
            await asyncio.sleep(0.005)
    except asyncio.CancelledError:
        probe.tell("cancelled")
        await asyncio.sleep(0)
        probe.tell("cleaned up")
        raise
    return Told(f"{language} {translation.get_language()}")


async def swallow(request):
    """Take no notice of being cancelled."""
    probe.tell("waiting")
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        probe.tell("swallowed")
    return Told("swallowed")


async def timeout(request):
    try:
        async with asyncio.timeout(0.01):
            await asyncio.sleep(60)
    except TimeoutError:
        return HttpResponse("timeout")


async def group(request):
    async def one(number):
        await asyncio.sleep(0)
        return number

    async with asyncio.TaskGroup() as tasks:
        made = [tasks.create_task(one(number)) for number in range(3)]
    return HttpResponse(str(sum(task.result() for task in made)))


def calls_async(request):
    async def inner():
        await asyncio.sleep(0)
        return await sync_to_async(probe.thread)()

    return JsonResponse([async_to_sync(inner)(), probe.thread()], safe=False)


async def threads(request):
    """The threads of a sensitive and of an insensitive call."""
    return JsonResponse(
        [await sync_to_async(probe.thread)(), await sync_to_async(probe.thread)()], safe=False
    )


def stream_threads(request):
    """A stream that tells the thread of its sensitive calls."""

    async def generate():
        yield await sync_to_async(probe.thread)()

    return StreamingHttpResponse(generate())


async def job_fails(request):
    def job():
        error = ERRORS[request.GET["kind"]]()
        raise error

    try:
        await sync_to_async(job)()
    except Exception as error:
        return HttpResponse(f"{type(error).__name__} {type(error.__cause__).__name__}")


def connection_identity(request):
    connection.ensure_connection()
    return HttpResponse(str(id(connection.connection)))


async def async_connection_identity(request):
    def look():
        connection.ensure_connection()
        return str(id(connection.connection))

    return HttpResponse(await sync_to_async(look)())


def add_group(request):
    Group.objects.create(name=request.GET["name"])
    if "fail" in request.GET:
        raise ValueError("deliberate")
    return hello(request)


async def async_add_group(request):
    await Group.objects.acreate(name=request.GET["name"])
    probe.tell("added", request.GET["name"])
    if "wait" in request.GET:
        while not probe.go_on.is_set():
            await asyncio.sleep(0.005)
    return hello(request)


async def async_groups(request):
    return JsonResponse([group.name async for group in Group.objects.order_by("name")], safe=False)


async def leave_open(request):
    """Open a transaction by hand and forget about it."""
    await sync_to_async(transaction.atomic().__enter__)()
    await Group.objects.acreate(name="forgotten")
    return hello(request)


async def query_slowly(request):
    """One query that takes a while, by the asynchronous ORM, on the database "other"."""
    await asyncio.sleep(0)
    async for _ in Group.objects.using("other").raw("SELECT 1 AS id, pg_sleep(0.01)"):
        pass
    return hello(request)


async def query_in_bits(request):
    """Iterate over a server-side cursor; wait in the midst of it."""
    found = 0
    async for _ in Group.objects.using("other").aiterator(chunk_size=1):
        found += 1
        if found == 1:
            probe.tell("cursor open")
            while not probe.go_on.is_set():
                await asyncio.sleep(0.005)
    return HttpResponse(str(found))


async def query_once(request):
    count = await Group.objects.using("other").acount()
    return HttpResponse(str(count))

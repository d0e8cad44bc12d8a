"""aiohttp handlers of the test project."""

import asyncio
import json
import threading

from aiohttp import web
from asgiref.sync import sync_to_async
from django.contrib.auth import aauthenticate, alogin, alogout
from django.contrib.auth.models import Permission, User
from django.contrib.sessions.backends.db import SessionStore
from django.core.cache import cache, caches
from django.core.exceptions import PermissionDenied
from django.db import connection, transaction
from django.http import Http404
from django.middleware.csrf import get_token
from django.shortcuts import render
from django.urls import reverse
from django.utils.translation import get_language, gettext

from django_aioserve.auth import (
    activate_language,
    csrf_protect,
    django_request,
    get_session,
    get_user,
    login_required,
    permission_required,
    web_response,
)
from django_aioserve.groups import MessagesLost
from django_aioserve.websocket import EventStream

__all__ = ["Permission", "SessionStore", "User"]

routes = web.RouteTableDef()


@routes.get("/table/{name}/", name="table")
async def table(request):
    return web.Response(text=f"table {request.match_info['name']}")


@routes.post("/form/")
async def posted(request):
    return web.Response(text="posted")


listed = [web.get("/listed/", posted)]


def add(app):
    app.router.add_get("/added/", posted)


def make_sub_application():
    async def where(request):
        user = await get_user(request)
        return web.Response(text=f"sub {request.path} {user}")

    app = web.Application()
    app.router.add_get("/where/", where)
    return app


mounted = ("/sub", make_sub_application)
wrong = 3
bare_application = web.Application()


@web.middleware
async def stamp(request, handler):
    response = await handler(request)
    if not response.prepared:
        response.headers["X-Stamp"] = "outer" if "X-Stamp" not in response.headers else "both"
    return response


STARTED = []


async def starting(app):
    STARTED.append("started")
    yield
    STARTED.append("cleaned")


# --- handlers for aio_path ----------------------------------------------------------------


async def live(request, room):
    here = reverse("live", kwargs={"room": room + 1})
    return web.json_response({"room": room, "match_info": request.match_info["room"], "next": here})


async def any_path(request, **values):
    return web.json_response({key: repr(value) for key, value in sorted(values.items())})


class Things(web.View):
    async def get(self):
        return web.Response(text=f"get {self.request.match_info['pk']!r}")

    async def post(self):
        return web.Response(text="post")

    @login_required
    async def delete(self):
        return web.Response(text="deleted")


async def language(request, **values):
    return web.Response(text=f"{get_language()} {gettext('Yes')}")


async def own_language(request):
    code = activate_language(request)
    return web.Response(text=f"{code} {get_language()} {gettext('Yes')}")


async def echo_socket(request):
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    async for message in socket:
        if message.type is web.WSMsgType.TEXT:
            await socket.send_str(message.data)
    return socket


async def own_limits_socket(request):
    socket = web.WebSocketResponse(max_msg_size=2000, heartbeat=5)
    await socket.prepare(request)
    async for message in socket:
        await socket.send_str(message.data)
    return socket


sockets = [web.get("/sockets/echo/", echo_socket)]


def make_socket_application():
    app = web.Application()
    app.router.add_get("/echo/", echo_socket)
    return app


mounted_sockets = ("/sockets", make_socket_application)


# --- Django inside handlers ---------------------------------------------------------------


async def whoami(request):
    user = await get_user(request)
    again = await get_user(request)
    return web.Response(text=f"{user.get_username() or 'anonymous'} {again is user}")


async def greeting(request):
    if "loaded" in request.query:
        await get_user(request)
    django = django_request(request)
    if "thread" in request.query:
        return web_response(await sync_to_async(render)(django, "greeting.html"))
    return web_response(render(django, "greeting.html"))


async def count(request):
    session = await get_session(request)
    session["count"] = session.get("count", 0) + 1
    return web.Response(text=str(session["count"]))


async def peek(request):
    session = await get_session(request)
    return web.Response(text=str(session.get("count", 0)))


async def both(request):
    session, user, same = await asyncio.gather(
        get_session(request), get_user(request), get_session(request)
    )
    return web.Response(text=f"{session is same} {user}")


async def log_in(request):
    data = await request.post()
    user = await aauthenticate(username=data["username"], password=data["password"])
    if user is None:
        raise web.HTTPForbidden
    await get_session(request)
    await alogin(django_request(request), user)
    return web.Response(text=f"hello {await get_user(request)}")


async def log_out(request):
    await get_session(request)
    await alogout(django_request(request))
    raise web.HTTPFound("/whoami/")


async def count_in_stream(request):
    session = await get_session(request)
    session["count"] = session.get("count", 0) + 1
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(b"counted")
    return response


async def count_in_socket(request):
    session = await get_session(request)
    session["count"] = session.get("count", 0) + 1
    return await echo_socket(request)


@login_required
async def members(request):
    return web.Response(text=f"member {await get_user(request)}")


@login_required(redirect=False)
async def members_api(request):
    return web.Response(text="member")


@login_required
async def members_socket(request):
    return await echo_socket(request)


@permission_required("auth.add_user")
async def adders(request):
    return web.Response(text="may add")


@permission_required(["auth.add_user", "auth.delete_user"])
async def adders_and_deleters(request):
    return web.Response(text="may add and delete")


@permission_required("auth.add_user")
async def adders_socket(request):
    return await echo_socket(request)


@csrf_protect
async def form(request):
    if request.method == "POST":
        data = await request.post()
        return web.Response(text=f"{data['text']} {django_request(request).POST.get('text')}")
    return web.Response(text=get_token(django_request(request)))


# --- database -----------------------------------------------------------------------------


async def users(request):
    names = [user.username async for user in User.objects.order_by("username")]
    return web.json_response(names)


async def chunked_users(request):
    names = []
    async for user in User.objects.order_by("username").aiterator(chunk_size=1):
        names.append(user.username)
        await asyncio.sleep(0)
    return web.json_response(names)


def thread_and_connection():
    connection.ensure_connection()
    return threading.current_thread().name, id(connection.connection)


async def threads(request):
    seen = {await sync_to_async(thread_and_connection)() for _ in range(5)}
    return web.json_response(sorted(seen))


async def counting_socket(request):
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    async for _ in socket:
        await socket.send_str(str(await User.objects.acount()))
    return socket


def _open_transaction():
    transaction.set_autocommit(False)
    User.objects.create(username="never")


async def left_open(request):
    await sync_to_async(_open_transaction)()
    return web.Response(text="left open")


async def too_many_jobs(request):
    await asyncio.gather(*(sync_to_async(thread_and_connection)() for _ in range(5)))
    return web.Response(text="done")


async def cached(request):
    await cache.aadd("count", 0, None)
    return web.Response(text=str(await cache.aincr("count")))


async def cache_objects(request):
    here = caches["default"].number
    at_home = await sync_to_async(lambda: caches["default"].number)()
    return web.json_response({"loop": here, "home": at_home})


async def delete_and_save(request, key):
    session = await get_session(request)
    session["count"] = 1
    await SessionStore().adelete(key)
    return web.Response(text="too late")


async def as_django(request):
    seen = django_request(request)
    return web.json_response(
        {
            "path": seen.path,
            "GET": seen.GET.getlist("a"),
            "host": seen.get_host(),
            "secure": seen.is_secure(),
            "uri": seen.build_absolute_uri(),
        }
    )


# --- exceptions ---------------------------------------------------------------------------


async def fail(request):
    secret = "a local of the handler"
    raise ZeroDivisionError(f"native {len(secret)}")


async def missing(request):
    raise Http404("no such thing")


async def denied(request):
    raise PermissionDenied


async def nothing(request):
    return None


async def fail_in_stream(request):
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(b"half")
    raise ZeroDivisionError("in the stream")


async def fail_in_socket(request):
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    raise ZeroDivisionError("in the socket")


async def refused(request):
    session = await get_session(request)
    session["count"] = 7
    raise web.HTTPConflict


# --- sockets and streams ------------------------------------------------------------------

EVENTS = {}


async def flood_socket(request):
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    EVENTS["flooded"] = 0
    while not socket.closed:
        await socket.send_bytes(b"x" * 65536)
        EVENTS["flooded"] += 1
    return socket


async def deaf_socket(request):
    """Sends nothing and reads nothing: it waits for something that never comes."""
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    EVENTS["deaf"] = "waiting"
    try:
        await asyncio.Event().wait()
    finally:
        EVENTS["deaf"] = "left"
    return socket


async def events(request):
    async with EventStream(request, retry=1.5) as stream:
        EVENTS["events"] = "open"
        start = int(stream.last_event_id or 0)
        for number in range(start + 1, start + 3):
            await stream.send(f"line one\nline {number}", event="tick", id=str(number))
        if "wait" in request.query:
            await asyncio.Event().wait()
    EVENTS["events"] = "left" if stream.ended else "done"
    return stream


async def lingering_events(request):
    async with EventStream(request) as stream:
        await stream.send("one")
    EVENTS["go"] = asyncio.Event()
    EVENTS["stream"] = stream
    await EVENTS["go"].wait()
    return stream


async def fast_heart(request):
    async with EventStream(request, heartbeat=0.02) as stream:
        EVENTS["heart"] = "beating"
        await asyncio.Event().wait()
    EVENTS["heart"] = "stopped"
    return stream


async def flood_events(request):
    async with EventStream(request) as stream:
        EVENTS["sent"] = 0
        while True:
            await stream.send("x" * 65536)
            EVENTS["sent"] += 1
    EVENTS["sent"] = "left"
    return stream


async def wrong_events(request):
    errors = []
    async with EventStream(request) as stream:
        for fields in ({"event": "a\nb"}, {"id": "a\rb"}, {"id": "a\0b"}):
            try:
                await stream.send("", **fields)
            except ValueError as error:
                errors.append(str(error))
        await stream.send(json.dumps(errors))
    return stream


async def failing_events(request):
    async with EventStream(request) as stream:
        await stream.send("one")
        raise ZeroDivisionError
    return stream


async def lost_socket(request):
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_lose())
        async for _ in socket:
            pass
    return socket


async def _lose():
    raise MessagesLost("room")


async def lost_events(request):
    async with EventStream(request) as stream:
        await stream.send("one")
        raise MessagesLost("room")


async def lost_poll(request):
    raise MessagesLost("room")


async def lost_page(request):
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(b"half")
    raise MessagesLost("room")

"""The URLs and native routes that the tests of `django_aioserve.testing` serve."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from aiohttp import web
from django.conf import settings
from django.contrib.auth.models import User
from django.core.handlers.wsgi import WSGIHandler
from django.db import transaction
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect, JsonResponse
from django.urls import path
from django.views.decorators.csrf import csrf_exempt

from django_aioserve import groups
from django_aioserve.auth import get_user

routes = web.RouteTableDef()


def wrapped(environ: dict[str, Any], start_response: Any) -> Any:
    """Serve Django behind WSGI middleware that answers one path itself."""
    if environ["PATH_INFO"] == "/middleware/":
        start_response("200 OK", [("Content-Length", "2")])
        return [b"me"]
    return WSGIHandler()(environ, start_response)


def users(request: HttpRequest) -> HttpResponse:
    return JsonResponse(
        list(User.objects.order_by("pk").values_list("username", flat=True)), safe=False
    )


async def async_users(request: HttpRequest) -> HttpResponse:
    return JsonResponse([user.username async for user in User.objects.order_by("pk")], safe=False)


def me(request: HttpRequest) -> HttpResponse:
    return HttpResponse(request.user.get_username())


def echo(request: HttpRequest) -> HttpResponse:
    if request.FILES:
        return HttpResponse(request.FILES["file"].read())
    return JsonResponse({"method": request.method, "form": request.POST.dict()})


def create(request: HttpRequest) -> HttpResponse:
    with transaction.atomic():
        user = User.objects.create(username=request.POST["name"])
        transaction.on_commit(lambda: groups.send_sync("users", {"name": user.username}))
    return HttpResponse(status=201)


def language(request: HttpRequest) -> HttpResponse:
    return HttpResponse(settings.LANGUAGE_CODE)


def moved(request: HttpRequest) -> HttpResponse:
    return HttpResponseRedirect("/users/")


def broken(request: HttpRequest) -> HttpResponse:
    return HttpResponse("öl".encode("latin-1"), content_type="text/plain; charset=latin-1")


urlpatterns = [
    path("users/", users),
    path("async-users/", async_users),
    path("me/", me),
    path("echo/", echo),
    path("exempt/", csrf_exempt(echo)),
    path("create/", create),
    path("language/", language),
    path("moved/", moved),
    path("latin/", broken),
]


@routes.get("/native/users/")
async def native_users(request: web.Request) -> web.Response:
    return web.json_response([user.username async for user in User.objects.order_by("pk")])


@routes.get("/native/me/")
async def native_me(request: web.Request) -> web.Response:
    return web.Response(text=(await get_user(request)).get_username())


@routes.get("/native/never/")
async def native_never(request: web.Request) -> web.Response:
    await asyncio.sleep(3600)
    return web.Response()


@routes.get("/native/events/")
async def native_events(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    async with groups.subscribe("users") as messages:
        await response.write(b": entered\n")
        async for message in messages:
            await response.write(f"data: {json.dumps(message)}\n".encode())
    return response


@routes.get("/native/echo/")
async def native_echo(request: web.Request) -> web.WebSocketResponse:
    """Give back what comes, until it is told to close."""
    websocket = web.WebSocketResponse(protocols=["chat"])
    await websocket.prepare(request)
    async for message in websocket:
        if message.data == "close":
            await websocket.close(code=4000, message=b"as you wish")
        elif message.type is web.WSMsgType.TEXT:
            await websocket.send_str(message.data)
        else:
            await websocket.send_bytes(message.data)
    return websocket

"""What aiohttp serves without Django: behind this project's server, and on its own."""

import asyncio

from aiohttp import web

#: Seconds between two messages on a connection that stays open.
PAUSE = 5


async def native(request):
    return web.Response(text="pong")


async def socket(request):
    websocket = web.WebSocketResponse()
    await websocket.prepare(request)
    number = 0
    while not websocket.closed:
        await websocket.send_str(f"event {number}")
        number += 1
        try:
            await websocket.receive(timeout=PAUSE)
        except TimeoutError:
            continue
    return websocket


async def events(request):
    from django_aioserve.websocket import EventStream

    async with EventStream(request) as stream:
        for number in range(1000):
            await stream.send(f"event {number}", id=str(number))
            await asyncio.sleep(PAUSE)
    return stream


async def plain_events(request):
    """The same without django-aioserve."""
    stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await stream.prepare(request)
    for number in range(1000):
        await stream.write(f"id: {number}\ndata: event {number}\n\n".encode())
        await asyncio.sleep(PAUSE)
    return stream


_both = [web.get("/native/", native), web.get("/native/socket/", socket)]

#: AIOSERVE_ROUTES.
routes = [*_both, web.get("/native/events/", events)]


async def make_app():
    app = web.Application()
    # No Django answers here: what is asked for beside open connections is a handler, too.
    app.add_routes([*_both, web.get("/native/events/", plain_events), web.get("/ping/", native)])
    return app

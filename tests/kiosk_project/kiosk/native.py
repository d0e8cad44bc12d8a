"""Native aiohttp routes of the kiosk."""

import asyncio

from aiohttp import web

routes = web.RouteTableDef()


@routes.get("/ws/")
async def echo(request):
    """Echo each message; at the end do what takes some time."""
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    async for message in socket:
        if message.type is web.WSMsgType.TEXT:
            await socket.send_str(message.data)
    await asyncio.sleep(float(request.query.get("farewell", "0")))
    print("Farewell", flush=True)
    return socket


async def stays(app):
    """Come to no end."""
    yield
    await asyncio.sleep(3600)

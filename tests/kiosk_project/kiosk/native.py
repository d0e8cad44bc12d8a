"""Native aiohttp routes of the kiosk."""

import asyncio

from aiohttp import web

routes = web.RouteTableDef()


@routes.get("/ws/")
async def echo(request):
    """Echo each message."""
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    async for message in socket:
        if message.type is web.WSMsgType.TEXT:
            await socket.send_str(message.data)
    return socket


async def stays(app):
    """Come to no end."""
    yield
    await asyncio.sleep(3600)

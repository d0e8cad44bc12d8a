"""AIOSERVE_ROUTES: a route that Django's URLconf does not know."""

from aiohttp import web

routes = web.RouteTableDef()


@routes.get("/native/ping/")
async def ping(request):
    """The least a native handler can do."""
    return web.Response(text="pong")


@routes.post("/native/length/")
async def length(request):
    """How long the body is."""
    return web.Response(text=str(len(await request.read())))

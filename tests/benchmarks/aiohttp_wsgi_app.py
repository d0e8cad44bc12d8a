"""testproject on aiohttp-wsgi, for aiohttp's own Gunicorn worker."""

from concurrent.futures import ThreadPoolExecutor

from aiohttp import web
from aiohttp_wsgi import WSGIHandler


async def make_app():
    from testproject.wsgi import application

    app = web.Application()
    handler = WSGIHandler(application, executor=ThreadPoolExecutor(8))
    app.router.add_route("*", "/{path_info:.*}", handler)
    return app

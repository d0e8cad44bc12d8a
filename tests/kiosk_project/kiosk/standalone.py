"""The kiosk served by aiohttp alone."""

import socket

from aiohttp import web

from kiosk.aio import app

if __name__ == "__main__":
    listener = socket.create_server(("127.0.0.1", 0))
    print(f"Listening at: http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    web.run_app(app, sock=listener, print=None)

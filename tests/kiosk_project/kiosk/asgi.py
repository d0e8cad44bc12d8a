"""The kiosk as an ASGI application, with a WebSocket beside Django."""

import asyncio
import os
from urllib.parse import parse_qs

from django.core.asgi import get_asgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "kiosk.settings")
django = get_asgi_application()

from kiosk.boot import boot  # noqa: E402

boot()


async def application(scope, receive, send):
    """Echo on WebSockets, as the native route does, and Django for the rest."""
    if scope["type"] == "http":
        await django(scope, receive, send)
    elif scope["type"] == "lifespan":
        while (message := await receive())["type"] != "lifespan.shutdown":
            await send({"type": f"{message['type']}.complete"})
        await send({"type": "lifespan.shutdown.complete"})
    else:
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": message.get("text") or ""})
        farewell = parse_qs(scope["query_string"]).get(b"farewell", [b"0"])
        await asyncio.sleep(float(farewell[0]))
        print("Farewell", flush=True)

"""What is asked of the servers, and what is claimed of the outcome."""

import json
from dataclasses import dataclass

from tests.benchmarks.environment import STATIC_FILES
from tests.benchmarks.native import PAUSE
from tests.benchmarks.servers import (
    ASGI_SERVERS,
    ASYNCHRONOUS,
    GENERAL,
    GRANIAN_WSGI,
)

MEGABYTE = 1 << 20
PEERS = tuple(name for name in GENERAL if name != "aioserve")
OWN_THREADS = ("aioserve-1", "aioserve-64")


def _is(text):
    return lambda body: body == text


def _has(text):
    return lambda body: text in body


def _weighs(size):
    return lambda body: len(body) == size


@dataclass(frozen=True)
class Load:
    """Requests for `path` by so many `clients`; `correct` judges the body of an answer.

    `setup` names what the servers are started with: a database, or what makes them special.
    Where a client waits long for an answer the run is so many times `longer` than others.
    """

    name: str
    title: str
    path: str
    correct: object
    servers: tuple[str, ...] = GENERAL
    clients: int = 32
    setup: str = "sqlite"
    upload: bool = False
    longer: int = 1


@dataclass(frozen=True)
class Opening:
    """`count` connections that stay open; each has begun when `begun` has arrived on it."""

    path: str
    begun: bytes
    websocket: bool = False
    count: int = 2000


@dataclass(frozen=True)
class Streams:
    """Connections that stay open while a trivial view is asked for as `aside`."""

    name: str
    title: str
    openings: tuple[Opening, ...]
    servers: tuple[str, ...]
    aside: str = "/ping/"
    setup: str = "native"


_NATIVE = ("aioserve-native", "aiohttp")
_SYNC = ("/ping/", _is(b"pong"))
_ASYNC = ("/ping-async/", _is(b"pong"))
_COST = ("aioserve", *OWN_THREADS, "granian-wsgi-8")
_ORM = _has(b'"messages": [{')
_STATIC = ("aioserve", "whitenoise-gthread", "whitenoise-uvicorn", "nginx")
_EVENTS = Opening(f"/events/?count=1000&pause={PAUSE}", b"event 0")
_NATIVE_EVENTS = Opening("/native/events/", b"event 0")
_SOCKETS = Opening("/native/socket/", b"event 0", websocket=True)

LOADS = (
    Load("sync", "Trivial sync view", *_SYNC, (*GENERAL, *OWN_THREADS)),
    Load("async", "Trivial async view", *_ASYNC, (*GENERAL, *OWN_THREADS)),
    Load("json", "JSON, sync view", "/json/", lambda body: json.loads(body)["count"] == 10),
    Load("orm-sync", "ORM, sync view, SQLite", "/orm/", _ORM),
    Load("orm-async", "ORM, async view, SQLite", "/orm-async/", _ORM),
    Load("wait-sync", "50 ms wait, sync view, 256 clients", "/slow/?seconds=0.05", _has(b"slept"),
         clients=256, longer=2),
    Load("wait-async", "50 ms wait, async view, 256 clients", "/slow-async/?seconds=0.05",
         _has(b"slept"), clients=256, longer=2),
    Load("upload", "Upload of 1 MB", "/echo/", _has(b'"length": 1048576'), upload=True),
    Load("response", "Response of 1 MB", "/megabyte/", _weighs(MEGABYTE)),
    Load("stream", "Stream of 10 MB", "/big-stream/", _weighs(10 * MEGABYTE)),
    Load("file", "File of 10 MB", "/big-file/", _weighs(10 * MEGABYTE)),
    Load("sync-1", "Trivial sync view, 1 client", *_SYNC, _COST, clients=1),
    Load("async-1", "Trivial async view, 1 client", *_ASYNC, _COST, clients=1),
    Load("sync-256", "Trivial sync view, 256 clients", *_SYNC, _COST, clients=256),
    Load("async-256", "Trivial async view, 256 clients", *_ASYNC, _COST, clients=256),
    Streams("streams", "2,000 event streams, async view", (_EVENTS,), ASYNCHRONOUS,
            setup="sqlite"),
    Load("native", "Native aiohttp route", "/native/", _is(b"pong"), _NATIVE, setup="native"),
    Streams("native-streams", "2,000 event streams, native route", (_NATIVE_EVENTS,), _NATIVE),
    Streams("sockets", "2,000 WebSockets, native route", (_SOCKETS,), _NATIVE),
    Streams("both", "2,000 event streams and 2,000 WebSockets, native routes",
            (_NATIVE_EVENTS, _SOCKETS), _NATIVE),
    *(
        Load(f"static-{name.partition('.')[0]}", f"Static file of {title}",
             f"/static/bench/{name}", _weighs(STATIC_FILES[name]), _STATIC, setup="static")
        for name, title in (("2k.css", "2 KB"), ("20k.css", "20 KB"), ("1m.css", "1 MB"))
    ),
    Load("pg-sync", "ORM, sync view, PostgreSQL", "/orm/", _ORM, setup="postgres"),
    Load("pg-async", "ORM, async view, PostgreSQL", "/orm-async/", _ORM, setup="postgres"),
)  # fmt: skip

#: The loads whose CPU per request shows how the cost grows, by view and clients.
COST = {
    "sync": {1: "sync-1", 32: "sync", 256: "sync-256"},
    "async": {1: "async-1", 32: "async", 256: "async-256"},
}

#: Who is compared with the peers where a load is not for "aioserve".
OURS = ("aioserve", "aioserve-native")


@dataclass(frozen=True)
class Claim:
    """That this project is `at_least` so many times as fast as the best of `peers`."""

    load: str
    against: str
    peers: tuple[str, ...]
    at_least: float


_GRANIAN = ("Granian WSGI, its better setting", GRANIAN_WSGI)
_GTHREAD = ("Gunicorn gthread, 8 threads", ("gunicorn-gthread",))
_BEST_ASGI = ("the best ASGI server", ASGI_SERVERS)
_BEST = ("the best peer", PEERS)

CLAIMS = (
    Claim("sync", *_GRANIAN, 1.1),
    Claim("json", *_GRANIAN, 1.1),
    Claim("sync", *_GTHREAD, 1.9),
    Claim("json", *_GTHREAD, 1.9),
    Claim("orm-sync", *_GRANIAN, 1.0),
    Claim("pg-sync", *_GRANIAN, 1.0),
    Claim("async", *_BEST_ASGI, 8.0),
    Claim("async", *_GRANIAN, 3.0),
    Claim("orm-async", *_BEST_ASGI, 4.0),
    Claim("wait-async", *_BEST_ASGI, 10.0),
    Claim("upload", *_BEST, 1.0),
    Claim("stream", *_BEST, 1.0),
    Claim("response", *_BEST, 1.0),
    Claim("file", *_GTHREAD, 1.5),
    Claim("native", "aiohttp alone, same loop", ("aiohttp",), 0.9),
)

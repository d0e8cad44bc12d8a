"""The environ: what Gunicorn's sync worker gives, and what a production site needs beyond."""

from __future__ import annotations

import asyncio
import json
import random
import time
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web
from gunicorn.config import Config as GunicornConfig
from gunicorn.http import wsgi as gunicorn_wsgi
from gunicorn.http.errors import ParseException
from gunicorn.http.message import Request as GunicornRequest
from gunicorn.http.unreader import IterUnreader

from django_aioserve.bridge.environ import ProxyTrust, RequestMeta, split_target
from django_aioserve.bridge.threads import ThreadPool
from django_aioserve.bridge.wsgi import WSGIBridge
from django_aioserve.conf import Config
from tests.support import AppServer, RawConnection, raw

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Serve = Callable[..., AppServer]


def show_environ(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    """A WSGI application that answers with the texts of its environ."""
    environ["wsgi.input"].read()
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps({k: v for k, v in environ.items() if isinstance(v, str)}).encode()]


@pytest.fixture
def serve(app_server: Callable[..., AppServer]) -> Serve:
    """Serve `show_environ`: `serve("/mount/{path_info:.*}", prefix="/app", ...)`."""

    def start(
        mount: str = "/{path_info:(?s:.*)}",
        *,
        prefix: str = "",
        server: dict[str, Any] | None = None,
        **options: Any,
    ) -> AppServer:
        async def factory() -> web.Application:
            config = Config(**{"threads": 1, **options})
            pool = ThreadPool(config.threads, config.queue_size)
            app = web.Application()
            app.router.add_route("*", mount, WSGIBridge(show_environ, config, pool).handle)
            root = app
            if prefix:
                root = web.Application()
                root.add_subapp(prefix, app)

            async def close_pool(_: web.Application) -> None:
                pool.close()
                await pool.join(10)

            root.on_cleanup.append(close_pool)
            return root

        return app_server(factory, **(server or {}))

    return start


def environ_of(server: AppServer, data: bytes) -> dict[str, str]:
    """The environ of one request of the given bytes; AssertionError if it is not answered 200."""
    with server.connect() as connection:
        connection.send(data)
        response = connection.read_response()
        assert response.status == 200, response
        return json.loads(response.body)


def get(target: bytes, *headers: bytes) -> bytes:
    lines = [b"GET %b HTTP/1.1" % target, b"Host: example.com", *headers, b"", b""]
    return b"\r\n".join(lines)


# --- as Gunicorn's sync worker ------------------------------------------------------------

PEER, HERE = ("127.0.0.1", 40000), ("127.0.0.1", 8000)

#: Documented differences: the length of a chunked body is known; cookies are joined as
#: RFC 6265 has it; these have to do with the connection or are not Gunicorn's.
OURS = {"REQUEST_URI", "SERVER_SOFTWARE", "REMOTE_PORT", "SERVER_PORT"}


def gunicorn_environ(data: bytes) -> dict[str, str]:
    """What Gunicorn makes of the request; ParseException if it refuses it."""
    config = GunicornConfig()
    request = GunicornRequest(config, IterUnreader(iter([data])), PEER)
    _, environ = gunicorn_wsgi.create(request, None, PEER, HERE, config)
    return {key: value for key, value in environ.items() if isinstance(value, str)}


def compare(ours: dict[str, str], data: bytes) -> None:
    theirs = gunicorn_environ(data)
    for key in OURS:
        ours.pop(key, None)
        theirs.pop(key, None)
    assert ours == theirs, data


TARGETS = [
    b"/",
    b"/plain",
    b"/?",
    b"/?a=b&c=%20d+e",
    b"/a?b?c",
    b"/%E2%82%AC",
    b"/%FF%fe",
    b"/%C3",
    b"/a%2Fb",
    b"/a%252Fb",
    b"/%00",
    b"/a%0D%0Ab",
    b"/%7F",
    b"//",
    b"//double//slashes//",
    b"//host:80/path",
    b"//user:pass@host/path",
    b"/../a/./b/%2e%2e",
    b"/;params=1;x",
    b"/%",
    b"/%zz%1",
    b"/a:b@c",
    b"/[x]",
    b"//[x",
    b'/a|b{c}^`"<>\\',
    b"/~user!$&'()*+,=",
    b"/a#fragment",
    b"/a?b#fragment?c",
    b"/a#b?c",
    b"/?%E2%82%AC=%FF",
    b"/?a=//b",
    b"/http://example.com/",
]


@pytest.mark.parametrize("target", TARGETS)
def test_line_30_the_path_is_what_gunicorn_gives(serve, target):
    data = get(target)
    compare(environ_of(serve(), data), data)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.0\r\n\r\n",
        b"GET / HTTP/1.0\r\nHost: a\r\n\r\n",
        b"OPTIONS /x HTTP/1.1\r\nHost: a\r\n\r\n",
        b"PROPFIND /x HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Type: a/b\r\nContent-Length: 0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc",
        b"POST / HTTP/1.1\r\nHost: a\r\n\r\n",
        get(b"/", b"X-A: 1", b"X-A: 2", b"x-a:3", b"X-A:"),
        get(b"/", b"X-Empty:", b"X-Space:  a\t b \t"),
        get(b"/", b"X-Utf8: caf\xc3\xa9", b"X-Latin1: caf\xe9", b"X-Bytes: \x80\xff"),
        get(b"/", b"Connection: keep-alive, x", b"TE: trailers", b"Keep-Alive: 5"),
        get(b"/", b"Upgrade: h2c", b"Connection: Upgrade", b"HTTP2-Settings: AAAA"),
        get(b"/", b"X_Auth_User: evil", b"X-Auth-User: good", b"Content_Length: 5"),
        get(b"/", b"!#$%&'*+-.^`|~: tokens"),
        get(b"/", b"X-Forwarded-Proto: https"),
        get(b"/", b"X-Forwarded-Protocol: ssl"),
        get(b"/", b"X-Forwarded-Ssl: on"),
        get(b"/", b"X-Forwarded-Ssl: off"),
        get(b"/", b"X-Forwarded-Proto: http"),
        get(b"/", b"X-Forwarded-Proto: https", b"X-Forwarded-Ssl: on"),
    ],
    ids=repr,
)
def test_everything_else_is_what_gunicorn_gives(serve, data):
    compare(environ_of(serve(), data), data)


def odd_request(choose: random.Random) -> bytes:
    """A request with an odd, though not malformed, target and odd headers."""
    alphabet = "abcXYZ019-._~!$&'()*+,;=:@/?%#[]|\\^`{}\"<>"
    escapes = [f"%{byte:02x}" for byte in range(256)] + ["%", "%4", "%zz", "//", "/../", "%2F"]
    target = "/" + "".join(
        choose.choice(escapes) if choose.random() < 0.4 else choose.choice(alphabet)
        for _ in range(choose.randrange(12))
    )
    names = ["X-A", "x-a", "X-a_b", "Accept", "Content-Type", "Via", "X-Long-Name" * 8, "Date"]
    values = [b"", b"a, b", b"\xe2\x82\xac", b"\xff\x80", b'"q;="', b"a\tb", b"=?utf-8?q?x?="]
    headers = {
        choose.choice(names).encode(): choose.choice(values) for _ in range(choose.randrange(6))
    }
    lines = [b"%b: %b" % pair for pair in headers.items()]
    method = choose.choice(["GET", "DELETE", "POST", "OPTIONS", "PUT"])
    return get(target.encode(), *lines).replace(b"GET", method.encode(), 1)


def test_odd_requests_are_what_gunicorn_makes_of_them(serve):
    choose = random.Random(30)
    compared = 0
    with serve().connect() as connection:
        for _ in range(500):
            data = odd_request(choose)
            try:
                gunicorn_environ(data)
            except ParseException:
                continue
            connection.send(data)
            compare(json.loads(connection.read_response().body), data)
            compared += 1
    assert compared > 250


# --- beyond Gunicorn ----------------------------------------------------------------------


def test_line_8_the_authority_of_an_absolute_target_is_the_host(serve):
    environ = environ_of(serve(), get(b"http://other.example:81/a%20b?c"))
    assert environ["HTTP_HOST"] == "other.example:81"
    assert environ["PATH_INFO"] == "/a b"
    assert environ["QUERY_STRING"] == "c"
    assert environ["RAW_URI"] == environ["REQUEST_URI"] == "http://other.example:81/a%20b?c"
    assert environ["wsgi.url_scheme"] == "http"


def test_line_8_an_absolute_target_does_not_tell_the_scheme(serve):
    assert environ_of(serve(), get(b"https://example.com/"))["wsgi.url_scheme"] == "http"


def test_line_8_user_information_in_the_target_is_refused(serve):
    server = serve()
    assert raw(server.address, get(b"http://user@example.com/", b"Connection: close")).startswith(
        b"HTTP/1.1 400 "
    )


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("*", ("*", "", None)),
        ("http://a", ("", "", "a")),
        ("http://a?b", ("", "b", "a")),
        ("http://a/b?c#d", ("/b", "c", "a")),
        ("http://[::1]:80/", ("/", "", "[::1]:80")),
        ("example.com:443", ("example.com:443", "", None)),
        ("/x?y://z", ("/x", "y://z", None)),
    ],
)
def test_each_form_of_target_is_split(target, expected):
    assert split_target(target) == expected


def test_line_24_names_with_underscores_are_dropped(serve):
    environ = environ_of(
        serve(), get(b"/", b"X_Auth_User: evil", b"X-Auth-User: good", b"X-Auth_User: evil")
    )
    assert environ["HTTP_X_AUTH_USER"] == "good"


def test_line_25_proxy_is_dropped(serve):
    assert "HTTP_PROXY" not in environ_of(serve(), get(b"/", b"Proxy: http://evil", b"pRoXy: x"))


def test_line_28_thousands_of_repeated_headers_take_linear_time(serve):
    server = serve(server={"max_headers": 100_000})

    def seconds(count: int) -> float:
        data = get(b"/", *[b"X-A: value"] * count)
        best = 10.0
        for _ in range(3):
            start = time.perf_counter()
            environ = environ_of(server, data)
            best = min(best, time.perf_counter() - start)
            assert environ["HTTP_X_A"] == ",".join(["value"] * count)
        return best

    # Ten times the work; quadratic time would take a hundred times as long.
    assert seconds(40_000) < 40 * seconds(4_000)


def test_line_29_cookies_are_joined_with_a_semicolon(serve):
    environ = environ_of(serve(), get(b"/", b"Cookie: a=1", b"cookie: b=2; c=3", b"COOKIE: d"))
    assert environ["HTTP_COOKIE"] == "a=1; b=2; c=3; d"


def test_the_length_of_a_chunked_body_is_told(serve):
    data = (
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    )
    environ = environ_of(serve(), data)
    assert environ["CONTENT_LENGTH"] == "5"
    assert environ["HTTP_TRANSFER_ENCODING"] == "chunked"


def test_many_distinct_header_names_do_not_fill_the_memory(serve):
    server = serve()
    with server.connect() as connection:
        for number in range(0, 3000, 100):
            headers = [(f"X-{n}", "v") for n in range(number, number + 100)]
            environ = json.loads(connection.request("GET", "/", headers).body)
            assert environ[f"HTTP_X_{number}"] == "v"
    meta = RequestMeta(ProxyTrust([]), {})
    for number in range(3000):
        assert meta._plain_names[b"X-%d" % number] == f"HTTP_X_{number}"
    assert len(meta._plain_names) <= 1024


# --- line 26: forwarded headers -----------------------------------------------------------

FORWARDED = [
    b"X-Forwarded-For: 203.0.113.9",
    b"X-Forwarded-Proto: https",
    b"X-Forwarded-Host: evil.example",
    b"X-Forwarded-Port: 81",
    b"Forwarded: for=203.0.113.9;proto=https",
]


def test_line_26_forwarded_headers_of_a_stranger_are_stripped(serve):
    environ = environ_of(serve(forwarded_allow_ips=("10.0.0.0/8",)), get(b"/", *FORWARDED))
    assert environ["REMOTE_ADDR"] == "127.0.0.1"
    assert environ["wsgi.url_scheme"] == "http"
    assert not [key for key in environ if "FORWARDED" in key]


@pytest.mark.parametrize("allowed", [("127.0.0.1",), ("127.0.0.0/8",), ("*",)])
def test_line_26_forwarded_headers_of_a_trusted_proxy_count(serve, allowed):
    environ = environ_of(serve(forwarded_allow_ips=allowed), get(b"/", *FORWARDED))
    assert environ["REMOTE_ADDR"] == "203.0.113.9"
    assert environ["REMOTE_PORT"] == "0"
    assert environ["wsgi.url_scheme"] == "https"
    assert environ["HTTP_X_FORWARDED_HOST"] == "evil.example"
    assert environ["HTTP_FORWARDED"] == "for=203.0.113.9;proto=https"


@pytest.mark.parametrize(
    ("headers", "scheme"),
    [
        ([b"X-Forwarded-Proto: HTTPS"], "https"),
        ([b"X-Forwarded-Proto: https, http"], "https"),
        ([b"X-Forwarded-Proto: http, https"], "http"),
        ([b"X-Forwarded-Scheme: https"], "https"),
        ([b"X-Forwarded-Proto: https", b"X-Forwarded-Proto: https"], "https"),
        ([b"X-Forwarded-Proto: nonsense"], "http"),
    ],
)
def test_a_trusted_proxy_tells_the_scheme(serve, headers, scheme):
    assert environ_of(serve(), get(b"/", *headers))["wsgi.url_scheme"] == scheme


@pytest.mark.parametrize(
    "headers",
    [
        [b"X-Forwarded-Proto: https", b"X-Forwarded-Ssl: off"],
        [b"X-Forwarded-Proto: https", b"X-Forwarded-Proto: http"],
        [b"X-Forwarded-Protocol: ssl", b"X-Forwarded-Scheme: http"],
    ],
)
def test_contradictory_schemes_are_refused(serve, headers):
    answer = raw(serve().address, get(b"/", *headers, b"Connection: close"))
    assert answer.startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    ("allowed", "forwarded_for", "client"),
    [
        (("10.0.0.1",), "203.0.113.9", "203.0.113.9"),
        (("10.0.0.1",), "198.51.100.1, 203.0.113.9", "203.0.113.9"),
        (("10.0.0.0/8",), "198.51.100.1, 203.0.113.9, 10.0.0.7", "203.0.113.9"),
        (("10.0.0.0/8",), "10.0.0.9, 10.0.0.7", "10.0.0.9"),
        (("*",), "198.51.100.1, 203.0.113.9", "203.0.113.9"),
        (("10.0.0.1",), "203.0.113.9:4711", "203.0.113.9"),
        (("10.0.0.1",), "[2001:db8::1]:4711", "2001:db8::1"),
        (("10.0.0.1",), "2001:DB8::0:1", "2001:db8::1"),
        (("10.0.0.1",), "unknown", None),
        (("10.0.0.1",), "", None),
        (("10.0.0.0/8",), "203.0.113.9, <script>, 10.0.0.7", "10.0.0.7"),
        (
            ("2001:db8::/32", "10.0.0.0/8"),
            "203.0.113.9, 2001:db8::7, ::ffff:10.0.0.1",
            "203.0.113.9",
        ),
    ],
)
def test_the_client_is_the_first_address_that_is_no_proxy(allowed, forwarded_for, client):
    assert ProxyTrust(allowed).client(forwarded_for) == client


def test_a_chain_of_proxies_is_followed_so_far(serve):
    trust = ProxyTrust(["10.0.0.0/8"])
    assert trust.client("203.0.113.9" + ",10.0.0.1" * 31) == "203.0.113.9"
    assert trust.client("203.0.113.9" + ",10.0.0.1" * 100_000) == "10.0.0.1"


@pytest.mark.parametrize(
    ("allowed", "address", "trusted"),
    [
        ((), "127.0.0.1", False),
        ((), None, False),
        (("unix",), None, True),
        (("unix",), "127.0.0.1", False),
        (("*",), None, True),
        (("*",), "anything", True),
        (("127.0.0.1",), None, False),
        (("10.0.0.0/8",), "::ffff:10.1.2.3", True),
        (("::1",), "::1", True),
        (("::1",), "fe80::1%eth0", False),
        (("::1",), "not an address", False),
    ],
)
def test_who_is_trusted(allowed, address, trusted):
    assert ProxyTrust(allowed).trusts(address) is trusted


def test_what_is_no_network_is_refused():
    with pytest.raises(ValueError, match="localhost"):
        ProxyTrust(["localhost"])


# --- line 27: Unix sockets ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "name", "port"),
    [
        (b"Host: example.com", "example.com", "80"),
        (b"Host: example.com:8443", "example.com", "8443"),
        (b"Host: [::1]:8000", "[::1]", "8000"),
        (b"Host: [::1]", "[::1]", "80"),
        (b"Host:", "localhost", "80"),
        (b"Host: example.com:x", "example.com", "80"),
        (b"Host: example.com\r\nX-Forwarded-Proto: https", "example.com", "443"),
    ],
)
def test_line_27_a_unix_socket_has_valid_addresses(serve, tmp_path: Path, host, name, port):
    server = serve(server={"unix": str(tmp_path / "s")})
    environ = environ_of(server, b"GET / HTTP/1.1\r\n" + host + b"\r\n\r\n")
    assert (environ["SERVER_NAME"], environ["SERVER_PORT"]) == (name, port)
    assert environ["REMOTE_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize(("allowed", "client"), [(("unix",), "203.0.113.9"), ((), "127.0.0.1")])
def test_a_proxy_on_a_unix_socket_may_be_trusted(serve, tmp_path, allowed, client):
    server = serve(server={"unix": str(tmp_path / "s")}, forwarded_allow_ips=allowed)
    assert environ_of(server, get(b"/", *FORWARDED))["REMOTE_ADDR"] == client


# --- line 31: mount points ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("mount", "prefix", "target", "script_name", "path_info"),
    [
        ("/{path_info:.*}", "", b"/", "", "/"),
        ("/{path_info:.*}", "", b"//a", "", "//a"),
        ("/app{path_info:.*}", "", b"/app", "/app", ""),
        ("/app{path_info:.*}", "", b"/app/", "/app", "/"),
        ("/app{path_info:.*}", "", b"/app//x%2Fy", "/app", "//x/y"),
        ("/app/{path_info:.*}", "", b"/app/x", "/app", "/x"),
        ("/app/{path_info:.*}", "", b"/%61pp/x", "/app", "/x"),
        ("/{path_info:.*}", "/sub", b"/sub/x", "/sub", "/x"),
        ("/{path_info:.*}", "/sub", b"/sub/", "/sub", "/"),
        # aiohttp finds no route whose fixed part needs escapes; as a variable part it does.
        ("/{at:caf\xe9 x}{path_info:.*}", "", b"/caf%C3%A9%20x/y%FF", "/caf\xc3\xa9 x", "/y\xff"),
        ("/{tenant}/app{path_info:.*}", "", b"/caf%C3%A9/app/x", "/caf\xc3\xa9/app", "/x"),
        ("/{tenant}/app{path_info:.*}", "", b"/a%2Fb/app/x", "/a/b/app", "/x"),
        ("/{tail:.*}", "", b"/anything/x", "", "/anything/x"),
        ("/fixed", "", b"/fixed", "", "/fixed"),
    ],
)
def test_line_31_script_name_is_the_mount_point(
    serve, mount, prefix, target, script_name, path_info
):
    environ = environ_of(serve(mount, prefix=prefix), get(target))
    assert (environ["SCRIPT_NAME"], environ["PATH_INFO"]) == (script_name, path_info)


def test_line_31_a_longer_name_is_not_below_the_mount_point(serve):
    assert serve("/app{path_info:.*}").get("/apple").status == 404


def test_a_newline_in_the_path_reaches_the_application(serve):
    assert environ_of(serve(), get(b"/a%0Ab"))["PATH_INFO"] == "/a\nb"


def test_a_bare_server_has_no_mount_point():
    async def run() -> dict[str, str]:
        pool = ThreadPool(1, 1)
        bridge = WSGIBridge(show_environ, Config(), pool)
        loop = asyncio.get_running_loop()
        server = await loop.create_server(web.Server(bridge.handle), "127.0.0.1", 0)
        async with server:
            address = server.sockets[0].getsockname()
            data = b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n"
            return await asyncio.to_thread(one, address, data)

    def one(address: Any, data: bytes) -> dict[str, str]:
        with RawConnection(address) as connection:
            connection.send(data)
            return json.loads(connection.read_response().body)

    environ = asyncio.run(run())
    assert (environ["SCRIPT_NAME"], environ["PATH_INFO"]) == ("", "*")


# --- ASGI ---------------------------------------------------------------------------------


def test_headers_for_asgi_follow_the_same_rules(app_server):
    meta = RequestMeta(ProxyTrust([]), {})
    seen = []

    async def handler(request: web.Request) -> web.Response:
        origin = meta.origin(request)
        seen.append((meta.headers(request, trusted=origin.trusted), origin.remote_addr))
        return web.Response()

    async def factory() -> web.Application:
        app = web.Application()
        app.router.add_get("/", handler)
        return app

    server = app_server(factory)
    raw(
        server.address,
        get(
            b"http://real.example/",
            *FORWARDED,
            b"X_A: evil",
            b"Proxy: evil",
            b"X-A: \xff",
            b"Connection: close",
        ),
    )
    assert seen == [
        ([(b"x-a", b"\xff"), (b"connection", b"close"), (b"host", b"real.example")], "127.0.0.1")
    ]

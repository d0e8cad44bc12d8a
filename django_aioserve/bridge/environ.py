"""What an HTTP request is to Django, to WSGI and to ASGI.

Rules:

1. The path is what the client sent: bytes, percent-decoded once, shown as latin-1
   (PEP 3333). ``//``, ``%2F``, ``%00`` and bytes that are no UTF-8 stay as they are.
2. Of an absolute-form target the authority is the Host, whatever the Host header says
   (RFC 9112, 3.2.2).
3. A header name with an underscore is dropped, for it would be taken for another one;
   so is ``Proxy``, which would become the HTTP_PROXY of the programs that Django starts.
4. Repeated headers are joined with a comma, cookies with a semicolon (RFC 6265, 5.4).
5. ``X-Forwarded-*`` and ``Forwarded`` count when they come from a trusted peer. From
   any other peer they are removed, so that nothing behind can be misled by them.
"""

from __future__ import annotations

import ipaddress
import sys
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote_to_bytes

from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from aiohttp.web_urldispatcher import AbstractResource

    from django_aioserve.conf import Config

__all__ = ["Origin", "ProxyTrust", "RequestMeta", "Target", "request_meta", "split_target"]

#: What a trusted proxy says when its client came by TLS: Gunicorn's
#: ``secure_scheme_headers``, and X-Forwarded-Scheme, which some ingresses send instead.
_SCHEME_HEADERS = {
    "HTTP_X_FORWARDED_PROTO": ("X-Forwarded-Proto", "https"),
    "HTTP_X_FORWARDED_PROTOCOL": ("X-Forwarded-Protocol", "ssl"),
    "HTTP_X_FORWARDED_SCHEME": ("X-Forwarded-Scheme", "https"),
    "HTTP_X_FORWARDED_SSL": ("X-Forwarded-Ssl", "on"),
}

#: How many proxies in a row are believed in X-Forwarded-For.
_MOST_HOPS = 32

#: How many translations of header names are kept, and how long a name may be for that.
_MOST_NAMES = 1024
_LONGEST_NAME = 64

_FORWARDED_FOR = b"x-forwarded-for"
_PROTOCOLS = {(1, 1): "HTTP/1.1", (1, 0): "HTTP/1.0"}
_DEFAULT_PORTS = {"http": "80", "https": "443"}


class Target(NamedTuple):
    """A request target, still percent-encoded (RFC 9112, 3.2)."""

    path: str
    query: str
    authority: str | None
    """``host[:port]`` of an absolute-form target, else None."""


def split_target(target: str) -> Target:
    """Split a request target the way Gunicorn's sync worker does.

    Raises HTTPBadRequest for an absolute-form target with user information in it
    (RFC 9110, 4.2.4).
    """
    if "#" in target:
        target = target.partition("#")[0]
    path, _, query = target.partition("?")
    if path[:1] == "/":
        return Target(path, query, None)
    _, separator, rest = path.partition("://")
    if not separator:
        return Target(path, query, None)
    authority, slash, path = rest.partition("/")
    if "@" in authority:
        raise web.HTTPBadRequest(text="400: user information in the request target")
    return Target(slash + path, query, authority)


class Origin(NamedTuple):
    """The two ends of a connection, and whether the peer is a trusted proxy."""

    remote_addr: str
    remote_port: str
    server_name: str
    """Empty on a Unix socket."""
    server_port: str
    trusted: bool


class ProxyTrust:
    """Which peers are proxies whose ``X-Forwarded-*`` headers are to be believed.

    ``forwarded_allow_ips`` holds IP addresses, networks in CIDR notation, ``"unix"`` for
    every peer on a Unix socket, or ``"*"`` for every peer. Raises ValueError for
    anything else.

    .. versionadded:: 0.1
    """

    def __init__(self, forwarded_allow_ips: Iterable[str]) -> None:
        allowed = set(forwarded_allow_ips)
        self._everyone = "*" in allowed
        self._unix = self._everyone or "unix" in allowed
        self._networks = [ipaddress.ip_network(item) for item in allowed - {"*", "unix"}]
        #: Whether the peer at this address is trusted; None stands for a Unix socket.
        self.trusts = lru_cache(maxsize=4096)(self._trusts)

    def client(self, forwarded_for: str) -> str | None:
        """The client's address out of the ``X-Forwarded-For`` of a trusted peer.

        Each proxy appends the address it was called from, so the list is read from the
        right, past the proxies that are trusted, to the first address that is not: what
        stands to the left of it may be anybody's invention. With ``"*"`` nobody can say
        which of the addresses are proxies; the one that the peer itself wrote is
        taken. None when there is no valid address where one is needed.
        """
        found = None
        for item in reversed(forwarded_for.rsplit(",", _MOST_HOPS)):
            address = _address(item)
            if address is None:
                break
            found = address
            if self._everyone or not self.trusts(address):
                break
        return found

    def _trusts(self, address: str | None) -> bool:
        if address is None:
            return self._unix
        if self._everyone:
            return True
        try:
            ip = ipaddress.ip_address(address)
        except ValueError:
            return False
        # A peer of a socket that serves both families comes as ::ffff:192.0.2.1.
        mapped = getattr(ip, "ipv4_mapped", None) or ip
        return any(mapped in network for network in self._networks)


@lru_cache(maxsize=4096)
def _address(item: str) -> str | None:
    """The IP address of one item of X-Forwarded-For, which may have a port, or None."""
    text = item.strip(' \t"')
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        return None


class _Names(dict[bytes, str | None]):
    """The environ's key for each header name, None for those that are dropped."""

    def __init__(self, *, forwarded: bool) -> None:
        super().__init__()
        self._forwarded = forwarded

    def __missing__(self, name: bytes) -> str | None:
        key = self._translate(name)
        if len(name) <= _LONGEST_NAME:
            if len(self) >= _MOST_NAMES:
                self.clear()
            self[name] = key
        return key

    def _translate(self, name: bytes) -> str | None:
        if b"_" in name or not name.isascii():
            return None
        key = name.decode("ascii").upper().replace("-", "_")
        if key in {"CONTENT_TYPE", "CONTENT_LENGTH"}:
            return key
        if key == "PROXY":
            return None
        if not self._forwarded and (key == "FORWARDED" or key.startswith("X_FORWARDED_")):
            return None
        return "HTTP_" + key


class RequestMeta:
    """Makes a CGI/WSGI environ of an aiohttp request.

    ``constants`` is what every environ begins with.

    .. versionadded:: 0.1
    """

    def __init__(self, trust: ProxyTrust, constants: Mapping[str, Any]) -> None:
        self._trust = trust
        self._constants = dict(constants)
        self._trusted_names = _Names(forwarded=True)
        self._plain_names = _Names(forwarded=False)
        self._mounts: dict[AbstractResource, str] = {}

    def environ(self, request: web.BaseRequest, script_name: str = "") -> dict[str, Any]:
        """The environ of PEP 3333 without what belongs to the request's body.

        CONTENT_LENGTH and CONTENT_TYPE are there when the headers are. ``script_name`` is
        what `script_name` gave. Raises HTTPBadRequest when trusted headers contradict each
        other about the scheme, and for a target that is not a valid one; HTTPNotFound
        when the path goes on behind the mount point without a slash.
        """
        environ = self._constants.copy()
        protocol = request.protocol
        remote_addr, remote_port, server_name, server_port, trusted = self._ends(
            protocol.peername, protocol.sockname
        )
        environ["REMOTE_ADDR"] = remote_addr
        environ["REMOTE_PORT"] = remote_port
        self._add_headers(environ, request, self._trusted_names if trusted else self._plain_names)

        target = _latin1(request.raw_path)
        path, query, authority = split_target(target)
        if authority is not None:
            environ["HTTP_HOST"] = authority
        if "%" in path:
            path = unquote_to_bytes(path.encode("latin-1")).decode("latin-1")
        if script_name:
            path = _below(script_name, path)

        scheme = "http" if protocol.ssl_context is None else "https"
        if trusted:
            scheme = self._believe(environ, request) or scheme
        environ["REQUEST_METHOD"] = request.method
        environ["SCRIPT_NAME"] = script_name
        environ["PATH_INFO"] = path
        environ["QUERY_STRING"] = query
        environ["RAW_URI"] = environ["REQUEST_URI"] = target
        version = request.version
        environ["SERVER_PROTOCOL"] = (
            _PROTOCOLS.get(version) or f"HTTP/{version.major}.{version.minor}"
        )
        environ["wsgi.url_scheme"] = scheme
        if not server_name:
            server_name, server_port = _split_host(environ.get("HTTP_HOST", ""))
        environ["SERVER_NAME"] = server_name or "localhost"
        environ["SERVER_PORT"] = server_port or _DEFAULT_PORTS[scheme]
        return environ

    def origin(self, request: web.BaseRequest) -> Origin:
        """Who called, and at which address of ours, as the socket tells it.

        A peer on a Unix socket has no address: it is on this machine, so it is given
        127.0.0.1.
        """
        protocol = request.protocol
        return Origin(*self._ends(protocol.peername, protocol.sockname))

    def client(self, request: web.BaseRequest) -> str:
        """The address that REMOTE_ADDR of the request's environ is."""
        origin = self.origin(request)
        if origin.trusted:
            # aiohttp's stand-in for a request that is malformed has no multidict.
            told = [item for name, item in request.raw_headers if name.lower() == _FORWARDED_FOR]
            client = self._trust.client(b",".join(told).decode("latin-1")) if told else None
            return client or origin.remote_addr
        return origin.remote_addr or request.remote or ""  # of a connection that is gone

    def script_name(self, request: web.BaseRequest) -> str:
        """The mount point of the handler, as SCRIPT_NAME has it: without a slash at its end.

        It is the part of the route's path that precedes ``{path_info}``. A handler that
        serves a bare server, or is mounted on a route without ``{path_info}``, is at the root.
        """
        if not isinstance(request, web.Request):
            return ""
        resource = request.match_info.route.resource
        if resource is None:
            return ""
        name = self._mounts.get(resource)
        if name is None:
            prefix, found, _ = resource.canonical.partition("{path_info}")
            if found and "{" in prefix:
                # Other parts of the path vary, so this differs between requests.
                return _varying_mount(resource, request)
            name = _mount(prefix) if found else ""
            self._mounts[resource] = name
        return name

    def headers(self, request: web.BaseRequest, *, trusted: bool) -> list[tuple[bytes, bytes]]:
        """The headers by rules 2, 3 and 5, names in lower case, as ASGI wants them."""
        names = self._trusted_names if trusted else self._plain_names
        pairs = [
            (name.lower(), value) for name, value in request.raw_headers if names[name] is not None
        ]
        authority = split_target(request.raw_path).authority
        if authority is not None:
            pairs = [pair for pair in pairs if pair[0] != b"host"]
            pairs.append((b"host", authority.encode("utf-8", "surrogateescape")))
        return pairs

    def _ends(self, peer: Any, here: Any) -> tuple[str, str, str, str, bool]:
        """The fields of an `Origin`, of the addresses of a connection as asyncio has them."""
        if isinstance(peer, tuple) and isinstance(here, tuple):
            return peer[0], str(peer[1]), here[0], str(here[1]), self._trust.trusts(peer[0])
        if isinstance(here, (str, bytes)):
            return "127.0.0.1", "0", "", "", self._trust.trusts(None)
        # The connection is gone already: nobody will read the answer.
        return "", "0", "", "", False

    def _add_headers(
        self, environ: dict[str, Any], request: web.BaseRequest, names: _Names
    ) -> None:
        repeated: dict[str, list[str]] | None = None
        for name, value in request.raw_headers:
            key = names[name]
            if key is None:
                continue
            if key not in environ:
                environ[key] = value.decode("latin-1")
            elif repeated is None:
                repeated = {key: [environ[key], value.decode("latin-1")]}
            else:
                # They are joined once, in the end: that takes linear time.
                repeated.setdefault(key, [environ[key]]).append(value.decode("latin-1"))
        if repeated is not None:
            for key, values in repeated.items():
                environ[key] = ("; " if key == "HTTP_COOKIE" else ",").join(values)

    def _believe(self, environ: dict[str, Any], request: web.BaseRequest) -> str | None:
        """Take the client's address from a trusted proxy's headers; give the scheme they tell."""
        if "HTTP_X_FORWARDED_FOR" in environ:
            client = self._trust.client(environ["HTTP_X_FORWARDED_FOR"])
            if client is not None:
                environ["REMOTE_ADDR"] = client
                environ["REMOTE_PORT"] = "0"
        told = None
        for key, (name, secure) in _SCHEME_HEADERS.items():
            if key not in environ:
                continue
            for value in request.headers.getall(name):
                # Of a list the first item counts, as in Django's SECURE_PROXY_SSL_HEADER:
                # it was written by the proxy that the client spoke to.
                word = value.partition(",")[0].strip().lower()
                scheme = "https" if word == secure else "http"
                if told is not None and told != scheme:
                    raise web.HTTPBadRequest(text="400: contradictory scheme headers")
                told = scheme
        return told


def request_meta(config: Config) -> RequestMeta:
    """Give what makes the environ of a request that Django gets without a WSGI server."""
    return RequestMeta(
        ProxyTrust(config.forwarded_allow_ips),
        {
            "SERVER_SOFTWARE": "django-aioserve",
            "wsgi.version": (1, 0),
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": True,
            "wsgi.multiprocess": True,
            "wsgi.run_once": False,
            "wsgi.input_terminated": True,
        },
    )


def _latin1(text: str) -> str:
    """What aiohttp decoded as UTF-8, as latin-1."""
    if text.isascii():
        return text
    return text.encode("utf-8", "surrogateescape").decode("latin-1")


def _mount(prefix: str) -> str:
    return unquote_to_bytes(prefix).decode("latin-1").removesuffix("/")


def _varying_mount(resource: AbstractResource, request: web.Request) -> str:
    # The router matches against this form of the path, which still has "%" and "/" escaped.
    path = request.rel_url.path_safe
    match = resource.get_info()["pattern"].fullmatch(path)
    return _mount(path[: match.start("path_info")]) if match else ""


def _below(script_name: str, path: str) -> str:
    """The rest of ``path`` behind ``script_name``; HTTPNotFound if it is not below it."""
    rest = path[len(script_name) :]
    if not path.startswith(script_name) or (rest and not rest.startswith("/")):
        raise web.HTTPNotFound
    return rest


def _split_host(host: str) -> tuple[str, str]:
    """Name and port of a Host header, each empty where there is none."""
    name, bracket, rest = host.rpartition("]")
    if bracket:
        port = rest.removeprefix(":")
        name += bracket
    else:
        name, _, port = host.partition(":")
    return name, port if port.isascii() and port.isdigit() else ""

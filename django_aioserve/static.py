"""Static and media files, served by the event loop.

Rules:

1. Served is a regular file whose real path lies below the root. A path with ``..``,
   an empty part, a backslash or a NUL, or with a name that begins with a dot (but for
   ``.well-known``), a directory, and a link that leads out of the root are not found.
2. What is known of a static file (its kind, its precompressed siblings, its headers)
   is found out at its first request and kept. Each request compares it with the open
   file, so one that was replaced, added or removed since is never answered wrongly.
   Of a media file nothing is kept.
3. Nothing is waited for in a thread: small files go out with their header in one
   piece, larger ones by sendfile.
4. A file that anybody may have uploaded can run no script on the site (media).
5. Conditions and ranges are those of RFC 9110, sections 13 and 14; of several ranges
   in one request none is given, but the whole file.
"""

from __future__ import annotations

import functools
import mimetypes
import os
import re
import stat
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, cast
from urllib.parse import urlsplit

from aiohttp import hdrs, web
from multidict import CIMultiDict

from django_aioserve import conf
from django_aioserve.bridge.stream import BridgeResponse, can_send_file
from django_aioserve.exceptions import ConfigurationError
from django_aioserve.keys import CONFIG, POOL

if TYPE_CHECKING:
    from django.core.checks import CheckMessage

    from django_aioserve.conf import Config

__all__ = ["FilesResource", "check", "setup"]

HeadersFunction = Callable[[MutableMapping[str, str], str, str], None]

SIBLINGS: Final = ((".br", "br"), (".zst", "zstd"), (".gz", "gzip"))

FOREVER: Final = "max-age=31536000, public, immutable"
"""For a file whose name tells its content: a year, the most that caches observe."""

A_WHILE: Final = "max-age=60, public"

HASHED_NAME: Final = re.compile(r"\.[0-9a-f]{12}(?=\.[^./]*\Z|\Z)")
"""The hash that Django's ManifestStaticFilesStorage puts into a name."""

IN_ONE_PIECE: Final = 1 << 16
"""Bytes up to which a file is read and sent together with its header. It is read each time:
kept in memory it would take 43 in place of 48 µs a request."""

BLOCK: Final = 1 << 18
"""Bytes of a larger file that are read at once where sendfile cannot be: over TLS."""

CONTENT_TYPES: Final = {
    ".avif": "image/avif",
    ".bz2": "application/x-bzip2",
    ".br": "application/octet-stream",
    ".eot": "application/vnd.ms-fontobject",
    ".flac": "audio/flac",
    ".geojson": "application/geo+json",
    ".gz": "application/gzip",
    ".ico": "image/x-icon",
    ".js": "text/javascript",
    ".jsonld": "application/ld+json",
    ".jxl": "image/jxl",
    ".map": "application/json",
    ".md": "text/markdown",
    ".mjs": "text/javascript",
    ".ogg": "audio/ogg",
    ".opus": "audio/opus",
    ".otf": "font/otf",
    ".rss": "application/rss+xml",
    ".ttc": "font/collection",
    ".ttf": "font/ttf",
    ".vtt": "text/vtt",
    ".wasm": "application/wasm",
    ".webmanifest": "application/manifest+json",
    ".webp": "image/webp",
    ".woff": "font/woff",
    ".woff2": "font/woff2",
    ".xht": "application/xhtml+xml",
    ".xhtml": "application/xhtml+xml",
    ".xml": "application/xml",
    ".xz": "application/x-xz",
    ".zst": "application/zstd",
}

SCRIPTS: Final = frozenset({"text/javascript", "application/javascript", "application/ecmascript"})

SANDBOX: Final = "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; sandbox"
"""Content-Security-Policy of an uploaded document: it may show itself and do nothing."""


@dataclass(frozen=True, slots=True)
class _Variant:
    """One representation of a file: as it is, or precompressed."""

    path: str
    encoding: str
    size: int
    mtime_ns: int
    etag: str
    headers: CIMultiDict[str]

    @property
    def modified(self) -> int:
        return self.mtime_ns // 1_000_000_000

    def is_current(self, status: os.stat_result) -> bool:
        return status.st_size == self.size and status.st_mtime_ns == self.mtime_ns


class _Directory:
    """Files below one root; gives the variants of a file, the smallest first."""

    def __init__(self, root: str, url: str, change_headers: HeadersFunction | None) -> None:
        self.url = url
        self._root = os.path.realpath(root)
        self._inside = os.path.join(self._root, "")
        self._change_headers = change_headers

    async def find(self, request: web.Request, name: str) -> tuple[_Variant, ...]:
        """Give the variants of the file ``name``, which is relative to the root, if any."""
        return self.look_up(os.path.join(self._root, name), name) if _is_plain(name) else ()

    async def find_again(self, request: web.Request, name: str) -> tuple[_Variant, ...]:
        """Give them anew, for what `find` gave has changed on disk."""
        return await self.find(request, name)

    def look_up(self, path: str, name: str) -> tuple[_Variant, ...]:
        """Read what the file system knows of the file at ``path`` and its siblings."""
        found = self._status(path)
        if found is None:
            return ()
        siblings = [
            (encoding, sibling)
            for suffix, encoding in SIBLINGS
            if (sibling := self._status(path + suffix)) is not None
        ]
        headers = self.headers(path, name)
        headers[hdrs.LAST_MODIFIED] = formatdate(found[1].st_mtime_ns // 1_000_000_000, usegmt=True)
        headers[hdrs.ACCEPT_RANGES] = "bytes"
        if siblings:
            headers[hdrs.VARY] = hdrs.ACCEPT_ENCODING
        if self._change_headers is not None:
            self._change_headers(headers, path, self.url + name)
        variants = [
            _variant(encoding, *each, headers) for encoding, each in (("", found), *siblings)
        ]
        return tuple(sorted(variants, key=lambda variant: variant.size))

    def _status(self, path: str) -> tuple[str, os.stat_result] | None:
        try:
            real = os.path.realpath(path, strict=True)
            status = os.stat(real)
        except (OSError, ValueError):  # ValueError: a name that the file system cannot encode
            return None
        if not stat.S_ISREG(status.st_mode) or not self.is_inside(real):
            return None
        return real, status

    def is_inside(self, real: str) -> bool:
        """Tell whether a real path lies below the root."""
        return real.startswith(self._inside)

    def headers(self, path: str, name: str) -> CIMultiDict[str]:
        """Give the headers that do not depend on the variant."""
        raise NotImplementedError


class _Static(_Directory):
    """STATIC_ROOT. Keeps what it has found out."""

    def __init__(self, root: str, url: str, change_headers: HeadersFunction | None) -> None:
        super().__init__(root, url, change_headers)
        self._known: dict[str, tuple[_Variant, ...]] = {}
        self._names_are_hashed = _names_are_hashed()

    async def find(self, request: web.Request, name: str) -> tuple[_Variant, ...]:
        return self._known.get(name) or await self.find_again(request, name)

    async def find_again(self, request: web.Request, name: str) -> tuple[_Variant, ...]:
        variants = await super().find(request, name)
        if variants:
            self._known[name] = variants
        else:
            self._known.pop(name, None)
        return variants

    def headers(self, path: str, name: str) -> CIMultiDict[str]:
        headers = _content_headers(name)
        # Static files hold nothing secret, and fonts from a CDN are refused without it.
        headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = "*"
        headers[hdrs.CACHE_CONTROL] = FOREVER if self._is_hashed(path, name) else A_WHILE
        return headers

    def _is_hashed(self, path: str, name: str) -> bool:
        # The storage leaves the file without the hash beside the one with it.
        directory, filename = os.path.split(path)
        plain, hashes = HASHED_NAME.subn("", filename)
        return bool(hashes and self._names_are_hashed) and os.path.isfile(
            os.path.join(directory, plain)
        )


class _Finders(_Directory):
    """The staticfiles finders, asked each time: for DEBUG."""

    def __init__(self, url: str, change_headers: HeadersFunction | None) -> None:
        super().__init__(os.sep, url, change_headers)

    async def find(self, request: web.Request, name: str) -> tuple[_Variant, ...]:
        from django.contrib.staticfiles import finders

        if not _is_plain(name):
            return ()
        path = await request.app[POOL].run(finders.find, name)
        return self.look_up(str(path), name) if path else ()

    def headers(self, path: str, name: str) -> CIMultiDict[str]:
        headers = _content_headers(name)
        headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = "*"
        headers[hdrs.CACHE_CONTROL] = "no-cache"
        return headers


class _Media(_Directory):
    """MEDIA_ROOT: looked up each time, for files come and go; their makers are not trusted."""

    def headers(self, path: str, name: str) -> CIMultiDict[str]:
        headers = _content_headers(name)
        kind = headers[hdrs.CONTENT_TYPE].partition(";")[0]
        if kind in SCRIPTS:
            headers[hdrs.CONTENT_TYPE] = "text/plain; charset=utf-8"
        elif kind == "text/html" or kind.endswith(("/xml", "+xml")):
            headers["Content-Security-Policy"] = SANDBOX
        return headers


class FilesResource(web.AbstractResource):
    """All URLs below one prefix."""

    ALLOWED: ClassVar = frozenset({hdrs.METH_GET, hdrs.METH_HEAD})

    def __init__(self, files: _Directory) -> None:
        super().__init__()
        self._files = files
        self._url = files.url
        self._route = web.ResourceRoute(hdrs.METH_ANY, self._handle, self)

    @property
    def canonical(self) -> str:
        return self._url.rstrip("/")

    @property
    def beginnings(self) -> tuple[str, ...]:
        """With what the paths begin that are not the bridge's."""
        return (self._url,)

    def url_for(self, **kwargs: str) -> Any:
        raise RuntimeError("Use Django's static() or the storage's url().")

    def add_prefix(self, prefix: str) -> None:
        self._url = prefix + self._url

    def get_info(self) -> Any:
        return {"prefix": self.canonical}

    def raw_match(self, path: str) -> bool:
        return False

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[web.AbstractRoute]:
        yield self._route

    async def resolve(
        self, request: web.Request
    ) -> tuple[web.UrlMappingMatchInfo | None, set[str]]:
        if not request.rel_url.path.startswith(self._url):
            return None, set()
        return web.UrlMappingMatchInfo({}, self._route), set()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if request.method not in self.ALLOWED:
            raise web.HTTPMethodNotAllowed(request.method, self.ALLOWED)
        files = self._files
        name = request.rel_url.path[len(self._url) :]
        variants = await files.find(request, name)
        for _ in range(2):
            if not variants:
                break
            variant = _choose(variants, request.headers.get(hdrs.ACCEPT_ENCODING, ""))
            response = await _answer(request, variant)
            if response is not None:
                return response
            variants = await files.find_again(request, name)
        return web.Response(status=404, text="404: Not Found")


async def _answer(request: web.Request, variant: _Variant) -> web.StreamResponse | None:
    """Answer with a variant; None where the file is not the one that it was."""
    try:
        descriptor = os.open(variant.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if not variant.is_current(os.fstat(descriptor)):
            return None
        status = _precondition(request, variant)
        if status != 200:
            return _response(request, status, _bodiless(variant), b"")
        headers = variant.headers
        start, end = 0, variant.size
        if hdrs.RANGE in request.headers and request.method == hdrs.METH_GET:
            wanted = _range(request, variant)
            if wanted == (0, 0):
                headers = _bodiless(variant)
                headers[hdrs.CONTENT_RANGE] = f"bytes */{variant.size}"
                return _response(request, 416, headers, b"")
            if wanted is not None:
                status = 206
                start, end = wanted
                headers = headers.copy()
                headers[hdrs.CONTENT_RANGE] = f"bytes {start}-{end - 1}/{variant.size}"
        if end - start <= IN_ONE_PIECE and request.method == hdrs.METH_GET:
            # Its length is the Content-Length, should the file be cut in this instant.
            return _response(request, status, headers, os.pread(descriptor, end - start, start))
        response = _response(request, status, headers, None)
        response.content_length = end - start
        if request.method == hdrs.METH_GET:
            await response.prepare(request)
            try:
                await _send(request, response, descriptor, start, end)
            except ConnectionError:
                response.cut_off()
        return response
    finally:
        os.close(descriptor)


async def _send(
    request: web.Request, response: BridgeResponse, descriptor: int, start: int, end: int
) -> None:
    if can_send_file(request):
        await response.send_file(descriptor, start, end - start)
        return
    while start < end and (block := os.pread(descriptor, min(end - start, BLOCK), start)):
        await response.write(block)
        start += len(block)


def _response(
    request: web.Request, status: int, headers: CIMultiDict[str], body: bytes | None
) -> BridgeResponse:
    return BridgeResponse(
        status,
        HTTPStatus(status).phrase,
        cast("Any", headers),
        write_timeout=request.app[CONFIG].write_timeout,
        body=body,
    )


def _bodiless(variant: _Variant) -> CIMultiDict[str]:
    headers = variant.headers.copy()
    headers.popall(hdrs.CONTENT_TYPE, None)
    headers.popall(hdrs.CONTENT_ENCODING, None)
    return headers


def _precondition(request: web.Request, variant: _Variant) -> int:
    """Evaluate the conditions of a request (RFC 9110, 13.2.2): 200, 304 or 412."""
    headers = request.headers
    if hdrs.IF_MATCH in headers:
        if not _matches(headers[hdrs.IF_MATCH], variant.etag, weak=False):
            return 412
    elif (since := request.if_unmodified_since) and variant.modified > since.timestamp():
        return 412
    if hdrs.IF_NONE_MATCH in headers:
        if _matches(headers[hdrs.IF_NONE_MATCH], variant.etag, weak=True):
            return 304
    elif (since := request.if_modified_since) and variant.modified <= since.timestamp():
        return 304
    return 200


_ETAG: Final = re.compile(r'(W/)?("[\x21\x23-\x7e\x80-\xff]*")')


def _matches(header: str, etag: str, *, weak: bool) -> bool:
    if header.strip() == "*":
        return True
    return any(tag == etag and (weak or not mark) for mark, tag in _ETAG.findall(header))


_RANGE: Final = re.compile(r"bytes=[ \t]*([0-9]{0,18})-([0-9]{0,18})[ \t]*", re.IGNORECASE)


def _range(request: web.Request, variant: _Variant) -> tuple[int, int] | None:
    """Give the beginning and the end of the part that is asked for (RFC 9110, 14.2).

    None where the whole file is to be sent, (0, 0) where no byte of the part exists.
    """
    condition = request.headers.get(hdrs.IF_RANGE)
    if condition is not None and condition not in (
        variant.etag,
        variant.headers[hdrs.LAST_MODIFIED],
    ):
        return None
    match = _RANGE.fullmatch(request.headers[hdrs.RANGE])
    if match is None or not (match[1] or match[2]):
        return None
    size = variant.size
    if not match[1]:
        start, end = max(size - int(match[2]), 0), size
    else:
        start, end = int(match[1]), min(int(match[2]) + 1, size) if match[2] else size
        if match[2] and int(match[2]) < start:
            return None
    return (start, end) if start < end else (0, 0)


def _choose(variants: tuple[_Variant, ...], accepted: str) -> _Variant:
    """Give the smallest variant in an encoding that the client accepts."""
    if len(variants) > 1:
        allowed = _encodings(accepted)
        for variant in variants:
            if not variant.encoding or variant.encoding in allowed:
                return variant
    return next(variant for variant in variants if not variant.encoding)


@functools.lru_cache(maxsize=256)
def _encodings(accepted: str) -> frozenset[str]:
    """Read Accept-Encoding (RFC 9110, 12.5.3); gives those of ours that are accepted."""
    weights = {}
    for item in accepted.lower().split(","):
        coding, _, parameters = item.partition(";")
        refused = re.fullmatch(r"\s*q\s*=\s*0(\.0*)?\s*", parameters) is not None
        weights[coding.strip()] = not refused
    others = weights.get("*", False)
    return frozenset(encoding for _, encoding in SIBLINGS if weights.get(encoding, others))


def _is_plain(name: str) -> bool:
    return not ("\\" in name or "\0" in name) and all(
        part and (part[0] != "." or part == ".well-known") for part in name.split("/")
    )


@functools.cache
def _kinds() -> mimetypes.MimeTypes:
    """Python's own table, whatever files of the kind this machine has, and ours over it."""
    kinds = mimetypes.MimeTypes()
    kinds.encodings_map.clear()
    kinds.suffix_map.clear()
    for suffix, kind in CONTENT_TYPES.items():
        kinds.add_type(kind, suffix)
    return kinds


def _content_headers(name: str) -> CIMultiDict[str]:
    # A name such as "a:b" must not be taken for a URL.
    kind = _kinds().guess_type(os.path.basename(name).replace(":", "_"))[0]
    kind = kind or "application/octet-stream"
    if kind.startswith("text/"):
        kind += "; charset=utf-8"
    return CIMultiDict({hdrs.CONTENT_TYPE: kind, "X-Content-Type-Options": "nosniff"})


def _variant(
    encoding: str, real: str, status: os.stat_result, headers: CIMultiDict[str]
) -> _Variant:
    headers = headers.copy()
    # RFC 9110, 8.8.3.3: each encoding has an entity tag of its own.
    suffix = f"-{encoding}" if encoding else ""
    etag = f'"{status.st_mtime_ns:x}-{status.st_size:x}{suffix}"'
    headers[hdrs.ETAG] = etag
    if encoding:
        headers[hdrs.CONTENT_ENCODING] = encoding
    return _Variant(real, encoding, status.st_size, status.st_mtime_ns, etag, headers)


# --------------------------------------------------------------------------- set-up


def setup(app: web.Application, config: Config) -> None:
    """Serve STATIC_URL and, with ``AIOSERVE_MEDIA``, MEDIA_URL from ``app``.

    Raises `ConfigurationError` where AIOSERVE_STATIC_HEADERS cannot be imported.
    """
    from django.conf import settings

    change_headers = _change_headers(config)
    url = _path(settings.STATIC_URL)
    if config.static and url:
        if settings.DEBUG and _has_finders():
            app.router.register_resource(FilesResource(_Finders(url, change_headers)))
        elif _is_directory(settings.STATIC_ROOT):
            root = os.fspath(settings.STATIC_ROOT)
            app.router.register_resource(FilesResource(_Static(root, url, change_headers)))
    url = _path(settings.MEDIA_URL)
    if config.media and url and settings.MEDIA_ROOT:
        root = os.fspath(settings.MEDIA_ROOT)
        app.router.register_resource(FilesResource(_Media(root, url, change_headers)))


def check(config: Config) -> list[CheckMessage]:
    """Find what would keep static and media files from being served.

    ``aioserve.W012``: STATIC_ROOT is not there. ``aioserve.W013``: MEDIA_URL or
    MEDIA_ROOT is missing although AIOSERVE_MEDIA is on. ``aioserve.E013``:
    AIOSERVE_STATIC_HEADERS cannot be imported.
    """
    from django.conf import settings
    from django.core.checks import Error, Warning  # noqa: A004

    messages: list[CheckMessage] = []
    try:
        _change_headers(config)
    except ConfigurationError as error:
        messages += [Error(str(each), id=f"aioserve.{each.id}") for each in error.problems]
    root = settings.STATIC_ROOT
    is_local = bool(_path(settings.STATIC_URL)) and not urlsplit(settings.STATIC_URL).netloc
    served_otherwise = settings.DEBUG and _has_finders()
    if config.static and is_local and not served_otherwise and not _is_directory(root):
        found = f'"{root}", which is no directory' if root else "not set"
        messages.append(
            Warning(
                f"STATIC_URL cannot be served: STATIC_ROOT is {found}.",
                hint="Set STATIC_ROOT and run 'manage.py collectstatic', or set "
                "AIOSERVE_STATIC = False where something else serves STATIC_URL.",
                id="aioserve.W012",
            )
        )
    if config.media and not (_path(settings.MEDIA_URL) and settings.MEDIA_ROOT):
        messages.append(
            Warning(
                "AIOSERVE_MEDIA is on, but there is no MEDIA_ROOT or no path in MEDIA_URL.",
                hint="Set MEDIA_ROOT, and MEDIA_URL to a path such as '/media/'.",
                id="aioserve.W013",
            )
        )
    return messages


def _change_headers(config: Config) -> HeadersFunction | None:
    if not config.static_headers:
        return None
    try:
        function = config.imported("static_headers", config.static_headers)
    except ImportError as error:
        reason = f"a function that can be imported ({error})"
    else:
        if conf.can_be_called(function, 3):
            return function  # type: ignore[no-any-return]
        reason = f"a function of (headers, path, url), not {function!r}"
    raise ConfigurationError([config.problem("static_headers", reason, id="E013")])


def _path(url: str | None) -> str:
    """Give the path at which files of ``url`` are asked for here; "" where there is none.

    The server sees paths without SCRIPT_NAME. Of a URL with a host (a CDN) the path
    counts too: the CDN fetches from here.
    """
    from django.urls import get_script_prefix

    path = urlsplit(url or "").path
    prefix = get_script_prefix()
    if path.startswith(prefix):
        path = "/" + path[len(prefix) :]
    return path if path.startswith("/") and path.strip("/") else ""


def _has_finders() -> bool:
    from django.apps import apps

    return apps.is_installed("django.contrib.staticfiles")


def _names_are_hashed() -> bool:
    from django.contrib.staticfiles.storage import HashedFilesMixin, staticfiles_storage

    return _has_finders() and isinstance(staticfiles_storage, HashedFilesMixin)


def _is_directory(path: str | os.PathLike[str] | None) -> bool:
    return bool(path) and Path(str(path)).is_dir()

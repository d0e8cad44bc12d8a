"""Static and media files, over a real socket."""

from __future__ import annotations

import gzip
import os
import socket
import ssl
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import uvloop
from aiohttp import web
from django.test import override_settings

from django_aioserve import static
from django_aioserve.conf import Config
from django_aioserve.exceptions import ConfigurationError
from tests.native_project.serving import serving
from tests.support import AppServer, Response, raw, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.usefixtures("django_ready")

HERE = "tests.test_static."
BIG = bytes(range(256)) * 4096  # 1 MiB
MANIFEST = {
    "staticfiles": {"BACKEND": "django.contrib.staticfiles.storage.ManifestStaticFilesStorage"}
}


def add_header(headers: Any, path: str, url: str) -> None:
    headers["X-File"] = f"{Path(path).name} {url}"
    headers.pop("Access-Control-Allow-Origin")


not_a_function = 3


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A STATIC_ROOT, with a secret beside it."""
    directory = tmp_path / "root"
    (directory / "css" / "deep").mkdir(parents=True)
    (directory / "css" / "site.css").write_text("body {}")
    (directory / "app.js").write_text("let a = 1;" * 100)
    (directory / "app.js.gz").write_bytes(gzip.compress(b"let a = 1;" * 100))
    (directory / "app.js.br").write_bytes(b"smaller than gzip")
    (directory / "app.js.zst").write_bytes(b"z" * 500)
    (directory / "big.bin").write_bytes(BIG)
    (directory / "empty.txt").write_bytes(b"")
    (directory / ".env").write_text("SECRET")
    (directory / ".well-known").mkdir()
    (directory / ".well-known" / "security.txt").write_text("mail us")
    (directory / "name with spaces é.txt").write_text("odd")
    (tmp_path / "secret.txt").write_text("SECRET")
    (tmp_path / "root-of-others").mkdir()
    (tmp_path / "root-of-others" / "secret.txt").write_text("SECRET")
    return directory


@pytest.fixture
def server(root: Path) -> Iterator[AppServer]:
    with serving(STATIC_URL="static/", STATIC_ROOT=root) as started:
        yield started


def get(server: AppServer, name: str, *headers: tuple[str, str], method: str = "GET") -> Response:
    return server.request(method, f"/static/{name}", headers)


# --- what is served -----------------------------------------------------------------------


def test_a_file_is_served_with_its_headers(server: AppServer, root: Path) -> None:
    response = get(server, "css/site.css")
    assert (response.status, response.body) == (200, b"body {}")
    assert response.header("Content-Type") == "text/css; charset=utf-8"
    assert response.header("Content-Length") == "7"
    assert response.header("Cache-Control") == "max-age=60, public"
    assert response.header("Access-Control-Allow-Origin") == "*"
    assert response.header("Accept-Ranges") == "bytes"
    assert response.header("Vary") is None
    modified = parsedate_to_datetime(response.header("Last-Modified") or "")
    assert modified.timestamp() == int((root / "css" / "site.css").stat().st_mtime)
    assert (response.header("ETag") or "").startswith('"')


@pytest.mark.parametrize("loop", [None, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_a_large_file_arrives_whole(root: Path, loop: Callable[[], Any] | None) -> None:
    options = {} if loop is None else {"loop_factory": loop}
    from tests.native_project.serving import URLCONF, application

    with (
        override_settings(STATIC_URL="static/", STATIC_ROOT=root, ROOT_URLCONF=URLCONF),
        AppServer(application, **options) as server,
        server.connect() as connection,
    ):
        for _ in range(2):
            assert connection.request("GET", "/static/big.bin").body == BIG
        assert connection.request("GET", "/static/css/site.css").body == b"body {}"


def test_a_large_file_arrives_whole_over_tls(root: Path, tmp_path: Path) -> None:
    context = _tls_context(tmp_path)
    from tests.native_project.serving import URLCONF, application

    with (
        override_settings(STATIC_URL="static/", STATIC_ROOT=root, ROOT_URLCONF=URLCONF),
        AppServer(application) as server,
    ):

        async def listen() -> int:
            site = web.TCPSite(server._runner, "127.0.0.1", 0, ssl_context=context)
            await site.start()
            return site._server.sockets[0].getsockname()[1]

        port = server.run(listen())
        client = ssl.create_default_context()
        client.check_hostname = False
        client.verify_mode = ssl.CERT_NONE
        with (
            socket.create_connection(("127.0.0.1", port), 10) as plain,
            client.wrap_socket(plain) as sock,
        ):
            sock.sendall(b"GET /static/big.bin HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            received = b"".join(iter(lambda: sock.recv(65536), b""))
    assert received.partition(b"\r\n\r\n")[2] == BIG


def _tls_context(directory: Path) -> ssl.SSLContext:
    import subprocess

    key, cert = directory / "key.pem", directory / "cert.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=localhost",
    ]
    subprocess.run([*command, "-keyout", key, "-out", cert], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    return context


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.js", "text/javascript; charset=utf-8"),
        ("a.mjs", "text/javascript; charset=utf-8"),
        ("a.html", "text/html; charset=utf-8"),
        ("a.json", "application/json"),
        ("a.js.map", "application/json"),
        ("a.wasm", "application/wasm"),
        ("a.webmanifest", "application/manifest+json"),
        ("a.woff2", "font/woff2"),
        ("a.svg", "image/svg+xml"),
        ("a.avif", "image/avif"),
        ("a.tar.gz", "application/gzip"),
        ("a.unheard-of", "application/octet-stream"),
        ("data:text/html,x", "application/octet-stream"),
        ("LICENSE", "application/octet-stream"),
    ],
)
def test_the_type_follows_from_the_name(
    server: AppServer, root: Path, name: str, kind: str
) -> None:
    path = root / name
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(b"x")
    assert get(server, name).header("Content-Type") == kind


def test_head_has_the_headers_and_no_body(server: AppServer) -> None:
    with server.connect() as connection:
        for name, size in (("big.bin", len(BIG)), ("css/site.css", 7)):
            response = connection.request("HEAD", f"/static/{name}")
            assert (response.status, response.header("Content-Length")) == (200, str(size))
        assert connection.request("GET", "/static/css/site.css").body == b"body {}"


def test_an_empty_file_is_served(server: AppServer) -> None:
    response = get(server, "empty.txt")
    assert (response.status, response.header("Content-Length"), response.body) == (200, "0", b"")


def test_a_name_is_percent_decoded(server: AppServer) -> None:
    assert get(server, "name%20with%20spaces%20%C3%A9.txt").text == "odd"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_other_methods_are_refused(server: AppServer, method: str) -> None:
    response = get(server, "css/site.css", method=method)
    assert (response.status, response.header("Allow")) == (405, "GET,HEAD")


# --- what is refused ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../secret.txt",
        "css/../../secret.txt",
        "%2e%2e/secret.txt",
        "..%2fsecret.txt",
        "%2e%2e%2fsecret.txt",
        "..%5csecret.txt",
        "..\\secret.txt",
        "%2e%2e%252fsecret.txt",
        "../root-of-others/secret.txt",
        "css/site.css%00.txt",
        "css//site.css",
        "./css/site.css",
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "css",
        "css/",
        "css/deep/",
        "",
        ".env",
        "css/.hidden",
        "missing.txt",
        "%ff%fe.txt",
        "css/site.css/",
    ],
)
def test_what_is_no_file_below_the_root_is_not_found(server: AppServer, name: str) -> None:
    with server.connect() as connection:
        response = connection.request("GET", f"/static/{name}")
        assert response.status == 404
        assert b"SECRET" not in response.body
        assert b"root:" not in response.body
        assert connection.request("GET", "/static/css/site.css").status == 200


def test_a_link_that_leads_out_of_the_root_is_not_followed(server: AppServer, root: Path) -> None:
    (root / "out.txt").symlink_to(root.parent / "secret.txt")
    (root / "outdir").symlink_to(root.parent / "root-of-others")
    (root / "css" / "site.css.gz").symlink_to(root.parent / "secret.txt")
    assert get(server, "out.txt").status == 404
    assert get(server, "outdir/secret.txt").status == 404
    assert get(server, "css/site.css", ("Accept-Encoding", "gzip")).body == b"body {}"


def test_a_link_within_the_root_is_followed(server: AppServer, root: Path) -> None:
    (root / "alias.css").symlink_to("css/site.css")
    assert get(server, "alias.css").body == b"body {}"


def test_a_root_that_is_a_link_itself_is_served(root: Path) -> None:
    link = root.parent / "current"
    link.symlink_to(root)
    with serving(STATIC_URL="static/", STATIC_ROOT=link) as server:
        assert get(server, "css/site.css").status == 200


def test_a_pipe_is_not_opened(server: AppServer, root: Path) -> None:
    os.mkfifo(root / "pipe")
    assert get(server, "pipe").status == 404


def test_well_known_is_no_hidden_directory(server: AppServer) -> None:
    assert get(server, ".well-known/security.txt").text == "mail us"


# --- conditions and ranges ----------------------------------------------------------------


def test_a_known_entity_tag_is_answered_304(server: AppServer) -> None:
    first = get(server, "css/site.css")
    for tags in (first.header("ETag"), f'"other", W/{first.header("ETag")}', "*"):
        with server.connect() as connection:
            again = connection.request(
                "GET", "/static/css/site.css", [("If-None-Match", str(tags))]
            )
            assert (again.status, again.body) == (304, b"")
            assert again.header("ETag") == first.header("ETag")
            assert again.header("Cache-Control") == first.header("Cache-Control")
            assert again.header("Content-Type") is None
            assert connection.request("GET", "/static/css/site.css").status == 200


def test_a_known_date_is_answered_304(server: AppServer) -> None:
    date = get(server, "css/site.css").header("Last-Modified") or ""
    assert get(server, "css/site.css", ("If-Modified-Since", date)).status == 304
    early = "Mon, 01 Jan 2001 00:00:00 GMT"
    assert get(server, "css/site.css", ("If-Modified-Since", early)).status == 200


def test_another_tag_outweighs_a_known_date(server: AppServer) -> None:
    date = get(server, "css/site.css").header("Last-Modified") or ""
    headers = (("If-Modified-Since", date), ("If-None-Match", '"other"'))
    assert get(server, "css/site.css", *headers).status == 200


def test_a_failed_precondition_is_412(server: AppServer) -> None:
    tag = get(server, "css/site.css").header("ETag") or ""
    assert get(server, "css/site.css", ("If-Match", '"other"')).status == 412
    assert get(server, "css/site.css", ("If-Match", f"W/{tag}")).status == 412
    assert get(server, "css/site.css", ("If-Match", f'"other", {tag}')).status == 200
    assert get(server, "css/site.css", ("If-Match", "*")).status == 200
    early = "Mon, 01 Jan 2001 00:00:00 GMT"
    assert get(server, "css/site.css", ("If-Unmodified-Since", early)).status == 412


@pytest.mark.parametrize(
    ("wanted", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=0-99", 0, 100),
        ("bytes=100-", 100, len(BIG)),
        ("bytes=-100", len(BIG) - 100, len(BIG)),
        (f"bytes=-{len(BIG) * 2}", 0, len(BIG)),
        (f"bytes=5-{len(BIG) * 2}", 5, len(BIG)),
        ("BYTES=7-8", 7, 9),
    ],
)
def test_a_range_is_answered_206(server: AppServer, wanted: str, start: int, end: int) -> None:
    response = get(server, "big.bin", ("Range", wanted))
    assert response.status == 206
    assert response.header("Content-Range") == f"bytes {start}-{end - 1}/{len(BIG)}"
    assert response.header("Content-Length") == str(end - start)
    assert response.body == BIG[start:end]


@pytest.mark.parametrize("wanted", [f"bytes={len(BIG)}-", "bytes=99999999-", "bytes=-0"])
def test_a_range_beyond_the_file_is_416(server: AppServer, wanted: str) -> None:
    response = get(server, "big.bin", ("Range", wanted))
    assert (response.status, response.body) == (416, b"")
    assert response.header("Content-Range") == f"bytes */{len(BIG)}"


@pytest.mark.parametrize(
    "wanted", ["bytes=5-1", "bytes=-", "bytes=a-b", "lines=1-2", "bytes=0-1,4-5", "bytes=٣-٤"]
)
def test_a_range_that_is_none_gets_the_whole_file(server: AppServer, wanted: str) -> None:
    request = (
        f"GET /static/css/site.css HTTP/1.1\r\nHost: x\r\nConnection: close\r\nRange: {wanted}"
    )
    answer = raw(server.address, request.encode() + b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.endswith(b"body {}")


def test_if_range_holds_for_the_same_file_only(server: AppServer) -> None:
    first = get(server, "big.bin", method="HEAD")
    part = ("Range", "bytes=0-9")
    for same in (first.header("ETag"), first.header("Last-Modified")):
        assert get(server, "big.bin", part, ("If-Range", str(same))).status == 206
    for other in ('"other"', f"W/{first.header('ETag')}", "Mon, 01 Jan 2001 00:00:00 GMT", "?"):
        assert get(server, "big.bin", part, ("If-Range", other)).status == 200


def test_head_knows_no_ranges(server: AppServer) -> None:
    response = get(server, "big.bin", ("Range", "bytes=0-9"), method="HEAD")
    assert (response.status, response.header("Content-Length")) == (200, str(len(BIG)))


# --- precompressed siblings ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("accepted", "encoding"),
    [
        ("br, gzip, zstd", "br"),
        ("gzip", "gzip"),
        ("GZIP;q=0.5", "gzip"),
        ("zstd", "zstd"),
        ("*", "br"),
        ("*, br;q=0", "gzip"),
        ("br;q=0.0, gzip;q=0", None),
        ("identity", None),
        ("", None),
        ("x-brotli", None),
    ],
)
def test_the_smallest_accepted_sibling_is_sent(
    server: AppServer, accepted: str, encoding: str | None
) -> None:
    response = get(server, "app.js", ("Accept-Encoding", accepted))
    assert response.header("Content-Encoding") == encoding
    assert response.header("Content-Type") == "text/javascript; charset=utf-8"
    assert response.header("Vary") == "Accept-Encoding"
    if encoding == "gzip":
        assert gzip.decompress(response.body) == b"let a = 1;" * 100


def test_each_encoding_has_an_entity_tag_of_its_own(server: AppServer) -> None:
    plain = get(server, "app.js")
    packed = get(server, "app.js", ("Accept-Encoding", "gzip"))
    assert plain.header("ETag") != packed.header("ETag")
    condition = ("If-None-Match", str(packed.header("ETag")))
    assert get(server, "app.js", condition, ("Accept-Encoding", "gzip")).status == 304
    assert get(server, "app.js", condition).status == 200


def test_a_sibling_that_is_larger_is_not_sent(server: AppServer, root: Path) -> None:
    (root / "css" / "site.css.gz").write_bytes(gzip.compress(b"body {}"))
    assert get(server, "css/site.css", ("Accept-Encoding", "gzip")).body == b"body {}"


def test_a_sibling_asked_for_by_name_is_a_file_of_its_own(server: AppServer) -> None:
    response = get(server, "app.js.gz", ("Accept-Encoding", "gzip"))
    assert response.header("Content-Type") == "application/gzip"
    assert response.header("Content-Encoding") is None


# --- caching, headers, and changes on disk -------------------------------------------------


def test_a_hashed_name_is_cached_for_ever(root: Path) -> None:
    (root / "site.0123456789ab.css").write_text("hashed")
    (root / "site.css").write_text("plain")
    (root / "lonely.0123456789ab.css").write_text("has no plain name beside it")
    with serving(STATIC_URL="static/", STATIC_ROOT=root, STORAGES=MANIFEST) as server:
        forever = "max-age=31536000, public, immutable"
        assert get(server, "site.0123456789ab.css").header("Cache-Control") == forever
        for name in ("site.css", "lonely.0123456789ab.css", "app.js"):
            assert get(server, name).header("Cache-Control") == "max-age=60, public"


def test_what_a_file_is_goes_by_its_name_alone(server: AppServer) -> None:
    assert get(server, "app.js").header("X-Content-Type-Options") == "nosniff"


def test_without_hashing_storage_no_name_is_hashed(server: AppServer, root: Path) -> None:
    (root / "app.0123456789ab.js").write_text("x")
    assert get(server, "app.0123456789ab.js").header("Cache-Control") == "max-age=60, public"


def test_a_function_changes_headers(root: Path) -> None:
    options = {"static_headers": HERE + "add_header"}
    with serving(options, STATIC_URL="static/", STATIC_ROOT=root) as server:
        response = get(server, "css/site.css")
    assert response.header("X-File") == "site.css /static/css/site.css"
    assert response.header("Access-Control-Allow-Origin") is None


def test_a_file_that_was_replaced_is_noticed(server: AppServer, root: Path) -> None:
    first = get(server, "css/site.css")
    (root / "css" / "site.css").write_text("body { color: red }")
    second = get(server, "css/site.css", ("If-None-Match", str(first.header("ETag"))))
    assert (second.status, second.text) == (200, "body { color: red }")


def test_a_file_that_appears_later_is_found(server: AppServer, root: Path) -> None:
    assert get(server, "later.txt").status == 404
    (root / "later.txt").write_text("here")
    assert get(server, "later.txt").text == "here"


def test_a_file_that_was_removed_is_not_found(server: AppServer, root: Path) -> None:
    assert get(server, "app.js", ("Accept-Encoding", "br")).status == 200
    (root / "app.js.br").unlink()
    assert (
        get(server, "app.js", ("Accept-Encoding", "br, gzip")).header("Content-Encoding") == "gzip"
    )
    for suffix in ("", ".gz", ".zst"):
        (root / f"app.js{suffix}").unlink()
    assert get(server, "app.js").status == 404


def test_a_client_that_leaves_in_the_middle_leaves_no_open_file(
    server: AppServer, root: Path
) -> None:
    (root / "huge.bin").write_bytes(b"")
    os.truncate(root / "huge.bin", 200 << 20)
    path = str(root / "huge.bin")

    def is_open() -> bool:
        return any(
            os.path.realpath(f"/proc/self/fd/{number}") == path
            for number in os.listdir("/proc/self/fd")
        )

    with server.connect() as connection:
        connection.send(b"GET /static/huge.bin HTTP/1.1\r\nHost: localhost\r\n\r\n")
        connection.recv_exactly(1000)
        wait_until(is_open)
        connection.reset()
        wait_until(lambda: not is_open())


# --- DEBUG, media, and where STATIC_URL leads ------------------------------------------------


def test_with_debug_the_finders_are_asked_each_time(root: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "fresh.css").write_text("one")
    with serving(
        DEBUG=True, STATIC_URL="static/", STATIC_ROOT=root, STATICFILES_DIRS=[source]
    ) as server:
        assert get(server, "fresh.css").text == "one"
        assert get(server, "fresh.css").header("Cache-Control") == "no-cache"
        (source / "fresh.css").write_text("other")
        assert get(server, "fresh.css").text == "other"
        assert get(server, "admin/css/base.css").status == 200
        assert get(server, "css/site.css").status == 404
        assert get(server, "../secret.txt").status == 404


def test_media_is_served_where_it_is_asked_for_only(root: Path) -> None:
    settings = {"MEDIA_URL": "media/", "MEDIA_ROOT": root}
    with serving(**settings) as server:
        assert server.get("/media/css/site.css").status == 404
    with serving({"media": True}, **settings) as server:
        assert server.get("/media/css/site.css").text == "body {}"
        (root / "upload.txt").write_text("new")
        assert server.get("/media/upload.txt").text == "new"
        (root / "upload.txt").write_text("newer")
        assert server.get("/media/upload.txt").text == "newer"
        assert server.get("/media/%2e%2e/secret.txt").status == 404


@pytest.mark.parametrize(
    ("name", "kind", "policy"),
    [
        ("page.html", "text/html; charset=utf-8", True),
        ("image.svg", "image/svg+xml", True),
        ("page.xhtml", "application/xhtml+xml", True),
        ("data.xml", "application/xml", True),
        ("script.js", "text/plain; charset=utf-8", False),
        ("image.png", "image/png", False),
    ],
)
def test_an_uploaded_file_can_do_nothing_on_the_site(
    root: Path, name: str, kind: str, policy: bool
) -> None:
    (root / name).write_text("x")
    with serving({"media": True}, MEDIA_URL="media/", MEDIA_ROOT=root) as server:
        response = server.get(f"/media/{name}")
    assert response.header("Content-Type") == kind
    assert response.header("X-Content-Type-Options") == "nosniff"
    assert ("sandbox" in (response.header("Content-Security-Policy") or "")) is policy


def test_static_can_be_turned_off(root: Path) -> None:
    with serving({"static": False}, STATIC_URL="static/", STATIC_ROOT=root) as server:
        assert get(server, "css/site.css").status == 404


def test_a_cdn_fetches_from_the_path_of_its_url(root: Path) -> None:
    with serving(STATIC_URL="https://cdn.example.com/static/", STATIC_ROOT=root) as server:
        assert get(server, "css/site.css").status == 200


def test_static_url_is_taken_without_script_name(root: Path) -> None:
    from django.urls import get_script_prefix, set_script_prefix

    before = get_script_prefix()
    set_script_prefix("/shop/")
    try:
        with override_settings(STATIC_URL="static/"):
            assert static._path("/shop/static/") == "/static/"
    finally:
        set_script_prefix(before)


def test_the_rest_is_served_where_static_root_is_missing(tmp_path: Path) -> None:
    with serving(STATIC_URL="static/", STATIC_ROOT=tmp_path / "missing") as server:
        assert get(server, "css/site.css").status == 404
        assert server.get("/").status == 200


def test_below_a_mount_point_static_files_are_served(root: Path) -> None:
    from tests.native_project.serving import application

    def mounted() -> web.Application:
        outer = web.Application()
        outer.add_subapp("/site", application())
        return outer

    with (
        override_settings(STATIC_URL="static/", STATIC_ROOT=root),
        AppServer(mounted) as server,
    ):
        assert server.get("/site/static/css/site.css").text == "body {}"


# --- system checks ------------------------------------------------------------------------


def ids(config: Config, **settings: Any) -> list[str | None]:
    with override_settings(**settings):
        return [message.id for message in static.check(config)]


def test_a_missing_static_root_is_w012_and_tells_the_remedy(tmp_path: Path) -> None:
    for root in (None, tmp_path / "missing"):
        with override_settings(STATIC_URL="static/", STATIC_ROOT=root):
            (message,) = static.check(Config())
        assert message.id == "aioserve.W012"
        assert "collectstatic" in (message.hint or "")
    assert str(tmp_path / "missing") in message.msg


def test_a_static_root_that_is_not_needed_may_be_missing(tmp_path: Path) -> None:
    assert ids(Config(), STATIC_URL="static/", STATIC_ROOT=tmp_path) == []
    assert ids(Config(), STATIC_URL="static/", STATIC_ROOT=None, DEBUG=True) == []
    assert ids(Config(static=False), STATIC_URL="static/", STATIC_ROOT=None) == []
    assert ids(Config(), STATIC_URL="https://cdn.example.com/x/", STATIC_ROOT=None) == []
    assert ids(Config(), STATIC_URL=None, STATIC_ROOT=None) == []


def test_media_without_a_place_is_w013(tmp_path: Path) -> None:
    here = {"STATIC_ROOT": tmp_path}
    config = Config(media=True)
    assert ids(config, MEDIA_URL="media/", MEDIA_ROOT="", **here) == ["aioserve.W013"]
    assert ids(config, MEDIA_URL="/", MEDIA_ROOT=tmp_path, **here) == ["aioserve.W013"]
    assert ids(config, MEDIA_URL="media/", MEDIA_ROOT=tmp_path, **here) == []


@pytest.mark.parametrize(
    "path", [HERE + "add_haeder", HERE + "not_a_function", "os.path.exists", "asyncio.sleep"]
)
def test_a_wrong_headers_function_names_itself(path: str, tmp_path: Path) -> None:
    config = Config(static_headers=path)
    assert ids(config, STATIC_ROOT=tmp_path) == ["aioserve.E013"]
    with pytest.raises(ConfigurationError, match=f'STATIC_HEADERS .* is "{path}"'):
        static.setup(web.Application(), config)

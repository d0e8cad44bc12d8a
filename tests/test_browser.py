"""Testproject's live pages in a real browser, before and after every worker is replaced."""

from __future__ import annotations

import http.server
import re
import shutil
import signal
import threading
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from tests import support
from tests.support import ROOT, Runaio, Visitor, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page

pytestmark = [pytest.mark.browser, pytest.mark.slow]

CHROMIUM = "/usr/bin/chromium"
WORKERS = 4
#: Milliseconds that a page may take to show something, on a busy machine.
PATIENCE = 30_000

#: What Chromium itself writes to the console when a worker leaves, whatever the page does about it.
RECONNECTING = re.compile(
    r"WebSocket connection to '\S+' failed|net::ERR_\w+|the server responded with a status of 503"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runaio]:
    env = {"STATIC_ROOT": str(tmp_path_factory.mktemp("static"))}
    support.manage(support.TESTPROJECT, "collectstatic", "--noinput", "--verbosity=0", env=env)
    with Runaio(f"--workers={WORKERS}", "--threads=4", "--stream-linger=2", env=env) as running:
        yield running
    running.check_log()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if shutil.which(CHROMIUM) is None:
        support.skip_or_fail(f"{CHROMIUM} is not installed")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
            ],
        )
        yield chromium
        chromium.close()


class Desk:
    """A visitor's browser, and all that its pages complain of."""

    def __init__(self, context: BrowserContext, url: str) -> None:
        self.complaints: list[str] = []
        self._context, self._url = context, url
        context.set_default_timeout(PATIENCE)

    def open(self, path: str, live: bool = True) -> Page:
        """Open a page and wait until it is connected."""
        page = self._context.new_page()
        page.on("console", self._note)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.goto(self._url + path)
        # A page that was loaded anew would not have it.
        page.evaluate("window.loadedOnce = true")
        if live:
            page.wait_for_selector("#connection[data-state=live]")
        return page

    def log_in(self) -> None:
        page = self.open("/accounts/login/", live=False)
        page.fill("[name=username]", "admin")
        page.fill("[name=password]", "admin")
        page.click("main button")
        page.wait_for_url(self._url + "/")
        page.close()

    def _note(self, message: ConsoleMessage) -> None:
        if message.type in {"error", "warning"} and not RECONNECTING.search(message.text):
            self.complaints.append(message.text)


@pytest.fixture
def desk(browser: Browser, server: Runaio) -> Iterator[Desk]:
    with browser.new_context(viewport={"width": 900, "height": 700}) as context:
        visitor = Desk(context, server.url)
        visitor.log_in()
        yield visitor
    assert visitor.complaints == []


def post(server: Runaio, text: str) -> None:
    with Visitor(server.address) as author:
        author.get("/topics/1/")
        author.close()
        response = author.post("/topics/1/", {"author": "hedy", "text": text})
        assert response.status == 302


def say(page: Page, text: str) -> None:
    page.fill("#say input", text)
    page.press("#say input", "Enter")


def texts(page: Page) -> list[str]:
    return page.locator("#messages article .text").all_inner_texts()


def wait_for_text(page: Page, text: str) -> None:
    page.locator("#messages article .text", has_text=re.compile(f"^{re.escape(text)}$")).wait_for()


def wait_for_count(page: Page, number: int) -> None:
    place = page.locator("[data-topic='1']", has_text=re.compile(f"^{number}$"))
    place.wait_for()


def replace_every_worker(server: Runaio) -> None:
    before = set(server.workers())
    server.signal(signal.SIGHUP)

    def replaced() -> bool:
        workers = set(server.workers())
        return len(workers) == WORKERS and not workers & before

    wait_until(replaced, 60, "the workers are not replaced")


def test_what_is_said_in_one_chat_appears_in_the_other(desk: Desk) -> None:
    first, second = desk.open("/topics/1/chat/"), desk.open("/topics/1/chat/")
    say(first, "Is anybody there?")
    wait_for_text(second, "Is anybody there?")
    say(second, "<b>Yes</b> & no")
    for page in (first, second):  # each by its own worker
        wait_for_text(page, "<b>Yes</b> & no")
    assert texts(first) == texts(second)
    assert first.locator("#messages article .author").last.inner_text() == "admin"


def test_text_that_is_refused_is_told_to_its_author(desk: Desk) -> None:
    page = desk.open("/topics/1/chat/")
    say(page, "   ")
    page.locator(".problem", has_text="This field is required.").wait_for()


def test_list_shows_what_is_posted_changed_and_deleted(desk: Desk, server: Runaio) -> None:
    page = desk.open("/topics/1/")
    before = texts(page)
    post(server, "Posted elsewhere")
    wait_for_text(page, "Posted elsewhere")
    newest = page.locator("#messages article").last.get_attribute("id") or ""
    number = newest.removeprefix("message-")
    admin = desk.open(f"/admin/board/message/{number}/change/", live=False)
    admin.fill("[name=text]", "Changed in the admin")
    admin.click("[name=_save]")
    wait_for_text(page, "Changed in the admin")
    assert texts(page) == [*before, "Changed in the admin"]
    admin.goto(f"{server.url}/admin/board/message/{number}/delete/")
    admin.click("#content [type=submit]")
    page.locator(f"#{newest}").wait_for(state="detached")
    assert texts(page) == before


def test_number_of_messages_follows_by_long_poll(desk: Desk, server: Runaio) -> None:
    page = desk.open("/")
    number = int(page.locator("[data-topic='1']").inner_text())
    post(server, "One more")
    wait_for_count(page, number + 1)


def test_pages_show_everything_after_every_worker_was_replaced(desk: Desk, server: Runaio) -> None:
    chats = [desk.open("/topics/1/chat/"), desk.open("/topics/1/chat/")]
    topic, index = desk.open("/topics/1/"), desk.open("/")
    expected = texts(topic)
    for release in ("first", "second"):
        for page in [*chats, topic, index]:
            page.evaluate("""() => {
                const place = document.getElementById("connection");
                window.wasAway = false;
                new MutationObserver(() => { window.wasAway ||= place.dataset.state === "away"; })
                    .observe(place, { attributes: true });
            }""")
        said = [f"said before the {release}", f"said after the {release}"]
        posted = f"posted after the {release}"
        say(chats[0], said[0])
        replace_every_worker(server)
        say(chats[1], said[1])
        wait_for_text(topic, said[1])
        post(server, posted)
        expected += [*said, posted]
        for page in [*chats, topic]:
            wait_for_text(page, posted)
            assert texts(page) == expected
        wait_for_count(index, len(expected))
        for page in [*chats, topic]:
            assert page.evaluate("window.wasAway")
    assert all(page.evaluate("window.loadedOnce") for page in [*chats, topic, index])


class Refusing(http.server.BaseHTTPRequestHandler):
    """A server of one page and its stream, which is refused, ends after an event, and so on."""

    asked: list[tuple[str, str | None]]
    answers: Iterator[bytes | None]

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if url.path != "/changes/":
            self.answer(200, "text/html", b"<!doctype html><body data-version=3>")
            return
        self.asked.append((url.query, self.headers["Last-Event-ID"]))
        events = next(self.answers, b"")
        if events is None:
            self.answer(503, "text/plain", b"")
        else:
            self.answer(200, "text/event-stream", events)

    def answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def refusing() -> Iterator[http.server.HTTPServer]:
    event = "retry: 100\n\nid: {0}\nevent: article\ndata: number {0}\n\n"
    Refusing.asked = []
    Refusing.answers = iter([None, event.format(4).encode(), None, event.format(5).encode()])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_the_script_of_the_documentation_opens_its_stream_again(
    browser: Browser, refusing: http.server.HTTPServer
) -> None:
    """Refused, the page opens it anew; where a stream ended, the browser does."""
    text = (ROOT / "docs" / "howto" / "live.md").read_text()
    script = re.search(r"```javascript\n(let last.*?)```", text, re.DOTALL)
    assert script is not None
    with browser.new_context() as context:
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.goto(f"http://127.0.0.1:{refusing.server_port}/")
        page.add_script_tag(
            content=f"const shown = []; function show(data) {{ shown.push(data); }}\n{script[1]}"
        )
        page.wait_for_function("shown.length === 2")
        assert page.evaluate("shown") == ["number 4", "number 5"]
    assert Refusing.asked[:4] == [
        ("after=3", None),
        ("after=3", None),
        ("after=3", "4"),
        ("after=4", None),
    ]

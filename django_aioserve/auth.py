"""Django inside aiohttp handlers: request, session, user, permissions, CSRF, language.

A session that was changed is saved, and its cookie set, before the head of the answer
leaves, be it a page, a stream or a WebSocket's handshake. What changes afterwards is
the handler's to save: ``await session.asave()``.
"""

from __future__ import annotations

import functools
import inspect
import io
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

from aiohttp import hdrs, web
from asgiref.sync import sync_to_async
from django.core.exceptions import SynchronousOnlyOperation
from django.core.handlers.wsgi import WSGIRequest
from django.utils.functional import SimpleLazyObject, cached_property
from multidict import CIMultiDict
from yarl import URL

from django_aioserve.state import State, current_state

if TYPE_CHECKING:
    from django.contrib.auth.base_user import AbstractBaseUser
    from django.contrib.auth.models import AnonymousUser
    from django.contrib.sessions.backends.base import SessionBase
    from django.http import HttpRequest, HttpResponse
    from django.http.response import HttpResponseBase

__all__ = [
    "activate",
    "activate_language",
    "csrf_protect",
    "django_request",
    "get_session",
    "get_user",
    "login_required",
    "permission_required",
    "settle",
    "watch_head",
    "web_response",
]

T = TypeVar("T")
H = TypeVar("H", bound=Callable[..., Awaitable[web.StreamResponse]])

# --------------------------------------------------------------------------- request, session, user


class NativeRequest(WSGIRequest):
    """Django's view of an aiohttp request: without a body, with a session and a user."""

    @cached_property
    def session(self) -> SessionBase:  # type: ignore[override]
        from django.conf import settings

        engine = import_module(settings.SESSION_ENGINE)
        key = self.COOKIES.get(settings.SESSION_COOKIE_NAME)
        return cast("SessionBase", engine.SessionStore(key))

    @cached_property
    def user(self) -> Any:  # type: ignore[override]
        # Templates have it in a thread: those of Django's error pages, for example.
        return SimpleLazyObject(partial(_user_at_last, self))


def _user_at_last(request: HttpRequest) -> Any:
    from django.contrib import auth

    try:
        return auth.get_user(request)
    except SynchronousOnlyOperation:
        raise SynchronousOnlyOperation(
            "Before a native handler uses request.user: await get_user(request)."
        ) from None


def django_request(request: web.Request) -> HttpRequest:
    """Give Django's view of an aiohttp request, always the same object for one request.

    Its META, GET, COOKIES, headers, path and scheme are those that a Django view would see,
    with trusted proxies respected. It has no body: POST and FILES are empty (after
    `csrf_protect` POST holds the fields of the form, FILES stays empty). Before
    ``session`` and ``user`` are used on the event loop, await `get_session` and `get_user`; in
    a thread they load themselves. ``auser()`` always works, so ``alogin()`` and
    ``alogout()`` of `django.contrib.auth` do, too.

    Raises RuntimeError outside of a native handler.

    .. versionadded:: 0.1
    """
    state = current_state()
    django = state.django
    if django is None:
        environ = state.shared.meta.environ(request, state.shared.script_name)
        environ["wsgi.input"] = io.BytesIO()
        django = state.django = NativeRequest(environ)
        cast("Any", django).auser = partial(get_user, request)
        if not state.is_watched:
            watch_head(request, state)
    return django


async def get_session(request: web.Request) -> SessionBase:
    """Load the session of a request, of whatever SESSION_ENGINE; kept for this request.

    Being loaded, it is used like that of a Django view: ``session["cart"]``. It is
    saved, and its cookie set, when the answer begins; what is changed afterwards, for
    example while a WebSocket is open, is saved by ``await session.asave()`` alone.

    .. versionadded:: 0.1
    """
    django = cast("NativeRequest", django_request(request))
    state = current_state()
    async with state.lock:
        await _with_session(state, django.session, lambda: None)
    return django.session


async def get_user(request: web.Request) -> AbstractBaseUser | AnonymousUser:
    """Give the user who is logged in, or an AnonymousUser; kept for this request.

    The user comes from the session, checked as `django.contrib.auth` does (backend,
    session hash, active or not). Nothing is looked up for a client without a session.

    .. versionadded:: 0.1
    """
    django = cast("NativeRequest", django_request(request))
    if type(django.user) is SimpleLazyObject:
        from django.contrib import auth

        state = current_state()
        async with state.lock:
            if type(django.user) is SimpleLazyObject:
                load = partial(auth.get_user, django)
                django.user = await _with_session(state, django.session, load)
    return cast("AbstractBaseUser | AnonymousUser", django.user)


async def _with_session(state: State, session: SessionBase, function: Callable[[], T]) -> T:
    """Load the session, then call ``function()``: together, in a thread unless nothing waits."""
    from django.contrib.auth import SESSION_KEY

    # A new session is empty, and one in a cookie came with the request.
    is_here = session.session_key is None or type(session).__module__.endswith(".signed_cookies")

    def call() -> T:
        # Any access loads it.
        session.keys()
        return function()

    if (state.is_loaded or is_here) and SESSION_KEY not in session:
        result = call()
    else:
        result = await sync_to_async(call)()
    state.is_loaded = True
    return result


def activate_language(request: web.Request) -> str:
    """Find out the language of a request as LocaleMiddleware does, and activate it.

    Translations of this handler are in it from here on; other requests are not affected. Gives
    the language code. For an `aio_path` within ``i18n_patterns()`` the language of the path is
    active without this.

    .. versionadded:: 0.1
    """
    from django.utils import translation

    language = current_state().language or translation.get_language_from_request(
        django_request(request)
    )
    translation.activate(language)
    return language


def activate(language: str) -> None:
    """Activate the language that the path of a native request names."""
    from django.utils import translation

    current_state().language = language
    translation.activate(language)


# --------------------------------------------------------------------------- decorators


@overload
def login_required(handler: H) -> H: ...


@overload
def login_required(
    *,
    login_url: str | None = None,
    redirect_field_name: str = "next",
    redirect: bool | None = None,
) -> Callable[[H], H]: ...


def login_required(
    handler: H | None = None,
    *,
    login_url: str | None = None,
    redirect_field_name: str = "next",
    redirect: bool | None = None,
) -> H | Callable[[H], H]:
    """Admit a user who is logged in; for a native handler or a method of a `web.View`.

    Others are sent to ``login_url`` (else LOGIN_URL) where a browser navigates to a page.
    A WebSocket, ``fetch()`` and XMLHttpRequest are answered with 401. ``redirect`` decides
    for all: True redirects always, False never.

    .. versionadded:: 0.1
    """

    async def check(request: web.Request) -> None:
        user = await get_user(request)
        if not user.is_authenticated:
            raise _login_needed(request, login_url, redirect_field_name, redirect)

    decorator = partial(_checked, check)
    return decorator(handler) if handler is not None else decorator


def permission_required(
    permission: str | Iterable[str],
    *,
    login_url: str | None = None,
    redirect: bool | None = None,
) -> Callable[[H], H]:
    """Admit a user who has one permission (``"app.change_thing"``), or all of several.

    Whoever is not logged in is treated as `login_required` does. A user who lacks a
    permission gets Django's page for PermissionDenied, a WebSocket 403.

    .. versionadded:: 0.1
    """
    permissions = (permission,) if isinstance(permission, str) else tuple(permission)

    async def check(request: web.Request) -> None:
        from django.core.exceptions import PermissionDenied

        user = cast("Any", await get_user(request))
        if await user.ahas_perms(permissions):
            return
        if not user.is_authenticated:
            raise _login_needed(request, login_url, "next", redirect)
        raise PermissionDenied

    return partial(_checked, check)


def csrf_protect(handler: H) -> H:
    """Protect a handler against cross-site requests as CsrfViewMiddleware protects a view.

    A request with an unsafe method needs a trusted Origin (or Referer, over HTTPS)
    and the token, in the header of CSRF_HEADER_NAME or in the form's field
    ``csrfmiddlewaretoken``. Others get the answer of CSRF_FAILURE_VIEW. The handler can
    use ``get_token(django_request(request))``; the cookie is set with its answer.

    .. versionadded:: 0.1
    """
    return _checked(_check_csrf, handler)


async def _check_csrf(request: web.Request) -> web.StreamResponse | None:
    from django.conf import settings

    django = cast("Any", django_request(request))
    if settings.CSRF_USE_SESSIONS:
        await get_session(request)
    middleware = _csrf_middleware()
    middleware.process_request(django)
    if request.method in {"GET", "HEAD", "OPTIONS", "TRACE"}:
        return None
    if request.method == "POST" and settings.CSRF_HEADER_NAME not in django.META:
        await _read_form(request)
    # A view of the project's answers a refusal: it may take its time.
    refusal = await sync_to_async(middleware.process_view)(django, None, (), {})
    return None if refusal is None else web_response(refusal)


async def _read_form(request: web.Request) -> None:
    """Put the fields of the form into Django's POST. The handler's own `post()` finds them, too."""
    from django.http import QueryDict

    fields = QueryDict(mutable=True)
    try:
        form = await request.post()
    except ValueError as error:
        raise web.HTTPBadRequest(text="400: malformed form") from error
    for name, value in form.items():
        if isinstance(value, str):
            fields.appendlist(name, value)
    fields._mutable = False  # noqa: SLF001  # as Django itself closes it
    cast("Any", django_request(request)).POST = fields


def _checked(check: Callable[[web.Request], Awaitable[web.StreamResponse | None]], handler: H) -> H:
    """Let ``check`` answer, raise or pass a request before ``handler`` gets it."""
    if isinstance(handler, type) or not inspect.iscoroutinefunction(handler):
        raise TypeError(
            f"{handler!r} is no coroutine function; of a web.View decorate the methods."
        )

    @functools.wraps(handler)
    async def checked(first: Any, *args: Any, **kwargs: Any) -> web.StreamResponse:
        request = first.request if isinstance(first, web.View) else first
        answer = await check(request)
        if answer is not None:
            return answer
        return await handler(first, *args, **kwargs)

    return cast("H", checked)


def _login_needed(
    request: web.Request, login_url: str | None, field: str, redirect: bool | None
) -> web.HTTPException:
    from urllib.parse import urlsplit

    from django.conf import settings
    from django.contrib.auth.views import redirect_to_login
    from django.shortcuts import resolve_url

    if not (_is_navigation(request) if redirect is None else redirect):
        # RFC 9110, 15.5.2 wants a challenge; browsers know none for a login page.
        return web.HTTPUnauthorized(headers={hdrs.WWW_AUTHENTICATE: "Session"})
    django = django_request(request)
    url = resolve_url(login_url or settings.LOGIN_URL)
    path = django.build_absolute_uri()
    there, here = urlsplit(url), urlsplit(path)
    if there.scheme in {"", here.scheme} and there.netloc in {"", here.netloc}:
        path = django.get_full_path()
    return web.HTTPFound(URL(redirect_to_login(path, url, field).url, encoded=True))


def _is_navigation(request: web.Request) -> bool:
    """Tell whether a browser shows the answer as a page."""
    headers = request.headers
    if hdrs.UPGRADE in headers:
        return False
    mode = headers.get("Sec-Fetch-Mode")
    if mode is not None:
        return mode == "navigate"
    return headers.get("X-Requested-With") != "XMLHttpRequest" and "text/html" in headers.get(
        hdrs.ACCEPT, ""
    )


# --------------------------------------------------------------------------- the answer


def web_response(response: HttpResponseBase) -> web.Response:
    """Make an aiohttp response of one of Django's, as ``render()`` gives it.

    Status, headers, cookies and content are taken over. Raises ValueError for a
    streaming response.

    .. versionadded:: 0.1
    """
    if response.streaming:
        raise ValueError("A streaming response of Django's cannot be answered with by aiohttp.")
    headers: CIMultiDict[str] = CIMultiDict(response.items())
    for cookie in response.cookies.values():
        headers.add(hdrs.SET_COOKIE, cookie.OutputString())
    return web.Response(
        status=response.status_code,
        reason=response.reason_phrase,
        headers=headers,
        body=cast("HttpResponse", response).content,
    )


def watch_head(request: web.Request, state: State) -> None:
    """See to the session and the cookies also of a response that the handler itself begins.

    For this request only: a receiver of ``on_response_prepare`` takes 1.3 µs of every one.
    """
    # aiohttp calls this before the head of a response leaves; there is no public name for it.
    ordinary = request._prepare_hook  # noqa: SLF001

    async def hook(response: web.StreamResponse) -> None:
        if state.on_head is not None:
            state.on_head(request, response)
        if state.django is not None:
            await settle(state, response)
        state.response = response
        await ordinary(response)

    # In debug mode aiohttp warns of attributes that are set on a request.
    object.__setattr__(request, "_prepare_hook", hook)
    state.is_watched = True


async def settle(state: State, response: web.StreamResponse) -> None:
    """Save the session; add its cookie, that of CSRF, and what the answer varies on."""
    django = state.django
    if django is None or state.settled or state.response is not None:
        return
    state.settled = True
    # Where it was not used it is not made for this.
    session = vars(django).get("session")
    needs_cookie = django.META.get("CSRF_COOKIE_NEEDS_UPDATE", False)
    if session is None and not needs_cookie:
        return
    from django.conf import settings
    from django.http import HttpResponse

    carrier = HttpResponse(status=response.status)
    if needs_cookie:
        _csrf_middleware().process_response(django, carrier)
    if session is not None:
        save = _session_middleware().process_response
        if session.modified or settings.SESSION_SAVE_EVERY_REQUEST:
            await sync_to_async(save)(django, carrier)
        else:
            save(django, carrier)
    headers = response.headers
    for cookie in carrier.cookies.values():
        headers.add(hdrs.SET_COOKIE, cookie.OutputString())
    if carrier.has_header("Vary"):
        already = headers.get(hdrs.VARY)
        headers[hdrs.VARY] = f"{already}, {carrier['Vary']}" if already else carrier["Vary"]


@functools.cache
def _session_middleware() -> Any:
    from django.contrib.sessions.middleware import SessionMiddleware

    return SessionMiddleware(_no_view)


@functools.cache
def _csrf_middleware() -> Any:
    from django.middleware.csrf import CsrfViewMiddleware

    return CsrfViewMiddleware(_no_view)


def _no_view(_: HttpRequest) -> HttpResponseBase:
    raise RuntimeError("Django's middleware is used here without a view.")

"""Native aiohttp routes beside Django: AIOSERVE_ROUTES, and `aio_path` in the URLconf.

Rules:

1. AIOSERVE_ROUTES, static files and each `aio_path` are routes of aiohttp's router, which
   asks the one with the longest literal path first. What none of them takes is the bridge's.
2. Within the URLconf the order is Django's: an `aio_path` gets a request only where no
   pattern before it matches the path.
3. The URLconf is read once, when the application is built. What stands before an `aio_path`
   is tried for a request only if their literal beginnings allow that both match.
4. Each pattern is matched by Django's own objects, so converters, ``include()``,
   namespaces and language prefixes are what they are in Django. For each language there is a
   row of its own where routes differ by language.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

from aiohttp import hdrs, web
from aiohttp.abc import AbstractView

from django_aioserve import auth, conf, static
from django_aioserve.bridge.body import expect_handler
from django_aioserve.exceptions import ConfigurationError, Problem
from django_aioserve.native import with_django
from django_aioserve.state import SHARED, Shared
from django_aioserve.state import setup as set_up_state

if TYPE_CHECKING:
    from django.core.checks import CheckMessage
    from django.http import HttpRequest, HttpResponse
    from django.urls import URLPattern, URLResolver

    from django_aioserve.conf import Config

__all__ = ["add_bridge", "aio_path", "check", "load_cleanup_ctx", "load_middlewares", "setup"]

Handler = Callable[..., Awaitable[web.StreamResponse]] | type[AbstractView]
SimpleHandler = Callable[[web.Request], Awaitable[web.StreamResponse]]

# --------------------------------------------------------------------------- aio_path


def aio_path(
    route: str,
    handler: Handler,
    kwargs: dict[str, Any] | None = None,
    name: str | None = None,
    *,
    methods: Sequence[str] | None = None,
) -> URLPattern:
    """Route a path to an aiohttp handler; for ``urlpatterns``, like `django.urls.path`.

    ``handler`` is a coroutine function that is called as Django calls a view, with the
    aiohttp request and, as keyword arguments, what the route's converters made::

        async def live(request: web.Request, room: int) -> web.StreamResponse: ...

        urlpatterns = [aio_path("live/<int:room>/", live, name="live")]

    or a subclass of `aiohttp.web.View`. Both find the same values in
    ``request.match_info``. A WebSocket handler is an ordinary handler. ``kwargs`` are
    more arguments for the handler. With ``methods`` others are answered with 405; GET
    admits HEAD. ``include()``, namespaces, ``reverse()`` and ``{% url %}`` work as ever.
    Django's MIDDLEWARE is not run for it; what it gives views is in `django_aioserve.auth`.

    Under another server than ``runaio`` (Django's ``runserver``, say) the URL is
    answered with 501 and a text that tells why.

    Raises TypeError where ``handler`` is no coroutine function, and where a decorator of
    Django's is around it: those are for views and their requests.

    .. versionadded:: 0.1
    """
    from django.urls import path

    if not _is_handler(handler):
        raise TypeError(
            f"aio_path({route!r}, ...) takes a coroutine function (async def) or a subclass of "
            f"aiohttp.web.View, not {handler!r}."
        )
    decorator = _decorator_of_django(handler)
    if decorator is not None:
        raise TypeError(
            f"aio_path({route!r}, ...): a decorator of {decorator} is around the handler, and "
            "those are for Django's views. login_required, permission_required and csrf_protect of "
            "django_aioserve.auth are for native handlers."
        )
    return cast("URLPattern", path(route, cast("Any", NativeView(handler, methods)), kwargs, name))


def _is_handler(handler: object) -> bool:
    if isinstance(handler, type):
        return issubclass(handler, AbstractView)
    call = getattr(handler, "__call__", None)  # noqa: B004  # objects with an async __call__
    return inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(call)


def _decorator_of_django(handler: Any) -> str | None:
    """Give the module of a decorator of Django's that is around a handler."""
    while handler is not None:
        module: str = getattr(handler, "__globals__", {}).get("__name__", "")
        if module.startswith("django."):
            return module
        handler = getattr(handler, "__wrapped__", None)
    return None


class NativeView:
    """What Django sees of an aiohttp handler: a view that can only tell where it is served."""

    # Whoever asks Django for it is to read that text, not one about logins or tokens.
    csrf_exempt = True
    login_required = False

    def __init__(self, handler: Handler, methods: Sequence[str] | None) -> None:
        names = ("__module__", "__name__", "__qualname__")
        functools.update_wrapper(self, cast("Any", handler), assigned=names, updated=())
        self.handler = handler
        self.methods = None if methods is None else _with_head(methods)

    def __call__(self, request: HttpRequest, **kwargs: Any) -> HttpResponse:
        from django.http import HttpResponse

        return HttpResponse(
            f"501 Not Implemented: {request.path} is served by the aiohttp handler "
            f"{self.__module__}.{getattr(self, '__qualname__', '?')}, which runs only under "
            '"manage.py runaio" (django-aioserve), not under this server.\n',
            status=501,
            content_type="text/plain; charset=utf-8",
        )


def _with_head(methods: Sequence[str]) -> frozenset[str]:
    upper = {method.upper() for method in methods}
    return frozenset(upper | {hdrs.METH_HEAD} if hdrs.METH_GET in upper else upper)


# --------------------------------------------------------------------------- the URLconf, flat


@dataclass(frozen=True, slots=True)
class _Literal:
    """A language prefix, in one language."""

    prefix: str

    def match(self, path: str) -> tuple[str, tuple[()], dict[str, Any]] | None:
        return (path[len(self.prefix) :], (), {}) if path.startswith(self.prefix) else None


@dataclass(frozen=True, slots=True)
class _Leaf:
    """One pattern of the URLconf with all that include it, in one language or in all."""

    view: Any
    language: str | None
    steps: tuple[tuple[Any, dict[str, Any]], ...]
    """Pattern objects of Django, outermost first, each with its default arguments."""
    head: str
    """The literal text with which each path begins that this leaf may match."""
    route: str
    """For messages."""
    is_literal: bool
    """Whether the paths have no parameters: there is one only."""
    defaults: dict[str, Any]
    """The default arguments of all steps together."""
    regex: re.Pattern[str] | None
    """That of an ordinary path that is not included, which is the usual case."""
    converters: tuple[tuple[str, Callable[[str], Any]], ...]
    """For what ``regex`` finds."""

    def match(self, path: str) -> dict[str, Any] | None:
        """Give the values in ``path``, which has no leading slash, as Django would; else None."""
        if self.is_literal:
            return self.defaults.copy() if path == self.head else None
        if self.regex is not None:
            # What Django does for a path that is not included, without its detours.
            match = self.regex.match(path)
            if match is None:
                return None
            values = match.groupdict()
            try:
                for name, to_python in self.converters:
                    values[name] = to_python(values[name])
            except ValueError:
                return None
            if self.defaults:
                values.update(self.defaults)
            return values
        values = {}
        for pattern, defaults in self.steps:
            found = pattern.match(path)
            if found is None:
                return None
            path = found[0]
            values.update(found[2])
            values.update(defaults)
        return values

    def may_meet(self, other: _Leaf) -> bool:
        """Tell whether some path could belong to both, judged by their literal beginnings."""
        if self.language and other.language and self.language != other.language:
            return False
        return self.head.startswith(other.head) or other.head.startswith(self.head)


def _leaves() -> list[_Leaf]:
    """Flatten ROOT_URLCONF, in its order."""
    from django.conf import settings
    from django.urls import get_resolver
    from django.utils import translation

    languages = dict.fromkeys((*dict(settings.LANGUAGES), settings.LANGUAGE_CODE))
    found: list[_Leaf] = []
    for steps, view in _walk(get_resolver(), ()):
        texts = {}
        for language in languages:
            with translation.override(language):
                texts[language] = tuple(str(pattern) for pattern, _ in steps)
        if len(set(texts.values())) <= 1:
            found.append(_leaf(view, None, steps))
            continue
        for language in languages:
            with translation.override(language):
                found.append(_leaf(view, language, _in_language(steps)))
    return found


def _walk(
    resolver: URLResolver, above: tuple[tuple[Any, dict[str, Any]], ...]
) -> Iterator[tuple[tuple[tuple[Any, dict[str, Any]], ...], Any]]:
    from django.urls import URLResolver

    for entry in resolver.url_patterns:
        if isinstance(entry, URLResolver):
            yield from _walk(entry, (*above, (entry.pattern, entry.default_kwargs)))
        else:
            yield (*above, (entry.pattern, entry.default_args)), entry.callback


def _in_language(
    steps: tuple[tuple[Any, dict[str, Any]], ...],
) -> tuple[tuple[Any, dict[str, Any]], ...]:
    """Fix patterns that depend on the language to the one that is active."""
    from django.urls.resolvers import LocalePrefixPattern, RegexPattern, RoutePattern

    fixed = []
    for position, (pattern, defaults) in enumerate(steps):
        is_endpoint = position == len(steps) - 1
        if isinstance(pattern, LocalePrefixPattern):
            pattern = _Literal(pattern.language_prefix)  # noqa: PLW2901
        elif isinstance(pattern, (RoutePattern, RegexPattern)):
            pattern = type(pattern)(str(pattern), is_endpoint=is_endpoint)  # noqa: PLW2901
        fixed.append((pattern, defaults))
    return tuple(fixed)


def _leaf(view: Any, language: str | None, steps: tuple[tuple[Any, dict[str, Any]], ...]) -> _Leaf:
    from django.urls.resolvers import RoutePattern

    route = "".join(str(getattr(pattern, "prefix", pattern)) for pattern, _ in steps)
    head = _head(pattern for pattern, _ in steps)
    is_literal = head == route and isinstance(steps[-1][0], RoutePattern)
    defaults = {name: value for _, each in steps for name, value in each.items()}
    regex = None
    converters: tuple[tuple[str, Callable[[str], Any]], ...] = ()
    if len(steps) == 1 and isinstance(steps[0][0], RoutePattern):
        regex = steps[0][0].regex
        converters = tuple((name, it.to_python) for name, it in steps[0][0].converters.items())
    return _Leaf(view, language, steps, head, "/" + route, is_literal, defaults, regex, converters)


_SPECIAL: Final = re.compile(r"[\\.\[\](){}*+?|$^]")


def _head(patterns: Iterator[Any]) -> str:
    """Give the literal beginning of whatever the patterns match together."""
    from django.urls.resolvers import RegexPattern, RoutePattern

    head = ""
    for pattern in patterns:
        text = str(getattr(pattern, "prefix", pattern))
        if isinstance(pattern, _Literal):
            head += text
        elif isinstance(pattern, RoutePattern):
            literal, parameter, _ = text.partition("<")
            head += literal
            if parameter:
                break
        elif isinstance(pattern, RegexPattern) and text.startswith("^") and "|" not in text:
            literal = _SPECIAL.split(text[1:], maxsplit=1)[0]
            rest = text[1 + len(literal) :]
            # "abc?" begins with "ab" only.
            head += literal[:-1] if rest[:1] in {"?", "*", "{"} else literal
            if rest not in {"", "$", r"\Z"}:
                break
        else:
            break
    return head


class _Resource(web.AbstractResource):
    """What aiohttp's router wants to know of every resource."""

    def __init__(self) -> None:
        super().__init__()
        self._prefix = ""

    def add_prefix(self, prefix: str) -> None:
        self._prefix = prefix + self._prefix

    def url_for(self, **kwargs: str) -> Any:
        raise RuntimeError("Use Django's reverse().")

    def get_info(self) -> Any:
        return {"formatter": self.canonical}

    def raw_match(self, path: str) -> bool:
        return False

    def __len__(self) -> int:
        return sum(1 for _ in self)


_NO_METHODS: Final[set[str]] = set()


class _NativeResource(_Resource):
    """An `aio_path`. ``rivals`` stand before it in the URLconf and may match the same paths."""

    def __init__(
        self, leaf: _Leaf, rivals: tuple[_Leaf, ...], wrap: Callable[..., SimpleHandler]
    ) -> None:
        super().__init__()
        self._leaf = leaf
        self._rivals = rivals
        self._begin = 1
        self._literal = leaf.head if leaf.is_literal else None
        self._route = web.ResourceRoute(hdrs.METH_ANY, _handler(leaf, wrap), self)

    @property
    def canonical(self) -> str:
        # The router finds a resource by what stands before the first brace.
        route = re.sub(r"<(?:[^>:]+:)?([^>]+)>", r"{\1}", self._leaf.route)
        head = "/" + self._leaf.head
        return self._prefix + (route if route.partition("{")[0] == head else head + "{rest}")

    def add_prefix(self, prefix: str) -> None:
        super().add_prefix(prefix)
        self._begin = len(self._prefix) + 1

    async def resolve(
        self, request: web.Request
    ) -> tuple[web.UrlMappingMatchInfo | None, set[str]]:
        path = request.rel_url.path_safe  # made by the router already
        if "%" in path:
            path = request.rel_url.path
        path = path[self._begin :]
        leaf = self._leaf
        values = leaf.defaults if path == self._literal else leaf.match(path)
        if values is None:
            return None, _NO_METHODS
        if self._rivals and any(rival.match(path) is not None for rival in self._rivals):
            return None, _NO_METHODS
        return web.UrlMappingMatchInfo(values, self._route), _NO_METHODS

    def __iter__(self) -> Iterator[web.AbstractRoute]:
        yield self._route


def _handler(leaf: _Leaf, wrap: Callable[..., SimpleHandler]) -> SimpleHandler:
    """Give the handler of an `aio_path` as aiohttp calls it: the values are in ``match_info``."""
    handler: Any = leaf.view.handler
    methods: frozenset[str] | None = leaf.view.methods
    language = leaf.language
    takes_values = not (isinstance(handler, type) or (leaf.is_literal and not leaf.defaults))
    if methods is None and language is None:
        return wrap(handler, takes_values=takes_values)

    async def call(request: web.Request, **values: Any) -> web.StreamResponse:
        if methods is not None and request.method not in methods:
            raise web.HTTPMethodNotAllowed(request.method, methods)
        if language is not None:
            auth.activate(language)
        return await handler(request, **values)  # type: ignore[no-any-return]

    return wrap(call, takes_values=takes_values)


class _BridgeResource(_Resource):
    """All that is not native."""

    beginnings: Final = ()
    """With what paths begin that may be native: none."""

    def __init__(self, handler: SimpleHandler, shared: Shared) -> None:
        super().__init__()
        self._shared = shared
        self._route = web.ResourceRoute(hdrs.METH_ANY, handler, self, expect_handler=expect_handler)

    @property
    def canonical(self) -> str:
        # The bridges read the mount point from the part before "{path_info}".
        return self._prefix + "/{path_info}"

    def add_prefix(self, prefix: str) -> None:
        super().add_prefix(prefix)
        self._shared.script_name = self._prefix

    async def resolve(self, _: web.Request) -> tuple[web.UrlMappingMatchInfo, set[str]]:
        return web.UrlMappingMatchInfo({}, self._route), _NO_METHODS

    def __iter__(self) -> Iterator[web.AbstractRoute]:
        yield self._route


# --------------------------------------------------------------------------- set-up


def setup(app: web.Application, config: Config) -> None:
    """Add the project's native routes to ``app``: AIOSERVE_ROUTES and those of the URLconf.

    Raises `ConfigurationError` for each of AIOSERVE_ROUTES that is none, and whatever
    importing ROOT_URLCONF raises.
    """
    from django.conf import settings

    shared = set_up_state(app)
    wrap = _unwrapped if _needs_middleware(config) else partial(with_django, shared)
    problems = []
    for path, value in _load_routes(config):
        try:
            _add_routes(app, value, wrap)
        except (RuntimeError, TypeError, ValueError) as error:
            # aiohttp's word for a wrong path, a wrong prefix or an application in use.
            problems.append(_problem(config, "routes", path, f"valid routes; {error}", "E010"))
    if problems:
        raise ConfigurationError(problems)
    if getattr(settings, "ROOT_URLCONF", None):
        leaves = _leaves()
        for position, leaf in enumerate(leaves):
            if isinstance(leaf.view, NativeView):
                rivals = tuple(other for other in leaves[:position] if leaf.may_meet(other))
                app.router.register_resource(_NativeResource(leaf, rivals, wrap))


def add_bridge(app: web.Application, handler: SimpleHandler) -> None:
    """Send to ``handler`` whatever no native route of ``app`` takes. After `setup`."""
    app.router.register_resource(_BridgeResource(handler, app[SHARED]))


def _unwrapped(handler: Any, *, takes_values: bool = False) -> SimpleHandler:
    """Give a handler as aiohttp calls it, for `_native` stands before it."""
    if not takes_values:
        return cast("SimpleHandler", handler)

    async def call(request: web.Request) -> web.StreamResponse:
        return await handler(request, **request.match_info)  # type: ignore[no-any-return]

    return call


def load_middlewares(config: Config) -> list[Any]:
    """Give the middlewares of the application: ours, then AIOSERVE_MIDDLEWARES in their order.

    Raises `ConfigurationError` for each that is no aiohttp middleware.
    """
    found = _load_middlewares(config)
    return [_native, *found] if _needs_middleware(config) else found


def load_cleanup_ctx(config: Config) -> list[Callable[[web.Application], AsyncIterator[None]]]:
    """Give what AIOSERVE_CLEANUP_CTX names, for ``app.cleanup_ctx``.

    Raises `ConfigurationError` for each that cannot be called with the application.
    """
    expected = "an asynchronous generator function that takes the application"
    return [value for _, value in _load(config, "cleanup_ctx", "E012", _takes_one, expected)]


def _load(
    config: Config, option: str, id_: str, is_right: Callable[[Any], bool], expected: str
) -> list[tuple[str, Any]]:
    """Import what an option names, each with its path."""
    found, problems = [], []
    for path in getattr(config, option):
        try:
            value = config.imported(option, path)
        except ImportError as error:
            problems.append(_problem(config, option, path, f"{expected}; {error}", id_))
            continue
        if is_right(value):
            found.append((path, value))
        else:
            problems.append(_problem(config, option, path, f"{expected}, not {value!r}", id_))
    if problems:
        raise ConfigurationError(problems)
    return found


def _load_routes(config: Config) -> list[tuple[str, Any]]:
    expected = (
        "a RouteTableDef, a list of web.RouteDef, a prefix with a sub-application, "
        "or a function that takes the application"
    )
    return _load(config, "routes", "E010", _is_routes, expected)


def _load_middlewares(config: Config) -> list[Any]:
    expected = "a function decorated with aiohttp.web.middleware"
    return [value for _, value in _load(config, "middlewares", "E011", _is_middleware, expected)]


def _needs_middleware(config: Config) -> bool:
    """Tell whether `_native` is to stand before the handlers, for they cannot be reached singly.

    aiohttp takes 2 µs for the first middleware, of every request, Django's among them.
    """
    return bool(config.middlewares) or any(
        _is_mount(value) or not isinstance(value, Sequence) for _, value in _load_routes(config)
    )


def _problem(config: Config, option: str, path: str, expected: str, id_: str) -> Problem:
    source = config.source(option)
    return Problem(source.name, str(source), path, expected, id_)


def _is_middleware(value: object) -> bool:
    return getattr(value, "__middleware_version__", None) == 1


def _is_routes(value: object) -> bool:
    if _is_mount(value):
        return True
    if isinstance(value, Sequence) and not isinstance(value, str):
        return all(isinstance(item, web.AbstractRouteDef) for item in value)
    # An application is callable, but it lacks its prefix.
    return _takes_one(value) and not isinstance(value, web.Application)


def _takes_one(value: object) -> bool:
    return conf.can_be_called(value, 1)


def _is_mount(value: object) -> bool:
    """Tell whether this is a prefix with a sub-application, or with a function that makes one."""
    return (
        isinstance(value, Sequence)
        and len(value) == 2
        and isinstance(value[0], str)
        and callable(value[1])
    )


def _add_routes(app: web.Application, value: Any, wrap: Callable[..., SimpleHandler]) -> None:
    if _is_mount(value):
        prefix, mounted = value
        app.add_subapp(prefix, mounted if isinstance(mounted, web.Application) else mounted())
    elif isinstance(value, Sequence):
        app.add_routes(
            web.RouteDef(item.method, item.path, wrap(item.handler), item.kwargs)
            if isinstance(item, web.RouteDef)
            else item
            for item in value
        )
    else:
        value(app)


@web.middleware
async def _native(request: web.Request, handler: Any) -> web.StreamResponse:
    """Give native handlers what they need of Django; everything else passes by."""
    resource = request.match_info.route.resource
    if isinstance(resource, (_BridgeResource, static.FilesResource)):
        return cast("web.StreamResponse", await handler(request))
    return await with_django(request.app[SHARED], handler)(request)


# --------------------------------------------------------------------------- checks

SAMPLES: Final = (
    "1",
    "a",
    "a-b",
    "a.b~c",
    "a/b",
    "2000-01-01",
    "0000",
    "00",
    "01234567-89ab-4cde-8fab-0123456789ab",
)
"""Values to try a route's parameters with; some of them suit each usual converter."""


def check(config: Config) -> list[CheckMessage]:
    """Find routes that cannot be loaded and routes that hide each other.

    ``aioserve.E010``, ``E011``, ``E012``: AIOSERVE_ROUTES, AIOSERVE_MIDDLEWARES or
    AIOSERVE_CLEANUP_CTX name something that is not there or not of that kind.
    ``aioserve.W010``: one of AIOSERVE_ROUTES hides a pattern of the URLconf.
    ``aioserve.W011``: an `aio_path` can never match, for an earlier pattern hides it.
    What hides what is judged by samples. Functions in AIOSERVE_ROUTES are not called.
    """
    from django.conf import settings
    from django.core.checks import Error, Warning  # noqa: A004

    messages: list[CheckMessage] = []
    routes: list[tuple[str, Any]] = []
    for load in (
        lambda: routes.extend(_load_routes(config)),
        lambda: _load_middlewares(config),
        lambda: load_cleanup_ctx(config),
    ):
        try:
            load()
        except ConfigurationError as error:
            messages += [Error(str(each), id=f"aioserve.{each.id}") for each in error.problems]
    if not getattr(settings, "ROOT_URLCONF", None):
        return messages
    leaves = [(leaf, samples) for leaf in _leaves() if (samples := _samples(leaf))]
    texts: dict[str, str] = {}
    for path, value in routes:
        for route, pattern in _patterns(value):
            for leaf, samples in leaves:
                if all(pattern.fullmatch("/" + sample) for sample in samples):
                    texts[f'{path} serves {route}, which hides "{leaf.route}" of the URLconf.'] = (
                        "W010"
                    )
    for position, (leaf, samples) in enumerate(leaves):
        if isinstance(leaf.view, NativeView):
            for earlier, _ in leaves[:position]:
                if leaf.may_meet(earlier) and all(
                    earlier.match(sample) is not None for sample in samples
                ):
                    text = (
                        f'The aio_path "{leaf.route}" can never match: '
                        f'"{earlier.route}" stands before it.'
                    )
                    texts[text] = "W011"
                    break
    hints = {
        "W010": "Give one of the two another path.",
        "W011": "Move it up in urlpatterns, or give one of the two another path.",
    }
    messages += [
        Warning(text, hint=hints[id_], id=f"aioserve.{id_}") for text, id_ in texts.items()
    ]
    return messages


def _patterns(value: Any) -> Iterator[tuple[str, re.Pattern[str]]]:
    """Give what aiohttp would match GET requests with, each with a text for messages."""
    if _is_mount(value):
        prefix = value[0].rstrip("/")
        yield f"{prefix}/", re.compile(re.escape(prefix) + "(/.*)?")
    elif isinstance(value, Sequence):
        app = web.Application()
        app.add_routes(value)
        for resource in app.router.resources():
            info = resource.get_info()
            methods = {route.method for route in resource}
            if not methods & {hdrs.METH_GET, hdrs.METH_ANY}:
                continue
            if "path" in info:
                yield info["path"], re.compile(re.escape(info["path"]))
            elif "pattern" in info:
                yield info["formatter"], info["pattern"]


def _samples(leaf: _Leaf) -> list[str]:
    """Give paths that the leaf matches, without a slash in front; none where none was found."""
    from django.utils.regex_helper import normalize

    pieces = []
    for pattern, _ in leaf.steps:
        text = str(getattr(pattern, "prefix", pattern))
        if hasattr(pattern, "regex"):
            text = normalize(pattern.regex.pattern)[0][0]
        pieces.append(text)
    template = re.sub(r"%\((\w+)\)s", "\0", "".join(pieces))
    candidates = dict.fromkeys(template.replace("\0", sample) for sample in SAMPLES)
    return [path for path in candidates if leaf.match(path) is not None]

"""The run of a native handler: Django at its hand, and an answer to what it raises.

Rules:

1. An exception that no handler caught becomes Django's answer, is logged as Django logs it, and
   in DEBUG gives Django's technical page. aiohttp's HTTPException is an answer.
2. MessagesLost of `django_aioserve.groups` is no mistake: it sends the client away, to come
   back at once and read its state anew. So a loss is not an error in the log for every page.
3. Of an exception group, as `asyncio.TaskGroup` raises it, the members count.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, cast

from aiohttp import WSCloseCode, hdrs, web

from django_aioserve import websocket
from django_aioserve.auth import django_request, settle, watch_head, web_response
from django_aioserve.bridge.threads import QueueFull
from django_aioserve.groups import MessagesLost
from django_aioserve.keys import POOL
from django_aioserve.state import STATE, Shared, State

if TYPE_CHECKING:
    from django.http import HttpRequest
    from django.http.response import HttpResponseBase

__all__ = ["with_django"]

logger = logging.getLogger("django.request")
groups_logger = logging.getLogger("django_aioserve.groups")


def with_django(
    shared: Shared,
    handler: Callable[..., Awaitable[web.StreamResponse]],
    *,
    takes_values: bool = False,
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """Make a handler that has Django at hand.

    With ``takes_values`` it is called with what the path holds as keyword arguments.
    """

    # All in one function, for each coroutine that awaits another takes half a microsecond.
    async def call(request: web.Request) -> web.StreamResponse:
        state = shared.state()
        STATE.set(state)
        for variable, value in shared.variables:
            variable.set(value)
        try:
            try:
                if hdrs.UPGRADE in request.headers:
                    _admit(request, state)
                if takes_values:
                    response = await handler(request, **request.match_info)
                else:
                    response = await handler(request)
            except web.HTTPException as answer:
                await settle(state, answer)
                raise
            # The first test spares an instance check of an abstract class, which takes longer.
            if type(response) is not web.Response and not isinstance(response, web.StreamResponse):
                raise TypeError(
                    f"The handler returned {response!r}, which is no response of aiohttp "
                    "(web_response() of django_aioserve.auth makes one of Django's)."
                )
            if state.django is not None:
                await settle(state, response)
        except (web.HTTPException, web.RequestPayloadError):  # the connection answers 400
            raise
        except QueueFull:
            raise web.HTTPServiceUnavailable(headers={hdrs.RETRY_AFTER: "1"}) from None
        except Exception as error:  # noqa: BLE001  # Django logs it
            return await _answer_exception(request, state, error)
        else:
            return response
        finally:
            if state.on_end is not None:
                state.on_end()
            if state.guest is not None:
                state.leave()

    return call


def _admit(request: web.Request, state: State) -> None:
    websocket.admit(request)
    state.on_head = websocket.begin
    if not state.is_watched:
        watch_head(request, state)


def _is_gone(request: web.Request, state: State, error: Exception) -> bool:
    if request.transport is None or request.transport.is_closing():
        return True
    # Whoever sends on a WebSocket that was closed meanwhile gets such an error.
    return (
        _consists_of(error, ConnectionError)
        and isinstance(state.response, web.WebSocketResponse)
        and state.response.closed
    )


def _consists_of(error: BaseException, kind: type[Exception]) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(_consists_of(each, kind) for each in error.exceptions)
    return isinstance(error, kind)


def _can_send_away(request: web.Request, state: State) -> bool:
    """Whether the client can tell the end from a complete answer."""
    resuming = isinstance(state.response, (web.WebSocketResponse, websocket.EventStream))
    return resuming or not request.writer.output_size


async def _send_away(request: web.Request, state: State) -> web.StreamResponse:
    """End what the client will open again, or have it ask again."""
    groups_logger.info("%s is ended: messages of a group were lost", ascii(request.path)[1:-1])
    begun = state.response
    if isinstance(begun, web.WebSocketResponse):
        await begun.close(code=WSCloseCode.TRY_AGAIN_LATER)
    if begun is not None:
        return begun
    raise web.HTTPServiceUnavailable(headers={hdrs.RETRY_AFTER: "1"})


async def _answer_exception(
    request: web.Request, state: State, error: Exception
) -> web.StreamResponse:
    if _is_gone(request, state, error):
        # It failed for want of a client, and nobody reads an answer.
        return state.response or web.Response(status=500)
    if _consists_of(error, MessagesLost) and _can_send_away(request, state):
        return await _send_away(request, state)
    django = django_request(request)
    try:
        answer = await state.shared.app[POOL].run(_django_answer, django, error)
    except QueueFull:
        logger.error(
            "Internal Server Error: %s",
            django.path,
            exc_info=error,
            extra={"status_code": 500, "request": django},
        )
        raise web.HTTPInternalServerError from error
    begun = state.response
    if isinstance(begun, web.WebSocketResponse):
        await begun.close(code=WSCloseCode.INTERNAL_ERROR)
        return begun
    response = web_response(answer)
    if request.writer.output_size and request.transport is not None:
        # Too late for another answer: what was sent must not look complete.
        request.transport.close()
        return begun or response
    await settle(state, response)
    return response


def _django_answer(request: HttpRequest, error: Exception) -> HttpResponseBase:
    """Let Django log an exception and make the answer to it, as its own handler does."""
    __traceback_hide__ = True  # Django's debug page leaves this frame out.
    from django.core.handlers.exception import response_for_exception
    from django.utils.log import log_response

    try:
        raise error
    except Exception as raised:  # noqa: BLE001  # as Django's own handler does
        response = response_for_exception(request, raised)
    if response.status_code >= 400:
        log_response(
            "%s: %s", response.reason_phrase, request.path, response=response, request=request
        )
    return cast("HttpResponseBase", response)

"""Middlewares of the project that the bridges are tested with."""

from __future__ import annotations

import weakref

from asgiref.sync import async_to_sync, markcoroutinefunction
from django.contrib import messages
from django.db import transaction
from django.http import HttpResponse
from django.utils import timezone
from django.utils.decorators import sync_only_middleware
from django.utils.deprecation import MiddlewareMixin

from tests.django_project import probe


class Recorder:
    """Tells of everything that Django calls."""

    def __init__(self, get_response):
        self.get_response = get_response

    def __call__(self, request):
        probe.tell("in", probe.thread())
        probe.inward.set(request.GET.get("inward", ""))
        try:
            response = self.get_response(request)
        except BaseException as error:
            probe.tell("error", type(error).__name__)
            raise
        finally:
            probe.tell("out", probe.thread())
        response["X-Outward"] = probe.outward.get()
        return response

    def process_view(self, request, view, args, kwargs):
        probe.tell("process_view", view.__name__)
        if "answer" in request.GET:
            return HttpResponse("from process_view")
        return None

    def process_exception(self, request, exception):
        probe.tell("process_exception", exception)
        if "catch" in request.GET:
            return HttpResponse(f"caught {exception}")
        return None

    def process_template_response(self, request, response):
        probe.tell("process_template_response")
        response.context_data["who"] = "middleware"
        return response


@sync_only_middleware
def other_urlconf(get_response):
    def middleware(request):
        request.urlconf = "tests.django_project.other_urls"
        return get_response(request)

    return middleware


@sync_only_middleware
def in_a_transaction(get_response):
    def middleware(request):
        if "atomic" not in request.GET:
            return get_response(request)
        with transaction.atomic():
            probe.tell("begin", request.GET["atomic"])
            response = get_response(request)
            probe.tell("end", request.GET["atomic"])
            if "undo" in request.GET:
                transaction.set_rollback(True)
            return response

    return middleware


class Keeping(MiddlewareMixin):
    """Keeps of a request what its query names: the request itself ("") or an attribute."""

    def process_request(self, request):
        probe.requests.append(weakref.ref(request))
        if "use" in request.GET:
            assert request.user.is_anonymous
            messages.info(request, "hello")
        if "keep" in request.GET:
            name = request.GET["keep"]
            probe.kept.append(getattr(request, name) if name else request)


class InTokyo(MiddlewareMixin):
    """Activates a time zone and says who is here."""

    def process_request(self, request):
        timezone.activate("Asia/Tokyo")
        probe.inward.set("ann")


class Holding(MiddlewareMixin):
    """Occupies its thread until the test lets go, when it is asked to."""

    def process_request(self, request):
        if "hold" in request.GET:
            probe.tell("holding")
            probe.go_on.wait(10)


class OnlyAsynchronous:
    """Cannot run synchronously."""

    sync_capable = False
    async_capable = True

    def __init__(self, get_response):
        self.get_response = get_response
        markcoroutinefunction(self)

    async def __call__(self, request):
        response = await self.get_response(request)
        response["X-Asynchronous"] = "yes"
        return response


class CallsAsynchronousCode(MiddlewareMixin):
    """Synchronous, and calls a coroutine."""

    def process_request(self, request):
        async def answer():
            return "42"

        request.answer = async_to_sync(answer)()

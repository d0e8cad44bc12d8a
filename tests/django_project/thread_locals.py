"""A middleware that keeps the request where only threads are told apart."""

from __future__ import annotations

import threading

_locals = threading.local()


def remember(get_response):
    def middleware(request):
        _locals.request = request
        return get_response(request)

    return middleware

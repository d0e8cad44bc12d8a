"""testproject's URLs and a JSON view that asks no database."""

from django.http import JsonResponse
from django.urls import path
from testproject.urls import urlpatterns as testproject_urls

ROWS = [
    {"id": number, "title": f"Topic {number}", "open": True, "tags": ["a", "b"], "score": 0.5}
    for number in range(10)
]


def json(request):
    return JsonResponse({"count": len(ROWS), "rows": ROWS})


# First: what is measured is a server, not how Django walks through other URLs.
urlpatterns = [path("json/", json), *testproject_urls]

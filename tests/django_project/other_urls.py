"""URLs that a middleware may choose for a request."""

from __future__ import annotations

from django.urls import path

from tests.django_project import views

(_, hello), (_, async_hello) = views.both("hello/", views.hello)

urlpatterns = [
    path("hello/", views.language),
    path("async-hello/", async_hello),
    path("turned-async/", async_hello),
    path("turned-sync/", hello),
]

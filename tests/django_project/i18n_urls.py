"""URLs with the language as their prefix."""

from __future__ import annotations

from django.conf.urls.i18n import i18n_patterns
from django.urls import path

from tests.django_project import views

urlpatterns = i18n_patterns(
    *(path(name, view) for name, view in views.both("language/", views.language)),
    path("wait/", views.wait),
)

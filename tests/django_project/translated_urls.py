"""URLs that are words of a language."""

from __future__ import annotations

from django.urls import path
from django.utils.translation import gettext_lazy

from tests.django_project import views

(_, language), (_, async_language) = views.both("", views.language)

urlpatterns = [
    path(gettext_lazy("Sunday"), language),
    path(gettext_lazy("Monday"), async_language),
]

"""URLs with a converter of the project's own."""

from __future__ import annotations

from django.urls import path, register_converter
from django.urls.converters import get_converters

from tests.django_project import views

if "moment" not in get_converters():
    register_converter(views.MomentConverter, "moment")

urlpatterns = [
    path(name, view) for name, view in views.both("moment/<moment:moment>/", views.moment)
]

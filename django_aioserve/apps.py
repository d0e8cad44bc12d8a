"""The application as Django knows it."""

from __future__ import annotations

from django.apps import AppConfig


class AioserveConfig(AppConfig):
    """Brings ``runaio`` and the system checks of its settings."""

    name = "django_aioserve"
    verbose_name = "django-aioserve"

    def ready(self) -> None:
        """Register the system checks."""
        from django_aioserve import checks

        checks.register()

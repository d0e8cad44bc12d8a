"""The board: topics, their messages, and views that behave in ways a server must cope with."""

from django.apps import AppConfig


class BoardConfig(AppConfig):
    default_auto_field = "django.db.models.BigAutoField"
    name = "board"

    def ready(self):
        from board import signals  # noqa: F401  # connects them

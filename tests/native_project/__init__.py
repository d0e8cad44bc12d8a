"""A Django project with native routes: its URLconf and handlers, on testproject's settings."""

import django
from django.apps import apps

if not apps.ready:
    # Its modules import models when the tests are collected.
    django.setup()

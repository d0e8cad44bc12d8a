"""The kiosk as an aiohttp application, for servers that are given one."""

from django_aioserve import get_aio_application
from kiosk.wsgi import application

app = get_aio_application(application)

"""Settings of the kiosk: nothing but what it needs to answer."""

import json
import os

SECRET_KEY = "kiosk"
ALLOWED_HOSTS = ["*"]
INSTALLED_APPS = ["django_aioserve"]
MIDDLEWARE = ["django.middleware.common.CommonMiddleware"]
ROOT_URLCONF = "kiosk.urls"
WSGI_APPLICATION = "kiosk.wsgi.application"
ASGI_APPLICATION = "kiosk.asgi.application"
TIME_ZONE = "UTC"
USE_TZ = True
if os.environ.get("KIOSK_DATABASE"):
    DATABASES = {
        "default": {"ENGINE": "django.db.backends.sqlite3", "NAME": os.environ["KIOSK_DATABASE"]}
    }
AIOSERVE_ROUTES = ["kiosk.native.routes"]
if os.environ.get("KIOSK_STAYS"):
    AIOSERVE_CLEANUP_CTX = ["kiosk.native.stays"]
AIOSERVE_GUNICORN = json.loads(os.environ.get("KIOSK_GUNICORN", "{}"))

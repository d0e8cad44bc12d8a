"""testproject's settings, with one more view and, where it is asked for, WhiteNoise."""

import testproject.settings as base
from testproject.settings import *  # noqa: F403

ROOT_URLCONF = "tests.benchmarks.urls"

if base.env.bool("BENCH_WHITENOISE", default=False):
    MIDDLEWARE = list(base.MIDDLEWARE)
    MIDDLEWARE.insert(1, "whitenoise.middleware.WhiteNoiseMiddleware")

"""A cache of which is known how many objects it had."""

from django.core.cache.backends.locmem import LocMemCache

MADE = []
CLOSED = []


class CountedCache(LocMemCache):
    def __init__(self, *args):
        super().__init__(*args)
        self.number = len(MADE) + 1
        MADE.append(self.number)

    def close(self, **kwargs):
        CLOSED.append(self.number)

"""The arbiter's process; `django_aioserve.server.launcher` starts it."""

from __future__ import annotations

import json
import os
import sys

if __name__ == "__main__":  # not where multiprocessing imports it again in its children
    try:
        if launch := os.environ.get("DJANGO_AIOSERVE_LAUNCH"):
            # Before the import: this package may be on a path that manage.py has added.
            sys.path[:] = json.loads(launch)["path"]

        from django_aioserve.server.launcher import main

        main()
    except KeyboardInterrupt:  # before the arbiter has its signal handlers
        sys.exit(130)

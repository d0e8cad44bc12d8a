"""Gunicorn's hooks; each says in which process it was called, and with what."""

import gc
import os
import signal
import sys
import threading
import time
from pathlib import Path


def _say(name, *details):
    line = " ".join(["hook", name, f"pid={os.getpid()}", *map(str, details)])
    os.write(1, f"{line}\n".encode())


def on_starting(server):
    _say("on_starting")


def when_ready(server):
    _say("when_ready")


def pre_fork(server, worker):
    _say("pre_fork")


def post_fork(server, worker):
    _say("post_fork", worker.pid)


def post_worker_init(worker):
    _say("post_worker_init", worker.pid)


def pre_request(worker, req):
    _say("pre_request", worker.pid, req.method, req.path)


def post_request(worker, req, environ, resp):
    _say("post_request", worker.pid, req.method, environ["PATH_INFO"], resp.status)


def child_exit(server, worker):
    _say("child_exit", worker.pid)


def worker_exit(server, worker):
    _say("worker_exit", worker.pid)


def worker_int(worker):
    _say("worker_int", worker.pid)


def nworkers_changed(server, new_value, old_value):
    _say("nworkers_changed", old_value, new_value)


def on_reload(server):
    _say("on_reload")


def on_exit(server):
    _say("on_exit")


def little_memory(server):
    """Let the container have no room for one more worker."""
    from django_aioserve import conf

    conf.memory_room = lambda: 1 << 20


def clock_that_jumps(server):
    """Set the wall clock of all processes by the seconds in the file KIOSK_CLOCK."""
    real = time.time
    time.time = lambda: real() + float(Path(os.environ["KIOSK_CLOCK"]).read_text())


def fork_that_fails(server, worker):
    """Fail as a system without memory does, while the file KIOSK_FULL exists."""
    if Path(os.environ["KIOSK_FULL"]).exists():
        worker.tmp.close()  # Gunicorn would leave it to the garbage collector
        raise OSError(12, "Cannot allocate memory")


def say_frozen(server, worker):
    _say("frozen", gc.get_freeze_count())


def told_as_its_loop_begins(worker):
    """Have the first worker get SIGTERM where uvloop, or asyncio, begins to run."""
    path = Path(os.environ["KIOSK_TOLD"])
    if path.exists():
        return
    path.touch()

    def look(frame, event, argument):
        if event == "call" and frame.f_code is threading.main_thread.__code__:
            sys.setprofile(None)
            _say("told")
            os.kill(os.getpid(), signal.SIGTERM)

    sys.setprofile(look)


def reload_fails(server):
    raise RuntimeError("a hook that fails")


def exit_fails(server, worker):
    raise RuntimeError("a hook that fails")

"""What a boot of this project costs and does."""

import json
import os
import signal
import threading
import time


def boot():
    """Take the time that a big project takes; tell of replacements in a file."""
    if os.environ.get("KIOSK_LOADED"):
        with open(os.environ["KIOSK_LOADED"], "a", encoding="utf-8") as file:
            file.write(f"{os.getpid()}\n")
    if os.environ.get("KIOSK_DATABASE"):
        from django.db import connection

        connection.ensure_connection()
    if os.environ.get("KIOSK_THREAD"):
        threading.Thread(target=time.sleep, args=(3600,), name="kiosk-thread", daemon=True).start()
    seconds = float(os.environ.get("KIOSK_BOOT", "0"))
    if os.environ.get("KIOSK_DEAF"):  # as in a library's own code, which Python does not interrupt
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        time.sleep(seconds)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    elif os.environ.get("KIOSK_BARE"):
        try:  # noqa: SIM105
            time.sleep(seconds)
        except:  # noqa: E722  # as many a settings file has it
            pass
    elif os.environ.get("KIOSK_TWICE"):  # Ctrl-C: the terminal's signal, and the arbiter's
        signals = [signal.SIGINT, signal.SIGQUIT]
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        for number in signals:
            os.kill(os.getpid(), number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    else:
        time.sleep(seconds)
    if os.environ.get("KIOSK_EVENTS"):
        from django_aioserve.signals import worker_replaced

        worker_replaced.connect(_note)


def _note(sender, event, **_):
    with open(os.environ["KIOSK_EVENTS"], "a", encoding="utf-8") as file:
        file.write(json.dumps({"sender": sender.__name__, **event}) + "\n")

"""The kiosk project, and the other servers that can serve it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support import ROOT, Runaio, clean_environment, python_command

#: A project whose release, boot and leaks its environment decides.
KIOSK = ROOT / "tests" / "kiosk_project"

#: A module is compiled afresh where it was changed within a second.
ENVIRONMENT = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT)}

#: Time for what takes no time, on a machine with much else to do.
SOON = 60.0


def copy_kiosk(directory: Path) -> Path:
    """A copy of the project, whose code a test may change."""
    project = directory / "kiosk_project"
    shutil.copytree(KIOSK, project, ignore=shutil.ignore_patterns("__pycache__"))
    return project


def release(project: Path, code: str) -> None:
    """Put a release on the disk at once; `code` is the content of its module."""
    new = project / "kiosk" / "release.new"
    new.write_text(f"{code}\n")
    new.replace(project / "kiosk" / "release.py")


class Process(Runaio):
    """Any other server: `command` follows the interpreter; it says where it listens."""

    def __init__(
        self, *command: str, project: Path = KIOSK, env: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(*command, bind=(), project=project, env=env)

    def __repr__(self) -> str:
        return " ".join(self.args)

    def start(self) -> None:
        """Start the server and wait until it says where it listens."""
        self.launch()
        try:
            self.wait_for_log(r"Listening at: http\S+", SOON)
        except BaseException:
            self.stop()
            raise

    def launch(self) -> None:
        """Start the process without waiting for it to listen."""
        self._scratch = tempfile.TemporaryDirectory(prefix="aioserve-")
        self.directory = Path(self._scratch.name)
        self.process = subprocess.Popen(
            [*python_command(), *self.args],
            cwd=self.project,
            env={**clean_environment(), "PYTHONUNBUFFERED": "1", **ENVIRONMENT, **self._env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()

    @property
    def urls(self) -> list[str]:
        """Where it says it listens."""
        return re.findall(r"Listening at: (http\S+)", self.log_text())


def gunicorn(application: str, worker: str, *args: str, **options: Any) -> Process:
    """Plain Gunicorn with `application` and a worker class."""
    bind = ("--bind=127.0.0.1:0", "--no-control-socket")
    return Process(
        "-m", "gunicorn", application, f"--worker-class={worker}", *bind, *args, **options
    )


def events(server: Runaio) -> list[dict[str, Any]]:
    """The replacements that the server has told of in its log."""
    told = re.findall(r"(?:replacement|stop) (\{.*\})\s*$", server.log_text(), re.MULTILINE)
    return [json.loads(text) for text in told]

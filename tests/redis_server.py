"""A Redis of a test's own, which keeps nothing and may be killed."""

from __future__ import annotations

import shutil
import socket
import subprocess
from typing import TYPE_CHECKING, Self

from tests import support

if TYPE_CHECKING:
    from pathlib import Path


class RedisServer:
    """On a free port of 127.0.0.1, which it keeps; runs within its ``with`` block."""

    def __init__(self, directory: Path) -> None:
        if shutil.which("redis-server") is None:
            support.skip_or_fail("redis-server is not installed")
        self.directory = directory
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill()

    def start(self) -> None:
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        self.process = subprocess.Popen(command, cwd=self.directory, stdout=subprocess.DEVNULL)
        support.wait_until(self.answers, message="redis-server does not answer")

    def answers(self) -> bool:
        try:
            return support.raw(("127.0.0.1", self.port), b"PING\r\nQUIT\r\n").startswith(b"+PONG")
        except OSError:
            return False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

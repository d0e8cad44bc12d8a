#!/usr/bin/env python
"""Measure the memory of four workers with and without ``--preload``.

    python docs/figures/preload.py         print a table in Markdown, and write it

Memory is proportional (Pss in /proc/PID/smaps_rollup): a page that several processes share
counts for each by its share, so the sum over all processes is what the server really takes.
All workers have answered some requests before the look. The two are measured in turns, and the
median of `ROUNDS` is taken. Needs Linux, and a machine without other programs of the same
Python: what is shared with them counts by its share, too.
"""

from __future__ import annotations

import re
import urllib.request
from pathlib import Path

from leak import HERE, about, children, serving

TABLE = HERE / "data" / "preload.md"

WORKERS = 4
ROUNDS = 3
REQUESTS = 200
"""Requests in all, spread over the workers by the kernel; each has a connection of its own."""
PAGES = ("/", "/ping/", "/ping-async/", "/orm/", "/admin/login/")


def proportional(pid: int) -> int:
    """Give the proportional memory of a process in bytes."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)[1]) * 1024


def measure(*flags: str) -> tuple[int, int]:
    """Give the memory of the arbiter and of all its workers, in bytes."""
    with serving("--workers", str(WORKERS), *flags) as (process, url):
        for number in range(REQUESTS):
            with urllib.request.urlopen(url + PAGES[number % len(PAGES)]) as response:
                response.read()
        workers = children(process.pid)
        return proportional(process.pid), sum(map(proportional, workers))


def main() -> None:
    """Measure both, and write the table."""
    ways = {"without `--preload`": [], "with `--preload`": ["--preload"]}
    rounds = [{name: measure(*flags) for name, flags in ways.items()} for _ in range(ROUNDS)]
    lines = ["| | arbiter | 4 workers | together |", "| --- | ---: | ---: | ---: |"]
    for name in ways:
        measured = [each[name] for each in rounds]
        print(name, [f"{arbiter >> 20} + {workers >> 20} MiB" for arbiter, workers in measured])
        arbiter, workers = sorted(measured, key=sum)[ROUNDS // 2]
        lines.append(
            f"| {name} | {arbiter >> 20} MiB | {workers >> 20} MiB "
            f"| {arbiter + workers >> 20} MiB |"
        )
    made = about().split(";")[0]
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(
        "\n".join([*lines, "", f"Median of {ROUNDS} runs on testproject: {made}.", ""])
    )
    print(TABLE.read_text())


if __name__ == "__main__":
    main()

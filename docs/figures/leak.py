#!/usr/bin/env python
"""Measure and draw the memory of a leaking project, with and without recycling.

    python docs/figures/leak.py            measure (about three minutes), write the data, draw
    python docs/figures/leak.py --draw     draw from the data that is there

Two servers run one after the other, with two workers each: one that never replaces a
worker, one with ``--max-requests``. Each serves ``/leak/``, a view of testproject that keeps
some kilobytes at every request. Twice a second the resident memory of all worker processes
is read from /proc. Needs Linux; the plot needs matplotlib (the extra "docs").
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import csv
import datetime
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import aiohttp

HERE = Path(__file__).resolve().parent
MANAGE = HERE.parent.parent / "testproject" / "manage.py"
SAMPLES = HERE / "data" / "leak.csv"
ABOUT = HERE / "data" / "leak.txt"
TABLE = HERE / "data" / "leak.md"
PICTURE = HERE / "leak.svg"

WORKERS = 2
LEAK_KB = 128
RATE = 60
"""Requests per second, of all clients together."""
CLIENTS = 8
SECONDS = 60
INTERVAL = 0.5
RUNS = {
    "no limit": [],
    "--max-requests 500": ["--max-requests", "500", "--max-requests-jitter", "100"],
}

PAGE = os.sysconf("SC_PAGE_SIZE")


class Sample(NamedTuple):
    """One look at a server: seconds since its start of load, bytes, what it has answered."""

    seconds: float
    resident: int
    workers: int
    answered: int
    failed: int


def children(pid: int) -> list[int]:
    """Give the child processes of a process."""
    with contextlib.suppress(OSError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def resident(pid: int) -> int:
    """Give the resident memory of a process in bytes; 0 where it is gone."""
    with contextlib.suppress(OSError, ValueError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    return 0


@contextlib.contextmanager
def serving(*flags: str):
    """Run testproject on a free port; give the arbiter's process and the server's address."""
    environment = {**os.environ, "DEBUG": "false", "LOG_LEVEL": "ERROR"}
    with tempfile.TemporaryDirectory() as directory:
        environment["DATABASE_URL"] = f"sqlite:///{directory}/db.sqlite3"
        environment["STATIC_ROOT"] = directory
        manage = [sys.executable, str(MANAGE)]
        subprocess.run([*manage, "migrate", "--verbosity=0"], check=True, env=environment)
        process = subprocess.Popen(
            [*manage, "runaio", "127.0.0.1:0", *flags],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            for line in process.stdout:
                if found := re.search(r"Serving .* at (http://\S+)", line):
                    break
            else:
                sys.exit("The server did not start.")
            yield process, found[1]
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate()


async def measure(*flags: str) -> list[Sample]:
    """Drive one server and sample its memory."""
    with serving("--workers", str(WORKERS), *flags) as (process, url):
        answered = failed = 0
        samples: list[Sample] = []
        begin = 0.0

        async def client(session: aiohttp.ClientSession) -> None:
            nonlocal answered, failed
            due = time.monotonic()
            while time.monotonic() - begin < SECONDS:
                try:
                    async with session.get(f"{url}/leak/?kb={LEAK_KB}") as response:
                        await response.read()
                        answered += response.status == 200
                        failed += response.status != 200
                except aiohttp.ClientError:
                    failed += 1
                due += CLIENTS / RATE
                await asyncio.sleep(max(due - time.monotonic(), 0))

        def look() -> None:
            pids = children(process.pid)
            sizes = [size for size in map(resident, pids) if size]
            samples.append(
                Sample(round(time.monotonic() - begin, 2), sum(sizes), len(sizes), answered, failed)
            )

        async with aiohttp.ClientSession() as session:
            async with session.get(f"{url}/ping/") as response:
                await response.read()
            begin = time.monotonic()
            clients = [asyncio.create_task(client(session)) for _ in range(CLIENTS)]
            while time.monotonic() - begin < SECONDS:
                look()
                await asyncio.sleep(INTERVAL)
            await asyncio.gather(*clients)
            look()
        return samples


def about() -> str:
    """Tell when and with what the data was made."""
    names = ("Django", "aiohttp", "gunicorn", "uvloop")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    return (
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, Python {platform.python_version()}, "
        f"{versions}; {WORKERS} workers, {RATE} requests per second, {LEAK_KB} KB kept by each\n"
    )


def read() -> dict[str, list[Sample]]:
    """Give the samples of each run."""
    runs: dict[str, list[Sample]] = {name: [] for name in RUNS}
    with SAMPLES.open() as file:
        for row in csv.DictReader(file):
            name = row.pop("run")
            seconds = float(row.pop("seconds"))
            runs[name].append(Sample(seconds, **{key: int(value) for key, value in row.items()}))
    return runs


def tabulate() -> None:
    """Write the figures of the picture as a table in Markdown."""
    lines = [
        "| | at the start | at most | at the end | requests answered | failed |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, samples in read().items():
        sizes = [sample.resident >> 20 for sample in samples]
        last = samples[-1]
        lines.append(
            f"| {name} | {sizes[0]} MiB | {max(sizes)} MiB | {sizes[-1]} MiB "
            f"| {last.answered:,} | {last.failed:,} |"
        )
    TABLE.write_text("\n".join([*lines, "", f"Measured {ABOUT.read_text().strip()}.", ""]))


def draw() -> None:
    """Draw the picture from the data."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    mpl.rcParams.update({"svg.hashsalt": "leak", "font.size": 11, "svg.fonttype": "none"})
    figure, axes = plt.subplots(figsize=(8, 4))
    for (name, samples), colour in zip(read().items(), ("#c0392b", "#1f6f54"), strict=True):
        axes.plot(
            [sample.seconds for sample in samples],
            [sample.resident / (1 << 20) for sample in samples],
            label=name,
            color=colour,
            linewidth=2,
        )
    axes.set_xlabel("seconds under load")
    axes.set_ylabel("resident memory of all workers, MiB")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.grid(visible=True, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    figure.tight_layout()
    # A white ground, for a dark page; no date, so that the same data gives the same file.
    figure.savefig(PICTURE, metadata={"Date": None}, facecolor="white")


def main() -> None:
    """Measure unless told not to, then draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draw", action="store_true", help="draw from the data that is there")
    if not parser.parse_args().draw:
        SAMPLES.parent.mkdir(exist_ok=True)
        with SAMPLES.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("run", *Sample._fields))
            for name, flags in RUNS.items():
                writer.writerows((name, *sample) for sample in asyncio.run(measure(*flags)))
        ABOUT.write_text(about())
    tabulate()
    print(TABLE.read_text())
    draw()


if __name__ == "__main__":
    main()

"""What the machine tells: processor time, memory, cores. Linux only."""

import os
import platform
import resource
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")


def cores():
    """The core for the server and the one for the client; the same where there is only one."""
    available = sorted(os.sched_getaffinity(0))
    return available[0], available[-1]


def tree(root):
    """The process ids of `root` and all its descendants."""
    children = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(entry.name)) is not None:
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [root]
    for pid in found:  # it grows meanwhile
        found += children.get(pid, ())
    return found


def cpu_seconds(root):
    """Processor seconds that the tree of `root` has used: its own, and the kernel's for it."""
    user = kernel = 0
    for pid in tree(root):
        fields = _stat(pid)
        if fields is not None:
            user += int(fields[11])
            kernel += int(fields[12])
            if pid == root:
                user += int(fields[13])
                kernel += int(fields[14])
    return user / _TICK, kernel / _TICK


def loop_seconds(root):
    """Processor seconds of all main threads in the tree of `root`, and of all other threads.

    In a worker the main thread is the one of the event loop.
    """
    loop = others = 0
    for pid in tree(root):
        for task in Path(f"/proc/{pid}/task").glob("*"):
            fields = _stat(f"{pid}/task/{task.name}")
            if fields is not None:
                ticks = int(fields[11]) + int(fields[12])
                if task.name == str(pid):
                    loop += ticks
                else:
                    others += ticks
    return loop / _TICK, others / _TICK


def core_seconds(core):
    """Seconds that all processes together have run on a core."""
    for line in Path("/proc/stat").read_text().splitlines():
        name, *numbers = line.split()
        if name == f"cpu{core}":
            user, nice, system = map(int, numbers[:3])
            return (user + nice + system) / _TICK
    return 0.0


def memory(root):
    """Bytes of memory of the tree of `root`, shared pages divided among those that share them."""
    total = 0
    for pid in tree(root):
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def allow_many_files():
    """Raise the limit of open files as far as is allowed, for the children too; give it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def describe():
    """The machine in one line."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return f"{model}, {os.cpu_count()} cores, Linux {platform.release()}"


def _stat(pid):
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None  # gone since
    return text.rpartition(")")[2].split()

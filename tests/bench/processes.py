"""CPU time, memory, threads and children of a process, from Linux's /proc."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; empty when the process is gone."""
    try:
        # The name before it may hold spaces and brackets: cut after the last one.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def alive(pid: int) -> bool:
    fields = _stat(pid)
    return bool(fields) and fields[0] != "Z"


def descendants(root: int) -> list[int]:
    """Process ids below `root`, nearest first."""
    parents = {int(p.name): _stat(int(p.name)) for p in Path("/proc").glob("[0-9]*")}
    found, frontier = [], [root]
    while frontier:
        below = [p for p, f in parents.items() if f and int(f[1]) in frontier and f[0] != "Z"]
        found += below
        frontier = below
    return found


def cpu_seconds() -> float:
    """CPU time of this process, of its children that ended, and of its living descendants.

    The living ones are counted in kernel ticks (10 ms), so measure over seconds.
    """
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    living = sum(sum(map(int, _stat(pid)[11:13])) for pid in descendants(os.getpid()))
    return time.process_time() + ended.ru_utime + ended.ru_stime + living / _TICK


def resident_mib() -> float:
    """Resident memory of this process and its descendants."""
    pages = 0
    for pid in (os.getpid(), *descendants(os.getpid())):
        fields = _stat(pid)
        pages += int(fields[21]) if fields else 0
    return pages * _PAGE / 2**20


def threads() -> int:
    return len(os.listdir("/proc/self/task"))

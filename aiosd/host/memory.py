"""How much memory this machine has for model workers, and how much of it is free.

The limits of the workers' control group count too, of cgroup v2 and of v1 (cgroups(7)).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from aiosd.host import proc

WORKERS = "aios-workers.slice"
CACHE = ("inactive_file", "active_file", "total_inactive_file", "total_active_file")
RESERVE_SHARE, RESERVE_MAX = 16, 1 << 30  # what is left for others: this part of the memory, at most that


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes for workers, without the reserve."""

    total: int
    free: int


def memory() -> Memory:
    known = proc.facts(Path("/proc/meminfo").read_bytes())
    total, free = (int(known[key].split()[0]) << 10 for key in (b"MemTotal", b"MemAvailable"))
    for limit, used in limits():
        total, free = min(total, limit), min(free, limit - used)
    reserve = min(total // RESERVE_SHARE, RESERVE_MAX)
    return Memory(total - reserve, max(0, free - reserve))


def limits() -> Iterator[tuple[int, int]]:
    """Limit and use of the workers' group and of each group above it. The page cache counts as free."""
    for folder in groups():
        for limit, current in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            try:
                most, used = (folder / limit).read_text().strip(), int((folder / current).read_text())
                words = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
                stat = {key: int(value) for key, value in words}
            except (OSError, ValueError):
                continue
            cache = max(sum(stat.get(key, 0) for key in CACHE[at : at + 2]) for at in (0, 2))
            if most != "max":
                yield int(most), max(0, used - cache)


def groups() -> Iterator[Path]:
    """The folders of the workers' control group: the slice beside this process, else its own group."""
    try:
        own = {line.split(":", 2)[1]: line.split(":", 2)[2] for line in proc.lines("/proc/self/cgroup")}
        mounts = list(proc.mounts())
    except (OSError, IndexError):
        return
    for mount in mounts:
        name = {"cgroup2": "", "cgroup": "memory"}.get(mount.kind)
        if name is None or name not in own or (name and name not in mount.options):
            continue
        folder = mount.folder / own[name].lstrip("/")
        folder = folder.parent / WORKERS if (folder.parent / WORKERS).is_dir() else folder
        while folder.is_relative_to(mount.folder):
            yield folder
            folder = folder.parent


def resident(pid: int) -> tuple[int, int]:
    """The bytes of a process in memory: its own, and those it shares with files. Zeros: it has ended."""
    try:
        _, all_pages, shared, *_ = map(int, proc.text(f"/proc/{pid}/statm").split())
    except OSError:
        return 0, 0
    page = os.sysconf("SC_PAGE_SIZE")
    return (all_pages - shared) * page, shared * page

"""What processes and disks take, as bounds are held against it."""

from __future__ import annotations

import math
import os
import subprocess
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from aiosd.host import proc

DEEPEST = 1000  # processes below each other


@dataclass(frozen=True, slots=True)
class Spent:
    """What the processes of a tool call took, all of them together."""

    cpu_s: float
    memory_bytes: int  # the most at one time; 0: nobody has counted


def reap(process: subprocess.Popen[bytes]) -> Spent:
    """Waits for its end. Those below it that nobody waited for, as it was killed, are not counted."""
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return Spent(used.ru_utime + used.ru_stime, 0)  # ru_maxrss is also that of who forked it


def memory(tops: Collection[int]) -> Counter[int]:
    """Bytes that each of these processes and all below it hold."""
    found = {p.pid: p.info for p in psutil.process_iter(["ppid", "memory_info"])}
    total = Counter[int]()
    for pid, info in found.items():
        top = pid
        for _ in range(DEEPEST):  # no further, should pids come round while they are read
            if top not in found or top in tops:
                break
            top = found[top]["ppid"]
        if top in tops and info["memory_info"]:
            total[top] += info["memory_info"].rss
    return total


def free_bytes(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def tasks_most() -> float:
    """How many threads the control groups of this process let it have, cgroups(7); infinite: as many as there
    are."""
    bounds = [math.inf]
    with suppress(OSError):
        own = [line.split(":", 2)[1:] for line in proc.lines(proc.SELF / "cgroup")]
        for mount in proc.mounts(proc.SELF):
            if mount.kind != "cgroup2" and not (mount.kind == "cgroup" and "pids" in mount.options):
                continue
            wanted = "pids" if mount.kind == "cgroup" else ""
            for path in (path for names, path in own if wanted in names.split(",")):
                below = mount.folder / path.lstrip("/")
                for folder in (below, *below.parents):
                    with suppress(OSError, ValueError):  # the root has none; "max" is no number
                        bounds.append(int((folder / "pids.max").read_text()))
    return min(bounds)

"""Control groups of tool calls: how many processes and how much memory one call has, all of them together.

One group a call, in `aios-tools`: of cgroup v2, below the daemon's own group where systemd delegated that and
at the root elsewhere; or of v1's two hierarchies; none where neither is to be had (cgroups(7)). Called before
workers start, and by the thread that starts the calls.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from aiosd.errors import in_words
from aiosd.host import proc
from aiosd.host.proc import MountPoint
from aiosd.host.usage import Spent

log = logging.getLogger(__name__)

NAME = "aios-tools"
CONTROLLERS = ("pids", "memory")
ACCOUNT = "cpuacct"  # of v1, where there is one; v2 always counts
ENTER = 'while [ "$1" != -- ]; do echo 0 > "$1" || exit 125; shift; done; shift; exec "$@"'
REMEDY = "run the daemon as root, or its unit with Delegate=pids memory"


@dataclass(frozen=True, slots=True)
class Group:
    folders: Mapping[str, Path]  # by controller, of v1 that which counts too; of v2 the same one

    @property
    def unified(self) -> bool:
        return self.folders["pids"] == self.folders["memory"]

    def limit(self, processes: int, memory_bytes: int) -> None:
        pids, memory = (self.folders[controller] for controller in CONTROLLERS)
        (pids / "pids.max").write_text(str(processes))
        names = ("memory.max",) if self.unified else ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
        for name in names:  # the last one counts swap, which not every kernel does
            if (memory / name).exists():
                (memory / name).write_text(str(memory_bytes))
        if self.unified and (memory / "memory.swap.max").exists():
            (memory / "memory.swap.max").write_text("0")

    @property
    def entrance(self) -> list[str]:
        """v1: a command line that enters the group and then becomes what follows it.

        The process moves itself, by 0: to move another waits for a grace period of RCU, 10 ms. No thread of
        the daemon ever enters a group, because a full one would not let it out again.
        """
        return [
            "/bin/sh",
            "-c",
            ENTER,
            "sh",
            *(f"{folder}/tasks" for folder in set(self.folders.values())),
            "--",
        ]

    def add(self, pid: int) -> None:
        """Of v2: it and its children, who are to wait; those of later are in the group by themselves."""
        file = self.folders["pids"] / "cgroup.procs"
        file.write_text(str(pid))
        for child in proc.text(f"/proc/{pid}/task/{pid}/children").split():
            file.write_text(child)

    def out_of_memory(self) -> bool:
        """Whether the kernel has killed for its bound."""
        file = "memory.events" if self.unified else "memory.oom_control"
        return "\noom_kill 0\n" not in "\n" + (self.folders["memory"] / file).read_text()

    def spent(self, known: Spent) -> Spent:
        """What all that ran in it has taken; what it does not count is as it is known."""
        memory = self.folders["memory"]
        if self.unified:
            stat = dict(line.split() for line in (memory / "cpu.stat").read_text().splitlines())
            cpu_s, peak = int(stat["usage_usec"]) / 1e6, memory / "memory.peak"
        else:
            account, peak = self.folders.get(ACCOUNT), memory / "memory.max_usage_in_bytes"
            cpu_s = int((account / "cpuacct.usage").read_text()) / 1e9 if account else known.cpu_s
        return Spent(
            cpu_s, int(peak.read_text()) if peak.exists() else known.memory_bytes
        )  # since Linux 5.19

    def remove(self) -> bool:
        """False: something of it is there yet."""
        for folder in set(self.folders.values()):
            try:
                folder.rmdir()
            except FileNotFoundError:
                continue
            except OSError:
                return False
        return True


class Cgroups:
    def __init__(self) -> None:
        self._parents: Mapping[str, Path] = {}
        self._numbers = itertools.count(1)

    def find(self, process: Path = proc.SELF) -> None:
        """And removes what a killed daemon left. Where there are none, the log says so, once."""
        mounts = list(proc.mounts(process))
        own = dict(line.split(":", 2)[1:] for line in proc.lines(process / "cgroup"))
        reasons = []
        for parents in (unified, split):
            try:
                self._parents = parents(mounts, own)
                break
            except OSError as error:
                reasons.append(in_words(error))
        else:
            log.warning("tools run without cgroups (%s); %s", "; ".join(reasons), REMEDY)
        for group in self._left():
            group.remove()

    def make(self, processes: int, memory_bytes: int) -> Group | None:
        """Raises OSError."""
        if not self._parents:
            return None
        group = self._group(f"{os.getpid()}.{next(self._numbers)}")
        try:
            for folder in set(group.folders.values()):
                folder.mkdir()
            group.limit(processes, memory_bytes)
        except OSError:
            group.remove()
            raise
        return group

    def _group(self, name: str) -> Group:
        return Group({controller: parent / name for controller, parent in self._parents.items()})

    def _left(self) -> Iterator[Group]:
        """Those of daemons that are gone."""
        names = {file.name for parent in self._parents.values() for file in parent.iterdir() if file.is_dir()}
        for name in names:
            pid = name.partition(".")[0]
            if pid.isdigit() and (int(pid) == os.getpid() or not Path("/proc", pid).exists()):
                yield self._group(name)


def unified(mounts: list[MountPoint], own: Mapping[str, str]) -> dict[str, Path]:
    """Of v2. What systemd delegated has no processes beside groups: so the daemon moves into one."""
    root = next((mount.folder for mount in mounts if mount.kind == "cgroup2"), None)
    if root is None:
        raise FileNotFoundError("no cgroup v2")
    if missing := set(CONTROLLERS) - set((root / "cgroup.controllers").read_text().split()):
        raise FileNotFoundError(f"cgroup v2 without {' and '.join(sorted(missing))}")
    parent = root / own.get("", "/").lstrip("/")
    if delegated(parent):
        (parent / "daemon").mkdir(exist_ok=True)
        (parent / "daemon/cgroup.procs").write_text(str(os.getpid()))
    else:
        parent = root
    folder = parent / NAME
    for at in (parent, folder):
        at.mkdir(mode=0o755, exist_ok=True)
        (at / "cgroup.subtree_control").write_text(" ".join(f"+{controller}" for controller in CONTROLLERS))
    return dict.fromkeys(CONTROLLERS, folder)


def delegated(folder: Path) -> bool:
    """As systemd marks it, by its version."""
    for name in ("user.delegate", "trusted.delegate"):
        with suppress(OSError):
            if os.getxattr(folder, name) == b"1":
                return True
    return False


def split(mounts: list[MountPoint], own: Mapping[str, str]) -> dict[str, Path]:
    """Of v1, below the daemon's own group in each hierarchy."""
    found = {controller: hierarchy(controller, mounts, own) for controller in CONTROLLERS}
    with suppress(OSError):
        found[ACCOUNT] = hierarchy(ACCOUNT, mounts, own)
    return found


def hierarchy(controller: str, mounts: list[MountPoint], own: Mapping[str, str]) -> Path:
    roots = (m.folder for m in mounts if m.kind == "cgroup" and controller in m.options)
    root = next(roots, None)
    if root is None:
        raise FileNotFoundError(f"no cgroup v1 of {controller}")
    paths = (path for names, path in own.items() if controller in names.split(","))
    below = root / next(paths, "/").lstrip("/")
    folder = (below if below.is_dir() else root) / NAME  # a container shows its own as the root
    folder.mkdir(mode=0o755, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} is not this user's")
    return folder

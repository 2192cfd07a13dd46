"""Facts about calling processes: which program a process runs, and which files it holds open.

A daemon with its own user may not look at the processes of others. Then `watch_by` sets another watcher for
the whole daemon (aiosd.privilege.helped). aiosd.host.proc reads the formats of /proc. Any thread may call.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Protocol

from aiosd.host.proc import NAMED, facts


class Watcher(Protocol):
    def program(self, pid: int) -> str:
        """Return the path of the program; empty: it cannot be seen."""
        ...

    def holds(self, pid: int, path: str) -> bool:
        """Whether the process has a file whose path ends with `path` open to write and not to read. Unknown
        counts as no."""
        ...

    def writes(self, uid: int, groups: frozenset[int], pids: Sequence[int]) -> None:
        """One of these processes of the user writes to a file of the tree, and waits meanwhile."""
        ...

    def forget(self, uid: int) -> None:
        """The uid is another account now, which nobody has seen yet."""
        ...


class Direct:
    """This process looks with its own rights."""

    def program(self, pid: int) -> str:
        try:
            return os.readlink(f"/proc/{pid}/exe")
        except OSError:
            return ""

    def holds(self, pid: int, path: str) -> bool:
        try:
            with os.scandir(f"/proc/{pid}/fd") as descriptors:
                for descriptor in islice(descriptors, NAMED):
                    with suppress(OSError):  # another thread may close it meanwhile
                        if os.readlink(descriptor.path).endswith(path) and writes_only(pid, descriptor.name):
                            return True
        except OSError:
            return False
        return False

    def writes(self, uid: int, groups: frozenset[int], pids: Sequence[int]) -> None:
        """Nothing to do: this process runs the tools itself."""

    def forget(self, uid: int) -> None:
        """It knows no users."""


def writes_only(pid: int, descriptor: str) -> bool:
    """Raises OSError."""
    flags = facts(Path(f"/proc/{pid}/fdinfo/{descriptor}").read_bytes())[b"flags"]
    return int(flags, 8) & os.O_ACCMODE == os.O_WRONLY


_watcher: Watcher = Direct()


def watch_by(watcher: Watcher) -> None:
    global _watcher
    _watcher = watcher


def program(pid: int) -> str:
    return _watcher.program(pid)


def holds(pid: int, path: str) -> bool:
    return _watcher.holds(pid, path)


def writes(uid: int, groups: frozenset[int], pids: Sequence[int]) -> None:
    _watcher.writes(uid, groups, pids)


def forget(uid: int) -> None:
    _watcher.forget(uid)

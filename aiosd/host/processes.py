"""What the daemon asks about the processes that call: what they run, which files they hold open.

A daemon with a user of its own may not look at the processes of others. `watch_by` then names another watcher
(aiosd.privilege.helped), for the whole process, as aiosd.host.identity does. Any thread may ask.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from typing import Protocol

DESCRIPTORS = 4096  # of a process that are looked at


class Watcher(Protocol):
    def program(self, pid: int) -> str:
        """The path of what runs there; empty when that cannot be seen."""
        ...

    def holds(self, pid: int, path: str) -> bool:
        """Whether the process has a file open whose path ends so. Unknown counts as no."""
        ...

    def writes(self, uid: int, groups: frozenset[int], pids: Sequence[int]) -> None:
        """One of these processes of that user writes to a file of the tree, and waits meanwhile."""
        ...


class Direct:
    """By this process's own rights."""

    def program(self, pid: int) -> str:
        try:
            return os.readlink(f"/proc/{pid}/exe")
        except OSError:
            return ""

    def holds(self, pid: int, path: str) -> bool:
        try:
            with os.scandir(f"/proc/{pid}/fd") as descriptors:
                for descriptor in islice(descriptors, DESCRIPTORS):
                    with suppress(OSError):  # another thread may close it meanwhile
                        if os.readlink(descriptor.path).endswith(path):
                            return True
        except OSError:
            return False
        return False

    def writes(self, uid: int, groups: frozenset[int], pids: Sequence[int]) -> None:
        """Who acts for users here has seen for itself who writes."""


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

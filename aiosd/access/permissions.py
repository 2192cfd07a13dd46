"""Who may do what: the one place where uid, gid and mode bits are compared.

The kernel checks every path of the mount itself (default_permissions); `may` decides the same way
about things a request only *names* in its text. `Permissions` remembers owners and modes of the
objects users made or changed. Knows no FUSE; called by the tree and by request admission, any thread.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from aiosd.access.caller import Caller

if TYPE_CHECKING:
    from aiosd.database.store import Store

READ, WRITE, EXECUTE = 4, 2, 1


@dataclass(frozen=True, slots=True)
class Permission:
    uid: int
    gid: int
    mode: int  # the nine bits and set-id/sticky, without the file type


def wanted(flags: int) -> int:
    """Of open(2)."""
    want = (READ, WRITE, READ | WRITE, READ | WRITE)[flags & os.O_ACCMODE]
    return want | WRITE if flags & os.O_TRUNC else want


def may(caller: Caller, permission: Permission, want: int) -> bool:
    """As generic_permission() of the kernel: the first class that fits decides, root may."""
    if caller.uid == 0:
        return want != EXECUTE or bool(permission.mode & 0o111)
    if caller.uid == permission.uid:
        granted = permission.mode >> 6
    elif permission.gid == caller.gid or permission.gid in caller.groups:
        granted = permission.mode >> 3
    else:
        granted = permission.mode
    return granted & want == want


def asks_groups(caller: Caller, permission: Permission, want: int) -> bool:
    """Whether groups that nobody has asked for would decide what `may` says."""
    if caller.grouped or caller.uid in (0, permission.uid) or caller.gid == permission.gid:
        return False
    return (permission.mode >> 3 & want == want) != (permission.mode & want == want)


class Permissions:
    """Owner and mode by path, for objects that were made (mkdir) or changed (chmod, chown)."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self.making = threading.RLock()  # held while an object is made or ended, so that it has its owner
        self._by_path: dict[str, Permission] = {}
        self.get: Callable[[str], Permission | None] = self._by_path.get  # of a path
        self._below: dict[str, set[str]] = {}  # paths by the object they are of
        self._owned: Counter[tuple[str, int]] = Counter()  # objects, by the folder they are in and user
        self.by_group = 0  # how many that requests may name let a group do other things than all others
        for path, uid, gid, mode in store.permissions():
            self._put(path, Permission(uid, gid, mode))

    def set(self, path: str, permission: Permission) -> None:
        self._store.save_permission(path, permission.uid, permission.gid, permission.mode)
        with self._lock:
            self._put(path, permission)

    def _put(self, path: str, permission: Permission | None) -> None:
        """With what is counted. `get` takes no lock: at no time is a path missing that stays."""
        before, folder = self._by_path.get(path), path.rpartition("/")[0]
        if before:
            self._owned[folder, before.uid] -= 1
            self.by_group -= by_group(path, before)
        if permission:
            self._owned[folder, permission.uid] += 1
            self.by_group += by_group(path, permission)
            self._by_path[path] = permission
            self._below.setdefault(object_of(path), set()).add(path)
        else:
            self._by_path.pop(path, None)

    @contextmanager
    def made(self, path: str, caller: Caller, mode: int) -> Iterator[None]:
        """An object is made inside: it has its owner before it is there. `making` is held."""
        self.set(path, Permission(caller.uid, caller.gid, mode))
        try:
            yield
        except BaseException:
            self.forget(path)
            raise

    def change(
        self, path: str, now: Permission, *, uid: int = -1, gid: int = -1, mode: int | None = None
    ) -> None:
        """chmod and chown; -1 keeps an id, as in chown(2)."""
        self.set(
            path,
            replace(
                now,
                uid=now.uid if uid < 0 else uid,
                gid=now.gid if gid < 0 else gid,
                mode=now.mode if mode is None else mode,
            ),
        )

    def paths(self) -> list[str]:
        with self._lock:
            return list(self._by_path)

    def count(self, folder: str, uid: int) -> int:
        """How many objects a user has directly in a folder."""
        return self._owned[folder, uid]

    def forget(self, path: str) -> None:
        """Drop an object and everything below it."""
        self._store.forget_permissions(path)
        with self._lock:
            for known in self._below.pop(path, ()):
                self._put(known, None)


def by_group(path: str, permission: Permission) -> bool:
    """Whether `may` could depend on a caller's groups."""
    mode = permission.mode
    return path.startswith(("/models/", "/contexts/", "/tools/")) and (mode >> 3 & 7) != (mode & 7)


def object_of(path: str) -> str:
    """/agents/ada of /agents/ada/syscall/llm, /access/groups/night of /access/groups/night/agents"""
    return "/".join(path.split("/")[: 4 if path.startswith("/access/") else 3])

"""Permissions: the only place where uids, gids and mode bits are compared.

The kernel checks every path of the mount itself (default_permissions). `may` decides the same way about
objects that a request only names in its text. `Permissions` holds the owners and modes of the objects that
users made or changed. Knows no FUSE. The tree and admission call, on any thread.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiosd.access.caller import Caller
from aiosd.host.subuids import owner

if TYPE_CHECKING:
    from aiosd.database.store import Store

READ, WRITE, EXECUTE = 4, 2, 1


@dataclass(frozen=True, slots=True)
class Permission:
    uid: int
    gid: int
    mode: int  # permission, set-id and sticky bits, without the file type


def wanted(flags: int) -> int:
    """Return the permissions that open(2) needs for these flags."""
    want = (READ, WRITE, READ | WRITE, READ | WRITE)[flags & os.O_ACCMODE]
    return want | WRITE if flags & os.O_TRUNC else want


def may(caller: Caller, permission: Permission, want: int) -> bool:
    """As the kernel's generic_permission(): the first class that fits decides. Root may do nearly all."""
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
    """Whether the answer of `may` depends on supplementary groups that were not read."""
    if caller.grouped or caller.uid in (0, permission.uid) or caller.gid == permission.gid:
        return False
    return (permission.mode >> 3 & want == want) != (permission.mode & want == want)


class Permissions:
    """Owner and mode by path, for objects that were made (mkdir) or changed (chmod, chown)."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self.making = threading.RLock()  # held while an object is made or ended, so that each has its owner
        self._by_path: dict[str, Permission] = {}
        self.get: Callable[[str], Permission | None] = self._by_path.get  # takes a path
        self._below: dict[str, set[str]] = {}  # by object: its paths
        self._owned: Counter[tuple[str, int]] = Counter()  # objects, by folder and user with all lent uids
        self.by_group = 0  # nameable objects whose group and other bits differ
        for path, uid, gid, mode in store.permissions():
            self._put(path, Permission(uid, gid, mode))

    def set(self, path: str, permission: Permission) -> None:
        self._store.save_permission(path, permission.uid, permission.gid, permission.mode)
        with self._lock:
            self._put(path, permission)

    def _put(self, path: str, permission: Permission | None) -> None:
        """Set or drop one path, and update the counts. `get` takes no lock, so a path that stays is never
        missing.
        """
        before, folder = self._by_path.get(path), path.rpartition("/")[0]
        if before:
            self._owned[folder, owner(before.uid)] -= 1
            self.by_group -= by_group(path, before)
        if permission:
            self._owned[folder, owner(permission.uid)] += 1
            self.by_group += by_group(path, permission)
            self._by_path[path] = permission
            self._below.setdefault(object_of(path), set()).add(path)
        else:
            self._by_path.pop(path, None)

    @contextmanager
    def made(self, path: str, caller: Caller, mode: int) -> Iterator[None]:
        """Give an object its owner before the caller makes it inside. The caller holds `making`."""
        self.set(path, Permission(caller.uid, caller.gid, mode))
        try:
            yield
        except BaseException:
            self.forget(path)
            raise

    def change(
        self, path: str, now: Permission, *, uid: int = -1, gid: int = -1, mode: int | None = None
    ) -> None:
        """Change owner, group or mode; -1 keeps an id, as in chown(2).

        The files of an object go with it, also those with modes of their own.
        """
        new_uid, new_gid = now.uid if uid < 0 else uid, now.gid if gid < 0 else gid
        with self._lock:
            changed = {path: Permission(new_uid, new_gid, now.mode if mode is None else mode)}
            for below in self._below.get(path, ()) if new_uid != now.uid else ():
                at = self._by_path[below]
                if below != path and at.uid == now.uid:
                    changed[below] = Permission(new_uid, new_gid if at.gid == now.gid else at.gid, at.mode)
            self._save([], changed)

    def of_user(self, uid: int) -> list[str]:
        """Return the user's objects, and what else was given to him; not the files of his objects."""
        with self._lock:
            own = {path for path, at in self._by_path.items() if at.uid == uid}
        return [path for path in own if path == object_of(path) or object_of(path) not in own]

    def give(self, modes: Mapping[str, int | None], uid: int, gid: int) -> None:
        """Give paths to another user. With a mode, the files below go back to theirs; None keeps the mode."""
        with self._lock:
            gone = [below for path, mode in modes.items() if mode is not None for below in self._below[path]]
            now = dict[str, Permission]()
            for path, mode in modes.items():
                now[path] = Permission(uid, gid, self._by_path[path].mode if mode is None else mode)
            self._save(gone, now)

    def _save(self, gone: list[str], now: Mapping[str, Permission]) -> None:
        """Drop paths, and set others. The caller holds the lock."""
        rows = [(path, at.uid, at.gid, at.mode) for path, at in now.items()]
        self._store.change_permissions(gone, rows)
        for path in set(gone) - now.keys():
            self._put(path, None)
        for path, at in now.items():
            self._put(path, at)

    def paths(self) -> list[str]:
        with self._lock:
            return list(self._by_path)

    def count(self, folder: str, uid: int) -> int:
        """Return how many objects a user has directly in a folder, with those of all lent uids."""
        return self._owned[folder, owner(uid)]

    def forget(self, path: str) -> None:
        """Drop an object and everything below it."""
        self._store.forget_permissions(path)
        with self._lock:
            for known in self._below.pop(path, ()):
                self._put(known, None)


def by_group(path: str, permission: Permission) -> bool:
    """Whether the answer of `may` can depend on the caller's groups."""
    mode = permission.mode
    return path.startswith(("/models/", "/contexts/", "/tools/")) and (mode >> 3 & 7) != (mode & 7)


def object_of(path: str) -> str:
    """/agents/ada/syscall/llm → /agents/ada; /access/groups/night/agents → /access/groups/night"""
    return "/".join(path.split("/")[: 4 if path.startswith("/access/") else 3])

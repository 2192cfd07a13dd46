"""The tree of names: folders, how a path is walked, and the owner and mode of each name. No FUSE, no errno.

A folder makes a node at its first lookup, and keeps it as long as the folder lives. A name has the owner of
the nearest object at or above it that has one (aiosd.access.permissions.Permissions).
"""

from __future__ import annotations

import re
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from aiosd.access.caller import Caller
from aiosd.access.permissions import EXECUTE, Permission, Permissions, asks_groups, may
from aiosd.errors import AiosError, BadValue, Denied, Exists, NotAllowed, NotFound
from aiosd.fs.files import File
from aiosd.host import identity
from aiosd.scheduler.limits import Quotas

NAME = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,64}")


@dataclass(slots=True)
class Link:
    target: Callable[[], str]
    mode: int = 0o777

    @property
    def size(self) -> int:
        return len(self.target())


class Folder:
    mode = 0o755
    uid: int | None = None  # None: as the folder above; also for the next three
    gid: int | None = None
    admins: int | None = None  # the group that gets the owner's rights on the files below
    changed_s = 0.0  # 0: as the folder above

    def names(self) -> Iterable[str]:
        raise NotImplementedError

    def listed(self, caller: Caller) -> Iterable[str]:
        """The names that this caller sees."""
        return self.names()

    def child(self, name: str) -> Node | None:
        raise NotImplementedError

    def make(self, name: str, caller: Caller, mode: int) -> None:
        raise NotAllowed("mkdir makes nothing in this folder")

    def remove(self, name: str, caller: Caller) -> None:
        raise NotAllowed("rmdir removes nothing from this folder")


Node = File | Folder | Link
Factory = Callable[[], Node]


class Table(Folder):
    """A folder whose names are fixed."""

    def __init__(self, entries: Mapping[str, Factory], mode: int = 0o755, changed_s: float = 0.0) -> None:
        self._entries, self.mode, self.changed_s = entries, mode, changed_s
        self._made: dict[str, Node] = {}

    def names(self) -> Iterable[str]:
        return list(self._entries)

    def child(self, name: str) -> Node | None:
        node = self._made.get(name)
        if node is None and (factory := self._entries.get(name)):
            node = self._made[name] = factory()
        return node


class Collection(Folder):
    """A folder of objects. mkdir makes an object, and rmdir ends it although it has files, as in cgroupfs."""

    def __init__(
        self,
        names: Callable[[], Iterable[str]],
        child: Callable[[str], Node | None],
        make: Callable[[str, Caller, int], None] | None = None,
        remove: Callable[[str], None] | None = None,
        mode: int = 0o755,
        gid: int | None = None,
    ) -> None:
        self._names, self._child, self._make, self._remove = names, child, make, remove
        self.mode, self.gid = mode, gid

    def names(self) -> Iterable[str]:
        return self._names()

    def child(self, name: str) -> Node | None:
        return self._child(name)

    def make(self, name: str, caller: Caller, mode: int) -> None:
        if self._make is None:
            raise NotAllowed("mkdir makes nothing here: the daemon makes these folders")
        if not NAME.fullmatch(name):
            raise BadValue(
                f"{name[:80]!r} is not a valid name", "use 1 to 64 of A-Z a-z 0-9 . _ - and no dot in front"
            )
        self._make(name, caller, mode)

    def remove(self, name: str, caller: Caller) -> None:
        if self._remove is None:
            raise NotAllowed("rmdir removes nothing here: the daemon removes these folders")
        self._remove(name)


class FoundNode(NamedTuple):
    path: str
    node: Node
    permission: Permission
    changed_ns: int


class Tree:
    """The names of one mount."""

    def __init__(
        self,
        root: Folder,
        permissions: Permissions,
        space: Callable[[], tuple[int, int]],
        explain: Callable[[str, AiosError, int], None],
        quotas: Callable[[], Quotas],
        check_account: Callable[[int], None],
    ) -> None:
        """`check_account`: called with the uid before a user gets anything (aiosd.host.accounts)."""
        self._root, self._permissions, self.space, self.explain = root, permissions, space, explain
        self.quotas, self.check_account = quotas, check_account
        self._born_s = time.time()
        self._owner = Permission(identity.uid(), identity.gid(), 0)

    def find(self, path: str) -> FoundNode:
        """Walk a path, which begins with a slash. Raises NotFound."""
        node: Node = self._root
        folder: Folder | None = self._root
        at, owner, changed_s = "", self._owner, self._born_s
        explicit: Permission | None = None
        admins: int | None = None
        for name in path.strip("/").split("/") if path != "/" else ():
            child = folder.child(name) if folder else None
            if child is None:
                raise NotFound(f"{path}: no such name")
            node, at = child, f"{at}/{name}"
            folder = node if isinstance(node, Folder) else None
            if folder:
                if folder.uid is not None:
                    owner = Permission(folder.uid, owner.gid if folder.gid is None else folder.gid, 0)
                    admins = None
                if folder.admins is not None:
                    admins = folder.admins
                changed_s = folder.changed_s or changed_s
            explicit = self._permissions.get(at)
            owner = explicit or owner
        gid = folder.gid if folder and folder.gid is not None else owner.gid
        mode = node.mode
        if isinstance(node, File) and node.gid is not None:
            gid = node.gid
        elif isinstance(node, File) and admins is not None:
            gid, mode = admins, mode | mode >> 3 & 0o060
        permission = explicit or Permission(owner.uid, gid, mode)
        return FoundNode(path, node, permission, int(changed_s * 1e9))

    def check(self, found: FoundNode, caller: Caller, want: int) -> Caller:
        """Check that the caller may open this path, and return the caller, with groups if they decide.

        The kernel has checked the permissions of an inode. That inode may belong to an earlier object of the
        same name: a descriptor of it reaches the new object through /proc/self/fd. Raises Denied.
        """
        if caller.uid in (0, found.permission.uid):
            return caller
        permission, at = found.permission, found.path.rstrip("/")
        while True:
            if asks_groups(caller, permission, want):
                caller = caller.with_groups()
            if not may(caller, permission, want):
                raise Denied(f"{at or '/'} is not yours to open", "ask its owner for access")
            if not at:
                return caller
            at, want = at.rpartition("/")[0], EXECUTE
            permission = self.find(at or "/").permission

    def make(self, parent: FoundNode, name: str, caller: Caller, mode: int) -> None:
        """mkdir: only the caller has access to the new object, until chmod."""
        if not isinstance(parent.node, Folder):
            raise NotFound(f"{parent.path}: not a folder")
        if parent.node.child(name) is not None:
            raise Exists(f"{name} exists")
        parent.node.make(name, caller, mode & 0o700)

    def remove(self, parent: FoundNode, name: str, caller: Caller) -> None:
        if not isinstance(parent.node, Folder):
            raise NotFound(f"{parent.path}: not a folder")
        if not isinstance(parent.node.child(name), Folder):
            raise NotFound(f"{name}: no such folder")
        if parent.permission.mode & stat.S_ISVTX and caller.uid != parent.permission.uid:
            self._owned(f"{parent.path.rstrip('/')}/{name}", caller)
        parent.node.remove(name, caller)

    def chmod(self, path: str, caller: Caller, mode: int) -> None:
        with self._permissions.making:
            self._permissions.change(path, self._owned(path, caller), mode=mode)

    def chown(self, path: str, caller: Caller, uid: int, gid: int) -> None:
        with self._permissions.making:
            self._permissions.change(path, self._owned(path, caller), uid=uid, gid=gid)

    def _owned(self, path: str, caller: Caller) -> Permission:
        """Check the owner again: the kernel may have checked an earlier object of the same name."""
        permission = self.find(path).permission
        if path == "/" or caller.uid not in (0, self._owner.uid, permission.uid):
            raise NotAllowed(f"{path} is not yours to change")
        return permission

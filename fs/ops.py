"""The FUSE adapter: system calls in, tree and handles below, errno out. The one errno table is here.

Thin on purpose: another FUSE library would replace this file and libfuse.py. Every method runs on a thread
of libfuse's and may block only in `_wait`.

Large: one method for each operation of FUSE.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import select
import stat
import threading
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Any

from aiosd.access import permissions
from aiosd.access.caller import Caller
from aiosd.errors import (
    AiosError,
    BadRequest,
    BadSnapshot,
    BadValue,
    Busy,
    ConfigError,
    Denied,
    Exists,
    Interrupted,
    ModelError,
    NoNetwork,
    NoRoom,
    NotAllowed,
    NotEmpty,
    NotFound,
    OverQuota,
    RequestFailed,
    ShuttingDown,
    StoreFailed,
    StoreFull,
    TooBig,
    TooLong,
    TooManyOpen,
    WireError,
    WouldBlock,
)
from aiosd.fs import libfuse
from aiosd.fs.burden import Burden
from aiosd.fs.files import File, Handle, Opening
from aiosd.fs.libfuse import Interrupts, PollHandle
from aiosd.fs.tree import Folder, FoundNode, Link, Tree
from aiosd.host import processes
from aiosd.host.watchers import Unwatch

log = logging.getLogger(__name__)

ERRNO: dict[type[AiosError], int] = {
    BadRequest: errno.EINVAL,
    BadSnapshot: errno.EINVAL,
    BadValue: errno.EINVAL,
    Busy: errno.EAGAIN,
    ConfigError: errno.EINVAL,
    Denied: errno.EACCES,
    Exists: errno.EEXIST,
    Interrupted: errno.EINTR,
    ModelError: errno.EINVAL,
    NoNetwork: errno.ENETUNREACH,
    NoRoom: errno.ENOMEM,
    NotAllowed: errno.EPERM,
    NotEmpty: errno.EBUSY,
    NotFound: errno.ENOENT,
    OverQuota: errno.EDQUOT,
    RequestFailed: errno.EIO,
    ShuttingDown: errno.ESHUTDOWN,
    StoreFailed: errno.EIO,
    StoreFull: errno.ENOSPC,
    TooBig: errno.EFBIG,
    TooLong: errno.E2BIG,
    TooManyOpen: errno.EMFILE,
    WireError: errno.EIO,
    WouldBlock: errno.EAGAIN,
}
KINDS = ((Folder, stat.S_IFDIR), (Link, stat.S_IFLNK), (File, stat.S_IFREG))
ENDINGS = ("release", "releasedir")  # nobody waits for these, and they must not be refused
EXPECTED = (Interrupted, WouldBlock)  # no refusal


class Open:
    """What one fh stands for."""

    __slots__ = ("found", "free_s", "handle", "held", "opening", "polled", "watch")

    def __init__(self, found: FoundNode, handle: Handle, opening: Opening) -> None:
        self.found, self.handle, self.opening = found, handle, opening
        self.held, self.free_s = 0, 0.0  # bytes and time, as the burden has them
        self.polled: PollHandle | None = None
        self.watch: Unwatch = lambda: None  # ends the poll's watch

    def end_poll(self) -> None:
        self.watch()
        polled, self.polled = self.polled, None
        if polled:
            polled.close()


class Ops:
    """Callable as fusepy wants it: `ops("read", path, …)`."""

    flag_nullpath_ok = True
    flag_nopath = True  # else rmdir of a folder would wait for a blocked read of a file in it

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._interrupts = Interrupts()
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._open: dict[int, Open] = {}
        self._of_path: dict[str, dict[int, Open]] = {}
        self._folders: dict[int, tuple[Folder, Caller]] = {}
        self._burden = Burden()

    def __call__(self, operation: str, path: str | None, *arguments: Any) -> Any:
        uid, entered = libfuse.context().uid, False
        try:
            if operation not in ENDINGS:
                self._burden.enter(uid)
                entered = True
            return getattr(self, operation)(path, *arguments)
        except AiosError as error:
            self._explain(operation, path, arguments, error)
            number = next(ERRNO[kind] for kind in type(error).__mro__ if kind in ERRNO)
            raise OSError(number, str(error)) from None
        finally:
            if entered:
                self._burden.leave(uid)

    def _explain(
        self, operation: str, path: str | None, arguments: tuple[Any, ...], error: AiosError
    ) -> None:
        """Leaves the reason where the caller can read it: an errno says little."""
        if isinstance(error, EXPECTED):
            return
        if isinstance(error, NotFound) and operation not in (
            "write",
            "mkdir",
            "flush",
        ):  # a name is looked up
            return
        uid = libfuse.context().uid
        if path is None and arguments and (opened := self._open.get(arguments[-1].fh)):
            path, uid = opened.opening.path, opened.opening.caller.uid
        self._tree.explain(path or "", error, uid)

    def _caller(self) -> Caller:
        """Before anything is looked up: a new account of the same uid ends the former one's rights."""
        context = libfuse.context()
        self._tree.check_account(context.uid)
        return Caller(context.uid, context.gid, context.pid, grouped=False)

    # names

    def getattr(self, path: str | None, info: Any = None) -> dict[str, int]:
        # of an open file what is there now: the kernel keeps it for all who have the inode
        found = self._find(self._open[info.fh].opening.path if path is None else path)
        node, perm = found.node, found.permission
        kind = next(bits for type_, bits in KINDS if isinstance(node, type_))
        return {
            "st_mode": kind | perm.mode,
            "st_nlink": 2 if kind == stat.S_IFDIR else 1,
            "st_uid": perm.uid,
            "st_gid": perm.gid,
            "st_size": 0 if isinstance(node, Folder) else node.size,
            "st_blksize": 131072,
            "st_atime": found.changed_ns,
            "st_mtime": found.changed_ns,
            "st_ctime": found.changed_ns,
        }

    def opendir(self, path: str, *_: Any) -> int:
        number, caller = next(self._numbers), self._caller()
        found = self._tree.find(path)
        if not isinstance(found.node, Folder):
            raise NotAllowed("not a folder")
        self._tree.check(found, caller, permissions.READ)
        self._folders[number] = found.node, caller
        return number

    def readdir(self, path: str | None, number: int) -> Iterable[str]:
        number = getattr(number, "fh", number)
        folder, caller = self._folders[number]
        return [".", "..", *folder.listed(caller)]

    def releasedir(self, path: str | None, number: int) -> None:
        self._folders.pop(getattr(number, "fh", number), None)

    def readlink(self, path: str) -> str:
        node = self._tree.find(path).node
        if not isinstance(node, Link):
            raise NotAllowed("not a link")
        return node.target()

    def mkdir(self, path: str, mode: int) -> None:
        caller = self._caller()
        parent, name = self._parent(path)
        self._tree.make(parent, name, caller, mode)

    def rmdir(self, path: str) -> None:
        caller = self._caller()
        parent, name = self._parent(path)
        self._tree.remove(parent, name, caller)

    def unlink(self, path: str) -> None:
        self._tree.find(path)
        raise NotAllowed("rmdir the object instead")

    def mknod(self, path: str, mode: int, device: int) -> None:
        self._parent(path)
        raise NotAllowed("only folders can be made here")

    def create(self, path: str, mode: int, info: Any) -> None:
        self.mknod(path, mode, 0)

    def symlink(self, path: str, source: str) -> None:
        self.mknod(path, 0, 0)

    def link(self, path: str, source: str) -> None:
        self.mknod(path, 0, 0)

    def rename(self, old: str, new: str) -> None:
        raise NotAllowed("objects keep their names")

    def chmod(self, path: str, mode: int) -> None:
        self._check_kept(path)
        self._tree.chmod(path, self._caller(), mode & 0o1777)

    def chown(self, path: str, uid: int, gid: int) -> None:
        self._check_kept(path)
        self._tree.check_account(uid if uid >= 0 else 0)
        self._tree.chown(path, self._caller(), uid, gid)

    @staticmethod
    def _check_kept(path: str) -> None:
        in_agent = path.startswith("/agents/") and path.split("/")[3:4] == ["requests"]
        if in_agent or path.startswith("/requests/"):
            raise NotAllowed("requests come and go: share the agent, or copy the answer")
        if path.startswith(("/access/pending/", "/access/allowed/")):  # it would be remembered for ever
            raise NotAllowed("what is here comes and goes, and is one user's alone")
        if path.startswith("/keys/") and path not in ("/keys/new", "/keys/check"):
            raise NotAllowed("a key stays that of the user who made it")

    def utimens(self, path: str, times: object) -> None:
        """touch: harmless, and without effect."""
        self._tree.find(path)

    def statfs(self, path: str) -> dict[str, int]:
        free, size = self._tree.space()
        return {
            "f_bsize": 4096,
            "f_frsize": 4096,
            "f_blocks": size // 4096,
            "f_bfree": free // 4096,
            "f_bavail": free // 4096,
            "f_namemax": 64,
        }

    # files

    def open(self, path: str, info: Any) -> None:
        caller, quotas = self._caller(), self._tree.quotas()
        found = self._tree.find(path)
        if not isinstance(found.node, File):
            raise NotAllowed("a folder")
        caller = self._tree.check(found, caller, permissions.wanted(info.flags))
        if not caller.grouped and (found.node.asks_groups or quotas.asks_groups):
            caller = caller.with_groups()
        opening = Opening(caller, info.flags, path)
        self._burden.check(caller, quotas.of(caller))
        handle = found.node.open(opening)
        info.fh = next(self._numbers)
        info.direct_io = 1  # sizes are not known before a read
        opened = self._open[info.fh] = Open(found, handle, opening)
        with self._lock:
            self._of_path.setdefault(path, {})[info.fh] = opened
        self._burden.opened(opened)

    def read(self, path: str | None, size: int, offset: int, info: Any) -> bytes:
        opened = self._open[info.fh]
        with self._burden.timed(opened):  # it may submit what was written
            data = opened.handle.read(size, offset)
        if data is None:
            data = self._wait(opened, size, offset, info.flags)
        self._burden.changed(opened)
        return data

    def _wait(self, opened: Open, size: int, offset: int, flags: int) -> bytes:
        if flags & os.O_NONBLOCK:
            raise WouldBlock("nothing there yet")
        changes = SimpleQueue[bool]()  # lighter than an Event, and says who has woken
        unwatch = opened.handle.watch(partial(changes.put, False))
        pause_s = self._burden.pause_s(opened.opening.caller.uid)
        try:
            if pause_s and self._interrupts.wait(SimpleQueue(), pause_s):
                raise Interrupted("a signal came")
            while (data := opened.handle.read(size, offset)) is None:
                if self._interrupts.wait(changes):
                    raise Interrupted("a signal came")
            return data
        finally:
            unwatch()

    def write(self, path: str | None, data: bytes, offset: int, info: Any) -> int:
        opened = self._open[info.fh]
        opener = opened.opening.caller
        try:
            if opened.held:
                self._burden.check_bytes(opener, self._tree.quotas().of(opener))
            self._burden.check_time(opener, self._tree.quotas().of(opener))
        except AiosError as error:
            opened.handle.refused(error)
            raise
        processes.writes(opener.uid, opener.all_groups, (libfuse.context().pid, opener.pid))
        with self._burden.timed(opened):
            opened.handle.write(data, offset)
        self._burden.changed(opened)
        return len(data)

    def truncate(self, path: str | None, length: int, info: Any = None) -> None:
        # by descriptor the file that was opened, though another may have its name by now
        if info is None and path:
            caller = self._caller()
            found = self._tree.find(path)
            self._tree.check(found, caller, permissions.WRITE)
        else:
            found = self._open[info.fh].found
        node = found.node
        if isinstance(node, File) and length == 0:
            node.truncate()

    def poll(self, path: str | None, info: Any, polled: PollHandle | None) -> int:
        opened = self._open[info.fh]
        if polled:
            opened.end_poll()
            opened.polled = polled
            with suppress(AiosError):  # the read will say what is wrong
                opened.watch = opened.handle.watch(polled.notify)
        events = select.POLLOUT if opened.opening.writes else 0
        events |= select.POLLIN if opened.opening.reads and self._readable(opened) else 0
        self._burden.changed(opened)
        return events

    @staticmethod
    def _readable(opened: Open) -> bool:
        try:
            return opened.handle.readable()
        except AiosError:
            return True  # the read will say what is wrong

    def flush(self, path: str | None, info: Any) -> None:
        opened = self._open[info.fh]
        with self._burden.timed(opened):
            opened.handle.flush(libfuse.context().pid)

    def fsync(self, path: str | None, datasync: int, info: Any) -> None:
        """What a write was answered is stored already."""

    def release(self, path: str | None, info: Any) -> None:
        opened = self._open.pop(info.fh)
        path = opened.opening.path
        with self._lock:
            del self._of_path[path][info.fh]
            if not self._of_path[path]:
                del self._of_path[path]
        if opened.polled:
            opened.end_poll()
        self._burden.closed(opened)
        try:
            with self._burden.timed(opened):
                opened.handle.release()
        except AiosError as error:  # nobody sees an errno of release
            self._tree.explain(path, error, opened.opening.caller.uid)

    # helpers of the above

    def _find(self, path: str) -> FoundNode:
        """A file that is open can be asked for (fstat) after its object was removed."""
        try:
            return self._tree.find(path)
        except NotFound:
            with self._lock:
                if opened := self._of_path.get(path):
                    return next(iter(opened.values())).found
            raise

    def _parent(self, path: str) -> tuple[FoundNode, str]:
        parent, _, name = path.rpartition("/")
        return self._tree.find(parent or "/"), name

"""Work folders: what the tools of an agent, or an MCP server, may write to, one for each user besides.

STATE/work/UID/NAME. The folders above are the daemon's: who could put a link in the place of one would be
given what it leads to. Only his group passes the one of his uid, so that a tool opens /work to nobody else.
"""

from __future__ import annotations

import logging
import os
import subprocess
import threading
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from queue import SimpleQueue

from aiosd.host import disk
from aiosd.host.unasked import FOLDER, enter

log = logging.getLogger(__name__)

REMOVE_S = 30.0


class Work:
    def __init__(self, root: Path) -> None:
        self.root = root

    def make(self, name: str, uid: int, gid: int) -> Path:
        """That of a user by its name, made where it is not there yet. Raises StoreFailed."""
        folder = self.root / str(uid) / name
        try:
            with ExitStack() as undo:
                at = _enter(undo, None, str(self.root), 0o711)
                at = _enter(undo, at, str(uid), 0o710)
                self._give(at, os.geteuid(), gid)
                self._give(_enter(undo, at, name, 0o700, uid), uid, gid)
        except OSError as error:
            raise disk.failed(folder, error) from None
        return folder

    @staticmethod
    def _give(fd: int, uid: int, gid: int) -> None:
        if os.geteuid() == 0:
            os.fchown(fd, uid, gid)

    def set_aside(self, uid: int) -> None:
        """Give a former account's work folders to root, under a name that no uid has. Raises StoreFailed."""
        with ExitStack() as undo:
            try:
                root = _open(undo, None, str(self.root))
                fd = _open(undo, root, str(uid))
                self._give(fd, os.geteuid(), os.getegid())
                os.fchmod(fd, 0o700)
                os.rename(str(uid), f"{uid}.{time.time_ns()}", src_dir_fd=root, dst_dir_fd=root)
            except FileNotFoundError:
                return
            except OSError as error:
                raise disk.failed(self.root / str(uid), error) from None

    def has(self, agent: int) -> bool:
        return any(str(agent) in names for _, names in self._folders())

    def of(self, agent: int) -> list[Path]:
        return [folder / str(agent) for folder, names in self._folders() if str(agent) in names]

    def of_others(self, agents: Collection[int]) -> list[Path]:
        """Those of agents that a killed daemon was about to end."""
        return [
            folder / name
            for folder, names in self._folders()
            for name in names
            if name.isdecimal() and int(name) not in agents
        ]

    def _folders(self) -> Iterator[tuple[Path, list[str]]]:
        """Of each user the folder, and the names in it. A link in the place of one is passed over."""
        with ExitStack() as undo, suppress(FileNotFoundError):
            root = _open(undo, None, str(self.root))
            for uid in os.listdir(root):
                with ExitStack() as inner, suppress(OSError):
                    at = _open(inner, root, uid)
                    yield self.root / uid, os.listdir(at)


class Removal:
    """Removes work folders, one after the other: much may be in one, or a file system that never answers."""

    def __init__(self) -> None:
        self._folders, self._known = SimpleQueue[Path](), set[Path]()
        self._stuck = set[str]()  # users with a folder that could not be removed; the next daemon tries again
        self._thread = threading.Thread(target=self._run, name="rm", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def add(self, folders: Iterable[Path]) -> None:
        for folder in set(folders) - self._known:
            self._known.add(folder)
            self._folders.put(folder)

    def _run(self) -> None:
        while True:
            folder = self._folders.get()
            if folder.parent.name not in self._stuck and not removed(folder):
                self._stuck.add(folder.parent.name)
                log.warning("%s cannot be removed: something in it does not answer", folder)
            self._known.discard(folder)


def _enter(undo: ExitStack, parent: int | None, name: str, mode: int, owner: int | None = None) -> int:
    """Opens a folder, made where it is not there; one that is another's is refused."""
    with suppress(FileExistsError):
        os.mkdir(name, mode, dir_fd=parent)
    fd = _open(undo, parent, name)
    if os.fstat(fd).st_uid not in (os.geteuid(), owner):
        raise PermissionError(1, f"{name} belongs to user {os.fstat(fd).st_uid}")
    return fd


def _open(undo: ExitStack, parent: int | None, name: str) -> int:
    """Raises SomethingMounted, OSError. The root may be a mount."""
    fd = os.open(name, FOLDER | os.O_NOFOLLOW) if parent is None else enter(parent, name)
    undo.callback(os.close, fd)
    return fd


def removed(folder: Path) -> bool:
    """By rm(1): shutil's recursion ends at a thousand folders in each other, which a tool may make. False: it
    takes so long that a file system in it may be one that never answers."""
    with ExitStack() as undo, suppress(OSError):
        above = _open(undo, None, str(folder.parents[1]))
        at = f"/proc/self/fd/{_open(undo, above, folder.parent.name)}"
        command = ["/bin/rm", "-rf", "--one-file-system", "--", folder.name]
        process = subprocess.Popen(command, cwd=at, stderr=subprocess.DEVNULL)
        try:
            process.wait(REMOVE_S)
        except subprocess.TimeoutExpired:
            process.kill()  # nobody waits for it: it may be impossible to end
            return False
    return True

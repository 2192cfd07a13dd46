"""Work folders: what the tools of an agent, or an MCP server, may write to, one for each user besides.

STATE/work/UID/NAME. The folders above are the daemon's: who could put a link in the place of one would be
given what it leads to. Only his group passes the one of his uid, so that a tool opens /work to nobody else.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

from aiosd.host import disk

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


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

    def forget(self, agent: int) -> None:
        for at, names in self._folders():
            remove(at, [name for name in names if name == str(agent)])

    def forget_but(self, agents: Collection[int]) -> None:
        """Remove those of agents that a killed daemon was about to end."""
        for at, names in self._folders():
            remove(at, [name for name in names if name.isdecimal() and int(name) not in agents])

    def _folders(self) -> Iterator[tuple[int, list[str]]]:
        """Of each user the folder, open, and the names in it. A link in the place of one is passed over."""
        with ExitStack() as undo, suppress(FileNotFoundError):
            root = _open(undo, None, str(self.root))
            for uid in os.listdir(root):
                with ExitStack() as inner, suppress(OSError):
                    at = _open(inner, root, uid)
                    yield at, os.listdir(at)


def _enter(undo: ExitStack, parent: int | None, name: str, mode: int, owner: int | None = None) -> int:
    """Opens a folder, made where it is not there; one that is another's is refused."""
    with suppress(FileExistsError):
        os.mkdir(name, mode, dir_fd=parent)
    fd = _open(undo, parent, name)
    if os.fstat(fd).st_uid not in (os.geteuid(), owner):
        raise PermissionError(1, f"{name} belongs to user {os.fstat(fd).st_uid}")
    return fd


def _open(undo: ExitStack, parent: int | None, name: str) -> int:
    fd = os.open(name, FOLDER, dir_fd=parent)
    undo.callback(os.close, fd)
    return fd


def remove(at: int, names: list[str]) -> None:
    """By rm(1): shutil's recursion ends at a thousand folders in each other, which a tool may make."""
    if names:
        command = ["/bin/rm", "-rf", "--one-file-system", "--", *names]
        subprocess.run(command, cwd=f"/proc/self/fd/{at}", stderr=subprocess.DEVNULL)

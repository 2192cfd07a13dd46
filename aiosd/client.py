"""How aiosctl reads and writes files of /aios. It uses no other interface of the daemon."""

from __future__ import annotations

import errno
import grp
import io
import json
import os
import pwd
import select
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from aiosd.host import terminal

CLOCK_S = 0.01  # times of notes are rounded
RESTART_S = 15.0  # a restart takes no longer, with the default of daemon.drain_s
ABSENT_S = 1.0  # a restart of both services leaves no tree for less
LOOK_S = 0.05
WAITING_MS = 200
# aiosd restarts: the file belongs to the daemon that has ended, or to one that is ending
AWAY = (errno.ENOTCONN, errno.ECONNABORTED, errno.ESHUTDOWN)
Result = TypeVar("Result")


class Failed(Exception):
    """The message is for the user; `status` is the exit status of aiosctl."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


class Files:
    """The tree. With `verbose`, show each access as the shell command that does the same."""

    def __init__(self, root: Path, verbose: bool) -> None:
        self.root, self._verbose = root, verbose
        self._began_s = time.time()  # what was refused before was refused to another program

    def read(self, path: str) -> str:
        self.show(f"cat {self._quoted(path)}")
        with self._named(path):
            return patiently(lambda: (self.root / path).read_text("utf-8"))

    def peek(self, path: Path) -> str:
        """Read a small file again and again; `verbose` does not show it."""
        return patiently(lambda: path.read_text("utf-8")).strip()

    def write(self, path: str, text: str) -> None:
        self.show(f"echo {shlex.quote(text)} > {self._quoted(path)}")
        with self._named(path):
            self._sent(path, "wb", text).close()

    def names(self, path: str) -> list[str]:
        self.show(f"ls {self._quoted(path)}")
        return sorted(patiently(lambda: os.listdir(self.root / path)))

    def make(self, path: str) -> None:
        self.show(f"mkdir {self._quoted(path)}")
        (self.root / path).mkdir()

    def remove(self, path: str) -> None:
        self.show(f"rmdir {self._quoted(path)}")
        (self.root / path).rmdir()

    def give(self, path: str, uid: int, gid: int) -> None:
        self.show(f"chown {uid}:{gid} {self._quoted(path)}")
        os.chown(self.root / path, uid, gid)

    def ask(self, path: str, text: str) -> None:
        """Write a question and print the answer."""
        write = terminal.writer()
        for data in self.answer(path, text):
            write(data)

    def answer(self, path: str, text: str, waiting: Callable[[], None] | None = None) -> Iterator[bytes]:
        """Write a question and give the answer as it comes, in one private transaction (O_RDWR). `waiting` is
        called again and again while nothing comes. Closing the iterator early cancels the request.
        """
        quoted = self._quoted(path)
        self.show(f"exec 3<>{quoted}; echo {shlex.quote(text)} >&3; cat <&3")
        with self._named(path):
            file = self._sent(path, "r+b", text)
            try:
                with file:  # close(2) may fail too
                    while data := read(file, waiting):
                        yield data
            except OSError as error:
                if error.errno not in AWAY:
                    raise
                raise Failed(f"aiosd has ended before the end of the answer; {self._later(path)}") from None

    def _sent(self, path: str, mode: str, text: str) -> io.FileIO:
        """Open the file and write the text. While aiosd restarts, try again: it has not taken the text."""
        until = time.monotonic() + RESTART_S
        while True:
            file = patiently(lambda: io.FileIO(self.root / path, mode))
            try:
                file.write(given(text) + b"\n")
                return file
            except OSError as error:
                file.close()
                if error.errno != errno.ESHUTDOWN or time.monotonic() > until:
                    raise
            time.sleep(LOOK_S)

    def _later(self, path: str) -> str:
        folder, syscall, _ = path.partition("/syscall/")
        if syscall:
            answer = self._quoted(f"{folder}/requests/latest/response")
            return f"the request goes on when it is back: cat {answer}"
        return "ask again when it is back"

    def why(self, file: Path) -> str:
        """Why the daemon refused this user's last call on a file; empty: it refused none."""
        try:
            notes = [json.loads(line) for line in (self.root / "refused.jsonl").read_text().splitlines()]
        except (OSError, ValueError):
            return ""
        path = os.path.realpath(file)  # requests/ID may be a link
        mine = [
            note["message"]
            for note in notes
            if os.path.realpath(self.root / note["file"]) == path and note["time"] > self._began_s - CLOCK_S
        ]
        return str(mine[-1]) if mine else ""

    @contextmanager
    def _named(self, path: str) -> Iterator[None]:
        """An error of read(2) or write(2) names the file too."""
        try:
            yield
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                error.filename = error.filename or str(self.root / path)
            raise

    def _quoted(self, path: str) -> str:
        return shlex.quote(str(self.root / path))

    def show(self, line: str) -> None:
        if self._verbose:
            print(f"+ {line}", file=sys.stderr)


def read(file: io.FileIO, waiting: Callable[[], None] | None) -> bytes | None:
    if waiting:
        poll = select.poll()
        poll.register(file, select.POLLIN)
        while not poll.poll(WAITING_MS):
            waiting()
    return file.read(65536)


def explained(files: Files, error: OSError) -> str:
    """The errno, and why: the daemon's reason, or whose file it is where the kernel refused."""
    said, file = str(error.strerror or error), Path(str(error.filename or files.root))
    if why := files.why(file):
        return f"{said}: {why}"
    if error.errno == errno.ENOENT and (name := missing(files.root, file)):
        return f"{said}: there is no {name}"
    if error.errno not in (errno.EACCES, errno.EPERM):
        return said
    try:
        at = file.stat()
        whose = (
            f"{said}; it is of {user(at.st_uid)} and group {group(at.st_gid)}, mode {at.st_mode & 0o7777:o}"
        )
        if at.st_mode & 0o060 == 0o060 and at.st_gid not in (os.getegid(), *os.getgroups()):
            return f"{whose}; as root: usermod -aG {group(at.st_gid)} {user(os.geteuid())}, then log in again"
        return whose
    except OSError:
        return f"{said}; a folder above it is closed to you: ls -ld {file.parent}"


def missing(root: Path, file: Path) -> str:
    """The object of the tree that is not there, and where to look; empty: it is not an object."""
    kind, name = (*file.relative_to(root).parts, "", "")[:2] if file.is_relative_to(root) else ("", "")
    if kind not in ("agents", "models", "contexts", "tools") or not name or (root / kind / name).exists():
        return ""
    return f"{kind[:-1]} {name}; ls {root / kind} shows what there is"


def user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def patiently(act: Callable[[], Result]) -> Result:
    """Do it, and again while aiosd restarts. Raises OSError."""
    until = time.monotonic() + RESTART_S
    while True:
        try:
            return act()
        except OSError as error:
            if error.errno not in AWAY or time.monotonic() > until:
                raise
        time.sleep(LOOK_S)


def wait_for_daemon(root: Path) -> None:
    """Raise Failed unless there is a tree within the time that a restart of both services leaves none."""
    until = time.monotonic() + ABSENT_S
    while not patiently((root / "version").exists):
        if time.monotonic() > until:
            raise Failed(
                f"{root}: aiosd is not running; systemctl start aiosd, or name its mount with --mount"
            )
        time.sleep(LOOK_S)


def given(text: str) -> bytes:
    """Words of a command line: UTF-8, and bytes that are none as they came, for the daemon to judge."""
    return text.encode("utf-8", "surrogateescape")

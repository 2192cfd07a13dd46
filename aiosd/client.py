"""How aiosctl reads and writes files of /aios. It uses no other interface of the daemon."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CLOCK_S = 0.01  # times of notes are rounded


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
            return (self.root / path).read_text("utf-8")

    def write(self, path: str, text: str) -> None:
        self.show(f"echo {shlex.quote(text)} > {self._quoted(path)}")
        with self._named(path), open(self.root / path, "wb", buffering=0) as file:
            file.write(given(text) + b"\n")

    def names(self, path: str) -> list[str]:
        self.show(f"ls {self._quoted(path)}")
        return sorted(os.listdir(self.root / path))

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
        """Write a question and print the answer in one private transaction (O_RDWR)."""
        quoted = self._quoted(path)
        self.show(f"exec 3<>{quoted}; echo {shlex.quote(text)} >&3; cat <&3")
        with self._named(path), open(self.root / path, "r+b", buffering=0) as file:
            file.write(given(text) + b"\n")
            while data := file.read(65536):
                sys.stdout.buffer.write(data)
                sys.stdout.buffer.flush()

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


def given(text: str) -> bytes:
    """Words of a command line: UTF-8, and bytes that are none as they came, for the daemon to judge."""
    return text.encode("utf-8", "surrogateescape")

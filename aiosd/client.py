"""How aiosctl reads and writes files of /aios. It uses no other interface of the daemon."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path


class Failed(Exception):
    """The message is for the user; `status` is the exit status of aiosctl."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


class Files:
    """The tree. With `verbose`, show each access as the shell command that does the same."""

    def __init__(self, root: Path, verbose: bool) -> None:
        self.root, self._verbose = root, verbose

    def read(self, path: str) -> str:
        self.show(f"cat {self._quoted(path)}")
        return (self.root / path).read_text("utf-8")

    def write(self, path: str, text: str) -> None:
        self.show(f"echo {shlex.quote(text)} > {self._quoted(path)}")
        with open(self.root / path, "wb", buffering=0) as file:
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

    def ask(self, path: str, text: str) -> None:
        """Write a question and print the answer in one private transaction (O_RDWR)."""
        quoted = self._quoted(path)
        self.show(f"exec 3<>{quoted}; echo {shlex.quote(text)} >&3; cat <&3")
        fd = os.open(self.root / path, os.O_RDWR)
        try:
            os.write(fd, given(text) + b"\n")
            while data := os.read(fd, 65536):
                sys.stdout.buffer.write(data)
                sys.stdout.buffer.flush()
        finally:
            os.close(fd)

    def _quoted(self, path: str) -> str:
        return shlex.quote(str(self.root / path))

    def show(self, line: str) -> None:
        if self._verbose:
            print(f"+ {line}", file=sys.stderr)


def given(text: str) -> bytes:
    """Words of a command line: UTF-8, and bytes that are none as they came, for the daemon to judge."""
    return text.encode("utf-8", "surrogateescape")

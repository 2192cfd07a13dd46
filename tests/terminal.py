"""A program on a terminal of its own, as a person uses it."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import termios
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

LIMIT_S = 60.0
CTRL_C, CTRL_D, CTRL_U = "\x03", "\x04", "\x15"


class Terminal:
    """`shown` is all that the program has printed."""

    def __init__(self, command: list[str], env: Mapping[str, str]) -> None:
        self.shown = ""
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            os.execvpe(command[0], command, {**os.environ, **env})

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def narrow(self, columns: int) -> None:
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def say(self, line: str) -> None:
        self.type(f"{line}\r")

    def until(self, text: str) -> str:
        """Read until the program has printed the text; return what came before it since the last call."""
        deadline = time.monotonic() + LIMIT_S
        while text not in self.shown:
            assert self._read(), self.shown
            assert time.monotonic() < deadline, f"no {text!r} in {self.shown!r}"
        before, _, self.shown = self.shown.partition(text)
        return before

    def _read(self) -> bool:
        if not select.select([self._terminal], [], [], 0.2)[0]:
            return True
        try:
            data = os.read(self._terminal, 4096)
        except OSError:  # EIO: nobody has the terminal open any longer
            return False
        self.shown += data.decode(errors="replace")
        return bool(data)

    def ended(self) -> int:
        """Read to the end; return the exit status."""
        deadline = time.monotonic() + LIMIT_S
        while self._read():
            assert time.monotonic() < deadline, self.shown
        return os.waitstatus_to_exitcode(self._wait())

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self._wait()

    def _wait(self) -> int:
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return status

    def close(self) -> None:
        if self.pid:
            self.kill()
        os.close(self._terminal)


@contextmanager
def terminal(command: list[str], env: Mapping[str, str]) -> Iterator[Terminal]:
    made = Terminal(command, env)
    try:
        yield made
    finally:
        made.close()

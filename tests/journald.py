"""The systemd journal, as tests read it: the machine's, or one of their own where none runs."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from aiosd.host.journal import SOCKET
from tests.running import REPOSITORY, Daemon, needs, wait_until

JOURNALD = Path("/lib/systemd/systemd-journald")
START = """set -e
mount -t tmpfs none /run
mkdir -p /run/systemd/journal /run/log/journal /run/systemd/journald.conf.d
mount --bind "$1/journal" /run/systemd/journal
mount --bind "$1/log" /run/log/journal
printf '[Journal]\\nStorage=volatile\\nReadKMsg=no\\nAudit=no\\n' > /run/systemd/journald.conf.d/test.conf
exec "$2"
"""  # in a mount namespace of its own: nothing of the machine is touched


class Journal:
    def __init__(self, folder: Path | None, journald: subprocess.Popen[bytes] | None) -> None:
        self._where = ["--directory", str(folder)] if folder else []
        self._journald = journald

    def entries(self, *matches: str) -> list[dict[str, Any]]:
        command = ["journalctl", *self._where, "--output=json", "--all", *matches]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        return [json.loads(line) for line in lines]

    @contextmanager
    def stands_still(self) -> Iterator[None]:
        """Stopped, and its socket takes not one entry more."""
        if self._journald is None:
            pytest.skip("the journal is the machine's")
        self._journald.send_signal(signal.SIGSTOP)
        try:
            while fill(SOCKET):
                pass
            yield
        finally:
            self._journald.send_signal(signal.SIGCONT)


def fill(address: str) -> int:
    """Sends datagrams, as many as one sender may, until it would have to wait."""
    sent = 0
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender, suppress(BlockingIOError):
        sender.setblocking(False)
        while sender.sendto(b"STATUS=full\n", address):
            sent += 1
    return sent


@contextmanager
def journal(folder: Path) -> Iterator[Journal]:
    if Path(SOCKET).exists():
        yield Journal(None, None)
        return
    needs("journalctl")
    (folder / "journal").mkdir(parents=True)
    (folder / "log").mkdir()
    command = ["unshare", "--mount", "sh", "-c", START, "sh", str(folder), str(JOURNALD)]
    link = Path(SOCKET)
    link.parent.mkdir(parents=True, exist_ok=True)
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as journald:
        try:
            wait_until((folder / "journal/socket").exists, "the journal")
            link.symlink_to(folder / "journal/socket")
            yield Journal(folder / "log", journald)
        finally:
            link.unlink(missing_ok=True)
            journald.terminate()


def connect(daemon: Daemon) -> Daemon:
    """Has it believe that its standard error is a stream of the journal, as a service manager says it."""
    daemon.log.touch()
    status = daemon.log.stat()
    daemon.env["JOURNAL_STREAM"] = f"{status.st_dev}:{status.st_ino}"
    return daemon


def program(code: str, stderr: Path, journal: bool = True) -> subprocess.Popen[bytes]:
    """A Python program whose standard error is the file, and a stream of the journal as far as it is told."""
    with stderr.open("wb") as file:
        status = os.fstat(file.fileno())
        told = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"} if journal else {}
        return subprocess.Popen(
            [sys.executable, "-c", code], cwd=REPOSITORY, stderr=file, env={**os.environ, **told}
        )

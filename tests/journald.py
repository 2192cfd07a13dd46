"""The systemd journal for tests: the machine's journald, or a private one where none runs."""

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
"""  # runs in its own mount namespace, so that it changes nothing on the machine


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
        """Stop journald, and fill its socket so that it takes no more entries."""
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
    """Send datagrams until the next one would block."""
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
    """Tell the program that its standard error is a stream of the journal, as a service manager does."""
    daemon.log.touch()
    status = daemon.log.stat()
    daemon.env["JOURNAL_STREAM"] = f"{status.st_dev}:{status.st_ino}"
    return daemon


def program(code: str, stderr: Path, journal: bool = True) -> subprocess.Popen[bytes]:
    """Start Python with the file as standard error, and tell it that this is a stream of the journal."""
    with stderr.open("wb") as file:
        status = os.fstat(file.fileno())
        told = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"} if journal else {}
        return subprocess.Popen(
            [sys.executable, "-c", code], cwd=REPOSITORY, stderr=file, env={**os.environ, **told}
        )

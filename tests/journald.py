"""The systemd journal, as tests read it: the machine's, or one of their own where none runs."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aiosd.host.journal import SOCKET
from tests.running import Daemon, needs, wait_until

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
    def __init__(self, folder: Path | None) -> None:
        self._where = ["--directory", str(folder)] if folder else []

    def entries(self, *matches: str) -> list[dict[str, str]]:
        command = ["journalctl", *self._where, "--output=json", "--all", *matches]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        return [json.loads(line) for line in lines]


@contextmanager
def journal(folder: Path) -> Iterator[Journal]:
    if Path(SOCKET).exists():
        yield Journal(None)
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
            yield Journal(folder / "log")
        finally:
            link.unlink(missing_ok=True)
            journald.terminate()


def connect(daemon: Daemon) -> Daemon:
    """Has it believe that its standard error is a stream of the journal, as a service manager says it."""
    daemon.log.touch()
    status = daemon.log.stat()
    daemon.env["JOURNAL_STREAM"] = f"{status.st_dev}:{status.st_ino}"
    return daemon

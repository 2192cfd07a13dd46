"""aiosctl audit verify: check the hash chain of the audit log, in the tree or in files."""

from __future__ import annotations

import argparse

from aiosd.client import Failed, Files, wait_for_daemon
from aiosd.host import hashchain


def verify(files: Files, options: argparse.Namespace) -> None:
    """Each file continues the one that is named before it."""
    if not options.files:
        wait_for_daemon(files.root)
    count, faults, last = 0, 0, hashchain.FIRST
    for number, file in enumerate(options.files or [files.root / "access/audit.jsonl"]):
        with file.open("rb") as lines:
            found = hashchain.verify(lines, last)
        for one in found.wrong:
            print(f"{file}: {one}")
        if found.earlier and not number:
            print(f"{file}: it continues {found.earlier}; name that file before it, to check both")
        count, faults, last = count + found.lines, faults + len(found.wrong), found.last
    if faults:
        raise Failed(
            f"the audit log of {count} lines is not whole; the messages above say where. Compare with a"
            " backup, and with the journal, which has the same facts: journalctl -u aiosd"
        )
    print(f"{count} lines, each follows the one before it")

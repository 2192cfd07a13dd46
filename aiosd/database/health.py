"""Whether the database of a state folder is whole, and the one that belongs there.

A state folder has a number, in a file of its own and in the database. A database that is missing, empty or
another one is then told from a state folder that is new. Called while the database is opened, by one thread.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
from pathlib import Path

from aiosd.errors import StoreFailed

MARKER = "state-id"
RESTORE = "stop aiosd and put a backup of aios.db back"


def check_there(folder: Path) -> None:
    """Before the file is made: a missing or empty one is right in a new folder only. Raises StoreFailed."""
    file, marker = folder / "aios.db", folder / MARKER
    empty = not file.exists() or file.stat().st_size == 0
    wal = folder / "aios.db-wal"
    if empty and marker.exists() and not (wal.exists() and wal.stat().st_size):
        raise StoreFailed(
            f"{file} is missing or empty, but {folder} has been used before",
            f"{RESTORE}; or move {folder} away, to begin without agents, contexts and their files",
        )


def check_whole(db: sqlite3.Connection, file: Path) -> None:
    """Raises StoreFailed."""
    try:
        said = [str(row[0]) for row in db.execute("PRAGMA quick_check(1)")]
    except sqlite3.DatabaseError as error:
        said = [str(error)]
    if said != ["ok"]:
        raise StoreFailed(
            f"{file} is damaged: {said[0]}", f"{RESTORE}; without one, sqlite3's .recover saves what it can"
        )


def check_belongs(db: sqlite3.Connection, folder: Path) -> None:
    """Give a new state folder its number. Raises StoreFailed where the database has another or none.

    The database gets it first: a folder without the file is new, or is from before there were numbers.
    """
    marker = folder / MARKER
    row = db.execute("SELECT next FROM counters WHERE name='state'").fetchone()
    if marker.exists():
        if row is None or marker.read_text().strip() != str(row[0]):
            raise StoreFailed(
                f"{folder / 'aios.db'} is not the database that this state folder was used with",
                f"{RESTORE}; or remove {marker}, if this is the database that you want",
            )
        return
    if row is None:
        row = (secrets.randbits(62),)
        db.execute("INSERT INTO counters VALUES ('state', ?)", row)
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()  # on the disk, before the file is
    new = marker.with_suffix(".new")
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, f"{row[0]}\n".encode())
        os.fsync(fd)
    finally:
        os.close(fd)
    new.replace(marker)

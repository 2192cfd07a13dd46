"""One SQLite file (WAL) that one process holds: open it, migrate it, run one transaction at a time.

kill -9 between any two lines leaves a consistent state. Any thread may call: one lock guards the connection.
A full disk raises StoreFull.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from aiosd.database import health
from aiosd.database.schema import MIGRATIONS, SCHEMA, SCHEMA_VERSION
from aiosd.errors import StoreFailed, StoreFull, in_words
from aiosd.host import disk
from aiosd.host.usage import free_bytes

HELD_S = 1.0
ROOM_BYTES = 1 << 20  # with less space, an error of the disk means that it is full: SQLite does not say so


class Connection:
    def __init__(self, folder: Path) -> None:
        """Open the database, or make it. Raises StoreFailed, and then holds nothing."""
        self.folder = folder
        self._lock = threading.RLock()
        file = folder / "aios.db"
        with ExitStack() as undo:
            try:
                self._open(file, undo)
                self._migrate(file)
                health.check_belongs(self._db, folder)
            except (sqlite3.Error, OSError) as error:
                remedy = "check the owner, the free space and the disk of the state folder"
                if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES):
                    remedy += f"; as a service: systemctl edit aiosd, with [Service] ReadWritePaths={folder}"
                raise StoreFailed(f"{file}: {in_words(error)}", remedy) from None
            undo.pop_all()

    def _open(self, file: Path, undo: ExitStack) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o711)  # tools pass through to their work folders; all else in it is private
        self._hold()
        undo.callback(self._held.close)
        health.check_there(self.folder)
        os.close(os.open(file, os.O_CREAT | os.O_CLOEXEC, 0o600))
        file.chmod(0o600)  # SQLite gives its other files the same mode
        self._db = sqlite3.connect(file, check_same_thread=False, isolation_level=None, timeout=5)
        undo.callback(self._db.close)
        health.check_whole(self._db, file)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.execute("PRAGMA secure_delete=ON")

    def _hold(self) -> None:
        """Lock the folder for this process until it closes the store or ends. Raises StoreFailed."""
        file = self.folder / "lock"
        self._held = file.open("a+")
        file.chmod(0o600)
        end_s = time.monotonic() + HELD_S
        while True:
            try:
                fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() < end_s:  # a killed daemon may be about to release it
                    time.sleep(0.05)
                    continue
                self._held.seek(0)
                who = self._held.read(20).strip()
                self._held.close()
                raise StoreFailed(
                    f"{self.folder} is in use by aiosd with pid {who}",
                    "stop that daemon, or name another folder with --state",
                ) from None
        self._held.truncate(0)
        self._held.write(f"{os.getpid()}\n")
        self._held.flush()

    def _migrate(self, file: Path) -> None:
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version == SCHEMA_VERSION:
            return
        if version > SCHEMA_VERSION:
            raise StoreFailed(
                f"{file} has version {version}; this aiosd reads {SCHEMA_VERSION}", "install a newer aiosd"
            )
        change = "".join(MIGRATIONS[v] for v in range(version, SCHEMA_VERSION)) if version else SCHEMA
        self._db.executescript(f"BEGIN;{change}PRAGMA user_version={SCHEMA_VERSION};COMMIT;")

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._statements() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    @contextmanager
    def _statements(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                yield self._db
            except sqlite3.Error as error:
                raise self._failed(error) from None

    def _failed(self, error: sqlite3.Error) -> StoreFailed:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        broken = code == sqlite3.SQLITE_IOERR
        if code == sqlite3.SQLITE_FULL or (broken and free_bytes(self.folder) < ROOM_BYTES):
            return StoreFull(f"{self.folder}: {error}", "free some space there")
        return StoreFailed(f"{self.folder}: {error}", disk.REMEDIES[errno.EIO] if broken else disk.LOOK)

    def _rows(self, sql: str, *arguments: object) -> list[tuple[Any, ...]]:
        with self._lock:
            try:
                return self._db.execute(sql, arguments).fetchall()
            except sqlite3.Error as error:
                raise self._failed(error) from None

    def free_bytes(self) -> int:
        return free_bytes(self.folder)

    def close(self) -> None:
        with self._lock:
            self._db.close()
            self._held.close()

"""KV of conversations that left the workers: first in this process's memory (host), then on disk, then gone.

The KV of a conversation is one file of aiosd.cores.snapshot, in memory or in STATE/kv/ID.kv. When a budget is
full, the eviction policy chooses which file moves down. Lost KV is recomputed to the same tokens. Any thread
may call; Swap's own thread moves the files.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from aiosd.cores import snapshot
from aiosd.cores.eviction import victim
from aiosd.policies.eviction import Kept

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Image:
    bytes: int
    used: int
    file: int | None  # a descriptor of the memory; None: the file is on disk
    checked: bool = True  # True: made here, in memory. False: a user wrote it, or a disk may have damaged it


class Swap:
    def __init__(self, folder: Path, host_bytes: int, disk_bytes: int, reserve_bytes: int) -> None:
        self._folder, self.host_bytes, self.disk_bytes = folder, host_bytes, disk_bytes
        self._reserve_bytes = reserve_bytes  # free space that stays for other files
        self._moving = threading.Lock()
        self._images: dict[int, Image] = {}
        self._clock = itertools.count()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="swap", daemon=True)

    def start(self, known: Iterable[int]) -> None:
        """Take over the files of an earlier daemon for the conversations that still exist."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        ids = set(known)
        for path in self._folder.iterdir():
            if path.suffix == ".kv" and path.stem.isdecimal() and int(path.stem) in ids:
                self._images[int(path.stem)] = Image(path.stat().st_size, next(self._clock), None)
            else:
                path.unlink()
        self._thread.start()

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    def resize(self, host_bytes: int, disk_bytes: int, reserve_bytes: int) -> None:
        with self._changed:
            self.host_bytes, self.disk_bytes, self._reserve_bytes = host_bytes, disk_bytes, reserve_bytes
            self._changed.notify_all()

    def tier(self, context: int) -> str:
        image = self._images.get(context)
        return "cold" if image is None else "disk" if image.file is None else "host"

    def bytes(self, context: int) -> int:
        image = self._images.get(context)
        return image.bytes if image else 0

    def used(self, tier: str) -> int:
        return sum(i.bytes for i in list(self._images.values()) if (i.file is None) == (tier == "disk"))

    def put(self, context: int, file: int, checked: bool = True) -> None:
        """Keep the KV of a context. Swap closes the descriptor later."""
        with self._changed:
            self._drop(context)
            self._images[context] = Image(os.fstat(file).st_size, next(self._clock), file, checked)
            self._changed.notify_all()

    def take(self, context: int) -> tuple[int, bool] | None:
        """Return (a descriptor that the caller closes, whether the file needs no check)."""
        with self._changed:
            image = self._images.get(context)
            if image is None:
                return None
            image.used = next(self._clock)
            try:
                if image.file is not None:
                    return os.dup(image.file), image.checked
                return os.open(self._path(context), os.O_RDONLY | os.O_CLOEXEC), False
            except OSError as error:
                log.error("KV of context %d cannot be read: %s", context, error)
                self._drop(context)
                return None

    def drop(self, context: int) -> None:
        with self._changed:
            self._drop(context)

    def release(self, context: int) -> None:
        """Free the memory after a worker took the KV. A file on disk stays, in case the worker dies."""
        with self._changed:
            image = self._images.get(context)
            if image is not None and image.file is not None:
                self._drop(context)

    def share(self, context: int, to: int) -> None:
        """Let another context use the same file. A kept file never changes, so a second name is enough."""
        with self._changed:
            image = self._images.get(context)
            if image is None:
                return
            if image.file is not None:
                file = os.dup(image.file)
            else:
                file = None
                with suppress(OSError):
                    os.link(self._path(context), self._path(to))
            self._images[to] = Image(image.bytes, next(self._clock), file, image.checked)

    def sink(self, context: int) -> None:
        """Move the KV from memory to disk now."""
        self._to_disk(context)

    def _drop(self, context: int) -> None:
        image = self._images.pop(context, None)
        if image is None:
            return
        if image.file is not None:
            os.close(image.file)
        with suppress(FileNotFoundError):
            self._path(context).unlink()

    def _path(self, context: int) -> Path:
        return self._folder / f"{context}.kv"

    # the thread

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._stopping and not (self._over("host") or self._over("disk")):
                    self._changed.wait()
                if self._stopping:
                    return
            self._relieve("host", self._to_disk)
            self._relieve("disk", self.drop)

    def _over(self, tier: str) -> bool:
        return self.used(tier) > (self.disk_bytes if tier == "disk" else self.host_bytes)

    def _relieve(self, tier: str, move: Callable[[int], None]) -> None:
        while self._over(tier):
            with self._changed:
                kept = [
                    Kept(id, i.bytes, i.used)
                    for id, i in self._images.items()
                    if (i.file is None) == (tier == "disk")
                ]
            if kept:  # another thread may have dropped the last one
                move(victim(kept))

    def _to_disk(self, context: int) -> None:
        """Write a temporary file, seal and rename it: a file on disk is complete. Without room,
        drop the KV.
        """
        with self._moving:  # one at a time: all use the same temporary file
            with self._changed:
                image = self._images.get(context)
                if image is None or image.file is None:
                    return
                file = os.dup(image.file)
            aside = self._folder / "new"
            try:
                self._check_disk(image.bytes)
                with aside.open("w+b") as out:  # the folder is private
                    size = snapshot.copy(file, out.fileno(), about=b"")
                with self._changed:
                    if self._images.get(context) is image and image.file is not None:
                        aside.rename(self._path(context))
                        os.close(image.file)
                        image.file, image.bytes = None, size
            except OSError as error:
                log.error("KV of context %d cannot go to disk: %s", context, error)
                self.drop(context)
            finally:
                os.close(file)
                aside.unlink(missing_ok=True)

    def _check_disk(self, size: int) -> None:
        status = os.statvfs(self._folder)
        if status.f_bavail * status.f_frsize < size + self._reserve_bytes:
            raise OSError(errno.ENOSPC, "the disk is nearly full")

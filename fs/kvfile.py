"""contexts/NAME/kv: the exact state of a conversation. `cp` reads it, and `cp` back restores it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from aiosd.access.caller import Caller
from aiosd.context.contexts import Context
from aiosd.context.kvfile import Export
from aiosd.cores import snapshot
from aiosd.errors import BadSnapshot
from aiosd.fs.files import File, Handle, Opening
from aiosd.host.watchers import Unwatch
from aiosd.kernel import Kernel


@dataclass(slots=True)
class KvFile(File):
    mode: int = 0o600
    kernel: Kernel = field(default=None)  # type: ignore[assignment]  # always given
    context: Context = field(default=None)  # type: ignore[assignment]

    def open(self, opening: Opening) -> Handle:
        return KvWriting(self, opening) if opening.writes else KvReading(self, opening.caller)


class KvReading(Handle):
    """A reader sees the state at the time of the first read."""

    def __init__(self, kv: KvFile, caller: Caller) -> None:
        self._kv, self._caller = kv, caller
        self._reserved = 0
        self._lock = threading.Lock()
        self._asking = threading.Lock()
        self._export: Export | None = None
        self._file: int | None = None

    def read(self, size: int, offset: int) -> bytes | None:
        with self._lock:
            if not self._asked().came.done():
                return None
            if self._file is None:
                file = self._asked().file()
                whole = os.fstat(file).st_size
                try:
                    self._kv.kernel.kv_budget.reserve(self._caller, whole)
                except BaseException:
                    os.close(file)
                    self._export = None  # the closed file held the KV; the next read asks again
                    raise
                self._file, self._reserved = file, whole
            return os.pread(self._file, size, offset)

    def watch(self, callback: Callable[[], None]) -> Unwatch:
        self._asked().came.add_done_callback(lambda _: callback())
        return lambda: None

    def readable(self) -> bool:
        return self._asked().came.done()

    def release(self) -> None:
        if self._export is not None:
            self._export.close()
        if self._file is not None:
            os.close(self._file)
        self._kv.kernel.kv_budget.reserve(self._caller, -self._reserved)

    def _asked(self) -> Export:
        with self._asking:
            if self._export is None:
                self._export = Export(self._kv.kernel.kv_files, self._kv.context)
            return self._export


class KvWriting(Handle):
    """A writer changes the conversation only with the last byte, when the whole file is valid."""

    def __init__(self, kv: KvFile, opening: Opening) -> None:
        self._kv, self._caller = kv, opening.caller
        self._lock = threading.Lock()
        self._file: int | None = None
        self._beginning = bytearray()
        self._written = self._reserved = 0
        self._size: int | None = None
        self._done = False

    def write(self, data: bytes, offset: int) -> None:
        with self._lock:
            if offset != self._written:
                raise BadSnapshot("a kv file must be written from beginning to end", "use cp or cat")
            self._kv.kernel.kv_budget.reserve(self._caller, len(data))
            self._reserved += len(data)
            if self._size is None:
                self._begin(data)
            if self._size is not None and self._written + len(data) > self._size:
                raise BadSnapshot("the file is longer than its header says", snapshot.COPY_AGAIN)
            if self._file is None:
                self._file = os.memfd_create("aios-kv-in")
            os.pwrite(self._file, data, offset)
            self._written += len(data)
            if self._written == self._size:
                self._kv.kernel.kv_files.restore(self._kv.context, self._file)
                self._done = True

    def _begin(self, data: bytes) -> None:
        self._beginning += data
        self._size = snapshot.size_of(self._beginning)
        if self._size is not None:
            self._kv.kernel.kv_budget.check(self._caller, self._size - self._reserved)
            self._beginning.clear()

    def flush(self, pid: int) -> None:
        if self._written and not self._done:
            raise BadSnapshot("the file ends too early; nothing was changed", snapshot.COPY_AGAIN)

    def release(self) -> None:
        with self._lock:
            if self._file is not None:
                os.close(self._file)
            self._kv.kernel.kv_budget.reserve(self._caller, -self._reserved)

"""Count and bound the open files of each user: their number, their bytes in memory, their waiting threads.

Any thread may call. Root and the daemon's own user have no bounds.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import Protocol

from aiosd.access.caller import Caller
from aiosd.config.config import Quota
from aiosd.errors import OverQuota, TooManyOpen
from aiosd.fs.files import Handle, Opening
from aiosd.host import identity
from aiosd.scheduler.queue import add

CROWD = 100  # waiting threads of one user that may be woken without delay
PAUSE_S = 0.0005  # delay for each waiting thread: waking a crowd for every token would starve other users


class Counted(Protocol):
    handle: Handle
    opening: Opening
    held: int  # bytes that Burden has counted


class Burden:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files, self._bytes, self._waiting = Counter[int](), Counter[int](), Counter[int]()

    def check(self, caller: Caller, quota: Quota) -> None:
        """Check that the caller may open one more file. Raises TooManyOpen, OverQuota."""
        if self._files.get(caller.uid, 0) >= quota.open_files and bounded(caller):
            raise TooManyOpen(f"you have {quota.open_files} files of this mount open", "close some of them")
        self.check_bytes(caller, quota)

    def check_bytes(self, caller: Caller, quota: Quota) -> None:
        """Check that the caller's open files may hold more bytes. Raises OverQuota."""
        if self._bytes.get(caller.uid, 0) >= quota.open_bytes and bounded(caller):
            words = f"the files you have open hold {quota.open_bytes} bytes or more"
            raise OverQuota(words, "close some of them")

    def opened(self, file: Counted) -> None:
        with self._lock:
            add(self._files, file.opening.caller.uid, 1)
        self.changed(file)

    def changed(self, file: Counted) -> None:
        """Count the handle's bytes again. Call this after each call that may change them."""
        if file.handle.held != file.held:
            with self._lock:
                change = file.handle.held - file.held
                file.held += change
                add(self._bytes, file.opening.caller.uid, change)

    def closed(self, file: Counted) -> None:
        with self._lock:
            add(self._files, file.opening.caller.uid, -1)
            add(self._bytes, file.opening.caller.uid, -file.held)

    def waits(self, uid: int) -> float:
        """Count one more waiting thread. Return for how many seconds it must not be woken."""
        with self._lock:
            waiting = add(self._waiting, uid, 1)
        return waiting * PAUSE_S if waiting > CROWD else 0.0

    def goes_on(self, uid: int) -> None:
        with self._lock:
            add(self._waiting, uid, -1)


def bounded(caller: Caller) -> bool:
    return caller.uid not in (0, identity.uid())

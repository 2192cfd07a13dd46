"""What open files take of the daemon, by user: their number, the bytes they hold, the threads that wait.

Any thread may ask. Root and the daemon's own user have no bounds.
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

CROWD = 100  # a user's threads that wait; one more waits PAUSE_S for each of them before it can be woken
PAUSE_S = 0.0005  # else what comes in small pieces would wake them all, and nobody else came to his turn


class Open(Protocol):
    handle: Handle
    opening: Opening
    held: int  # bytes, as counted here


class Burden:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files, self._bytes, self._waiting = Counter[int](), Counter[int](), Counter[int]()

    def check(self, caller: Caller, quota: Quota) -> None:
        """Whether he may open one more. Raises TooManyOpen, OverQuota."""
        if self._files.get(caller.uid, 0) >= quota.open_files and bounded(caller):
            raise TooManyOpen(f"you have {quota.open_files} files of this mount open", "close some first")
        self.check_bytes(caller, quota)

    def check_bytes(self, caller: Caller, quota: Quota) -> None:
        """Raises OverQuota."""
        if self._bytes.get(caller.uid, 0) >= quota.open_bytes and bounded(caller):
            words = f"the files you have open hold {quota.open_bytes} bytes or more"
            raise OverQuota(words, "close some first")

    def opened(self, file: Open) -> None:
        with self._lock:
            add(self._files, file.opening.caller.uid, 1)
        self.changed(file)

    def changed(self, file: Open) -> None:
        """To be told after each call that may change what it holds."""
        if file.handle.held != file.held:
            with self._lock:
                change = file.handle.held - file.held
                file.held += change
                add(self._bytes, file.opening.caller.uid, change)

    def closed(self, file: Open) -> None:
        with self._lock:
            add(self._files, file.opening.caller.uid, -1)
            add(self._bytes, file.opening.caller.uid, -file.held)

    def waits(self, uid: int) -> float:
        """A thread of his is about to wait. Gives for how many seconds it is not to be woken."""
        with self._lock:
            waiting = add(self._waiting, uid, 1)
        return waiting * PAUSE_S if waiting > CROWD else 0.0

    def goes_on(self, uid: int) -> None:
        with self._lock:
            add(self._waiting, uid, -1)


def bounded(caller: Caller) -> bool:
    return caller.uid not in (0, identity.uid())

"""Count and bound what the files of each user take: their number, their bytes in memory, the threads of the
daemon, and the processor's time for writes that are refused or large.

All users wait while the daemon parses for one of them, so that time has a bound too. All uids that are lent
to one user (subuid(5)) count as one. Any thread may call. Root and the daemon's own user have no bounds.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from aiosd.access.caller import Caller
from aiosd.config.config import UNBOUNDED, Quota
from aiosd.errors import AiosError, Busy, OverQuota, TooManyOpen
from aiosd.fs.files import Handle, Opening
from aiosd.host import identity, usage
from aiosd.host.subuids import owner
from aiosd.scheduler.ledger import Buckets
from aiosd.scheduler.queue import add

CROWD = 100  # threads of one user that may be woken without delay
THREADS_MOST = 12_000  # of the tree at once; TasksMax of aiosd.service leaves room for others
THREADS_PART = 0.75  # of what the control group lets the daemon have, where that is less
PAUSE_S = 0.0005  # delay for each waiting thread: waking a crowd for every token would starve other users
FREE_S = 0.003  # of a write that is not refused
BEFORE_S = 0.02  # of the writes before one that is refused
BURST_S = 20.0  # of this time a user may use the milliseconds at once


class Counted(Protocol):
    handle: Handle
    opening: Opening
    held: int  # bytes that Burden has counted
    free_s: float  # time that was not charged


class Burden:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files, self._bytes = Counter[int](), Counter[int]()
        self._threads, self._all_threads = Counter[int](), 0  # of the daemon, that serve a call
        self._threads_most = int(min(THREADS_MOST, THREADS_PART * usage.tasks_most()))
        self._time = Buckets(BURST_S)  # by person, in milliseconds of the processor

    def check(self, caller: Caller, quota: Quota) -> None:
        """Check that the caller may open one more file. Raises TooManyOpen, OverQuota."""
        if self._files.get(owner(caller.uid), 0) >= quota.open_files and bounded(caller):
            raise TooManyOpen(f"you have {quota.open_files} files of this mount open", "close some of them")
        self.check_bytes(caller, quota)

    def check_bytes(self, caller: Caller, quota: Quota) -> None:
        """Check that the caller's open files may hold more bytes. Raises OverQuota."""
        if self._bytes.get(owner(caller.uid), 0) >= quota.open_bytes and bounded(caller):
            words = f"the files you have open hold {quota.open_bytes} bytes or more"
            raise OverQuota(words, "close some of them")

    def check_time(self, caller: Caller, quota: Quota) -> None:
        """Check that the caller's writes have not taken too much of the processor. Raises Busy."""
        most = quota.writing_ms_per_minute
        if most >= UNBOUNDED or not bounded(caller):
            return
        with self._lock:
            left = self._time.left(owner(caller.uid), most, time.monotonic())
        if left <= 0:
            wait_s = math.ceil((1 - left) * 60 / most)
            words = f"refused and large writes of yours took {most * BURST_S / 60:.0f} ms of the processor"
            raise Busy(words, f"try again in {wait_s} s")

    def enter(self, uid: int) -> None:
        """Count one more thread of the daemon that serves this user. `leave` must follow. Each call takes a
        thread until it is answered, and so does the call that would end a wait: so one person gets half of
        the threads that others leave. Raises Busy.
        """
        person = owner(uid)
        with self._lock:
            mine = self._threads.get(person, 0)
            if mine >= CROWD and uid not in (0, identity.uid()):
                left = self._threads_most - (self._all_threads - mine)
                if mine >= left // 2:
                    raise Busy(f"{mine} threads of yours wait in this mount", "use poll(2) instead")
            self._threads[person] = mine + 1
            self._all_threads += 1

    def leave(self, uid: int) -> None:
        with self._lock:
            add(self._threads, owner(uid), -1)
            self._all_threads -= 1

    @contextmanager
    def timed(self, file: Counted) -> Iterator[None]:
        """Count the time of what the thread does within, for the user of the open file. What is refused costs
        also the time of the writes before, which brought the rest of it."""
        began, refused = time.thread_time(), False
        try:
            yield
        except AiosError:
            refused = True
            raise
        finally:
            took_s = time.thread_time() - began
            free_s = 0.0 if refused else min(took_s, FREE_S)
            charged_s = took_s - free_s + (file.free_s if refused else 0.0)
            file.free_s = 0.0 if refused else min(file.free_s + free_s, BEFORE_S)
            if charged_s > 0:
                with self._lock:
                    self._time.spend(owner(file.opening.caller.uid), charged_s * 1000)

    def opened(self, file: Counted) -> None:
        with self._lock:
            add(self._files, owner(file.opening.caller.uid), 1)
        self.changed(file)

    def changed(self, file: Counted) -> None:
        """Count the handle's bytes again. Call this after each call that may change them."""
        if file.handle.held != file.held:
            with self._lock:
                change = file.handle.held - file.held
                file.held += change
                add(self._bytes, owner(file.opening.caller.uid), change)

    def closed(self, file: Counted) -> None:
        with self._lock:
            add(self._files, owner(file.opening.caller.uid), -1)
            add(self._bytes, owner(file.opening.caller.uid), -file.held)

    def pause_s(self, uid: int) -> float:
        """Return for how many seconds a waiting thread of that user must not be woken."""
        threads = self._threads.get(owner(uid), 0)
        return threads * PAUSE_S if threads > CROWD else 0.0


def bounded(caller: Caller) -> bool:
    return caller.uid not in (0, identity.uid())

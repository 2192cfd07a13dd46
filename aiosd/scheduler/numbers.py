"""The numbers of requests: no number is given twice, not even after kill -9. Any thread may take one.

A reader knows an answer by its number, and the audit log a call. So numbers are reserved in the store, a
block at a time, before the first of the block is given.
"""

from __future__ import annotations

import threading

from aiosd.database.store import Store

BLOCK = 1000


class Numbers:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._next = self._end = 0

    def take(self) -> int:
        """Raises StoreFull, StoreFailed."""
        with self._lock:
            if self._next == self._end:
                self._next = self._store.reserve_numbers(BLOCK)
                self._end = self._next + BLOCK
            self._next += 1
            return self._next - 1

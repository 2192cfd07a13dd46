"""Callbacks that are told of every change of something. Any thread may watch, stop, or tell."""

from __future__ import annotations

import threading
from collections.abc import Callable

Unwatch = Callable[[], None]


class Watchers:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] = []

    def add(self, callback: Callable[[], None]) -> Unwatch:
        """`callback` runs at every change, on the thread that makes it; the result stops that."""
        with self._lock:
            self._callbacks.append(callback)

        def unwatch() -> None:
            with self._lock:
                if callback in self._callbacks:
                    self._callbacks.remove(callback)

        return unwatch

    def __len__(self) -> int:
        return len(self._callbacks)

    def notify(self) -> None:
        """Never with a lock held that a callback may take."""
        for callback in list(self._callbacks):
            callback()

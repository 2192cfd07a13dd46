"""One thread that does what it is ordered: now, later, or when a file has something to say.

Any thread may order; what is ordered runs one after the other, and an error in it is logged and is nobody
else's.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable

log = logging.getLogger(__name__)

STOP_S = 10.0  # that it has to end; the daemon ends in any case


class EventLoop:
    def __init__(self, name: str) -> None:
        self._orders: deque[Callable[[], None]] = deque()
        self._selector = selectors.DefaultSelector()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector.register(self._wake, selectors.EVENT_READ, lambda: os.eventfd_read(self._wake))
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self.order(lambda: setattr(self, "_stopping", True))
        if self._thread.ident is not None:
            self._thread.join(STOP_S)

    def order(self, order: Callable[[], None]) -> None:
        """Runs it on this thread, soon, after what was ordered before."""
        self._orders.append(order)
        os.eventfd_write(self._wake, 1)

    def later(self, after_s: float, order: Callable[[], None]) -> None:
        """Runs it on this thread, then."""
        timer = time.monotonic() + after_s, next(self._numbers), order
        self.order(lambda: heapq.heappush(self._timers, timer))

    def _run(self) -> None:
        while not self._stopping:
            for key, _ in self._selector.select(self._patience_s()):
                self._try(key.data)
            while self._orders and not self._stopping:
                self._try(self._orders.popleft())
            now = time.monotonic()
            while self._timers and self._timers[0][0] <= now:
                self._try(heapq.heappop(self._timers)[2])
            self._tick(now)
        self._finish()

    def _patience_s(self) -> float | None:
        return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None

    def _tick(self, now: float) -> None:
        """After each turn."""

    def _finish(self) -> None:
        """At the end of the thread."""

    @staticmethod
    def _try(act: Callable[[], object]) -> None:
        try:
            act()
        except Exception:  # the broad handler of this thread
            log.exception("an order")

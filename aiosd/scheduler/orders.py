"""Orders to workers and tools: made with the scheduler's lock held, sent without it, in the order they were
made.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable


class Orders:
    def __init__(self) -> None:
        self._orders: deque[Callable[[], None]] = deque()
        self._sending = threading.Lock()
        self._since_s: float | None = None  # when the order that is being sent was begun

    def add(self, order: Callable[[], None]) -> None:
        """Queue an order. `send` has to follow, without the lock."""
        self._orders.append(order)

    def send(self) -> None:
        """Send all orders. A thread that finds another one sending leaves its orders to that thread."""
        while self._orders and self._sending.acquire(blocking=False):
            try:
                while self._orders:
                    self._since_s = time.monotonic()
                    self._orders.popleft()()
            finally:
                self._since_s = None
                self._sending.release()

    def stuck(self, patience_s: float) -> bool:
        """Whether one order has been on its way for longer than that."""
        since_s = self._since_s
        return since_s is not None and time.monotonic() - since_s > patience_s

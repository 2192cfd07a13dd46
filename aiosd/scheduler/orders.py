"""Orders to workers and tools. They are added with the scheduler's lock held, and sent without it in the same
order.
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
        self._since_s: float | None = None  # when sending the present order began

    def add(self, order: Callable[[], None]) -> None:
        """Queue an order. The caller calls `send` next, without the lock."""
        self._orders.append(order)

    def send(self) -> None:
        """Send all orders. If another thread sends already, leave them to that thread."""
        while self._orders and self._sending.acquire(blocking=False):
            try:
                while self._orders:
                    self._since_s = time.monotonic()
                    self._orders.popleft()()
            finally:
                self._since_s = None
                self._sending.release()

    def stuck(self, patience_s: float) -> bool:
        """Whether sending one order takes longer than that already."""
        since_s = self._since_s
        return since_s is not None and time.monotonic() - since_s > patience_s

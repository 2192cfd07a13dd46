"""A limit on how often something happens: `burst` times at once, and more only at a steady rate."""

from __future__ import annotations

import time


class Pace:
    """Used by one thread."""

    def __init__(self, per_s: float, burst: int) -> None:
        self._per_s, self._burst = per_s, burst
        self._left, self._at_s = float(burst), time.monotonic()

    def wait(self) -> None:
        now = time.monotonic()
        self._left = min(self._burst, self._left + (now - self._at_s) * self._per_s) - 1
        self._at_s = now
        if self._left < 0:
            time.sleep(-self._left / self._per_s)

"""Estimate when a waiting request starts, from the policy's present order and the pace of the last starts.

The caller holds the scheduler's lock.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable

from aiosd.policies import Job

HOLDS_S = 0.5  # how long an order is reused: ranking a long queue takes milliseconds


class Forecast:
    def __init__(self) -> None:
        self._starts: deque[float] = deque(maxlen=64)  # when requests last started
        self._ahead: dict[int, int] = {}
        self._until_s = 0.0

    def started(self) -> None:
        self._starts.append(time.monotonic())

    def position(self, id: int, orders: Callable[[], Iterable[list[Job]]]) -> tuple[int, float] | None:
        """Return how many requests start before this one, and in how many seconds it may start.

        `orders` gives all waiting jobs of each queue, best first.
        """
        now = time.monotonic()
        if now > self._until_s:
            self._until_s = now + HOLDS_S
            self._ahead = {job.id: n for order in orders() for n, job in enumerate(order)}
        ahead = self._ahead.get(id)
        if ahead is None:
            return None
        pace_s = (now - self._starts[0]) / len(self._starts) if self._starts else 0.0
        return ahead, (ahead + 1) * pace_s

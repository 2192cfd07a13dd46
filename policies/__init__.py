"""Decisions, one small pure file each: who is next, who yields.

A policy sees immutable views and answers with ids. No clock, no I/O, no log: the same views give the same
answer. The mechanism (aiosd.scheduler) checks every answer and falls back to FIFO on a bad one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Job:
    """One request as a policy sees it. Times are seconds on one monotonic clock."""

    id: int  # grows with arrival
    uid: int
    agent: str
    nice: int
    queued_s: float  # when it began to wait this time
    served_tokens: int  # generated since it arrived
    slice_tokens: int  # generated since it was last put on a worker
    deadline_s: float | None


class Policy(Protocol):
    def pick(self, waiting: Sequence[Job], running: Sequence[Job], now: float) -> int | None:
        """The job to start next on a free place; None only when nobody waits."""

    def preempt(
        self, waiting: Sequence[Job], running: Sequence[Job], quantum_tokens: int, now: float
    ) -> int | None:
        """The running job that yields its place to a waiting one; None: nobody. Asked when all is taken."""


@dataclass(frozen=True, slots=True)
class Functions:
    """A policy made of two plain functions."""

    pick: Callable[[Sequence[Job], Sequence[Job], float], int | None]
    preempt: Callable[[Sequence[Job], Sequence[Job], int, float], int | None]

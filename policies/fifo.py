"""First in, first out; nobody yields. The fallback of every other policy."""

from __future__ import annotations

from collections.abc import Sequence

from aiosd.policies import Job


def pick(waiting: Sequence[Job], running: Sequence[Job], now: float) -> int | None:
    return min((job.id for job in waiting), default=None)


def preempt(waiting: Sequence[Job], running: Sequence[Job], quantum_tokens: int, now: float) -> int | None:
    return None

"""Round robin: who waits longest is next; who used up its quantum of tokens yields to a waiting one."""

from __future__ import annotations

from collections.abc import Sequence

from aiosd.policies import Job


def pick(waiting: Sequence[Job], running: Sequence[Job], now: float) -> int | None:
    longest = min(waiting, key=lambda job: (job.queued_s, job.id), default=None)
    return longest.id if longest else None


def preempt(waiting: Sequence[Job], running: Sequence[Job], quantum_tokens: int, now: float) -> int | None:
    spent = [job for job in running if job.slice_tokens >= quantum_tokens]
    most = max(spent, key=lambda job: (job.slice_tokens, -job.id), default=None)
    return most.id if most and waiting else None

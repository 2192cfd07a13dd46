"""The lowest nice first. Every AGEING_S seconds of waiting lower nice by one, so that no job starves."""

from __future__ import annotations

from aiosd.policies import Job, View

AGEING_S = 5.0


def rank(view: View, job: Job) -> tuple[float, int]:
    return job.nice - (view.now - job.queued_s) / AGEING_S, job.id


def preempt(view: View) -> int | None:
    """A job with a lower nice takes a place at once. A job that only aged waits for the end of a quantum."""
    best = min(view.waiting, key=lambda job: rank(view, job), default=None)
    worst = max(view.running, key=lambda job: (job.nice, job.slice_tokens), default=None)
    if best is None or worst is None:
        return None
    aged = worst.slice_tokens >= view.quantum_tokens and rank(view, best)[0] < worst.nice
    return worst.id if best.nice < worst.nice or aged else None

"""The lowest nice first. Waiting makes nicer: a level every AGEING_S seconds, so that nobody starves."""

from __future__ import annotations

from aiosd.policies import Job, View

AGEING_S = 5.0


def rank(job: Job, now: float) -> tuple[float, int]:
    return job.nice - (now - job.queued_s) / AGEING_S, job.id


def pick(view: View) -> int | None:
    best = min(view.waiting, key=lambda job: rank(job, view.now), default=None)
    return best.id if best else None


def preempt(view: View) -> int | None:
    """A better one takes a place at once; one that only aged waits for the end of a quantum."""
    best = min(view.waiting, key=lambda job: rank(job, view.now), default=None)
    worst = max(view.running, key=lambda job: (job.nice, job.slice_tokens), default=None)
    if best is None or worst is None:
        return None
    aged = worst.slice_tokens >= view.quantum_tokens and rank(best, view.now)[0] < worst.nice
    return worst.id if best.nice < worst.nice or aged else None

"""Round robin: the longest waiting job is next. A job that used its quantum of tokens yields to a waiting
one.
"""

from __future__ import annotations

from aiosd.policies import Job, View


def rank(view: View, job: Job) -> tuple[float, int]:
    return job.queued_s, job.id


def preempt(view: View) -> int | None:
    spent = [job for job in view.running if job.slice_tokens >= view.quantum_tokens]
    most = max(spent, key=lambda job: (job.slice_tokens, -job.id), default=None)
    return most.id if most and view.waiting else None

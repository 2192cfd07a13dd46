"""Earliest deadline first. Jobs that have no deadline, or missed it, come last."""

from __future__ import annotations

import math

from aiosd.policies import Job, View


def rank(view: View, job: Job) -> tuple[float, int]:
    reachable = job.deadline_s is not None and job.deadline_s >= view.now
    return job.deadline_s if reachable and job.deadline_s is not None else math.inf, job.id


def preempt(view: View) -> int | None:
    best = min(view.waiting, key=lambda job: rank(view, job), default=None)
    last = max(view.running, key=lambda job: rank(view, job), default=None)
    if best is None or last is None:
        return None
    return last.id if rank(view, best)[0] < rank(view, last)[0] else None

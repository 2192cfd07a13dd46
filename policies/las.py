"""Least attained service of the whole agent run (Autellix's PLAS, arXiv 2502.13965).

The tokens of an agent's run put it on a level, and a lower level goes first. So a short run does not wait
behind a long run, even if the long run makes many short requests. Each level is twice as long as the one
before, so runs of similar length do not preempt each other for ever. A waiting job moves one level down every
AGEING_S seconds.
"""

from __future__ import annotations

import math

from aiosd.policies import Job, View

AGEING_S = 10.0


def level(view: View, job: Job) -> float:
    attained = view.agents.get((job.uid, job.agent), 0.0)
    return float(math.floor(math.log2(1 + attained / view.quantum_tokens)))


def rank(view: View, job: Job) -> tuple[float, int]:
    return level(view, job) - math.floor((view.now - job.queued_s) / AGEING_S), job.id


def preempt(view: View) -> int | None:
    best = min(view.waiting, key=lambda job: rank(view, job), default=None)
    spent = [job for job in view.running if job.slice_tokens >= view.quantum_tokens]
    worst = max(spent, key=lambda job: (level(view, job), job.id), default=None)
    if best is None or worst is None:
        return None
    return worst.id if rank(view, best)[0] < level(view, worst) else None

"""Fair shares between users by virtual token counters (VTC, OSDI 2024); within a user, las.

The user with the least service is next. Service counts input and output tokens, weighted by nice
(aiosd.scheduler.ledger). A user who was idle starts again at the others' lowest level, so he cannot save up.
"""

from __future__ import annotations

from aiosd.policies import Job, View, las


def rank(view: View, job: Job) -> tuple[float, float, int]:
    return view.users.get(job.uid, 0.0), *las.rank(view, job)


def preempt(view: View) -> int | None:
    """Between users, a job yields to a user with less service after its quantum, or at once if the gap
    exceeds a quantum. Within one user, las decides.
    """
    best = min(view.waiting, key=lambda job: rank(view, job), default=None)
    if best is None:
        return None
    got = view.users.get(best.uid, 0.0)

    def yields(job: Job) -> bool:
        gap = view.users.get(job.uid, 0.0) - got
        return job.slice_tokens >= view.quantum_tokens or (job.uid != best.uid and gap > view.quantum_tokens)

    worst = max(filter(yields, view.running), key=lambda job: rank(view, job), default=None)
    if worst is None:
        return None
    if best.uid != worst.uid:
        return worst.id if got < view.users.get(worst.uid, 0.0) else None
    return worst.id if las.rank(view, best)[0] < las.level(view, worst) else None

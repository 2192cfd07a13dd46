"""Scheduling policies, one small pure file each: which request runs next, and which one yields.

A policy sees an immutable View and returns a rank or an id. It has no clock, I/O or log, so the same view
gives the same answer. aiosd.scheduler.chooser checks every answer and uses FIFO in place of a faulty policy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aiosd.policies.residence import Full, leave


@dataclass(frozen=True, slots=True)
class Job:
    """One request as a policy sees it. Times are seconds on the clock of View.now."""

    id: int  # grows with arrival
    uid: int  # of a lent uid (subuid(5)), that of the user to whom it is lent
    agent: str
    nice: int
    queued_s: float  # when its current wait began
    served_tokens: int  # tokens generated since it arrived
    slice_tokens: int  # tokens generated since it was last put on a worker
    deadline_s: float | None


@dataclass(frozen=True, slots=True)
class View:
    """All that a decision may depend on.

    `waiting` holds only the best and the newest jobs of a very long queue. `running` holds the jobs in the
    places to be decided about.
    """

    waiting: Sequence[Job]
    running: Sequence[Job]
    now: float
    quantum_tokens: int
    users: Mapping[
        int, float
    ]  # service by uid: weighted tokens, or seconds of tools (aiosd.scheduler.ledger)
    agents: Mapping[tuple[int, str], float]  # service of each agent's run, in tokens


@dataclass(frozen=True, slots=True)
class Policy:
    """`rank`: any comparable value; the waiting job with the least rank starts next. `preempt`: the id of the
    running job that yields to a waiting one, or None. It is asked only when all places are taken. `leave`:
    the models that leave a full device for the model that is wanted there."""

    rank: Callable[[View, Job], Any]
    preempt: Callable[[View], int | None]
    leave: Callable[[Full], Sequence[str]] = leave

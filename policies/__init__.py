"""Policies, one small pure file each: which request is next, which yields.

A policy sees an immutable View and answers with a rank or an id. No clock, no I/O, no log: the same view
gives the same answer. The mechanism (aiosd.scheduler.chooser) checks every answer, and uses FIFO after a bad
one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Job:
    """One request as a policy sees it. Times are seconds on the clock of View.now."""

    id: int  # grows with arrival
    uid: int
    agent: str
    nice: int
    queued_s: float  # when its present wait began
    served_tokens: int  # generated since it arrived
    slice_tokens: int  # generated since its worker last started it
    deadline_s: float | None


@dataclass(frozen=True, slots=True)
class View:
    """Everything that a decision may depend on. `waiting`: of a very long queue, the best and the newest
    jobs.

    `running`: the jobs of the same model or tool.
    """

    waiting: Sequence[Job]
    running: Sequence[Job]
    now: float
    quantum_tokens: int
    users: Mapping[int, float]  # service by uid, in weighted tokens (aiosd.scheduler.ledger)
    agents: Mapping[tuple[int, str], float]  # service of each agent's run, in tokens


@dataclass(frozen=True, slots=True)
class Policy:
    """`rank` returns anything comparable; the waiting job with the lowest rank starts next.

    `preempt` returns the id of a running job that yields its place to a waiting one, or None. It is asked
    only when all places are taken.
    """

    rank: Callable[[View, Job], Any]
    preempt: Callable[[View], int | None]

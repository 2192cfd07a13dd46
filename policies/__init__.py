"""Decisions, one small pure file each: who is next, who yields.

A policy sees an immutable View and answers with a rank or an id. No clock, no I/O, no log: the same view
gives the same answer. The mechanism (aiosd.scheduler.chooser) checks every answer and falls back to FIFO on a
bad one.
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
    queued_s: float  # when it began to wait this time
    served_tokens: int  # generated since it arrived
    slice_tokens: int  # generated since it was last put on a worker
    deadline_s: float | None


@dataclass(frozen=True, slots=True)
class View:
    """All that a decision may depend on. `waiting`: of very many, the best and the newest.

    `running` are those on the places that are asked about.
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
    """`rank`: anything that can be compared; the least of those that wait starts next. `preempt`: the running
    job that yields its place to a waiting one, or None; asked only when all places are taken."""

    rank: Callable[[View, Job], Any]
    preempt: Callable[[View], int | None]

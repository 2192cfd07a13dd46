"""Where a job runs: the worker that holds its KV if that has room, else the least loaded one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Seat:
    """One worker with a free place."""

    worker: int
    running: int


def place(seats: Sequence[Seat], last_worker: int | None) -> int | None:
    if any(seat.worker == last_worker for seat in seats):
        return last_worker
    best = min(seats, key=lambda seat: (seat.running, seat.worker), default=None)
    return best.worker if best else None

"""What leaves a memory that is full: the least recently used, pinned ones only when nothing else is left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kept:
    """One thing that is kept. `used` grows with every use of anything in the same memory."""

    id: int
    bytes: int
    used: float
    pinned: bool = False


def victim(kept: Sequence[Kept]) -> int | None:
    """The id of the next to go; None only when nothing is kept."""
    last = min(kept, key=lambda one: (one.pinned, one.used, one.id), default=None)
    return last.id if last else None

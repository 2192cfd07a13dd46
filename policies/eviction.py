"""Choose what leaves a full memory: the least recently used; a pinned one only if nothing else is left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kept:
    """One kept item. `used` is the count of all uses in the same memory at its last use."""

    id: int
    bytes: int
    used: float
    pinned: bool = False


def victim(kept: Sequence[Kept]) -> int | None:
    """Return the id of the item that leaves next; None: nothing is kept."""
    last = min(kept, key=lambda one: (one.pinned, one.used, one.id), default=None)
    return last.id if last else None

"""Choose what leaves a full memory: the least recently used item, and pinned items only when no other is
left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kept:
    """One item in the memory. `used` is higher, the later its last use."""

    id: int
    bytes: int
    used: float
    pinned: bool = False


def victim(kept: Sequence[Kept]) -> int | None:
    """Return the id of the item that leaves. None only when `kept` is empty."""
    last = min(kept, key=lambda one: (one.pinned, one.used, one.id), default=None)
    return last.id if last else None

"""Choose which loaded models leave for one that has no room.

Idle models leave first, the longest idle before the others. A busy model leaves after a turn, so that the
models take turns. A model of a user's own does not displace a busy model of the administrator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

STAY_S = 2.0  # a model stays at least this long, and
STAY_LOADS = 4.0  # as many times longer than its load took: so loading takes a fifth of the time at most
TURN_S = 30.0  # how long a busy model stays at least
WAIT_S = 5.0  # how long a model waits at least before a busy one leaves for it
MANNERS_S = 60.0  # how long the administrator's model must be idle to leave for a user's own


@dataclass(frozen=True, slots=True)
class Resident:
    """A loaded model."""

    model: str
    bytes: int
    rank: int  # 1: the administrator's; 0: a user's own
    pinned: bool  # keep_alive is "always"
    requests: int  # that run or wait
    idle_s: float  # since its last request ended
    served_s: float  # since it was ready
    load_s: float  # how long its load took


@dataclass(frozen=True, slots=True)
class Full:
    """A device without room for the model that is wanted."""

    model: str
    bytes: int  # that the model takes
    free_bytes: int
    rank: int
    waited_s: float
    residents: Sequence[Resident]


def leave(full: Full) -> list[str]:
    """Return the models that leave. Empty: nobody, the model waits."""
    going: list[Resident] = []
    for one in sorted(filter(lambda one: may_leave(full, one), full.residents), key=order):
        if room(full, going):
            break
        going.append(one)
    if not room(full, going):
        return []
    for one in list(going):  # a later, larger one may make it unnecessary
        if room(full, [other for other in going if other is not one]):
            going.remove(one)
    return [one.model for one in going]


def room(full: Full, going: Sequence[Resident]) -> bool:
    return full.free_bytes + sum(one.bytes for one in going) >= full.bytes


def may_leave(full: Full, one: Resident) -> bool:
    if one.pinned or one.served_s < max(STAY_S, STAY_LOADS * one.load_s):
        return False
    if one.rank > full.rank:
        return not one.requests and one.idle_s >= MANNERS_S
    if not one.requests or one.rank < full.rank:
        return True
    return full.waited_s >= WAIT_S and one.served_s >= max(TURN_S, 2 * STAY_LOADS * one.load_s)


def order(one: Resident) -> tuple[bool, int, float, str]:
    return bool(one.requests), one.rank, -(one.served_s if one.requests else one.idle_s), one.model

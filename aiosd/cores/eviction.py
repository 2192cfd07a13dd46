"""Ask the eviction policy which KV leaves a full memory, and check its answer."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from aiosd.policies import eviction
from aiosd.policies.eviction import Kept

log = logging.getLogger(__name__)


def victim(kept: Sequence[Kept]) -> int:
    """Return the id of the KV that leaves. `kept` is not empty. For an unknown id, take the oldest
    instead.
    """
    id = eviction.victim(kept)
    if all(one.id != id for one in kept):
        log.error("eviction chose %r, which is not kept; the oldest goes", id)
        id = min(one.id for one in kept)
    assert id is not None
    return id

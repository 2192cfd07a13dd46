"""Asks the policy in force and checks its answer; a bad one, or one that raises, is answered by FIFO.

A policy can therefore be wrong but never lose a request. Called with the scheduler's lock held.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from aiosd.errors import BadValue
from aiosd.policies import Policy, View, edf, eviction, fair, fifo, las, priority, rr
from aiosd.policies.eviction import Kept

log = logging.getLogger(__name__)

POLICIES: dict[str, Policy] = {
    "fifo": Policy(fifo.pick, fifo.preempt),
    "rr": Policy(rr.pick, rr.preempt),
    "priority": Policy(priority.pick, priority.preempt),
    "fair": Policy(fair.pick, fair.preempt),
    "las": Policy(las.pick, las.preempt),
    "edf": Policy(edf.pick, edf.preempt),
}


class Chooser:
    def __init__(self, name: str) -> None:
        self.name = ""
        self.switch(name)

    def switch(self, name: str) -> None:
        if name not in POLICIES:
            raise BadValue(f"no policy {name[:40]!r}", f"policies are {', '.join(POLICIES)}")
        if name != self.name:
            log.info("scheduling policy is %s", name)
        self.name = name
        self._warned = False

    def pick(self, view: View) -> int:
        """The id of one that waits; there is one."""
        try:
            id = POLICIES[self.name].pick(view)
        except Exception as error:  # noqa: BLE001 - a policy is foreign code: the queue goes on
            self._warn(repr(error))
            id = fifo.pick(view)
        if all(job.id != id for job in view.waiting):
            self._warn(f"picked {id!r}, which does not wait")
            id = fifo.pick(view)
        assert id is not None
        return id

    def preempt(self, view: View) -> int | None:
        try:
            id = POLICIES[self.name].preempt(view)
        except Exception as error:  # noqa: BLE001 - as above
            self._warn(repr(error))
            return fifo.preempt(view)
        if id is not None and all(job.id != id for job in view.running):
            self._warn(f"preempts {id!r}, which does not run")
            return fifo.preempt(view)
        return id

    def _warn(self, why: str) -> None:
        if not self._warned:
            log.error("policy %s: %s; fifo decides instead", self.name, why)
        self._warned = True


def victim(kept: Sequence[Kept]) -> int:
    """What leaves a full memory; something is kept."""
    id = eviction.victim(kept)
    if all(one.id != id for one in kept):
        log.error("eviction chose %r, which is not kept; the oldest goes", id)
        id = min(one.id for one in kept)
    assert id is not None
    return id

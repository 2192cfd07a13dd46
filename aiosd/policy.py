"""Asks the policy in force and checks its answer; a bad one, or one that raises, is answered by FIFO.

A policy can therefore be wrong but never lose a request. Called with the scheduler's lock held.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

from aiosd.errors import BadValue
from aiosd.policies import Functions, Job, Policy, fifo, rr

log = logging.getLogger(__name__)

POLICIES: dict[str, Policy] = {
    "fifo": Functions(fifo.pick, fifo.preempt),
    "rr": Functions(rr.pick, rr.preempt),
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

    def pick(self, ready: Mapping[int, Job], running: Sequence[Job]) -> int:
        """The id of one of `ready`, which is not empty."""
        try:
            id = POLICIES[self.name].pick(tuple(ready.values()), running, time.monotonic())
        except Exception as error:  # noqa: BLE001 - a policy is foreign code: the queue goes on
            self._warn(repr(error))
            return min(ready)
        if id is None or id not in ready:
            self._warn(f"picked {id!r}, which does not wait")
            return min(ready)
        return id

    def preempt(self, ready: Mapping[int, Job], running: Sequence[Job], quantum_tokens: int) -> int | None:
        try:
            id = POLICIES[self.name].preempt(tuple(ready.values()), running, quantum_tokens, time.monotonic())
        except Exception as error:  # noqa: BLE001 - as above
            self._warn(repr(error))
            return None
        if id is not None and all(job.id != id for job in running):
            self._warn(f"preempts {id!r}, which does not run")
            return None
        return id

    def _warn(self, why: str) -> None:
        if not self._warned:
            log.error("policy %s: %s; fifo decides instead", self.name, why)
        self._warned = True

"""Ask the policy in force and check its answer. If the answer is bad or the policy raises, FIFO decides.

A wrong policy can therefore not lose a request. Administrators may add policies as Python files. The caller
holds the scheduler's lock.
"""

from __future__ import annotations

import heapq
import logging
import os
from collections.abc import Collection
from pathlib import Path

from aiosd.errors import BadValue, ConfigError, in_words
from aiosd.host.administered import listed, unreadable
from aiosd.host.ownership import check_owner
from aiosd.policies import Job, Policy, View, edf, fair, fifo, las, priority, residence, rr
from aiosd.policies.residence import Full

log = logging.getLogger(__name__)
HINT = "aios-policy(7) says how to write one"

BUILT_IN = {
    name: Policy(module.rank, module.preempt)
    for name, module in {
        "fifo": fifo, "rr": rr, "priority": priority, "fair": fair, "las": las, "edf": edf,
    }.items()
}  # fmt: skip


class Chooser:
    def __init__(self, name: str, folder: Path) -> None:
        self.policies, self.name = BUILT_IN, ""
        self.load(folder)
        self.switch(name)

    def load(self, folder: Path) -> None:
        """Read the folder's policies. If the policy in force is gone or bad now, FIFO replaces it."""
        self.take(read_all(folder))

    def take(self, own: dict[str, Policy]) -> None:
        self.policies = BUILT_IN | own
        if self.name and self.name not in self.policies:
            log.error("policy %s is gone; fifo decides instead", self.name)
            self.switch("fifo")

    def switch(self, name: str) -> None:
        self.check(name)
        if name != self.name:
            log.info("scheduling policy is %s", name)
        self.name = name
        self._warned = False

    def check(self, name: str) -> None:
        check(name, self.policies)

    def order(self, view: View, count: int) -> list[Job]:
        """Return the `count` waiting jobs that start next, best first."""
        rank = self.policies[self.name].rank
        try:
            return heapq.nsmallest(count, view.waiting, key=lambda job: rank(view, job))
        except Exception as error:  # noqa: BLE001 - a policy is foreign code; the queue must go on
            self._warn(in_words(error))
            return heapq.nsmallest(count, view.waiting, key=lambda job: fifo.rank(view, job))

    def preempt(self, view: View) -> int | None:
        try:
            id = self.policies[self.name].preempt(view)
        except Exception as error:  # noqa: BLE001 - as above
            self._warn(in_words(error))
            return fifo.preempt(view)
        if id is not None and all(job.id != id for job in view.running):
            self._warn(f"preempts {id!r}, which does not run")
            return fifo.preempt(view)
        return id

    def leave(self, full: Full) -> list[str]:
        """Return the models that leave for another one. Empty: it waits."""
        try:
            going = [str(name) for name in self.policies[self.name].leave(full)]
        except Exception as error:  # noqa: BLE001 - as above
            self._warn(in_words(error))
            return residence.leave(full)
        there = {one.model: one for one in full.residents if not one.pinned}
        if wrong := next((name for name in going if name not in there), None):
            self._warn(f"lets model {wrong!r} leave, which may not")
            return residence.leave(full)
        enough = full.free_bytes + sum(there[name].bytes for name in set(going)) >= full.bytes
        return going if enough else []

    def _warn(self, why: str) -> None:
        if not self._warned:
            log.error("policy %s: %s; fifo decides instead", self.name, why)
        self._warned = True


def check(name: str, policies: Collection[str]) -> None:
    if name not in policies:
        raise BadValue(f"no policy {name[:40]!r}", f"policies are {', '.join(policies)}")


def judge(name: str, folder: Path) -> dict[str, Policy]:
    """Read administrators' policies for a reload that puts policy `name` in force. Raises BadValue,
    ConfigError.
    """
    own = read_all(folder, strict=True)
    check(name, [*BUILT_IN, *own])
    return own


def read_all(folder: Path, strict: bool = False) -> dict[str, Policy]:
    """Read administrators' policies. Log and skip an unusable one; with `strict`, raise ConfigError
    instead.
    """
    found: dict[str, Policy] = {}
    try:
        files = listed(folder, "*.py")
    except ConfigError as error:
        if strict:
            raise
        log.error("no policy of the administrator is used: %s", error.explanation)
        return found
    for file in files:
        try:
            if file.stem in BUILT_IN:
                raise ValueError("a built-in policy has this name")
            found[file.stem] = read_one(file)
        except Exception as error:  # noqa: BLE001 - foreign code: whatever it raises, the daemon starts
            why = (
                error
                if isinstance(error, ConfigError)
                else ConfigError(f"policy {file}: {in_words(error)}", HINT)
            )
            if strict:
                raise why from None
            log.error("not used: %s", why.explanation)
    return found


def read_one(file: Path) -> Policy:
    """Load one policy. It runs in the daemon, so only root or the daemon's user may write file and folder."""
    check_owner(file.parent, os.stat(file.parent))
    try:
        with file.open("rb") as opened:
            check_owner(file, os.fstat(opened.fileno()))
            code = compile(opened.read(), str(file), "exec")
    except PermissionError as error:
        raise unreadable(file, error) from None
    made: dict[str, object] = {"__name__": f"aiosd_policy_{file.stem}"}
    exec(code, made)
    rank, preempt = made.get("rank"), made.get("preempt")
    if not callable(rank) or not callable(preempt):
        raise ValueError("it must define rank(view, job) and preempt(view)")
    leave = made.get("leave", residence.leave)
    if not callable(leave):
        raise ValueError("leave must be a function: leave(full)")
    return Policy(rank, preempt, leave)

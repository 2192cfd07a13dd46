"""The steps of making and ending that all kinds of objects share: owner, quota, events."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from aiosd.access.caller import Caller
from aiosd.access.permissions import Permissions
from aiosd.errors import Exists, OverQuota
from aiosd.events import ROOTS, Events
from aiosd.host import identity
from aiosd.scheduler.ending import Ending
from aiosd.scheduler.limits import Limits
from aiosd.scheduler.scheduler import Scheduler
from aiosd.syscall.request import Request

Made = TypeVar("Made")


class Making:
    def __init__(
        self,
        permissions: Permissions,
        events: Events,
        limits: Limits,
        scheduler: Scheduler,
        ending: Ending,
    ) -> None:
        self.permissions, self.events, self.limits = permissions, events, limits
        self._scheduler, self._ending = scheduler, ending
        self.lock = permissions.making  # held while an object is made or ended, so that each has its owner

    def make(
        self, kind: str, name: str, caller: Caller, mode: int, there: object, add: Callable[[str], Made]
    ) -> Made:
        """Make an agent or a context, with its owner and its event. `there`: the object that has the name
        now, if any.
        """
        path = f"/{kind}s/{name}"
        with self.lock:
            self.check_new(there, path, caller)
            self.events.forget(path)
            with self.permissions.made(path, caller, mode):
                made = add(name)
            self.events.emit(kind, path, caller.uid, **{kind: name}, state="made")
        return made

    def check_new(self, there: object, path: str, caller: Caller) -> None:
        """Check that the name is free and the user's quota allows one more. Raises Exists, OverQuota."""
        folder, name = path.rsplit("/", 1)
        if there:
            raise Exists(f"{name} exists")
        kind = folder.strip("/")
        most: int = getattr(self.limits.quotas.of(caller.with_groups()), kind)
        if self.permissions.count(folder, caller.uid) >= most:
            raise OverQuota(f"your quota of {most} {kind} is used up", f"rmdir some of your {kind}")

    def emit_removed(self, kind: str, path: str, **facts: object) -> None:
        last = self.permissions.get(path) or ROOTS
        self.events.emit(kind, path, last.uid, **facts, state="removed")
        self.events.forget(path, last)

    def used(self, target: str) -> bool:
        """Whether an unfinished request has this model or tool as its target."""
        return any(request.spec.target == target for request in self._scheduler.unfinished())

    def cancel(self, belongs: Callable[[Request], bool], why: str) -> None:
        """Cancel the unfinished requests that belong to an object."""
        for request in self._scheduler.unfinished():
            if belongs(request):
                self._ending.cancel(request, why)


def administers(caller: Caller, admins: int | None) -> bool:
    """Whether the caller has root's rights on the daemon's own objects. `admins`: the group that has."""
    own = caller.uid in (0, identity.uid())
    return own or (admins is not None and admins in caller.with_groups().all_groups)

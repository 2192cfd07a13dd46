"""Contexts: mkdir, rmdir, and the commands of contexts/NAME/ctl."""

from __future__ import annotations

import os

from aiosd.access.caller import Caller
from aiosd.access.permissions import EXECUTE, READ, WRITE, Permission, may
from aiosd.config.config import NAME
from aiosd.context.contexts import Context, Contexts
from aiosd.context.residency import Residency
from aiosd.cores.pool import Pool
from aiosd.errors import BadValue, Busy, Denied
from aiosd.objects.making import Making
from aiosd.scheduler.scheduler import Scheduler

EVICT_S = 5.0
COMMANDS = "fork NEW, truncate N, pin, unpin, evict [host|disk|cold]"


class ContextObjects:
    def __init__(
        self, making: Making, contexts: Contexts, residency: Residency, pool: Pool, scheduler: Scheduler
    ) -> None:
        self._making, self._contexts, self._residency = making, contexts, residency
        self._pool, self._scheduler = pool, scheduler

    # making and ending

    def add(self, name: str, caller: Caller, mode: int = 0o700) -> None:
        self._making.make("context", name, caller, mode, self._contexts.find(name), self._contexts.add)

    def remove(self, name: str) -> None:
        path = f"/contexts/{name}"
        with self._making.lock:
            context = self._contexts.get(name)
            self._contexts.remove(name)  # from here on no request is admitted for it
            self._making.cancel(lambda r: r.spec.turn_of == context.id, "its context was removed")
            self._residency.drop(context)
            self._making.emit_removed("context", path, context=name)
            self._making.permissions.forget(path)

    # commands

    def command(self, context: Context, caller: Caller, verb: str, argument: str) -> None:
        """Obey one line of ctl. `fork` needs r on the context's folder, all other commands w."""
        self._contexts.check(context)
        at = self._making.permissions.get(f"/contexts/{context.name}") or Permission(0, 0, 0o700)
        if not may(caller, at, READ if verb == "fork" else WRITE):
            raise Denied(f"you may not {verb[:40]} context {context.name}", "ask its owner")
        if verb == "fork" and argument:
            self.fork(context, argument, caller)
        elif verb == "truncate" and argument.isdecimal() and len(argument) < 19:
            self._contexts.truncate(context, int(argument))
        elif verb in ("pin", "unpin") and not argument:
            self._contexts.set(context, pinned=verb == "pin")
            self._residency.pin(context)
        elif verb == "evict" and argument in ("", "host", "disk", "cold"):
            self.evict(context, argument or "host")
        else:
            raise BadValue(f"no command {f'{verb} {argument}'.strip()[:40]!r}", COMMANDS)

    def fork(self, context: Context, name: str, caller: Caller) -> None:
        """Make a context with the conversation of another. They share the KV if the caller owns both."""
        if not NAME.fullmatch(name):
            raise BadValue(f"{name[:80]!r} is not a name", "fork NEW; a name is 1 to 64 of A-Z a-z 0-9 . _ -")
        folder = self._making.permissions.get("/contexts")
        if folder and not may(caller, folder, WRITE | EXECUTE):
            raise Denied(
                "you may not make a context in contexts/", "ask an administrator for the group of contexts/"
            )

        def forked(name: str) -> Context:
            self._making.limits.check_disk(self._contexts.size(context))
            return self._contexts.fork(context, name)

        new = self._making.make("context", name, caller, 0o700, self._contexts.find(name), forked)
        if self._contexts.owner(context) == (caller.uid, True) and not context.salt:
            self._residency.fork(context, new)

    def evict(self, context: Context, tier: str) -> None:
        """Move the KV down to a tier, and wait for it. Raises Busy."""
        if self._scheduler.turn(context.id) is not None:
            raise Busy(f"a turn of context {context.name} is running", "try again when it has ended")
        if tier == "cold":
            self._residency.drop(context)
            return
        try:
            saved = self._residency.save(context, self._pool.find(context.worker), evict=True)
            kv = saved.result(EVICT_S)
            if kv is not None:  # a reader of the kv file asked before, without evicting
                os.close(kv)
        except TimeoutError:
            raise Busy(
                f"the worker did not answer within {EVICT_S:g} s", "read the file state later"
            ) from None
        context.worker = None
        if tier == "disk":
            self._residency.swap.sink(context.id)

"""Irreversible acts that wait until a person decides: access/pending/ID.

A call of a tool that is marked irreversible is in the queue like any other, and may not start before it is
allowed. Deciding is for its caller and root; not for the tools that run for him, which do not see access/.
Who says nothing says no. Any thread may ask and decide.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

from aiosd.access import Caller, Permissions
from aiosd.agents import Agent, Agents
from aiosd.errors import BadValue, NotFound, StoreFull
from aiosd.events import Events
from aiosd.request import Request, State
from aiosd.scheduler import Scheduler
from aiosd.tools import QUEUE

DAEMON = Caller(os.geteuid(), os.getegid(), os.getpid())  # the daemon itself


class Pending:
    def __init__(
        self, scheduler: Scheduler, agents: Agents, permissions: Permissions, events: Events
    ) -> None:
        self._scheduler, self._agents, self._permissions, self._events = (
            scheduler, agents, permissions, events,
        )  # fmt: skip
        scheduler.ask, scheduler.decide_by = self.ask, self.decide_by

    def ids(self) -> list[int]:
        return [r.id for r in self._scheduler.unfinished() if r.decide_by_s is not None]

    def find(self, id: int) -> Request | None:
        request = self._scheduler.find(id)
        return request if request and request.decide_by_s is not None and not request.state.final else None

    def decide_by(self, request: Request) -> float | None:
        """Until when a call waits for a decision; None: it needs none."""
        tool = self._scheduler.calls.tools.of(request.spec.model)
        if tool is None or not tool.manifest.irreversible:
            return None
        agent = self._agents.find(request.agent)
        if agent and tool.name in agent.settings.allowed and request.uid == self.owner(agent):
            return None
        return time.time() + self._scheduler.calls.pending_s

    def owner(self, agent: Agent) -> int | None:
        at = self._permissions.get(f"/agents/{agent.name}")
        return at.uid if at else None

    def allow_always(self, caller: Caller, agent: Agent, names: Sequence[str]) -> None:
        """These tools, of calls of its owner's own; of others each call is theirs to decide."""
        for name in names:
            if not self._scheduler.calls.tools.get(name).manifest.irreversible:
                raise BadValue(f"{name} needs no decision", "name irreversible tools")
        allowed = sorted(set(names))
        self._scheduler.calls.audit.granted(agent.name, allowed, caller)
        self._agents.change(agent, allowed=allowed)

    def ask(self, request: Request) -> None:
        """Tells that it waits, and when it has waited long enough."""
        until_s = request.decide_by_s
        if until_s is None:  # somebody was quick to allow it
            return
        self._tell(request, "pending")
        if agent := self._agents.find(request.agent):
            how = f"echo allow > access/pending/{request.id}/decision"
            agent.note(f"{request.spec.model} waits for a decision: {how}", request=request.id)
        self._scheduler.calls.later(until_s - time.time(), partial(self._expire, request.id))

    def _expire(self, id: int) -> None:
        """By id: a request that was decided or cancelled long ago is not to be kept in memory till then."""
        if request := self.find(id):
            self._deny(request, "nobody allowed it in time", DAEMON)

    def decide(self, caller: Caller, id: int, text: str) -> None:
        request = self.find(id)
        if request is None:
            raise NotFound(f"{id} does not wait any more")
        if text == "allow always":
            agent = self._agents.find(request.agent)
            if agent is None or request.uid != self.owner(agent):
                raise BadValue("only the calls of an agent's owner can be allowed always", "allow")
            self.allow_always(
                caller, agent, [*agent.settings.allowed, request.spec.model.removeprefix(QUEUE)]
            )
        if text in ("allow", "allow always"):
            self._scheduler.calls.audit.decided(request, "allowed", caller)
            if self._scheduler.allow(request):
                self._tell(request, "allowed")
        elif text == "deny":
            self._deny(request, f"denied by user {caller.uid}", caller)
        else:
            raise BadValue(f"{text[:40]!r} is no decision", "allow, allow always or deny")

    def _deny(self, request: Request, why: str, caller: Caller) -> None:
        if request.decide_by_s is None or request.state.final:
            return
        with suppress(StoreFull):  # a no is heeded also where it cannot be written down
            self._scheduler.calls.audit.decided(request, "denied", caller)
        if self._scheduler.end(request, State.FAILED, why):
            self._tell(request, "denied")

    def _tell(self, request: Request, state: str) -> None:
        at = f"/agents/{request.agent}" if request.agent else "/"
        tool = request.spec.model
        self._events.emit(
            "access", at, request.uid, id=request.id, agent=request.agent, tool=tool, state=state
        )

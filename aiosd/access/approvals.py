"""Acts that wait until a person decides: access/pending/ID. Which do, the rules say (aiosd.access.rules).

Such a call is in the queue like any other, and may not start before it is allowed. Deciding is for its
caller, or the group that the rule names, and root; not for the tools that run for them, which do not see
access/. Who says nothing says no. Any thread may ask and decide.
"""

from __future__ import annotations

import grp
import json
import logging
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

from aiosd.access.caller import Caller
from aiosd.access.permissions import Permissions
from aiosd.access.rules import Asked, Rule, Rules
from aiosd.access.trust import Trust
from aiosd.agents.agents import Agent, Agents
from aiosd.errors import BadValue, Denied, NotFound, StoreFailed
from aiosd.events import Events
from aiosd.host import identity
from aiosd.host.message_ids import NOTICE, Id, about
from aiosd.scheduler.scheduler import Scheduler
from aiosd.syscall.request import Request, State
from aiosd.tools.catalog import QUEUE, Tool

log = logging.getLogger(__name__)

ALWAYS = Rule("allow", "access/allowed")
ALLOWED_MAX = 500  # one line of the audit log has them
NOBODY = 65534


class Pending:
    def __init__(
        self,
        scheduler: Scheduler,
        agents: Agents,
        permissions: Permissions,
        events: Events,
        trust: Trust,
        rules: Rules,
    ) -> None:
        self._scheduler, self._agents, self._permissions, self._events = (
            scheduler, agents, permissions, events,
        )  # fmt: skip
        self._trust, self.rules = trust, rules
        self._daemon = Caller(identity.uid(), identity.gid(), os.getpid())
        scheduler.ask, scheduler.rule = self.ask, self.rule

    def ids(self) -> list[int]:
        return [r.id for r in self._scheduler.unfinished() if r.decide_by_s is not None]

    def find(self, id: int) -> Request | None:
        request = self._scheduler.find(id)
        return request if request and request.decide_by_s is not None and not request.state.final else None

    def rule(self, request: Request) -> None:
        """Whether a call goes on at once, and until when it waits else. Raises Denied."""
        request.decide_by_s = None
        tool = self._scheduler.calls.tools.of(request.spec.model)
        if tool is None:
            return
        rule = self.rules.judge(self._asked(request, tool))
        agent = self._agents.find(request.agent)
        if rule.decision == "ask" and not rule.by and agent and tool.name in agent.settings.allowed:
            rule = ALWAYS if request.uid == self.owner(agent) else rule
        request.rule = rule
        if rule.decision == "deny":
            raise Denied(f"calls of {tool.name} like this one are denied", rule.why or f"rule: {rule.place}")
        if rule.decision == "ask":
            request.decide_by_s = time.time() + self._scheduler.calls.pending_s

    def _asked(self, request: Request, tool: Tool) -> Asked:
        gid, *more = request.spec.groups
        asks = self._scheduler.find(request.parent) if request.parent else None
        return Asked(
            tool.name,
            tool.manifest.irreversible,
            lambda: dict(json.loads(request.spec.messages[0]["content"])),
            Caller(request.uid, gid, request.pid, frozenset(more)),
            request.agent,
            partial(self._trust.groups_of, request.agent_id),
            asks.spec.model if asks else "",
        )

    def owner(self, agent: Agent) -> int | None:
        at = self._permissions.get(f"/agents/{agent.name}")
        return at.uid if at else None

    def allow_always(self, caller: Caller, agent: Agent, names: Sequence[str]) -> None:
        """These tools, of calls of its owner's own; of others each call is theirs to decide, and where a
        rule names a group each is the group's."""
        for name in names:
            self._scheduler.calls.tools.get(name)
        allowed = sorted(set(names))
        if len(allowed) > ALLOWED_MAX:
            raise BadValue(f"more than {ALLOWED_MAX} tools", "name fewer")
        self._scheduler.calls.audit.granted("allowed always", caller, agent=agent.name, tools=allowed)
        self._agents.change(agent, allowed=allowed)

    def ask(self, request: Request) -> None:
        """Tells that it waits, and when it has waited long enough."""
        until_s = request.decide_by_s
        if until_s is None:  # somebody was quick to allow it
            return
        self._tell(request, "pending")
        how = f"echo allow > access/pending/{request.id}/decision"
        log.log(
            NOTICE,
            "call %d of %s waits for a decision of %s: %s",
            request.id,
            request.spec.model,
            f"group {request.rule.by}" if request.rule and request.rule.by else f"user {request.uid}",
            how,
            extra=about(
                Id.CALL_WAITS,
                request=request.id,
                agent=request.agent,
                uid=request.uid,
                tool=request.spec.model.removeprefix(QUEUE),
            ),
        )
        if agent := self._agents.find(request.agent):
            agent.note(f"{request.spec.model} waits for a decision: {how}", request=request.id)
        if hook := self._scheduler.config.tools.notify:
            self._notify(hook, request)
        self._scheduler.calls.later(until_s - time.time(), partial(self._expire, request.id))

    def _notify(self, hook: str, request: Request) -> None:
        """Runs the administrator's program as who called; where a group decides, as nobody."""
        config, tool = self._scheduler.config, request.spec.model.removeprefix(QUEUE)
        group = request.rule.by if request.rule else ""
        decision = f"{config.daemon.mount}/access/pending/{request.id}/decision"
        facts = {"REQUEST": request.id, "TOOL": tool, "AGENT": request.agent, "GROUP": group}
        facts |= {"UID": request.uid, "DECISION": decision}
        uid, gid = (NOBODY, NOBODY) if group else (request.uid, request.spec.groups[0])
        named = {f"AIOS_{key}": str(value) for key, value in facts.items()}
        self._scheduler.calls.notify(hook, named, uid, gid)

    def _expire(self, id: int) -> None:
        """By id: a request that was decided or cancelled long ago is not to be kept in memory till then."""
        if request := self.find(id):
            self._deny(request, "nobody allowed it in time", self._daemon)

    def decide(self, caller: Caller, id: int, text: str) -> None:
        request = self.find(id)
        if request is None:
            raise NotFound(f"{id} does not wait any more")
        if text == "allow always":
            agent = self._agents.find(request.agent)
            if agent is None or request.uid != self.owner(agent) or self.decider(request) is not None:
                raise BadValue("only an agent's owner can allow his own calls always", "allow")
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

    @staticmethod
    def decider(request: Request) -> int | None:
        """The group that decides about it, where a rule names one; one that does not exist is root's."""
        by = request.rule.by if request.rule else ""
        try:
            return grp.getgrnam(by).gr_gid if by else None
        except KeyError:
            log.error("%s: there is no group %s; root decides", request.rule and request.rule.place, by)
            return 0

    def _deny(self, request: Request, why: str, caller: Caller) -> None:
        if request.decide_by_s is None or request.state.final:
            return
        with suppress(StoreFailed):  # a no is heeded also where it cannot be written down
            self._scheduler.calls.audit.decided(request, "denied", caller)
        if self._scheduler.end(request, State.FAILED, why):
            self._tell(request, "denied")

    def _tell(self, request: Request, state: str) -> None:
        at, tool = self._scheduler.place(request), request.spec.model
        self._events.emit(
            "access", at, request.uid, id=request.id, agent=request.agent, tool=tool, state=state
        )

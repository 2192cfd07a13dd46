"""Calls that wait for a person's decision: access/pending/ID. The rules (aiosd.access.rules) choose the
calls.

Such a call is in the queue like any other, but does not start before it is allowed. The caller decides, or
the group that the rule names; root always may. Tools cannot decide, because their sandbox hides access/.
Without a decision in time the call fails. Any thread may call.
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
from typing import Any

from aiosd.access.audit import Audit
from aiosd.access.caller import Caller
from aiosd.access.permissions import Permissions
from aiosd.access.rules import CallFacts, Rule, Rules
from aiosd.access.trust import Trust
from aiosd.agents.agents import Agent, Agents
from aiosd.config.config import Config
from aiosd.errors import BadValue, Denied, NotFound, StoreFailed
from aiosd.host import identity
from aiosd.host.message_ids import NOTICE, Id, about
from aiosd.scheduler.ending import Ending
from aiosd.scheduler.notices import Notices
from aiosd.scheduler.scheduler import Scheduler
from aiosd.syscall.request import Request, State
from aiosd.syscall.toolcall import ToolCall, outcome
from aiosd.tools.catalog import Tool, Tools
from aiosd.tools.run.toolrunner import ToolRunner

log = logging.getLogger(__name__)

ALWAYS = Rule("allow", "access/allowed")
ALLOWED_MAX = 500  # they are one line of the audit log
NOBODY = 65534


class Approvals:
    def __init__(
        self,
        scheduler: Scheduler,
        ending: Ending,
        notices: Notices,
        agents: Agents,
        tools: Tools,
        runner: ToolRunner,
        permissions: Permissions,
        trust: Trust,
        audit: Audit,
        rules: Rules,
        mount: str,
    ) -> None:
        """`mount`: path of the tree, for the program that notifies people."""
        self._scheduler, self._ending, self._notices = scheduler, ending, notices
        self._agents, self._tools, self._runner = agents, tools, runner
        self._permissions, self._trust, self._audit = permissions, trust, audit
        self.rules, self._mount = rules, mount
        self.pending_s, self._hook = 0.0, ""  # how long a call waits; the program that notifies people
        self._daemon = Caller(identity.uid(), identity.gid(), os.getpid())

    def configure(self, config: Config) -> None:
        self.pending_s, self._hook = config.tools.pending_s, config.tools.notify

    def start(self) -> None:
        """Ask again for decisions that an earlier daemon asked for."""
        for id in self.ids():
            if request := self.find(id):
                self.ask(request)

    def ids(self) -> list[int]:
        return [r.id for r in self._scheduler.unfinished() if r.decide_by_s is not None]

    def find(self, id: int) -> Request | None:
        request = self._scheduler.find(id)
        return request if request and request.decide_by_s is not None and not request.state.final else None

    def rule(self, request: Request) -> None:
        """Apply the first rule that fits a call: set until when it waits for a decision, or raise Denied."""
        request.decide_by_s = None
        call = call_of(request)
        tool = self._tools.find(call.tool)
        if tool is None:
            return
        rule = self.rules.judge(self._asked(request, call, tool))
        agent = self._agents.find(request.agent)
        if rule.decision == "ask" and not rule.by and agent and call.tool in agent.settings.allowed:
            rule = ALWAYS if request.uid == self.owner(agent) else rule
        how = outcome(request)
        how.decision, how.rule, how.why, how.by = rule.decision, rule.place, rule.why, rule.by
        if rule.decision == "deny":
            raise Denied(f"a rule denies this call of {call.tool}", rule.why or f"rule: {rule.place}")
        if rule.decision == "ask":
            request.decide_by_s = time.time() + self.pending_s

    def _asked(self, request: Request, call: ToolCall, tool: Tool) -> CallFacts:
        gid, *more = call.groups
        asks = self._scheduler.find(request.parent) if request.parent else None

        def arguments() -> dict[str, Any]:
            return dict(json.loads(call.arguments))

        return CallFacts(
            call.tool,
            tool.manifest.irreversible,
            arguments,
            Caller(request.uid, gid, request.pid, frozenset(more)),
            request.agent,
            partial(self._trust.groups_of, request.agent_id),
            asks.spec.target if asks else "",
        )

    def owner(self, agent: Agent) -> int | None:
        at = self._permissions.get(f"/agents/{agent.name}")
        return at.uid if at else None

    def allow_always(self, caller: Caller, agent: Agent, names: Sequence[str]) -> None:
        """Let the owner's own calls of these tools start without a decision, except where a rule names a
        group.

        Other users still decide about each of their calls.
        """
        allowed = sorted({self._tools.get(name).name for name in names})
        if len(allowed) > ALLOWED_MAX:
            raise BadValue(f"more than {ALLOWED_MAX} tools", "name fewer tools")
        self._audit.granted("allowed always", caller, agent=agent.name, tools=allowed)
        self._agents.change(agent, allowed=allowed)

    def ask(self, request: Request) -> None:
        """Announce that a call waits, and let it fail at its deadline."""
        until_s = request.decide_by_s
        if until_s is None:  # it was allowed a moment ago
            return
        self._notices.decided(request, "pending")
        call, how = call_of(request), outcome(request)
        command = f"echo allow > access/pending/{request.id}/decision"
        log.log(
            NOTICE,
            "call %d of %s waits for a decision of %s: %s",
            request.id,
            call.target,
            f"group {how.by}" if how.by else f"user {request.uid}",
            command,
            extra=about(
                Id.CALL_WAITS,
                request=request.id,
                agent=request.agent,
                uid=request.uid,
                tool=call.tool,
            ),
        )
        if agent := self._agents.find(request.agent):
            agent.note(f"{call.target} waits for a decision: {command}", request=request.id)
        if self._hook:
            self._notify(self._hook, request)
        self._runner.later(until_s - time.time(), partial(self._expire, request.id))

    def _notify(self, hook: str, request: Request) -> None:
        """Run the administrator's program as the call's user; if a group decides, as nobody."""
        call, group = call_of(request), outcome(request).by
        decision = f"{self._mount}/access/pending/{request.id}/decision"
        facts = {"REQUEST": request.id, "TOOL": call.tool, "AGENT": request.agent, "GROUP": group}
        facts |= {"UID": request.uid, "DECISION": decision}
        uid, gid = (NOBODY, NOBODY) if group else (request.uid, call.groups[0])
        named = {f"AIOS_{key}": str(value) for key, value in facts.items()}
        self._runner.notify(hook, named, uid, gid)

    def _expire(self, id: int) -> None:
        """Deny a call that still waits. The timer holds only its id, so that an ended request can
        be freed.
        """
        if request := self.find(id):
            self._deny(request, "nobody allowed it in time", self._daemon)

    def decide(self, caller: Caller, id: int, text: str) -> None:
        request = self.find(id)
        if request is None:
            raise NotFound(f"request {id} does not wait for a decision any more")
        if text == "allow always":
            agent = self._agents.find(request.agent)
            if agent is None or request.uid != self.owner(agent) or self.decider(request) is not None:
                raise BadValue(
                    "only an agent's owner can always allow a tool, for his own calls", "write allow"
                )
            self.allow_always(caller, agent, [*agent.settings.allowed, call_of(request).tool])
        if text in ("allow", "allow always"):
            self._audit.decided(request, "allowed", caller)
            if self._scheduler.allow(request):
                self._notices.decided(request, "allowed")
        elif text == "deny":
            self._deny(request, f"denied by user {caller.uid}", caller)
        else:
            raise BadValue(f"{text[:40]!r} is no decision", "write allow, allow always or deny")

    @staticmethod
    def decider(request: Request) -> int | None:
        """Return the gid that decides, if a rule names a group. Root decides for a group that does
        not exist.
        """
        by = outcome(request).by
        try:
            return grp.getgrnam(by).gr_gid if by else None
        except KeyError:
            log.error("%s: there is no group %s; root decides", outcome(request).rule, by)
            return 0

    def _deny(self, request: Request, why: str, caller: Caller) -> None:
        if request.decide_by_s is None or request.state.final:
            return
        with suppress(StoreFailed):  # a denial takes effect even if it cannot be logged
            self._audit.decided(request, "denied", caller)
        if self._ending.finish(request, State.FAILED, why):
            self._notices.decided(request, "denied")


def call_of(request: Request) -> ToolCall:
    assert isinstance(request.spec, ToolCall)
    return request.spec

"""Answers of models that MCP servers ask for during a call (sampling).

Each is a request of the agent that called the tool, in the name of the call's caller, and counts against the
same quotas. It has neither the tools nor the context of the agent. Called on the runner's thread.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from aiosd.access.caller import Caller
from aiosd.agents.agents import Agents
from aiosd.errors import AiosError
from aiosd.handlers.tool.approvals import call_of
from aiosd.scheduler.admission import Admission
from aiosd.scheduler.ending import Ending
from aiosd.scheduler.handler import Source
from aiosd.syscall.request import Request, State
from aiosd.tools.mcp.calling import Question

ASKED = ("messages", "max_tokens", "temperature", "stop")  # what a server may say of its request
ALONE: dict[str, Any] = {"tools": [], "tool_choice": "none", "context": ""}


class Sampled:
    def __init__(self, admission: Admission, ending: Ending, agents: Agents) -> None:
        self._admission, self._ending, self._agents = admission, ending, agents
        self._running: dict[tuple[int, int], Request] = {}  # by call and number of the question

    def ask(self, call: Request, question: Question) -> None:
        agent = self._agents.find(call.agent)
        if agent is None:
            question.reply("the tool was not called through an agent, so there is no model to ask")
            return
        gid, *more = call_of(call).groups
        caller = Caller(call.uid, gid, call.pid, frozenset(more))
        source = Source(f"/agents/{agent.name}/requests/{call.id}/sampling", agent)
        given = question.facts.get("body")
        said = {key: given[key] for key in ASKED if key in given} if isinstance(given, dict) else {}
        body = json.dumps({**said, **ALONE}).encode()
        try:
            self._admission.check(caller, source, len(body))
            asked = self._admission.submit(caller, source, body)
        except AiosError as error:
            question.reply(error.explanation)
            return
        self._running[call.id, question.number] = asked
        unwatch = asked.answer.watch(partial(self._look, call.id, question))
        if asked.answer.ended:
            unwatch()
            self._look(call.id, question)

    def _look(self, call: int, question: Question) -> None:
        """Reply once, when the request has ended. The thread that ends the request may call."""
        asked = self._running.get((call, question.number))
        if asked is None or not asked.answer.ended or not self._running.pop((call, question.number), None):
            return
        if asked.state is not State.DONE:
            question.reply(asked.error or str(asked.state))
            return
        question.reply({"text": asked.text, "model": asked.spec.target, "finish_reason": asked.finish_reason})

    def withdraw(self, call: int, number: int) -> None:
        if asked := self._running.pop((call, number), None):
            self._ending.cancel(asked, "its MCP server does not wait for it any more")

"""Tool calls: check them by schema and rules, audit them, and run them in a sandbox as the caller."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Set
from typing import ClassVar

from aiosd.access.caller import Caller
from aiosd.cores.pool import Worker
from aiosd.errors import AiosError, Denied
from aiosd.handlers.parts import Parts
from aiosd.host.usage import Spent
from aiosd.scheduler.handler import Handler, Source
from aiosd.scheduler.names import acting
from aiosd.syscall.foreign import decode
from aiosd.syscall.request import Request, State
from aiosd.syscall.spec import Spec
from aiosd.syscall.toolcall import ToolCall, outcome
from aiosd.tools import catalog
from aiosd.tools.mcp.calling import Question, Withdrawn

TOOL_GONE = "its tool was removed"


class ToolHandler(Handler):
    """Implements aiosd.tools.calls.CallEvents, whose methods run on the runner's thread."""

    takes_text: ClassVar[bool] = False
    span: ClassVar[str] = "tool"

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    # admission

    def asks_groups(self, source: Source) -> bool:
        return True

    def check(self, caller: Caller, source: Source) -> None:
        if source.target:
            self._parts.names.check_tool(caller, source.target)

    def judge(self, caller: Caller, source: Source, body: bytes) -> ToolCall:
        text = decode(body)
        name, given = (source.target, text) if source.target else catalog.call(text)
        agent, nice = (source.agent.name, source.agent.settings.nice) if source.agent else ("", 0)
        return self.call(caller, name, given, nice, agent)

    def call(self, caller: Caller, name: str, arguments: str, nice: int, agent: str = "") -> ToolCall:
        """Check a call with arguments as JSON. Raises BadRequest, NotFound, Denied."""
        tool = self._parts.names.check_tool(caller, name, agent)
        said = json.dumps(catalog.arguments(tool, arguments), ensure_ascii=False)
        return ToolCall(tool.name, said, acting(caller), nice=nice)

    def check_names(self, caller: Caller, source: Source, spec: Spec) -> None:
        assert isinstance(spec, ToolCall)
        self._parts.names.check_tool(caller, spec.tool, source.agent.name if source.agent else "")

    def misunderstood(self, source: Source, body: bytes) -> ToolCall:
        return ToolCall(source.target)

    def forbid(self, request: Request) -> str:
        try:
            self._parts.approvals.rule(request)
        except Denied as error:
            return error.explanation
        return ""

    def record(self, request: Request) -> None:
        self._parts.audit.called(request)

    def queued(self, request: Request) -> None:
        if request.decide_by_s is not None:
            self._parts.approvals.ask(request)

    def lost(self, request: Request) -> str:
        if request.started_s is not None:
            return "interrupted: the daemon ended while the call ran"
        return "" if self._parts.tools.of(request.queue) else f"{request.queue} is gone"

    def orphaned(self, request: Request) -> str:
        return "" if self._parts.tools.of(request.queue) else TOOL_GONE

    def complete_audit(self) -> None:
        """Write the ends of calls that a killed daemon stored before it could write them into the audit
        log.
        """
        for id in self._parts.audit.unended():
            request = self._parts.store.request(id)
            if request and request.state.final:
                facts, how = json.loads(request.document or "{}"), outcome(request)
                how.exit_status = facts.get("exit_status")
                if "cpu_seconds" in facts:
                    how.spent = Spent(facts["cpu_seconds"], facts["memory_bytes"] or 0)
                self._parts.audit.ended(request)

    # running

    def free(self, queue: str, running: Iterable[Request]) -> bool:
        tool = self._parts.tools.of(queue)
        return tool is not None and self._parts.calls.free(tool, running)

    def crowding(self, queue: str, running: Iterable[Request]) -> Set[int]:
        tool = self._parts.tools.of(queue)
        return self._parts.calls.crowding(tool, running) if tool else frozenset()

    def start(self, request: Request, worker: Worker | None) -> None:
        """A call that waited long may be of a user who is gone. Orders do not wait for the name service."""
        if self._parts.accounts.fresh(request.uid):
            self._run(request)
        else:
            threading.Thread(target=self._check_and_run, args=(request,), name="account", daemon=True).start()

    def _check_and_run(self, request: Request) -> None:
        if self._parts.accounts.replaced(request.uid):
            why = f"its user was removed: {request.uid} is another one by now"
            self._parts.ending.finish(request, State.FAILED, why)
        else:
            self._run(request)

    def _run(self, request: Request) -> None:
        try:
            self._parts.calls.run(request)
        except AiosError as error:
            self._parts.ending.finish(request, State.FAILED, error.explanation)

    def call_began(self, request: Request) -> bool:
        """Mark the call as started before it acts, so that a crash never runs it twice."""
        with self._parts.scheduler.lock:
            if request.id not in self._parts.scheduler.queue.running:
                return False
            request.started_s = time.time()
        self._parts.notices.changed(request)
        try:
            self._parts.store.start_request(request)
        except AiosError as error:
            self._parts.ending.finish(request, State.FAILED, error.explanation)
            return False
        return True

    def call_ended(self, request: Request, error: str) -> None:
        if not self._parts.ending.finish(request, State.FAILED if error else State.DONE, error):
            self.call_left(request)  # it was cancelled before, and leaves its place only now

    def call_left(self, request: Request) -> None:
        self._parts.scheduler.stir()

    def call_asked(self, request: Request, news: Question | Withdrawn) -> None:
        self._parts.questions.heard(request, news)

    # the end

    def closing(self, request: Request) -> None:
        self._parts.scheduler.orders.add(lambda: self._parts.calls.kill(request.id))
        request.text = request.answer.text

    def account(self, request: Request) -> None:
        if request.started_s and request.finished_s:
            took_s = request.finished_s - request.started_s
            self._parts.scheduler.queue.ledger.charge_call(request, took_s)
        if tool := self._parts.tools.of(request.queue):
            tool.account(request)

    def ended(self, request: Request) -> None:
        self._parts.audit.ended(request)

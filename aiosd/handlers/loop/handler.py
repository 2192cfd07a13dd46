"""Requests whose tool calls are run. Such a request starts at once; its steps (steps.py) wait and run."""

from __future__ import annotations

import time
from typing import ClassVar

from aiosd.access.caller import Caller
from aiosd.cores.pool import Worker
from aiosd.errors import AiosError
from aiosd.handlers.loop.steps import Steps
from aiosd.handlers.parts import Parts
from aiosd.handlers.tool.handler import ToolHandler
from aiosd.scheduler.admission import ended
from aiosd.scheduler.handler import Handler
from aiosd.syscall.chat import Chat
from aiosd.syscall.request import Request, State
from aiosd.syscall.toolcall import ToolCall


class LoopHandler(Handler):
    """Handler "llm" parses and checks these requests. Implements aiosd.handlers.loop.steps.Requests."""

    ranked: ClassVar[bool] = False  # a loop takes no place from other requests
    span: ClassVar[str] = "loop"

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._steps = Steps(self)

    def lost(self, request: Request) -> str:
        return self._parts.handlers["llm"].lost(request)

    def orphaned(self, request: Request) -> str:
        return self._parts.handlers["llm"].orphaned(request)

    def start(self, request: Request, worker: Worker | None) -> None:
        """Begin a loop, or continue one of an earlier daemon."""
        if why := self.orphaned(request):
            self._parts.ending.finish(request, State.FAILED, why)
            return
        request.started_s = request.started_s or time.time()
        self._parts.notices.changed(request)
        assert isinstance(request.spec, Chat)
        try:
            stored = self._parts.store.children(request.id)
            known = [self._parts.admission.find(child.id) or ended(child) for child in stored]
            self._parts.contexts.begin_loop(request.id)
            self._steps.begin(request, self._parts.contexts.whole(request.spec), known)
        except AiosError as error:
            self._parts.ending.finish(request, State.FAILED, error.explanation, error.code)

    # its steps

    def new_id(self) -> int:
        return self._parts.admission.new_id()

    def admit(self, request: Request, hopeless: str) -> None:
        self._parts.admission.admit(request, hopeless)

    def finish(self, request: Request, state: State, error: str, code: str = "") -> bool:
        return self._parts.ending.finish(request, state, error, code)

    def call(self, caller: Caller, name: str, arguments: str, nice: int, agent: str) -> ToolCall:
        tool = self._parts.handlers["tool"]
        assert isinstance(tool, ToolHandler)
        return tool.call(caller, name, arguments, nice, agent)

    def away(self, request: Request, calls: list[Request]) -> None:
        """Move the loop's KV while these calls run."""
        if context := self._parts.contexts.loop(request.id):
            running = self._parts.scheduler.running_on(context.worker)
            self._parts.interception.away(context, calls, running)

    def child_said(self, request: Request, child: Request) -> None:
        self._steps.said(child)

    def child_ended(self, request: Request, child: Request) -> None:
        self._steps.child_ended(child)

    # the end

    def account(self, request: Request) -> None:
        self._parts.handlers["llm"].account(request)

    def ended(self, request: Request) -> None:
        if own := self._parts.contexts.end_loop(request.id):
            self._parts.residency.drop(own)

    def told(self, request: Request) -> None:
        for child in self._steps.ended(request):
            self._parts.ending.cancel(child, "its request ended")

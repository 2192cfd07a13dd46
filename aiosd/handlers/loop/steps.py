"""The agent loop: a request whose tool calls are run for it, model and tools in turn, until it has an answer.

The request itself computes nothing. Its steps are requests of their own, linked to it as children: "2" is the
second time that the model is asked, "2.1" the first call in its second answer. The next step follows from the
children alone, so that a loop goes on after a restart as it does after each end of a child. Any thread may
report on a child.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field
from typing import Protocol

from aiosd.access.caller import Caller
from aiosd.errors import AiosError, TooLong
from aiosd.host.message_ids import about
from aiosd.syscall import response, toolcalls
from aiosd.syscall.chat import Chat, Loop, between
from aiosd.syscall.request import Request, State
from aiosd.syscall.spec import Message, Spec
from aiosd.syscall.toolcall import ToolCall

log = logging.getLogger(__name__)

CALLS_MAX = 16  # of one answer
RESULT_CHARS = 32 << 10  # of a result that the model is shown
MESSAGES_CHARS = 4 << 20  # of all messages that it is shown in one step: each step is kept
NAME_CHARS = 64  # of a tool that the model made up


class Requests(Protocol):
    """Where the steps of loops are queued."""

    def new_id(self) -> int: ...
    def admit(self, request: Request, hopeless: str) -> None: ...
    def finish(self, request: Request, state: State, error: str) -> bool: ...
    def call(self, caller: Caller, name: str, arguments: str, nice: int) -> ToolCall:
        """The call of a tool. Raises AiosError when the caller may not make it, or its arguments are
        wrong.
        """
        ...

    def away(self, request: Request, calls: list[Request]) -> None:
        """The model waits for these calls, which are in the queue."""
        ...


@dataclass(slots=True, eq=False)
class RunningLoop:
    request: Request
    asked: Loop
    before: list[Message]  # the conversation up to the question
    children: dict[str, Request] = field(default_factory=dict)  # by place
    lock: threading.Lock = field(default_factory=threading.Lock)
    busy: bool = False
    changed: bool = False
    away: int = 0  # the last step whose calls were waited for
    earlier: str = ""  # the text of the steps before the one that is being made, as the reader has it


class Steps:
    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._loops: dict[int, RunningLoop] = {}

    def begin(self, request: Request, before: list[Message], known: list[Request]) -> None:
        """`known`: children that an earlier daemon made."""
        assert isinstance(request.spec, Loop)
        loop = RunningLoop(request, request.spec, before, {place(child): child for child in known})
        self._loops[request.id] = loop
        self._go_on(loop)

    def ended(self, request: Request) -> list[Request]:
        """A loop's request is over; gives what of it still runs."""
        loop = self._loops.pop(request.id, None)
        return [child for child in loop.children.values() if not child.state.final] if loop else []

    def child_ended(self, child: Request) -> None:
        if loop := self._loops.get(child.parent):
            self._go_on(loop)

    def said(self, child: Request) -> None:
        """Text of a step, while it is made: its loop's reader sees what cannot become a call any more."""
        loop = self._loops.get(child.parent)
        if loop and isinstance(child.spec, Chat):
            self._show(loop, loop.earlier + child.text[: toolcalls.hold(child.text)])

    @staticmethod
    def _show(loop: RunningLoop, text: str) -> None:
        """All of it, of which the reader has a part already."""
        new = text[len(loop.request.text) :]
        if new:
            loop.request.text = text
            response.grow(loop.request, new, [])

    def _go_on(self, loop: RunningLoop) -> None:
        """Never twice at once: what ends meanwhile, also by what is done here, is looked at afterwards."""
        with loop.lock:
            loop.changed = True
            if loop.busy:
                return
            loop.busy = True
        while True:
            with loop.lock:
                if not loop.changed:
                    loop.busy = False
                    return
                loop.changed = False
            try:
                self._advance(loop)
            except AiosError as error:  # a step could not be stored
                self._requests.finish(loop.request, State.FAILED, error.explanation)
            except Exception:  # what a model said is foreign: it ends this loop, which else would never end
                log.exception("request %d", loop.request.id, extra=about(request=loop.request.id))
                why = "the daemon could not go on; the log says why"
                self._requests.finish(loop.request, State.FAILED, why)

    def _advance(self, loop: RunningLoop) -> None:
        """Makes the children that are next, or ends the loop."""
        request, turns, said = loop.request, list[Message](), ""
        for step in range(1, loop.asked.steps + 1):
            child = loop.children.get(str(step))
            if child is None:
                loop.earlier = said
                self._show(loop, said)
                self._ask(loop, step, turns)
                return
            if not child.state.final:
                return
            if child.state is not State.DONE:
                self._requests.finish(request, child.state, f"step {step}: {child.error}")
                return
            prose, calls = toolcalls.parse(child.text)
            if not calls:
                self._show(loop, said + child.text)
                self._end(loop, child, turns)
                return
            said += child.text[: toolcalls.hold(child.text)]
            said += "\n" if said and not said.endswith("\n") else ""
            made = [self._call(loop, f"{step}.{i}", call) for i, call in enumerate(calls[:CALLS_MAX], 1)]
            if not all(one.state.final for one in made):
                if loop.away < step:
                    loop.away = step
                    self._requests.away(request, made)
                return
            turns += turn(prose, calls[:CALLS_MAX], made)
        self._requests.finish(
            request, State.FAILED, f"it made calls in all of its {loop.asked.steps} steps; raise max_steps"
        )

    def _ask(self, loop: RunningLoop, step: int, turns: list[Message]) -> None:
        """The model, with all that was said before."""
        messages = (*loop.before, *turns)
        if sum(len(message["content"]) for message in messages) > MESSAGES_CHARS:
            raise TooLong("the conversation has become too long", "ask for less, or lower max_steps")
        asked = loop.asked
        chat = Chat(
            messages, asked.sampling, asked.model, tools=asked.tools, decoded=asked.decoded,
            tool_choice=asked.tool_choice if step == 1 else "auto",  # else it would call for ever
            schema=asked.schema, nice=asked.nice, deadline_s=asked.deadline_s,
        )  # fmt: skip
        self._make(loop, str(step), chat, "")

    def _call(self, loop: RunningLoop, at: str, call: toolcalls.Call) -> Request:
        if child := loop.children.get(at):
            return child
        groups, hopeless = loop.asked.groups, ""
        caller = Caller(loop.request.uid, groups[0], 0, frozenset(groups[1:]))
        try:
            spec = self._requests.call(caller, call.name, call.arguments, loop.asked.nice)
        except AiosError as error:  # the model is told, and may do better
            hopeless = error.explanation
            spec = ToolCall(call.name[:NAME_CHARS], call.arguments)
        return self._make(loop, at, spec, hopeless)

    def _make(self, loop: RunningLoop, at: str, spec: Spec, hopeless: str) -> Request:
        asked = loop.request
        file = f"/agents/{asked.agent}/requests/{asked.id}/steps/{at}"
        id = self._requests.new_id()
        child = Request(id, asked.uid, asked.agent, file, spec, asked.agent_id, parent=asked.id)
        child.running_most = asked.running_most
        loop.children[at] = child
        self._requests.admit(child, hopeless)
        if self._loops.get(asked.id) is not loop:  # it ended while the child was made
            self._requests.finish(child, State.CANCELLED, "its request ended")
        return child

    def _end(self, loop: RunningLoop, child: Request, said: list[Message]) -> None:
        request = loop.request
        between(request)[:] = said
        request.finish_reason = child.finish_reason
        for one in loop.children.values():
            request.usage.add(one.usage)
        self._requests.finish(request, State.DONE, "")


def place(child: Request) -> str:
    return child.file.rpartition("/")[2]


def turn(prose: str, calls: list[toolcalls.Call], made: list[Request]) -> list[Message]:
    """What the assistant said and what came of it, as messages."""
    named = [
        {"id": f"call_{r.id}", "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
        for c, r in zip(calls, made, strict=True)
    ]
    said: Message = {"role": "assistant", "content": prose, "tool_calls": named}
    told = zip(calls, made, strict=True)
    return [said, *({**result(r), "name": c.name, "tool_call_id": f"call_{r.id}"} for c, r in told)]


def result(call: Request) -> Message:
    text = call.answer.text.rstrip("\n")
    if call.state is not State.DONE:
        text = "\n".join(filter(None, (text, f"error: {call.error}")))
    if len(text) > RESULT_CHARS:
        text = text[:RESULT_CHARS] + f"\n(cut after {RESULT_CHARS} characters)"
    return {"role": "tool", "content": text}

"""The agent loop: ask the model, run its tool calls, and ask again, until it answers without a call.

The loop's request itself computes nothing. Its steps are requests too, linked to it as children: "2" asks the
model the second time, "2.1" is the first call of the second answer. The next step is derived from the
children alone, so a loop continues after a restart in the same way as after each end of a child. Any thread
may report on a child.
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
from aiosd.syscall.reading import Reading
from aiosd.syscall.request import Request, State
from aiosd.syscall.spec import Message, Spec
from aiosd.syscall.toolcall import ToolCall

log = logging.getLogger(__name__)

CALLS_MAX = 16  # calls that run per answer
RESULT_CHARS = 32 << 10  # the model sees this much of a call's result
MESSAGES_CHARS = 4 << 20  # all messages of one step; bounded because each step is stored
NAME_CHARS = 64  # stored of a tool name that the model invented


class Requests(Protocol):
    """Creates and ends the requests of steps."""

    def new_id(self) -> int: ...
    def admit(self, request: Request, hopeless: str) -> None: ...
    def finish(self, request: Request, state: State, error: str, code: str = "") -> bool: ...
    def call(self, caller: Caller, name: str, arguments: str, nice: int, agent: str) -> ToolCall:
        """Check a tool call. Raises AiosError if the caller may not make it or its arguments are wrong."""
        ...

    def away(self, request: Request, calls: list[Request]) -> None:
        """Move the loop's KV while these calls run; they are queued."""
        ...


@dataclass(slots=True, eq=False)
class RunningLoop:
    request: Request
    asked: Loop
    before: list[Message]  # the messages up to the loop's request
    children: dict[str, Request] = field(default_factory=dict)  # by step: "2", "2.1"
    lock: threading.Lock = field(default_factory=threading.Lock)
    busy: bool = False
    changed: bool = False
    away: int = 0  # the last step for whose calls `Requests.away` was called
    reading: Reading | None = None  # reads the running step's answer, to show what surely is no call
    read: int = 0  # characters of that answer that `reading` has


class Steps:
    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._loops: dict[int, RunningLoop] = {}

    def begin(self, request: Request, before: list[Message], known: list[Request]) -> None:
        """Begin a loop. `before`: the messages so far; `known`: children of an earlier daemon."""
        assert isinstance(request.spec, Loop)
        loop = RunningLoop(request, request.spec, before, {place(child): child for child in known})
        self._loops[request.id] = loop
        self._go_on(loop)

    def ended(self, request: Request) -> list[Request]:
        """Forget a loop whose request has ended. Return its unfinished children."""
        loop = self._loops.pop(request.id, None)
        return [child for child in loop.children.values() if not child.state.final] if loop else []

    def child_ended(self, child: Request) -> None:
        if loop := self._loops.get(child.parent):
            self._go_on(loop)

    def said(self, child: Request) -> None:
        """Show new text of a step to the loop's readers, except a part that may become a tool call."""
        loop = self._loops.get(child.parent)
        if loop and isinstance(child.spec, Chat):
            if loop.reading is None:
                loop.reading = Reading(child.family, True)
            new, loop.read = child.text[loop.read :], len(child.text)
            self._add(loop, loop.reading.push(new)[1])

    def _show(self, loop: RunningLoop, text: str) -> None:
        """Extend the loop's answer to `text`, of which readers have the beginning."""
        self._add(loop, text[len(loop.request.text) :])

    @staticmethod
    def _add(loop: RunningLoop, new: str) -> None:
        if new:
            loop.request.text += new
            response.grow(loop.request, [])

    def _go_on(self, loop: RunningLoop) -> None:
        """Advance the loop, on one thread at a time. If a child ends meanwhile, advance again afterwards."""
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
                self._requests.finish(loop.request, State.FAILED, error.explanation, error.code)
            except Exception:  # model output is foreign; without this the loop would never end
                log.exception("request %d", loop.request.id, extra=about(request=loop.request.id))
                why = "the daemon failed in this loop; its log says why"
                self._requests.finish(loop.request, State.FAILED, why)

    def _advance(self, loop: RunningLoop) -> None:
        """Make the next children, or end the loop."""
        request, turns, said = loop.request, list[Message](), ""
        for step in range(1, loop.asked.steps + 1):
            child = loop.children.get(str(step))
            if child is None:
                loop.reading, loop.read = None, 0
                self._show(loop, said)
                self._ask(loop, step, turns)
                return
            if not child.state.final:
                return
            if child.state is not State.DONE:
                self._requests.finish(request, child.state, f"step {step}: {child.error}", child.error_code)
                return
            answer = heard(child)
            said += answer.content
            if not answer.calls:
                self._show(loop, said)
                self._end(loop, child, turns)
                return
            said += "\n" if said and not said.endswith("\n") else ""
            calls = answer.calls[:CALLS_MAX]
            made = [self._call(loop, f"{step}.{i}", call) for i, call in enumerate(calls, 1)]
            if not all(one.state.final for one in made):
                if loop.away < step:
                    loop.away = step
                    self._requests.away(request, made)
                return
            turns += turn(answer, calls, made)
        self._requests.finish(
            request,
            State.FAILED,
            f"the model still made calls in step {loop.asked.steps}, the last; raise max_steps",
        )

    def _ask(self, loop: RunningLoop, step: int, turns: list[Message]) -> None:
        """Ask the model, with all earlier messages."""
        messages = (*loop.before, *turns)
        if sum(len(message["content"]) for message in messages) > MESSAGES_CHARS:
            raise TooLong("the loop's messages have become too long", "ask for less, or lower max_steps")
        asked = loop.asked
        chat = Chat(
            messages, asked.sampling, asked.model, tools=asked.tools, decoded=asked.decoded,
            tool_choice=asked.tool_choice if step == 1 else "auto",  # "required" in each step would never end
            parallel=asked.parallel, template=asked.template,
            schema=asked.schema, nice=asked.nice, deadline_s=asked.deadline_s,
            keep_alive_s=asked.keep_alive_s,
        )  # fmt: skip
        self._make(loop, str(step), chat, "")

    def _call(self, loop: RunningLoop, at: str, call: toolcalls.ParsedCall) -> Request:
        if child := loop.children.get(at):
            return child
        groups, hopeless = loop.asked.groups, ""
        caller = Caller(loop.request.uid, groups[0], 0, frozenset(groups[1:]))
        try:
            spec = self._requests.call(caller, call.name, call.arguments, loop.asked.nice, loop.request.agent)
        except AiosError as error:  # the model sees the error, and may correct the call
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
        if self._loops.get(asked.id) is not loop:  # the loop ended meanwhile
            self._requests.finish(child, State.CANCELLED, "its request ended")
        return child

    def _end(self, loop: RunningLoop, child: Request, said: list[Message]) -> None:
        request = loop.request
        between(request)[:] = said
        request.finish_reason, request.stopped = child.finish_reason, child.stopped
        for one in loop.children.values():
            request.usage.add(one.usage)
        self._requests.finish(request, State.DONE, "")


def place(child: Request) -> str:
    return child.file.rpartition("/")[2]


def heard(child: Request) -> toolcalls.ParsedAnswer:
    """Parse the answer of a step. A call of a tool that was not offered is one too: it fails."""
    assert isinstance(child.spec, Chat)
    offered = toolcalls.offer(child.spec.tools, any_name=True, one=not child.spec.parallel)
    return toolcalls.parse(child.text, child.family, offered)


def turn(
    answer: toolcalls.ParsedAnswer, calls: list[toolcalls.ParsedCall], made: list[Request]
) -> list[Message]:
    """Return an answer with calls, and the calls' results, as messages.

    The thinking is kept, because some templates show a model what it thought between the calls of one turn.
    """
    named = [
        {"id": f"call_{r.id}", "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
        for c, r in zip(calls, made, strict=True)
    ]
    said: Message = {"role": "assistant", "content": answer.content, "tool_calls": named}
    if answer.reasoning:
        said["reasoning_content"] = answer.reasoning
    told = zip(calls, made, strict=True)
    return [said, *({**result(r), "name": c.name, "tool_call_id": f"call_{r.id}"} for c, r in told)]


def result(call: Request) -> Message:
    text = call.answer.text.rstrip("\n")
    if call.state is not State.DONE:
        text = "\n".join(filter(None, (text, f"error: {call.error}")))
    if len(text) > RESULT_CHARS:
        text = text[:RESULT_CHARS] + f"\n(cut after {RESULT_CHARS} characters)"
    return {"role": "tool", "content": text}

"""The agent loop: a request whose tool calls are run for it, model and tools in turn, until it has an answer.

The request itself computes nothing. Its steps are requests of their own, linked to it as children: "2" is the
second time that the model is asked, "2.1" the second call of what it said then. What is next follows from the
children alone, so that a loop goes on after a restart as it does after each end of a child. Any thread may
tell of one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from aiosd.access.caller import Caller
from aiosd.errors import AiosError, TooLong
from aiosd.host.message_ids import about
from aiosd.syscall import response, toolcalls
from aiosd.syscall.request import Request, State
from aiosd.syscall.spec import Message, Spec

log = logging.getLogger(__name__)

CALLS_MAX = 16  # of one answer
RESULT_CHARS = 32 << 10  # of a result that the model is shown
MESSAGES_CHARS = 4 << 20  # of all that it is shown in one step: each step is kept
Judge = Callable[[Caller, str, str, int], Spec]  # (caller, tool, arguments, nice)


@dataclass(slots=True, eq=False)
class Loop:
    request: Request
    before: list[Message]  # the conversation up to what is asked
    children: dict[str, Request] = field(default_factory=dict)  # by place
    lock: threading.Lock = field(default_factory=threading.Lock)
    busy: bool = False
    changed: bool = False
    away: int = 0  # the last step whose calls were waited for
    earlier: str = ""  # what its reader has of the steps before the one that is being made


class Loops:
    """`admit`, `finish`: the scheduler's; `judge`: admission's of a tool call."""

    def __init__(
        self,
        admit: Callable[[Request, str], None],
        finish: Callable[[Request, State, str], bool],
        new_id: Callable[[], int],
        away: Callable[[Request, list[Request]], None] = lambda request, calls: None,
    ) -> None:
        """`away` is told of calls that are waited for, once they are in the queue."""
        self._admit, self._finish, self._new_id, self._away = admit, finish, new_id, away
        self.judge: Judge
        self._loops: dict[int, Loop] = {}

    def begin(self, request: Request, before: list[Message], known: list[Request]) -> None:
        """`known`: children that an earlier daemon made."""
        loop = Loop(request, before, {place(child): child for child in known})
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
        if loop and child.spec.operation == "llm":
            self._show(loop, loop.earlier + child.text[: toolcalls.hold(child.text)])

    @staticmethod
    def _show(loop: Loop, text: str) -> None:
        """All of it, of which the reader has a part already."""
        new = text[len(loop.request.text) :]
        if new:
            loop.request.text = text
            response.grow(loop.request, new, [])

    def _go_on(self, loop: Loop) -> None:
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
                self._finish(loop.request, State.FAILED, error.explanation)
            except Exception:  # what a model said is foreign: it ends this loop, which else would never end
                log.exception("request %d", loop.request.id, extra=about(request=loop.request.id))
                self._finish(loop.request, State.FAILED, "the daemon could not go on; the log says why")

    def _advance(self, loop: Loop) -> None:
        """Makes the children that are next, or ends the loop."""
        request, between, said = loop.request, list[Message](), ""
        for step in range(1, request.spec.steps + 1):
            child = loop.children.get(str(step))
            if child is None:
                loop.earlier = said
                self._show(loop, said)
                self._ask(loop, step, between)
                return
            if not child.state.final:
                return
            if child.state is not State.DONE:
                self._finish(request, child.state, f"step {step}: {child.error}")
                return
            prose, calls = toolcalls.parse(child.text)
            if not calls:
                self._show(loop, said + child.text)
                self._end(loop, child, between)
                return
            said += child.text[: toolcalls.hold(child.text)]
            said += "\n" if said and not said.endswith("\n") else ""
            made = [self._call(loop, f"{step}.{i}", call) for i, call in enumerate(calls[:CALLS_MAX], 1)]
            if not all(one.state.final for one in made):
                if loop.away < step:
                    loop.away = step
                    self._away(request, made)
                return
            between += turn(prose, calls[:CALLS_MAX], made)
        self._finish(
            request, State.FAILED, f"it made calls in all of its {request.spec.steps} steps; raise max_steps"
        )

    def _ask(self, loop: Loop, step: int, between: list[Message]) -> None:
        """The model, with all that was said before."""
        messages = (*loop.before, *between)
        if sum(len(message["content"]) for message in messages) > MESSAGES_CHARS:
            raise TooLong("the conversation has become too long", "ask for less, or lower max_steps")
        asked = loop.request.spec
        spec = replace(
            asked,
            messages=messages,
            context="", context_id=0, system="", steps=0, json=False, stream=False,
            tool_choice=asked.tool_choice if step == 1 else "auto",  # else it would call for ever
        )  # fmt: skip
        self._make(loop, str(step), spec, "")

    def _call(self, loop: Loop, at: str, call: toolcalls.Call) -> Request:
        if child := loop.children.get(at):
            return child
        asked = loop.request
        caller = Caller(asked.uid, asked.spec.groups[0], 0, frozenset(asked.spec.groups[1:]))
        hopeless = ""
        try:
            spec = self.judge(caller, call.name, call.arguments, asked.spec.nice)
        except AiosError as error:  # the model is told, and may do better
            hopeless = error.explanation
            said = ({"role": "user", "content": call.arguments},)
            spec = Spec(said, asked.spec.sampling, f"tools/{call.name}"[:70], operation="tool")
        return self._make(loop, at, spec, hopeless)

    def _make(self, loop: Loop, at: str, spec: Spec, hopeless: str) -> Request:
        asked = loop.request
        file = f"/agents/{asked.agent}/requests/{asked.id}/steps/{at}"
        child = Request(self._new_id(), asked.uid, asked.agent, file, spec, asked.agent_id, parent=asked.id)
        child.running_most = asked.running_most
        loop.children[at] = child
        self._admit(child, hopeless)
        if self._loops.get(asked.id) is not loop:  # it ended while the child was made
            self._finish(child, State.CANCELLED, "its request ended")
        return child

    def _end(self, loop: Loop, child: Request, between: list[Message]) -> None:
        request = loop.request
        request.between, request.finish_reason = between, child.finish_reason
        for one in loop.children.values():
            request.usage.add(one.usage)
        self._finish(request, State.DONE, "")


def place(child: Request) -> str:
    return child.file.rpartition("/")[2]


def turn(prose: str, calls: list[toolcalls.Call], made: list[Request]) -> list[Message]:
    """What the assistant said and what came of it, as messages."""
    named = [
        {"id": f"call_{r.id}", "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
        for c, r in zip(calls, made, strict=True)
    ]
    said: Message = {"role": "assistant", "content": prose, "tool_calls": named}
    return [said, *({**result(r), "tool_call_id": f"call_{r.id}"} for r in made)]


def result(call: Request) -> Message:
    text = call.answer.text.rstrip("\n")
    if call.state is not State.DONE:
        text = "\n".join(filter(None, (text, f"error: {call.error}")))
    if len(text) > RESULT_CHARS:
        text = text[:RESULT_CHARS] + f"\n(cut after {RESULT_CHARS} characters)"
    return {"role": "tool", "content": text, "name": call.spec.model.removeprefix("tools/")}

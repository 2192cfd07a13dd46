"""The agent loop without a scheduler: the next step follows from the existing steps."""

from __future__ import annotations

import itertools
from pathlib import Path

from aiosd.access.caller import Caller
from aiosd.database.store import Store
from aiosd.handlers.loop.steps import Steps
from aiosd.handlers.table import SPECS
from aiosd.syscall.chat import GREEDY, Chat, Loop
from aiosd.syscall.request import Request, State
from aiosd.syscall.toolcall import ToolCall


class Requests:
    """Queues the steps of loops, and runs none."""

    def __init__(self) -> None:
        self.made: list[Request] = []
        self.new_id = itertools.count(2).__next__

    def admit(self, request: Request, hopeless: str) -> None:
        self.made.append(request)

    def finish(self, request: Request, state: State, error: str, code: str = "") -> bool:
        return True

    def call(self, caller: Caller, name: str, arguments: str, nice: int, agent: str) -> ToolCall:
        return ToolCall("calc", arguments, (0,))

    def away(self, request: Request, calls: list[Request]) -> None:
        pass


def test_text_before_a_call_is_shown_once_also_after_a_restart() -> None:
    """The reader sees the same text, in whatever state a new daemon finds the children."""
    said = ['Let me see. <tool_call>{"name": "calc"}</tool_call>', "It is <b>5</b>."]

    def run(known: int) -> str:
        queue = Requests()
        loops = Steps(queue)
        spec = Loop(({"role": "user", "content": "?"},), GREEDY, "m", steps=4, groups=(0,))
        request = Request(1, 0, "a", "", spec)
        chat, call = Chat((), GREEDY, "m"), ToolCall("calc", "{}", (0,))
        children = [
            Request(9 + i, 0, "a", f"/steps/{at}", asked, parent=1, state=State.DONE, text=text)
            for i, (at, asked, text) in enumerate(
                (("1", chat, said[0]), ("1.1", call, ""), ("2", chat, said[1]))
            )
        ]
        loops.begin(request, [], children[:known])
        for child, text in zip(queue.made, [said[0], "", said[1]][known:], strict=False):
            for i in range(1, len(text) + 1):
                child.text = text[:i]
                loops.said(child)
            child.state = State.DONE
            loops.child_ended(child)
        return request.text

    assert {run(known) for known in range(4)} == {"Let me see.\nIt is <b>5</b>."}


def test_the_steps_of_a_loop_that_goes_on_are_not_forgotten(tmp_path: Path) -> None:
    store = Store(tmp_path, SPECS)
    agent = store.add_agent("a", {})
    spec = Chat(({"role": "user", "content": "?"},), GREEDY, "m")
    loop = Request(1, 0, "a", "", spec, agent)
    store.add_request(loop)

    def end(request: Request) -> None:
        store.add_request(request)
        request.state, request.finished_s = State.DONE, 1.0
        store.finish_request(request, [], keep=2)

    for id in range(2, 9):
        end(Request(id, 0, "a", f"/steps/{id}", spec, agent, parent=1))
    assert [child.id for child in store.children(1)] == list(range(2, 9))
    end(loop)
    end(Request(9, 0, "a", "", spec, agent))
    assert len(store.request_ids(agent)) == 2
    store.close()

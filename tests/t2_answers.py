"""Thinking, calls and turns through a kernel and a real worker, of a model that says prepared texts."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from aiosd.kernel import Kernel
from aiosd.syscall.request import Request, State
from tests import parrot
from tests.t2_contexts import begin
from tests.t2_scheduler import MakeKernel, ask, ended

CALL = '<tool_call>{"name": "clock", "arguments": {"zone": "UTC"}}</tool_call>'
SCRIPTS = {
    "R": ["[THINK]", "I ponder.", "[/THINK]", "The answer is 4."],
    "Q": [f"<think>I could {CALL} but no</think>", "\n\nHello"],
    "T": ["One moment. ", CALL],
    "M": [CALL.replace("UTC", zone) for zone in ("A", "B", "C")],
    "J": ['{"name": "Ada", "parameters": {"age": 36}}'],
    ">": [f"and {CALL} no", *(f" {i}," for i in range(30)), "</think>Opened."],
    "N": ["<thi", "nking is", " <b>text</b>", " here"],
}
THOUGHT = "".join(SCRIPTS[">"][:-1])
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}]


SCRATCH = tempfile.TemporaryDirectory(prefix="parrot-")


@functools.cache
def folder(opened: bool) -> Path:
    """With `opened`, the prompt ends in the middle of thinking."""
    made = Path(SCRATCH.name) / f"parrot{opened:d}"
    last = "{{ messages[-1].content[-1:] }}"
    frame = parrot.FRAME.replace(
        last, "{% if messages[-1].content[-1:] == 'O' %}<think>{% else %}" + last + "{% endif %}"
    )
    return parrot.make(made, SCRIPTS, frame if opened else parrot.FRAME)


@pytest.fixture
def kernel(make_kernel: MakeKernel) -> Kernel:
    made = make_kernel(model=folder(False))
    made.start()
    return made


def said(kernel: Kernel, question: str, **more: Any) -> dict[str, Any]:
    """The message that answers a JSON request."""
    body = {"prompt": question, "max_tokens": 100, "ignore_eos": False, **more}
    request = ended(ask(kernel, json.dumps(body)))
    document: dict[str, Any] = json.loads(request.answer.text)
    assert request.state is State.DONE, document
    message: dict[str, Any] = document["choices"][0]["message"]
    return message


def text(kernel: Kernel, question: str, context: str = "") -> str:
    return ended(ask(kernel, question, context, ignore_eos=False, max_tokens=100)).answer.text


def test_thinking_is_told_apart_in_json_and_left_out_of_text(kernel: Kernel) -> None:
    assert said(kernel, "x R") == {
        "role": "assistant",
        "content": "The answer is 4.",
        "reasoning_content": "I ponder.",
    }
    assert text(kernel, "x R") == "The answer is 4.\n"
    assert text(kernel, "x N") == "<thinking is <b>text</b> here\n"


@pytest.mark.parametrize("question", ["x R", "x Q", "x N", "x O"])
def test_a_stream_has_the_thinking_and_the_text_of_the_whole_answer(
    make_kernel: MakeKernel, question: str
) -> None:
    kernel = make_kernel(model=folder(question == "x O"))
    kernel.start()
    whole = said(kernel, question)
    body = {"prompt": question, "max_tokens": 100, "ignore_eos": False, "stream": True}
    body["stream_options"] = {"include_usage": True}
    lines = ended(ask(kernel, json.dumps(body))).answer.text.splitlines()
    chunks = [json.loads(line) for line in lines]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(one.get("content", "") for one in deltas) == whole["content"]
    thought = "".join(one.get("reasoning_content", "") for one in deltas)
    assert thought == whole.get("reasoning_content", "")
    assert bool(thought) == (question != "x N")
    assert chunks[-1]["usage"]["completion_tokens"] > 0
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_call_in_thinking_goes_to_nobody(kernel: Kernel) -> None:
    message = said(kernel, "x Q", tools=TOOLS)
    assert message["content"] == "Hello"
    assert "tool_calls" not in message
    assert CALL in message["reasoning_content"]


def test_json_that_names_no_tool_is_the_answer(kernel: Kernel) -> None:
    assert said(kernel, "x J", tools=TOOLS) == {"role": "assistant", "content": SCRIPTS["J"][0]}


def test_parallel_tool_calls_false_ends_the_answer_behind_the_first_call(kernel: Kernel) -> None:
    free = said(kernel, "x M", tools=TOOLS)
    assert len(free["tool_calls"]) == 3, free
    request = ended(
        ask(
            kernel,
            json.dumps({"prompt": "x M", "tools": TOOLS, "parallel_tool_calls": False, "ignore_eos": False}),
        )
    )
    (choice,) = json.loads(request.answer.text)["choices"]
    assert len(choice["message"]["tool_calls"]) == 1


def test_the_next_turn_sees_the_answer_and_no_thinking(kernel: Kernel) -> None:
    begin(kernel)
    assert text(kernel, "x R", "talk") == "The answer is 4.\n"
    stored = kernel.contexts.messages(kernel.contexts.get("talk"))
    assert stored == [
        {"role": "user", "content": "x R"},
        {"role": "assistant", "content": "The answer is 4."},
    ]


def test_a_call_for_the_client_is_a_call_in_the_conversation(kernel: Kernel) -> None:
    begin(kernel)
    body = {"prompt": "x T", "tools": TOOLS, "max_tokens": 50, "ignore_eos": False}
    ended(ask(kernel, json.dumps(body), "talk"))
    _, answer = kernel.contexts.messages(kernel.contexts.get("talk"))
    assert answer["content"] == "One moment."
    assert answer["tool_calls"][0]["function"]["name"] == "clock"
    result = {"role": "tool", "tool_call_id": answer["tool_calls"][0]["id"], "content": "noon R"}
    request = ended(ask(kernel, json.dumps({"messages": [result], "max_tokens": 50}), "talk"))
    assert "The answer is 4." in request.answer.text


def test_a_system_message_in_every_turn_is_stored_once(kernel: Kernel) -> None:
    begin(kernel)
    system = {"role": "system", "content": "Be brief."}
    for question in ("x R", "y R"):
        body = {"messages": [system, {"role": "user", "content": question}], "max_tokens": 50}
        assert ended(ask(kernel, json.dumps(body), "talk")).state is State.DONE
    stored = kernel.contexts.messages(kernel.contexts.get("talk"))
    assert [one["role"] for one in stored] == ["system", "user", "assistant", "user", "assistant"]


def test_a_prompt_that_ends_in_thinking_begins_the_answer_there(make_kernel: MakeKernel) -> None:
    kernel = make_kernel(model=folder(True))
    kernel.start()
    message = said(kernel, "x O", tools=TOOLS)
    assert message == {"role": "assistant", "content": "Opened.", "reasoning_content": THOUGHT}
    cut = said(kernel, "x O", tools=TOOLS, max_tokens=1)
    assert cut == {"role": "assistant", "content": "", "reasoning_content": f"and {CALL} no"}


def test_an_answer_is_read_by_its_family_after_a_restart(make_kernel: MakeKernel) -> None:
    kernel = make_kernel(model=folder(False))
    kernel.start()
    request = ended(ask(kernel, "x Q", ignore_eos=False, max_tokens=50))
    kernel.stop()
    again = make_kernel(model=folder(False)).admission.get(request.id)
    assert (again.family, again.answer.text) == ("hermes", "Hello\n")


def test_a_moved_request_is_read_as_if_it_had_stayed(make_kernel: MakeKernel) -> None:
    kernel = make_kernel('[scheduler]\npolicy = "rr"\n[engine]\nmax_running = 1\n', model=folder(True))
    kernel.scheduler.quantum_tokens = 1
    kernel.start()
    for _ in range(50):  # an answer may be complete before its turn is over
        requests: list[Request] = [ask(kernel, "x O", ignore_eos=False) for _ in range(3)]
        assert [ended(one).answer.text for one in requests] == ["Opened.\n"] * 3
        if any(one.preemptions for one in requests):
            return
    raise AssertionError("no request was moved")

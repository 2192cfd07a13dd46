"""What aios-gateway(8) makes of requests and answers of OpenAI's Responses API, without a mount."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiosd.gateway.openai_completions import Choice
from aiosd.gateway.openai_input import KEYS, chat_of, items_of
from aiosd.gateway.openai_output import GrowingResponse, begun
from aiosd.gateway.openai_stored import ID, new_id
from aiosd.gateway.refused import HttpRefused
from aiosd.syscall.chat import Defaults, parse

Json = dict[str, Any]
USAGE = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
CALL = {"type": "function_call", "call_id": "call_1", "name": "calc", "arguments": "{}"}


def chat(**more: object) -> Json:
    return chat_of({"input": "hi"} | more)


def test_items_become_messages_and_each_answer_is_one() -> None:
    items = [
        {"role": "developer", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}],
        },
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Let me see."}]},
        CALL,
        CALL | {"call_id": "call_2"},
        {"type": "function_call_output", "call_id": "call_1", "output": "4"},
    ]
    said = chat_of({"input": items})["messages"]
    assert [one["role"] for one in said] == ["developer", "user", "assistant", "tool"]
    assert said[1]["content"] == "ab"
    assert (said[2]["content"], said[2]["reasoning_content"]) == ("Let me see.", "hm")
    assert [call["id"] for call in said[2]["tool_calls"]] == ["call_1", "call_2"]
    assert said[3] == {"role": "tool", "tool_call_id": "call_1", "content": "4"}


def test_keys_have_the_names_of_the_files() -> None:
    form = {
        "type": "json_schema",
        "name": "n",
        "schema": {"type": "integer"},
        "strict": True,
        "description": None,
    }
    made = chat(
        instructions="Be brief.", max_output_tokens=5, reasoning={"effort": "low"}, text={"format": form},
        tools=[{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}],
        tool_choice={"type": "function", "name": "f"}, include=["message.output_text.logprobs"],
    )  # fmt: skip
    assert made == {
        "messages": [{"role": "user", "content": "hi"}],
        "system": "Be brief.",
        "max_tokens": 5,
        "reasoning_effort": "low",
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "n", "schema": {"type": "integer"}, "strict": True},
        },
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "logprobs": True,
        "top_logprobs": 0,
    }  # fmt: skip
    asked = parse(json.dumps(made).encode(), Defaults("m", system="Of the agent."))
    assert (asked.system, asked.leads) == ("Be brief.", True)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "role", "content", "text", "name", "x"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(sorted(KEYS)), VALUES, max_size=4))
def test_whatever_is_sent_is_taken_or_refused(body: Json) -> None:
    try:
        made = chat_of({"input": "hi"} | body)
    except HttpRefused as refused:
        assert refused.status == 400
    else:
        begun("resp", body, True)
        json.dumps(made)


def grown(*choices: Json, finish: str = "stop") -> tuple[list[Json], Json]:
    growing = GrowingResponse(begun("resp_1", {"model": "m"}, True))
    events = list(growing.begin())
    for choice in choices:
        events += growing.push(choice)
    events += [*growing.end(finish, USAGE), growing.last()]
    return [json.loads(event.decode().split("data: ")[1]) for event in events], growing.response


def delta(**said: object) -> Json:
    return {"delta": said}


def test_thinking_text_and_calls_are_items_one_after_the_other() -> None:
    call = {"id": "call_1", "function": {"name": "calc", "arguments": "{}"}}
    events, response = grown(
        delta(reasoning_content="hm"), delta(content="Let "), delta(content="me."), delta(tool_calls=[call])
    )
    assert [item["type"] for item in response["output"]] == ["reasoning", "message", "function_call"]
    assert [e["output_index"] for e in events if e["type"] == "response.output_item.added"] == [0, 1, 2]
    assert [e["item"] for e in events if e["type"] == "response.output_item.done"] == response["output"]
    assert response["output"][1]["content"][0]["text"] == "Let me."
    assert events[-1] == {
        "type": "response.completed",
        "sequence_number": len(events) - 1,
        "response": response,
    }
    assert response["usage"]["input_tokens"] == 5


def test_an_answer_that_was_cut_off_is_incomplete_and_an_empty_one_is_a_message() -> None:
    events, response = grown(delta(content="Le"), finish="length")
    assert (events[-1]["type"], response["output"][0]["status"]) == ("response.incomplete", "incomplete")
    assert grown()[1]["output"][0]["content"][0]["text"] == ""


def test_a_conversation_is_shown_as_items() -> None:
    calls = [{"id": "call_1", "type": "function", "function": {"name": "calc", "arguments": "{}"}}]
    said: list[Json] = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_1", "content": "4"},
    ]
    items = items_of(said, new_id())
    assert [item["type"] for item in items] == ["message", "function_call", "function_call_output"]
    assert chat_of({"input": items})["messages"] == said


def test_ids_are_names_of_contexts_and_sort_by_time() -> None:
    assert ID.fullmatch(new_id())
    assert len(new_id()) <= 64


def test_logprobs_have_the_shape_of_completions() -> None:
    content = [
        {"token": t, "logprob": -1.0, "top_logprobs": [{"token": "x", "logprob": -0.5}]} for t in ("ab", "c")
    ]
    choice = Choice(3, "echo", 1)
    first = choice.of({"delta": {"content": "ab"}, "logprobs": {"content": content[:1]}})
    second = choice.of(
        {"delta": {"content": "c"}, "logprobs": {"content": content[1:]}, "finish_reason": "stop"}
    )
    assert (first["text"], second["text"], second["finish_reason"]) == ("echoab", "c", "stop")
    assert first["logprobs"]["top_logprobs"] == [{"x": -0.5}]
    assert (first["logprobs"]["text_offset"], second["logprobs"]["text_offset"]) == ([4], [6])


@pytest.mark.parametrize("key", ["messages", "system", "context", "tools", "tool_choice"])
def test_a_raw_prompt_is_all_that_the_model_gets(key: str) -> None:
    asked = parse(b'{"prompt": "x", "raw": true}', Defaults("m", "talk", "Be brief.", tools=({},), steps=3))
    assert (asked.kind, asked.context, asked.system, asked.tools) == ("llm", "", "", ())
    with pytest.raises(Exception, match=f"raw takes no {key}"):
        parse(json.dumps({"prompt": "x", "raw": True, key: "x"}).encode(), Defaults("m"))

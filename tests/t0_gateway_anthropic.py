"""What aios-gateway(8) makes of a request of Anthropic's API, and of the answer to it, without a mount."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiosd.gateway.aliases import alias, meant
from aiosd.gateway.anthropic import answer, errors
from aiosd.gateway.anthropic.answer import MessageShape
from aiosd.gateway.anthropic.request import request
from aiosd.gateway.client import Client
from aiosd.gateway.dialect import chat_file, model_file
from aiosd.gateway.refused import HttpRefused
from aiosd.gateway.sessions import SessionLink

Json = dict[str, Any]
TOOL = {"name": "add", "description": "Adds", "input_schema": {"type": "object"}}
CALL = {"type": "tool_use", "id": "c1", "name": "add", "input": {"a": 1}}
USAGE = {
    "prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13,
    "prompt_tokens_details": {"cached_tokens": 5},
}  # fmt: skip


def asked(*messages: Json, **more: object) -> Json:
    said = list(messages) or [{"role": "user", "content": "hi"}]
    return {"model": "tiny", "max_tokens": 9, "messages": said} | more


def test_a_conversation_with_tools_becomes_that_of_the_files() -> None:
    thought = [{"type": "thinking", "thinking": "easy", "signature": "x"}, {"type": "redacted_thinking"}]
    cached = {"cache_control": {"type": "ephemeral"}}
    results = [
        {
            "type": "tool_result",
            "tool_use_id": "c1",
            "content": [{"type": "text", "text": "no"}],
            "is_error": True,
        },
        {"type": "tool_result", "tool_use_id": "c1"},
        {"type": "text", "text": "go on", **cached},
    ]
    made = request(
        asked(
            {"role": "user", "content": "one"},
            {"role": "user", "content": [{"type": "text", "text": "two"}]},
            {"role": "assistant", "content": [*thought, {"type": "text", "text": "I add"}]},
            {"role": "assistant", "content": [CALL]},
            {"role": "user", "content": results},
            system=[
                {"type": "text", "text": "x-anthropic-billing-header: a=1"},
                {"type": "text", "text": "S", **cached},
            ],
        ),
        agent=False,
    )
    function = {"name": "add", "arguments": '{"a": 1}'}
    assert made["messages"] == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "one\ntwo"},
        {
            "role": "assistant",
            "content": "I add",
            "reasoning_content": "easy",
            "tool_calls": [{"id": "c1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "c1", "name": "add", "content": "Error: no"},
        {"role": "tool", "tool_call_id": "c1", "name": "add", "content": ""},
        {"role": "user", "content": "go on"},
    ]


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        (
            {"stop_sequences": ["a"], "top_k": 4},
            {"stop": ["a"], "top_k": 4, "max_tokens": 9, "stream": False},
        ),
        (
            {"stop_sequences": [], "metadata": {"user_id": "u"}, "service_tier": "auto"},
            {"enable_thinking": False},
        ),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, {"enable_thinking": True}),
        ({"thinking": {"type": "disabled"}, "stream": True}, {"enable_thinking": False, "stream": True}),
        ({"tools": [TOOL], "tool_choice": {"type": "any"}}, {"tool_choice": "required"}),
        (
            {"tools": [TOOL], "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
            {"tool_choice": "auto", "parallel_tool_calls": False},
        ),
        (
            {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "add"}},
            {"tool_choice": {"type": "function", "function": {"name": "add"}}},
        ),
        (
            {
                "output_config": {
                    "effort": "max",
                    "format": {"type": "json_schema", "schema": {"type": "null"}},
                }
            },
            {
                "reasoning_effort": "xhigh",
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "answer", "schema": {"type": "null"}},
                },
            },
        ),
    ],
)
def test_what_a_request_asks_for_is_asked_of_the_files(more: Json, wanted: Json) -> None:
    made = request(asked(**more), agent=False)
    assert {key: made.get(key) for key in wanted} == wanted
    assert not {"metadata", "stop_sequences", "system"} & made.keys()
    if "tools" in more:
        function = {"name": "add", "description": "Adds", "parameters": {"type": "object"}}
        assert made["tools"] == [{"type": "function", "function": function}]


def test_an_agent_keeps_its_own_settings() -> None:
    assert request(asked(), agent=True).keys() == {"messages", "max_tokens", "stream"}


def block(**keys: object) -> Json:
    return {"role": "user", "content": [keys]}


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (asked(max_tokens=None), "max_tokens"),
        (asked(max_tokens=True), "max_tokens"),
        (asked(messages=[]), "messages"),
        (asked({"role": "tool", "content": "x"}), "messages.0.role"),
        (asked({"role": "user"}), "messages.0.content"),
        (asked(block(type="image", source={})), "an image"),
        (asked(block(type="document", source={"type": "base64"})), "a file"),
        (asked(block(type="text", text=5)), "messages.0.content.0.text"),
        (asked(block(type="tool_result", tool_use_id="c1")), "no tool_use"),
        (asked(block(type=["text"])), "messages.0.content.0"),
        (asked({"role": "user", "content": "x"}, {"role": "assistant", "content": "{"}), "last one"),
        (asked({"role": "assistant", "content": [CALL | {"input": "x"}]}), "input"),
        (asked(tools=[{"type": "web_search_20250305", "name": "web_search"}]), "only Anthropic"),
        (asked(tools=[{"name": "add"}]), "input_schema"),
        (asked(tool_choice="auto"), "tool_choice"),
        (asked(tool_choice={"type": ["auto"]}), "tool_choice"),
        (asked(thinking=True), "thinking"),
        (asked(thinking={"type": "enabled", "budget_tokens": "x"}), "budget"),
        (asked(output_config={"effort": ["high"]}), "effort"),
        (asked(output_config={"format": {"type": "json_object"}}), "format"),
        (asked(stream="yes"), "stream"),
        (asked(mcp_servers=[{"url": "x"}]), "mcp_servers"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(body: Json, word: str) -> None:
    with pytest.raises(HttpRefused) as refused:
        request(body, agent=False)
    assert refused.value.status == 400
    assert word in refused.value.reason


WORDS = ["text", "tool_use", "tool_result", "thinking", "user", "assistant", "enabled", "any"]
NAMES = ["type", "role", "content", "text", "name", "input", "id", "tool_use_id", "source"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=12,
)
KEYS = ("messages", "system", "tools", "tool_choice", "thinking", "output_config", "stop_sequences", "stream")


@given(st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4), st.lists(JSON, max_size=3))
def test_whatever_comes_is_a_request_or_is_refused(more: Json, said: list[Any]) -> None:
    body = asked(**more) if "messages" in more else asked() | more | {"messages": said}
    try:
        made = request(body, agent=False)
    except HttpRefused as refused:
        assert refused.status == 400
    else:
        assert all(isinstance(one["content"], str) for one in made["messages"])


def chunk(finish: str | None = None, **delta: object) -> bytes:
    choice: Json = {"index": 0, "delta": {"role": "assistant", **delta}, "finish_reason": finish}
    made: Json = {"id": "aios-7", "choices": [choice]} | ({"usage": USAGE} if finish else {})
    return json.dumps(made).encode() + b"\n"


def streamed(*lines: bytes, thinks: bool = True) -> list[Json]:
    async def given() -> AsyncIterator[bytes]:
        for line in lines[1:]:
            yield line

    async def first_of_all() -> bytes:
        return lines[0]

    async def collect() -> bytes:
        made = answer.events(first_of_all(), given(), "aios-7", MessageShape("tiny", thinks, 9))
        return b"".join([part async for part in made])

    *events, rest = asyncio.run(collect()).decode().split("\n\n")
    assert rest == ""
    found = list[Json]()
    for event in events:
        name, data = event.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def read(events: list[Json]) -> list[Json]:
    """The content as a client puts it together. Asserts that the events are in order."""
    content, opened = list[Json](), False
    for event in events:
        match event["type"]:
            case "content_block_start":
                assert not opened
                assert event["index"] == len(content)
                content.append(dict(event["content_block"]))
                opened = True
            case "content_block_delta":
                assert opened
                assert event["index"] == len(content) - 1
                delta = dict(event["delta"])
                kind = delta.pop("type")
                ((key, value),) = delta.items()
                if kind == "input_json_delta":
                    content[-1]["input"] = json.loads(value)
                else:
                    content[-1][key] += value
            case "content_block_stop":
                assert opened
                opened = False
    assert not opened
    return content


CALLS = [
    {"id": f"call_7_{i}", "type": "function", "function": {"name": "add", "arguments": f'{{"a": {i}}}'}}
    for i in range(2)
]


@pytest.mark.parametrize("thinks", [True, False])
def test_a_stream_is_the_message_in_parts(thinks: bool) -> None:
    lines = [
        chunk(reasoning_content="ea"),
        chunk(reasoning_content="sy"),
        chunk(content="I "),
        chunk(content="add"),
        chunk("tool_calls", tool_calls=CALLS),
    ]
    said = {"content": "I add", "reasoning_content": "easy", "tool_calls": CALLS}
    document = {
        "id": "aios-7",
        "choices": [{"message": said, "finish_reason": "tool_calls"}],
        "usage": USAGE,
    }
    whole = answer.whole(document, MessageShape("tiny", thinks, 9))
    events = streamed(*lines, thinks=thinks)
    assert read(events) == whole["content"]
    assert [one["type"] for one in whole["content"]] == ["thinking"] * thinks + [
        "text",
        "tool_use",
        "tool_use",
    ]
    assert [event["type"] for event in events[:2]] == ["message_start", "ping"]
    assert sum(event["type"] == "ping" for event in events) == 1
    delta, stop = events[-2:]
    assert stop == {"type": "message_stop"}
    assert delta["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert delta["usage"] == whole["usage"]
    assert whole["usage"]["input_tokens"] == 4
    assert whole["usage"]["cache_read_input_tokens"] == 5
    assert whole.keys() == events[0]["message"].keys()


@pytest.mark.parametrize(
    ("choice", "most", "reason", "stopped"),
    [
        ({"finish_reason": "stop"}, 9, "end_turn", None),
        ({"finish_reason": "stop", "stop_reason": "END"}, 9, "stop_sequence", "END"),
        ({"finish_reason": "length"}, 4, "max_tokens", None),
        ({"finish_reason": "length"}, 9, "model_context_window_exceeded", None),
    ],
)
def test_a_message_says_why_it_ended(choice: Json, most: int, reason: str, stopped: str | None) -> None:
    document = {"id": "aios-7", "choices": [{"message": {"content": ""}, **choice}], "usage": USAGE}
    whole = answer.whole(document, MessageShape("tiny", False, most))
    assert (whole["stop_reason"], whole["stop_sequence"]) == (reason, stopped)
    assert whole["content"] == [{"type": "text", "text": ""}]


def test_a_stream_that_fails_or_breaks_off_says_so() -> None:
    failed = b'{"error":{"message":"the worker died","type":"failed","request":7}}\n'
    *_, last = streamed(chunk(content="a"), failed)
    assert last == {"type": "error", "error": {"type": "api_error", "message": "the worker died"}}
    assert [event["type"] for event in streamed(failed)] == ["message_start", "ping", "error"]
    *_, last = streamed(chunk(content="a"))
    assert last["error"]["type"] == "overloaded_error"


def test_a_prompt_that_is_too_long_is_told_in_the_words_that_clients_look_for() -> None:
    shape = errors.shape(HttpRefused(400, "5 tokens", "context_length_exceeded"))
    assert shape["error"] == {"type": "invalid_request_error", "message": "prompt is too long: 5 tokens"}


def test_a_client_that_wants_a_thread_learns_to_do_without() -> None:
    with pytest.raises(HttpRefused) as refused:
        request(asked(thread={"type": "create"}), agent=False)
    details = errors.shape(refused.value)["error"]["details"]
    assert details == {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}


def test_an_alias_is_the_first_that_fits() -> None:
    aliases = [alias("claude-*haiku*=small"), alias("claude-*=agent:coder")]
    assert meant(aliases, "claude-3-5-haiku-latest") == "small"
    assert meant(aliases, "claude-opus-4") == "agent:coder"
    assert meant(aliases, "tiny") == "tiny"
    assert meant(aliases, ["claude-"]) == ["claude-"]
    for wrong in ("x", "=x", "x="):
        with pytest.raises(ValueError, match="PATTERN=NAME"):
            alias(wrong)


def test_an_alias_names_a_model_to_ask_and_none_to_change() -> None:
    async def no_session() -> SessionLink:
        raise AssertionError

    client = Client(1000, "", no_session, aliases=[alias("claude-*=tiny")])
    assert chat_file(client, "claude-x") == "models/tiny/llm"
    assert model_file(client, "claude-x", "ctl") == "models/claude-x/ctl"

"""What aios-gateway(8) makes of AIOS's wire contract, without a mount."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiosd.gateway import aios_agents, aios_query
from aiosd.gateway.aios_errors import AsciiResponse, failure, refusal
from aiosd.gateway.refused import HttpRefused

Json = dict[str, Any]
TEXT = st.text(st.characters(categories=["L", "N", "P", "Cs", "Cc"]), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
KEYS = ("messages", "tools", "llms", "action_type", "temperature", "max_new_tokens", "response_format")


def read(**asked: object) -> Json:
    return aios_query.read_llm({"messages": [{"role": "user", "content": "hi"}]} | asked)


@given(st.dictionaries(st.sampled_from(KEYS), VALUES))
def test_a_query_is_a_request_or_its_form_is_wrong(asked: Json) -> None:
    try:
        read = aios_query.read_llm(asked)
    except HttpRefused as refused:
        assert refused.status == 422
        assert json.loads(bytes(refusal(refused).body))["detail"][0]["loc"][:2] == ["body", "query_data"]
    else:
        for entry in read.get("llms") or [{}]:
            assert json.loads(aios_query.written(aios_query.request(read, entry)))["messages"] is not None


def test_the_settings_of_a_query_count() -> None:
    asked = read(temperature=0.3, max_new_tokens=7, response_format={"type": "json_schema"})
    found = aios_query.request(asked, {})
    assert {
        "temperature": 0.3,
        "max_tokens": 7,
        "response_format": {"type": "json_schema"},
    }.items() <= found.items()
    assert "model" not in found
    llm = {"name": "tiny", "backend": "x", "temperature": 0.9, "max_tokens": 5, "top_p": None}
    found = aios_query.request(asked, llm)
    assert (found["model"], found["temperature"], found["max_tokens"]) == ("tiny", 0.9, 5)
    assert "top_p" not in found


@pytest.mark.parametrize("asked", [{"action_type": "chat_with_json_output"}, {"message_return_type": "json"}])
def test_json_is_wanted_in_two_ways(asked: Json) -> None:
    assert aios_query.request(read(**asked), {})["response_format"] == {"type": "json_object"}
    assert "response_format" not in aios_query.request(read(), {})


def test_two_answers_differ() -> None:
    assert aios_query.request(read(), {})["seed"] != aios_query.request(read(), {})["seed"]


def test_a_call_gets_the_name_back_that_its_tool_has_in_aios() -> None:
    asked = read(tools=[{"name": "a/b_c"}, {"type": "function", "function": {"name": "d__e"}}])
    names = [tool["function"]["name"] for tool in aios_query.request(asked, {})["tools"]]
    assert names == ["a__b_c", "d__e"]
    calls = [{"id": "c", "function": {"name": name, "arguments": '{"x": 1}'}} for name in names]
    document = {"choices": [{"message": {"content": None, "tool_calls": calls}}]}
    found = aios_query.said(document, asked["tools"])["tool_calls"]
    assert [call["name"] for call in found] == ["a/b_c", "d__e"]
    assert found[0]["parameters"] == {"x": 1}


@pytest.mark.parametrize("text", ["{", '{"a": NaN}', "[" * 100_000])
def test_what_a_program_prints_that_is_no_json_stays_text(text: str) -> None:
    assert aios_agents.result(text) == text


def test_a_lone_surrogate_of_a_program_is_sent_as_it_was() -> None:
    body = AsciiResponse({"result": aios_agents.result('{"a": "\\ud800"}')}).body
    assert json.loads(bytes(body)) == {"result": {"a": "\ud800"}}


@pytest.mark.parametrize("kind", ["llm", "tool", "storage", "memory"])
def test_each_class_has_its_own_failure(kind: str) -> None:
    found = failure(kind, HttpRefused(404, "it is not here"))
    assert (found["response_class"], found["error"]) == (kind, "it is not here")
    assert ("success" in found) == (kind == "memory")
    assert found.get("status_code") == (None if kind == "memory" else 404)

"""Requests as bytes: the valid ones, the refused ones and their error texts."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiosd.errors import BadRequest
from aiosd.syscall.chat import Chat, Defaults, Loop, as_asked, parse
from aiosd.syscall.foreign import VALUES_MAX, NotJson, parsed_bytes, read_json, values_of
from aiosd.syscall.openai_keys import NO_EFFECT, REFUSED
from aiosd.syscall.sampling import Sampling

DEFAULTS = Defaults(model="m", system="be brief", nice=3, sampling=Sampling(max_tokens=9))


def parse_json(**keys: object) -> Chat:
    document = {"messages": [{"role": "user", "content": "x"}], **keys}
    return parse(json.dumps(document).encode(), DEFAULTS)


def schema(of: object) -> dict[str, object]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": of}}


USER = {"role": "user", "content": "x"}
TEXT = {"type": "text", "text": "x"}
ANY_OBJECT = {"type": "object"}
F = {"type": "function", "function": {"name": "f"}}


def called(**more: object) -> dict[str, Any]:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}, **more}
    return {"role": "assistant", "tool_calls": [call]}


def test_text_is_one_user_message_without_its_last_newline() -> None:
    spec = parse(b"two\nlines\n", DEFAULTS)
    assert spec.messages == ({"role": "user", "content": "two\nlines"},)
    assert (spec.model, spec.system, spec.nice, spec.sampling.max_tokens) == ("m", "be brief", 3, 9)
    assert not spec.json


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"\xff\xfe", "byte 0 is not UTF-8"),
        (b" \n", "empty"),
        (b"a\0b", "NUL"),
        (b"{", "not JSON"),
        (b"{} x", "not JSON"),
        (b"{}", "messages is missing"),
        (b'{"messages":[]}', "messages is missing"),
        (b'{"messages":[{"role":"robot","content":"x"}]}', r"messages\[0\] needs a role"),
        (b'{"messages":[{"role":"user","content":5}]}', "content must be text"),
        (b'{"messages":[{"role":"user","content":[{"image":1}]}]}', "may only have text parts"),
    ],
)
def test_a_bad_request_says_what_is_wrong(body: bytes, reason: str) -> None:
    with pytest.raises(BadRequest, match=reason):
        parse(body, DEFAULTS)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("top_p", 2),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("seed", 1 << 63),
        ("stop", [""]),
        ("stop", ["x"] * 17),
        ("stop", 7),
        ("nice", 20),
        ("nice", True),
        ("n", 2),
        ("n", 0),
        ("min_p", 1.5),
        ("frequency_penalty", 2.1),
        ("presence_penalty", "much"),
        ("repetition_penalty", 0),
        ("logit_bias", [1]),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"1e3": 1}),
        ("logit_bias", {"007": 1}),
        ("logit_bias", {"7": 101}),
        ("logit_bias", {"7": True}),
        ("logit_bias", {str(i): 1 for i in range(1025)}),
        ("modalities", ["text", "audio"]),
        ("functions", [{"name": "f"}]),
        ("function_call", "auto"),
        ("audio", {"voice": "alloy"}),
        ("web_search_options", {"search_context_size": "low"}),
        ("stream", "yes"),
        ("tools", [{"name": "x"}]),
        ("tools", {}),
        ("logprobs", 21),
        ("model", 5),
        ("response_format", {"type": "json_schema"}),
        ("response_format", {"type": "xml"}),
        ("response_format", "json"),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": "x"}}),
        ("response_format", schema({"type": "nonsense"})),
        ("response_format", schema({"not": {"minimum": 3}})),
        ("response_format", schema({"type": "string", "pattern": "("})),
        ("response_format", schema({"type": "string", "pattern": "(?=a)b"})),
        ("response_format", schema({"$ref": "#/$defs/none"})),
        ("response_format", schema({"type": "object", "properties": {"a": False}, "required": ["a"]})),
        ("response_format", schema({"enum": ["x" * 70_000]})),
        ("response_format", schema({"not": {}, "x-guidance": {"lenient": True}})),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}),
        ("tool_choice", 5),
        ("nonsense", 1),
    ],
)
def test_a_bad_parameter_is_refused_by_its_name(key: str, value: object) -> None:
    if value == {}:
        value = {"a": 1}
    with pytest.raises(BadRequest, match=key):
        parse_json(**{key: value})


def test_parameters_of_the_request_win_over_the_agents() -> None:
    spec = parse_json(max_tokens=5, temperature=1, stop="END", seed=7, nice=-5, model="other", context="c")
    assert spec.sampling == Sampling(max_tokens=5, temperature=1.0, stop=("END",), seed=7)
    assert (spec.nice, spec.model, spec.context) == (-5, "other", "c")


def test_penalties_are_kept_by_their_openai_names() -> None:
    keys = {"frequency_penalty": 1, "presence_penalty": -2, "repetition_penalty": 1.5, "min_p": 0.1}
    s = parse_json(**keys, logit_bias={"7": -100, "40": 2.5}).sampling
    assert s == Sampling(
        max_tokens=9, frequency_penalty=1.0, presence_penalty=-2.0, repetition_penalty=1.5, min_p=0.1,
        logit_bias={"7": -100.0, "40": 2.5},
    )  # fmt: skip
    assert s.penalises
    assert not parse_json(
        repetition_penalty=1, frequency_penalty=0, logit_bias={}, min_p=0.5
    ).sampling.penalises


def test_keys_that_do_not_change_the_answer_have_no_effect() -> None:
    ignored = {
        "metadata": {"job": "7"}, "modalities": ["text"], "n": 1, "prediction": {"content": "x"},
        "prompt_cache_key": "k", "prompt_cache_retention": "24h", "safety_identifier": "s",
        "service_tier": "auto", "store": True, "stream_options": {"include_usage": True}, "user": "u",
        "verbosity": "low",
    }  # fmt: skip
    assert set(ignored) == set(NO_EFFECT)
    assert parse_json(**ignored) == parse_json()
    silent = dict.fromkeys((*NO_EFFECT, *REFUSED)) | {"functions": []}
    assert parse_json(**silent) == parse_json()


def test_a_key_that_cannot_be_honoured_is_refused_with_the_remedy() -> None:
    asked = {"n": 3, "modalities": ["audio"], "functions": [{"name": "f"}], "function_call": {"name": "f"}}
    asked |= {"audio": {"voice": "alloy"}, "web_search_options": {"search_context_size": "low"}}
    for key, value in asked.items():
        with pytest.raises(BadRequest) as caught:
            parse_json(**{key: value})
        assert caught.value.hint


def test_text_parts_become_one_text_and_developer_is_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    spec = parse_json(messages=[{"role": "developer", "content": parts}])
    assert spec.messages == ({"role": "system", "content": "ab"},)


def test_logprobs_are_asked_for_as_openai_does() -> None:
    assert parse_json().sampling.logprobs is None
    assert parse_json(logprobs=True).sampling.logprobs == 0
    assert parse_json(logprobs=True, top_logprobs=4).sampling.logprobs == 4
    assert parse_json(logprobs=False).sampling.logprobs is None


@given(st.binary(max_size=200))
def test_any_bytes_are_a_request_or_a_bad_request(body: bytes) -> None:
    try:
        parse(body, DEFAULTS)
    except BadRequest as error:
        assert str(error)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda c: st.lists(c) | st.dictionaries(st.text(), c),
)


@given(st.dictionaries(st.sampled_from(["messages", "tools", "stop", "seed", "stream", "temperature"]), JSON))
def test_any_json_is_a_request_or_a_bad_request(document: dict[str, object]) -> None:
    try:
        parse(json.dumps(document).encode(), DEFAULTS)
    except BadRequest as error:
        assert str(error)


@given(st.text(max_size=40), st.integers(0, 200))
def test_every_beginning_of_a_json_request_is_seen_as_unfinished(text: str, cut: int) -> None:
    """Otherwise a client that writes in pieces would fail in the middle."""
    whole = json.dumps({"messages": [{"role": "user", "content": text}]})
    part = whole[: 1 + cut % (len(whole) - 1)]
    if part[-1] in "}\n":  # Draft asks only then
        with pytest.raises(NotJson) as caught:
            parse(part.encode(), DEFAULTS)
        assert caught.value.incomplete


@pytest.mark.parametrize("body", [b"{nonsense\n", b'{"a" 1}', b'{"messages": }', b"{]}"])
def test_bytes_that_cannot_become_json_are_not_waited_on(body: bytes) -> None:
    with pytest.raises(NotJson) as caught:
        parse(body, DEFAULTS)
    assert not caught.value.incomplete


@pytest.mark.parametrize("choice", ["auto", "required", F])
def test_a_spec_survives_the_store_and_being_asked_again(choice: object) -> None:
    form = schema({"type": "integer", "$comment": "größer"})
    spec = parse_json(
        logit_bias={"5": 1},
        min_p=0.5,
        frequency_penalty=0.1,
        stop=["a", "b"],
        tools=[F],
        deadline_s=3,
        tool_choice=choice,
        response_format=form,
        model="m",
    )
    raw = json.loads(spec.dump())
    assert raw.pop("kind") == "llm"
    assert Chat.load(raw) == spec
    again = parse(json.dumps(as_asked(spec)).encode(), dataclasses.replace(DEFAULTS, nice=3))
    assert dataclasses.replace(again, deadline_s=3) == spec


def test_tool_choice_is_auto_or_one_of_the_tools() -> None:
    assert parse_json(tools=[F]).tool_choice == "auto"
    assert parse_json(tools=[F], tool_choice="none").tools == ()
    assert parse_json(tools=[F], tool_choice=F).tool_choice == "function f"
    with pytest.raises(BadRequest, match="one of tools"):
        parse_json(tools=[F], tool_choice={"type": "function", "function": {"name": "g"}})
    agents = dataclasses.replace(DEFAULTS, tools=(F,), steps=3)
    body = b'{"messages":[{"role":"user","content":"x"}],"tool_choice":"required"}'
    loop = parse(body, agents)
    assert isinstance(loop, Loop)
    assert (loop.tool_choice, loop.steps) == ("required", 3)


def test_any_json_object_and_any_text_need_no_schema() -> None:
    assert parse_json(response_format={"type": "text"}).schema == ""
    assert json.loads(parse_json(response_format={"type": "json_object"}).schema) == {"type": "object"}


def test_a_schema_beside_json_object_counts() -> None:
    form = {"type": "json_object", "schema": {"type": "object", "required": ["n"], "properties": {"n": {}}}}
    assert json.loads(parse_json(response_format=form).schema) == form["schema"]
    assert json.loads(parse_json(response_format={"type": "json_object", "schema": {}}).schema) == ANY_OBJECT


NESTED: list[tuple[str, dict[str, Any]]] = [
    (
        "response_format: unknown key 'shcema'",
        {"response_format": {"type": "json_object", "shcema": {"a": 1}}},
    ),
    (
        "response_format: unknown key 'json_schema'",
        {"response_format": {"type": "text", "json_schema": {"a": 1}}},
    ),
    (
        r"response_format.json_schema: unknown key 'strct'",
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strct": False}}},
    ),
    (
        "strict must be true or false",
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strict": 1}}},
    ),
    (
        r"messages\[0\]: unknown key 'images'",
        {"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]},
    ),
    (r"messages\[1\]: unknown key 'contnet'", {"messages": [USER, {**USER, "contnet": "y"}]}),
    (
        r"messages\[0\].content\[1\]: unknown key 'cache_control'",
        {"messages": [{"role": "user", "content": [TEXT, {**TEXT, "cache_control": {"type": "ephemeral"}}]}]},
    ),
    (
        r"content\[1\] is an image, and models here read only text",
        {"messages": [{"role": "user", "content": [TEXT, {"type": "image_url", "image_url": {"url": "x"}}]}]},
    ),
    (
        "may only have text parts",
        {"messages": [{"role": "user", "content": [{**TEXT, "type": "smell"}]}]},
    ),
    (r"messages\[0\].tool_calls\[0\]: unknown key 'args'", {"messages": [called(args={"a": 1})]}),
    (
        r"messages\[0\].tool_calls\[0\].function: unknown key 'argumnets'",
        {"messages": [called(function={"name": "f", "argumnets": "{}"})]},
    ),
    (
        r"messages\[0\].tool_calls\[0\] must be an object",
        {"messages": [{"role": "assistant", "tool_calls": ["f"]}]},
    ),
    (r"tools\[0\]: unknown key 'parameters'", {"tools": [{**F, "parameters": {"type": "object"}}]}),
    (r"tools\[0\] must be a function", {"tools": [{**F, "type": "web_search"}]}),
    ("tool_choice: unknown key 'name'", {"tools": [F], "tool_choice": {**F, "name": "f"}}),
    ("prompt and messages", {"prompt": "x", "messages": [USER]}),
]


@pytest.mark.parametrize(("reason", "keys"), NESTED)
def test_an_unknown_key_is_refused_at_any_depth(reason: str, keys: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match=reason):
        parse_json(**keys)


def test_what_says_nothing_is_no_unknown_key() -> None:
    """Programs send back the message that they got, with all its keys."""
    answer: dict[str, Any] = {
        "role": "assistant",
        "content": "y",
        "refusal": None,
        "annotations": [],
        "audio": None,
    }
    answer |= {"function_call": None, "tool_calls": None, "reasoning": "so"}
    spec = parse_json(messages=[USER, answer, USER])
    assert spec.messages[1] == {"role": "assistant", "content": "y", "reasoning_content": "so"}
    streamed = called(index=0, function={"name": "f", "arguments": "{}"})
    assert parse_json(messages=[streamed]).messages[0]["tool_calls"] == called()["tool_calls"]


def test_all_that_a_function_says_goes_to_the_chat_template() -> None:
    tool = {"type": "function", "function": {"name": "f", "strict": True, "examples": [1]}}
    assert parse_json(tools=[tool]).tools == (tool,)


@pytest.mark.parametrize("wrap", ["items", "anyOf", "allOf"])
def test_a_chain_of_references_that_would_overflow_the_stack_is_refused(wrap: str) -> None:
    def link(i: int) -> dict[str, object]:
        to: object = {"$ref": f"#/$defs/{i}"}
        return {wrap: to if wrap == "items" else [to, {"type": "string"}]}

    deep = {"$ref": "#/$defs/0", "$defs": {str(i): link(i + 1) for i in range(500)}}
    with pytest.raises(BadRequest, match="its depth times its references"):
        parse_json(response_format=schema(deep))


def test_what_refuses_a_schema_says_why() -> None:
    with pytest.raises(BadRequest, match='no answer can be made by "not"'):
        parse_json(response_format=schema({"not": {"minimum": 3}}))


@pytest.mark.parametrize(
    "body",
    [
        b'{"messages":[{"role":"user","content":"x \\ud800"}]}',
        b'{"messages":[{"role":"user","content":"x"}],"model":"\\ud800"}',
        b'{"messages":[{"role":"user","content":"x"}],"tools":[{"function":{"name":"f","\\ud800":1}}]}',
        b'{"messages":' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"seed":' + b"9" * 10_000 + b"}",
    ],
    ids=["text", "model", "key", "depth", "digits"],
)
def test_json_that_later_code_could_choke_on_is_refused(body: bytes) -> None:
    with pytest.raises(NotJson) as caught:
        parse(body, DEFAULTS)
    assert not caught.value.incomplete


def test_a_reason_quotes_no_more_than_a_line_of_a_hostile_request() -> None:
    with pytest.raises(BadRequest) as caught:
        parse_json(**{"x" * 1_000_000: 1})
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("NaN", "NaN is not a number"),
        ("-Infinity", "not a number"),
        ("1e999", "too large"),
        ("-1e999", "too large"),
        ("18446744073709551616", "64 bits"),
        ("-9223372036854775809", "64 bits"),
        ("1" * 5000, "64 bits"),
        ('{"a":1,"b":2,"a":3}', "'a' stands twice"),
        ('"\\ud800"', "surrogate"),
        ("[" * 70 + "]" * 70, "deeper"),
    ],
)
@pytest.mark.parametrize(
    "place", ['{"x":%s}', '{"messages":[{"role":"user","content":"x","tool_calls":[%s]}]}']
)
def test_json_that_only_python_accepts_is_refused(value: str, why: str, place: str) -> None:
    with pytest.raises(NotJson, match=why) as caught:
        parse((place % value).encode(), DEFAULTS)
    assert not caught.value.incomplete


@pytest.mark.parametrize("value", ["18446744073709551615", "-9223372036854775808", "1e308", "-0.0", "0"])
def test_numbers_of_64_bits_are_json(value: str) -> None:
    assert repr(read_json(value)) == repr(json.loads(value))


@pytest.mark.parametrize("before", [b"", b" ", b"\n\t\r\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf \n"])
def test_blanks_and_a_byte_order_mark_before_json_leave_it_json(before: bytes) -> None:
    asked = parse(before + b'{"prompt":"x"}', DEFAULTS)
    assert (asked.json, asked.messages) == (True, ({"role": "user", "content": "x"},))


def test_a_byte_order_mark_is_no_part_of_a_text() -> None:
    assert parse("\ufeffhello".encode(), DEFAULTS).messages[0]["content"] == "hello"


def test_variables_of_the_chat_template_are_taken_and_kept() -> None:
    base = Defaults("tiny", template={"enable_thinking": True, "tone": "dry"}, parallel=False)
    body = {
        "prompt": "x",
        "chat_template_kwargs": {"tone": "warm", "n": 1},
        "enable_thinking": False,
        "reasoning_effort": "low",
    }
    spec = parse(json.dumps(body).encode(), base)
    assert spec.template == {"tone": "warm", "n": 1, "enable_thinking": False, "reasoning_effort": "low"}
    assert not spec.parallel
    raw = json.loads(spec.dump())
    assert raw.pop("kind") == "llm"
    assert Chat.load(raw) == spec
    again = parse(json.dumps(as_asked(spec)).encode(), Defaults("tiny"))
    assert (again.template, again.parallel) == (spec.template, False)
    assert parse(b'{"prompt": "x", "parallel_tool_calls": true}', base).parallel


@pytest.mark.parametrize(
    "more",
    [
        {"chat_template_kwargs": []},
        {"chat_template_kwargs": {"messages": []}},
        {"chat_template_kwargs": {"chat_template": "x"}},
        {"chat_template_kwargs": {"add_generation_prompt": False}},
        {"enable_thinking": "no"},
        {"reasoning_effort": "much"},
        {"parallel_tool_calls": 1},
        {"messages": [{"role": "assistant", "content": "x", "reasoning_content": 5}]},
        {"messages": [{"role": "tool", "content": "x", "name": {}}]},
    ],
)
def test_wrong_values_of_them_are_refused(more: dict[str, Any]) -> None:
    with pytest.raises(BadRequest):
        parse(json.dumps({"messages": [{"role": "user", "content": "x"}], **more}).encode(), Defaults("tiny"))


def test_json_of_very_many_values_is_refused_before_it_is_parsed() -> None:
    lists = '{"messages":[' + ",".join(["[]"] * (VALUES_MAX + 1)) + "]"  # has no end
    for text in (lists, '["' + '","'.join(["a"] * (VALUES_MAX + 1)), "[" * (VALUES_MAX + 1)):
        with pytest.raises(NotJson, match="100000 values"):
            read_json(text)
    keys = ",".join(f'"{i}":[{i}]' for i in range(VALUES_MAX // 2 - 10))
    assert len(read_json("{" + keys + "}")) == VALUES_MAX // 2 - 10


@pytest.mark.parametrize("ends", ["", chr(92) * 2, chr(92) + '"'])
def test_what_is_in_a_string_is_no_value(ends: str) -> None:
    table = "1,2,[3]{4}" * VALUES_MAX + ends
    assert len(read_json('{"prompt": "' + table + '"}')["prompt"]) >= len(table) - 1
    assert values_of('{"prompt": "' + table + '", "a": [1]}') == 3


def test_a_request_takes_the_memory_of_its_values_and_wide_characters() -> None:
    assert parsed_bytes(b"x" * 1000) < 200
    assert parsed_bytes(b"x" * 1000 + "\N{OWL}".encode()) > 3000
    assert parsed_bytes(b'{"a": [' + b"[]," * 500 + b"[]]}") > 500 * 64

"""Tool calls in an answer: the syntax of each model family, text that only looks like it, and hostile
text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiosd.syscall import chat, completion, response
from aiosd.syscall.request import Request, State
from aiosd.syscall.toolcalls import CALLS_MAX, Call, hold, parse

A = '{"name": "add", "arguments": {"a": 1}}'
P = '{"name": "add", "parameters": {"a": 1}}'
ADD: tuple[str, dict[str, Any]] = ("add", {"a": 1})
LS: tuple[str, dict[str, Any]] = ("ls", {})
MARKERS = ("<tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "<function=")

HERMES = [  # Hermes 2 and 3, Qwen 2.5 and 3, and models/tiny
    (f"<tool_call>{A}</tool_call>", "", [ADD]),
    (f"<tool_call>\n{A}\n</tool_call>", "", [ADD]),
    (f'One moment.\n<tool_call>\n{A}\n</tool_call>\n<tool_call>\n{{"name": "ls"}}\n</tool_call>',
     "One moment.", [ADD, LS]),
    (f"a <tool_call>{A}</tool_call> b", "a  b", [ADD]),
    (f"<tool_call>{A}", "", [ADD]),
    (f"<tool_call>{A}\n<tool_call>{A}\n", "", [ADD, ADD]),
    (f"<tool_call>{A}\n{A}</tool_call>", "", [ADD, ADD]),
    (f"<tool_call>\n```json\n{A}\n```\n</tool_call>", "", [ADD]),
    (f"<tool_call>```{A}```", "", [ADD]),
    (f"<tool_call>{P}</tool_call>", "", [ADD]),
    (r'<tool_call>{"name": "add", "arguments": "{\"a\": 1}"}</tool_call>', "", [ADD]),
    ('<tool_call>{"arguments": null, "name": "ls"}</tool_call>', "", [LS]),
    ('<tool_call>{"arguments": "", "name": "ls", "id": 7}</tool_call>', "", [LS]),
    ('<tool_call>{"name": "say", "arguments": {"text": "</tool_call> }\\n größer"}}</tool_call>', "",
     [("say", {"text": "</tool_call> }\n größer"})]),
    (f"With <tool_call> I call: <tool_call>{A}</tool_call>", "With <tool_call> I call:", [ADD]),
]  # fmt: skip
LLAMA = [  # Llama 3.1, 3.2 and 3.3: built-in tools' mark, the template's bare object, the prompt's own tags
    (f"<|python_tag|>{P}", "", [ADD]),
    (f'<|python_tag|>{P}; {{"name": "ls", "parameters": {{}}}}', "", [ADD, LS]),
    (f"Sure.\n<|python_tag|>\n{P}\n{P}\nThat is it.", "Sure.\n\nThat is it.", [ADD, ADD]),
    (P, "", [ADD]),
    (f'{{"type": "function", "name": "add", "parameters": {{"a": 1}}}}; {P}', "", [ADD, ADD]),
    (f"\n{A}\n", "", [ADD]),
    ('<function=add>{"a": 1}</function>', "", [ADD]),
    ('I add.<function=add>{"a": 1}</function>\n<function=ls>{}</function>', "I add.", [ADD, LS]),
    ('<function=add>{"a": 1}', "", [ADD]),
]
MISTRAL = [  # 7B v0.3, Nemo, Large 2407: a list; Small 3.1, Magistral, Devstral, Ministral 3: name by name
    (f"[TOOL_CALLS] [{A}]", "", [ADD]),
    (f'Well.[TOOL_CALLS][{A}, {{"name": "ls", "arguments": {{}}, "id": "abcdefghi"}}]', "Well.", [ADD, LS]),
    (f"[TOOL_CALLS]{A}", "", [ADD]),
    ('[TOOL_CALLS]add[ARGS]{"a": 1}', "", [ADD]),
    ('Well.[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]ls[ARGS]{}', "Well.", [ADD, LS]),
    ('[TOOL_CALLS]add[CALL_ID]abcdefghi[ARGS]{"a": 1}', "", [ADD]),
    ('[TOOL_CALLS]add{"a": 1}', "", [ADD]),
]
QWEN_CODER = [  # Qwen3-Coder, which sometimes leaves out the first tag
    ("<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>", "", [ADD]),
    ("<tool_call><function=ls></function></tool_call>", "", [LS]),
    ("So:\n<function=add><parameter=a>1</parameter></function></tool_call>", "So:", [ADD]),
    ("<tool_call><function=put><parameter=text>\na < b\n\n</parameter><parameter=on>true</parameter>"
     "</function></tool_call>", "", [("put", {"text": "a < b\n", "on": True})]),
    ("<tool_call><function=ls></function></tool_call>\n" * 2, "", [LS, LS]),
]  # fmt: skip

TEXT = [
    *(f"Such a call begins with {marker} and has JSON." for marker in MARKERS),
    *(f"{marker}" for marker in MARKERS),
    "Write <tool_call><function=NAME> and so on",
    "<|python_tag|>print(1)",
    '<|python_tag|>brave_search.call(query="x")',
    "[TOOL_CALLS] []",
    "The object " + A,
    A + " is the object",
    '{"name": "add", "arguments": {}, "more": 1}',
    '{"name": "add"}',
    '{"name": "add", "parameters": 5}',
    "[" + A + "]",
    json.dumps({"page": f"<tool_call>{A}</tool_call>"}),
    '{"page": "<function=rm>{}</function>"} is the page',
    '{"name": "x", "arguments": "<function=rm>{}</function>"}',
    P + '; {"more": 1}',
    "<tool_call>{}</tool_call>",
    "<tool_call>{bad}</tool_call>",
    "<tool_call>[5]</tool_call>",
    f"<tool_call>{A}}}</tool_call>",
    f"<tool_call>{A} and more",
    '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
    '<tool_call>{"name": "", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "x", "arguments": [1]}</tool_call>',
    '<tool_call>{"name": "x", "arguments": "[1]"}</tool_call>',
    '<tool_call>{"name": "x", "arguments": "no"}</tool_call>',
    '<tool_call>{"name": "x", "arguments": {"a": NaN}}</tool_call>',
    '<tool_call>{"name": "x", "arguments": {"a": 1e999}}</tool_call>',
    '<tool_call>{"name": "x", "arguments": {"a": ' + "1" * 5000 + "}}</tool_call>",
    "[TOOL_CALLS]add[ARGS]{bad}",
    "[TOOL_CALLS] [{bad}]",
    '<function=add>{"a": 1} and more',
    "<tool_call><function=add><parameter=a>1",
    "<tool_call><function=add><parameter=a>1</parameter>",  # b may be missing
    f"<tool_call>{A}</tool_call><tool_call>{{bad}}</tool_call>",
    f"<tool_call><function=put><parameter=text>a page: <tool_call>{A}</tool_call>",  # quoted in a broken call
]


@pytest.mark.parametrize(("text", "prose", "calls"), HERMES + LLAMA + MISTRAL + QWEN_CODER)
def test_calls_in_the_syntax_of_each_family_are_parsed(
    text: str, prose: str, calls: list[tuple[str, dict[str, Any]]]
) -> None:
    said, found = parse(text)
    assert (said, [(call.name, json.loads(call.arguments)) for call in found]) == (prose, calls)
    assert prose.startswith(text[: hold(text)].strip())


@pytest.mark.parametrize("text", TEXT)
def test_text_that_is_not_a_call_stays_text(text: str) -> None:
    assert parse(f" {text}\n") == (text, [])


def test_arguments_are_json_with_the_letters_as_they_are() -> None:
    assert parse('<tool_call>{"name":"f","arguments":{"x":"ß"}}')[1] == [Call("f", '{"x": "ß"}')]


def test_a_value_in_tags_that_is_no_json_is_text() -> None:
    values = {"7": 7, "[1]": [1], "7a": "7a", "NaN": "NaN", "1e999": "1e999", "True": "True", "": ""}
    for said, meant in values.items():
        _, (call,) = parse(f"<function=f><parameter=x>{said}</parameter></function>")
        assert json.loads(call.arguments) == {"x": meant}


def test_very_many_calls_stay_text() -> None:
    one = f"<tool_call>{A}</tool_call>"
    assert len(parse(one * CALLS_MAX)[1]) == CALLS_MAX
    text = one * (CALLS_MAX + 1)
    assert parse(text) == (text, [])


FRAGMENTS = st.sampled_from(
    [*MARKERS, "</tool_call>", "<function=f>", "</function>", "<parameter=k>", "</parameter>", "[ARGS]",
     "[CALL_ID]", "```json", "```", A, P, "{", "}", "[", "]", '"', "\\", ";", ",", " ", "\n", "f", "1"]
)  # fmt: skip


@given(st.lists(FRAGMENTS | st.text(max_size=3), max_size=12).map("".join))
def test_any_text_can_be_parsed(text: str) -> None:
    prose, calls = parse(text)
    assert calls or prose == text.strip()
    assert all(call.name and isinstance(json.loads(call.arguments), dict) for call in calls)
    rest = iter(text)
    assert all(character in rest for character in prose)  # the text without the calls
    if calls:  # no text shown early is part of a call
        assert prose.startswith(text[: hold(text)].strip())


@given(st.text())
def test_text_without_markers_is_only_stripped(text: str) -> None:
    if not any(marker in text for marker in MARKERS):
        assert parse(text) == (text.strip(), [])


@given(st.text(), st.text())
def test_text_shown_early_stays_shown(text: str, more: str) -> None:
    shown = hold(text)
    assert shown <= hold(text + more)
    assert shown == len(text) or text[shown] in "<[{"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(
    st.from_regex(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}", fullmatch=True),
    st.dictionaries(st.text(), JSON, max_size=4),
    st.booleans(),
)
def test_a_rendered_call_is_read_again(name: str, arguments: dict[str, Any], ascii: bool) -> None:
    said = json.dumps(arguments, ensure_ascii=ascii)
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=ascii)
    text = json.dumps({"name": name, "parameters": said})
    want = Call(name, json.dumps(arguments, ensure_ascii=False))
    for rendered in (
        f"<tool_call>{call}</tool_call>",
        f"<tool_call>\n{text}\n</tool_call>",
        f"<|python_tag|>{call}",
        call,
        f"<function={name}>{said}</function>",
        f"[TOOL_CALLS] [{call}]",
        f"[TOOL_CALLS]{name}[ARGS]{said}",
    ):
        assert parse(rendered) == ("", [want])
    two = f"[TOOL_CALLS]{name}[ARGS]{said}" * 2
    assert parse(f"Now.{two}") == ("Now.", [want, want])


MB = 1 << 20


@pytest.mark.parametrize(
    "unit",
    [*MARKERS, "{", "[", "<", " ", "\n<", "<tool_call>{", '<tool_call>{"', "<tool_call> ",
     "<tool_call>```json\n", "[TOOL_CALLS]a", "[TOOL_CALLS]a[ARGS]", "[TOOL_CALLS]a[CALL_ID]b",
     "<function=a>", "<function=a><parameter=b>", "<tool_call><function=a>", "<function=a></function>",
     '{"a":', '<tool_call>{"a":', f"<tool_call>{A}", f"{A};"],
)  # fmt: skip
@pytest.mark.parametrize("head", ["", "[TOOL_CALLS]a", '{"name": "'])
def test_a_megabyte_of_anything_is_read(unit: str, head: str) -> None:
    text = head + unit * (MB // len(unit))
    prose, calls = parse(text)
    assert len(calls) <= 1
    assert calls or prose == text.strip()
    assert hold(text) <= len(text)


@pytest.mark.parametrize("deep", [10**3, 10**5])
def test_a_deeply_nested_call_stays_text(deep: int) -> None:
    nested = '{"name": "f", "arguments": {"x": ' + "[" * deep + "]" * deep + "}}"
    for text in (nested, f"<tool_call>{nested}</tool_call>", f"[TOOL_CALLS] [{nested}]"):
        assert parse(text) == (text, [])


def request(text: str, tools: bool = True) -> Request:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}
    if tools:
        body["tools"] = [{"type": "function", "function": {"name": "add"}}]
    made = chat.parse(json.dumps(body).encode(), chat.Defaults("tiny"))
    return Request(7, 0, "ada", "/x", made, state=State.DONE, text=text, finish_reason="stop")


def tool_calls(request: Request) -> tuple[str | None, list[dict[str, Any]]]:
    assert isinstance(request.spec, chat.Chat)
    return completion.tool_calls(request, request.spec)


def test_calls_have_the_shape_of_openai() -> None:
    said = f"Now.\n<tool_call>{A}</tool_call><tool_call>{A}</tool_call>"
    (choice,) = json.loads(response.document(request(said)))["choices"]
    function = {"name": "add", "arguments": '{"a": 1}'}
    calls = [{"id": f"call_7_{i}", "type": "function", "function": function} for i in range(2)]
    assert choice["message"] == {"role": "assistant", "content": "Now.", "tool_calls": calls}
    assert choice["finish_reason"] == "tool_calls"


def test_an_answer_that_is_all_calls_has_no_content() -> None:
    assert tool_calls(request(P))[0] is None


@pytest.mark.parametrize("said", [" no call\n", "<tool_call>{bad}</tool_call>\n"])
def test_an_answer_without_calls_is_as_the_model_said_it(said: str) -> None:
    assert tool_calls(request(said)) == (said, [])


def test_without_tools_nothing_is_a_call() -> None:
    assert tool_calls(request(P, tools=False)) == (P, [])

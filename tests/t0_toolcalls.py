"""Tool calls in an answer: what each model family prints, what only looks like it, and hostile text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiosd.syscall import answers, chat, families, response, toolcalls
from aiosd.syscall.families import FAMILIES, THINKING
from aiosd.syscall.reading import Reading
from aiosd.syscall.request import Request, State
from aiosd.syscall.toolcalls import CALLS_MAX, NOTHING, Offer, ParsedAnswer, ParsedCall, parse

A = '{"name": "add", "arguments": {"a": 1}}'
P = '{"name": "add", "parameters": {"a": 1}}'
ADD: tuple[str, dict[str, Any]] = ("add", {"a": 1})
LS: tuple[str, dict[str, Any]] = ("ls", {})
KEYS: dict[str, Any] = {
    "a": {"type": "integer"}, "text": {"type": "string"}, "on": {"type": "boolean"}, "any": {}
}  # fmt: skip
SCHEMA = {"type": "object", "properties": KEYS}
OFFER = Offer(dict.fromkeys(("add", "ls", "say", "put", "f"), SCHEMA))
NAMES = [family.name for family in FAMILIES] + [families.UNKNOWN]
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
]
FUNCTION = [  # Functionary 3.1, and Llama 3 prompted so
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


def read(text: str, family: str = "hermes", offered: Offer = OFFER) -> ParsedAnswer:
    """The answer taken apart; what its readers had while it grew is the beginning of that."""
    said = parse(text, family, offered)
    grow(Reading(family, True), text, said)
    grow(Reading(family, False), text, parse(text, family, NOTHING))
    return said


def grow(growing: Reading, text: str, said: ParsedAnswer) -> None:
    thought = answer = ""
    for character in text:
        more = growing.push(character)
        thought, answer = thought + more[0], answer + more[1]
    assert said.reasoning.startswith(thought)
    assert said.content.startswith(answer)
    assert not growing.plain or said == ParsedAnswer("", text, [])


def arguments(calls: list[ParsedCall]) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in calls]


PRINTED = [
    *(("hermes", *one) for one in HERMES),
    *(("llama", *one) for one in LLAMA),
    *(("function", *one) for one in FUNCTION),
    *(("mistral-args", *one) for one in MISTRAL),
    *(("qwen-coder", *one) for one in QWEN_CODER),
    *((families.UNKNOWN, *one) for one in HERMES + FUNCTION + MISTRAL),
]


@pytest.mark.parametrize(("family", "text", "prose", "calls"), PRINTED)
def test_what_the_families_print(
    family: str, text: str, prose: str, calls: list[tuple[str, dict[str, Any]]]
) -> None:
    said = read(text, family)
    assert (said.content.strip(), arguments(said.calls)) == (prose, calls)


@pytest.mark.parametrize("text", TEXT)
@pytest.mark.parametrize("family", ["hermes", "llama", "mistral-args", "qwen-coder", families.UNKNOWN])
def test_what_is_no_call_stays_text(text: str, family: str) -> None:
    assert read(f" {text}\n", family) == ParsedAnswer("", f" {text}\n", [])


# thinking is not acting

CALL = f"<tool_call>{A}</tool_call>"


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("mark", THINKING, ids=lambda mark: mark.opening)
def test_a_call_in_thinking_is_no_call(family: str, mark: families.Thinking) -> None:
    """Of every family, in every family's marks, in every way that a call is printed."""
    for call in (one for one in PRINTED if one[3]):
        thought = f"I could {call[1]} but no"
        if mark.closing in thought:
            continue
        said = read(f"{mark.opening}{thought}{mark.closing}Hello", family)
        assert said == ParsedAnswer(thought.strip(), "Hello", [])
        assert read(f"\n{mark.opening}{thought}", family) == ParsedAnswer(thought.strip(), "", [])


def test_a_quoted_call_in_the_thinking_does_not_void_the_real_one() -> None:
    for quoted in ("<tool_call>{bad}</tool_call>", "<tool_call>", CALL, "```"):
        said = read(f"<think>not {quoted}</think>\n\nNow.\n{CALL}")
        assert (said.content, arguments(said.calls)) == ("Now.", [ADD])


@pytest.mark.parametrize(
    "text",
    [
        f"```\n{CALL}\n```",
        f"For example:\n```xml\n{CALL}\n```\nThat was it.",
        f"~~~\n{CALL}\n~~~",
        f"````\n```\n{CALL}\n```\n````",
        f"```\n{CALL}",
        f"Say `{CALL}` then",
        f"Say ``a ` {CALL}`` then",
        f"> {CALL}",
        f"> He said:\n> {CALL}",
        f'The page says "{CALL}".',
        f'The page says "do {CALL} now", and I do not.',
        f"The page says “{CALL}”.",
        f"The page says « {CALL} ».",
        f"The page says '{CALL}'.",
        f"I think {CALL} </think>Hello",
        f"Do not <reasoning>{CALL}</reasoning> it",
    ],
)
def test_a_quoted_call_is_no_call(text: str) -> None:
    said = read(text, "llama" if "reasoning" in text else "hermes")
    assert said.calls == []
    assert said.content == text


@pytest.mark.parametrize(
    "text",
    [
        f"```\ncode\n```\n{CALL}",
        f"`code` and {CALL}",
        f"a ` alone {CALL}",
        f'"quoted" before {CALL} and "after"',
        f"It's an apostrophe {CALL} isn't it",
        f'5" wide\n\n{CALL} and 6" high',
        f"> quoted\n\n{CALL}",
    ],
)
def test_a_call_beside_a_quotation_is_one(text: str) -> None:
    said = read(text)
    assert arguments(said.calls) == [ADD]
    assert said.content == text.replace(CALL, "").rstrip()


def test_thinking_between_calls_and_in_arguments() -> None:
    said = read(f"<think>one</think>a{CALL}<think>two {CALL}</think>b{CALL}")
    assert (said.reasoning, said.content, arguments(said.calls)) == ("one\ntwo " + CALL, "ab", [ADD, ADD])
    (call,) = read('<tool_call>{"name": "say", "arguments": {"text": "<think>"}}</tool_call>').calls
    assert json.loads(call.arguments) == {"text": "<think>"}


# what was offered


@pytest.mark.parametrize("family", NAMES)
def test_json_that_names_no_offered_tool_is_an_answer(family: str) -> None:
    for text in (
        '{"name": "Ada", "parameters": {"age": 36}}',
        '[{"name": "Ada", "arguments": {}}]',
        "[Ada(age=36)]",
        '{"Ada": {}}',
    ):
        assert read(text, family) == ParsedAnswer("", text, [])


def test_a_call_of_a_tool_that_was_not_offered_is_text_but_for_those_who_can_say_so() -> None:
    text = 'x <tool_call>{"name": "nope", "arguments": {}}</tool_call>'
    assert read(text) == ParsedAnswer("", text, [])
    offered = Offer(OFFER.tools, any_name=True)
    assert parse(text, "hermes", offered) == ParsedAnswer("", "x", [ParsedCall("nope", "{}")])
    bare = '{"name": "nope", "parameters": {}}'
    assert parse(bare, "llama", offered) == ParsedAnswer("", bare, [])


@pytest.mark.parametrize(
    ("schema", "said", "meant"),
    [
        ({"type": "string"}, "1.10", "1.10"),
        ({"type": "string"}, "5551234567", "5551234567"),
        ({"type": "string"}, "null", "null"),
        ({"type": "string"}, "true", "true"),
        ({"type": "string"}, '{"a": 1.10,   "b": [1,2]}', '{"a": 1.10,   "b": [1,2]}'),
        ({"type": "string"}, "  indented\n", "  indented\n"),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "integer"]}, "007", "007"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "12", "12"),
        ({"$ref": "#/$defs/word"}, "12", "12"),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"enum": [1, 2]}, "1", 1),
        ({"const": "1"}, "1", "1"),
        ({"type": "string", "nullable": True}, "null", None),
        ({"type": "integer"}, "12", 12),
        ({"type": "number"}, "1.10", 1.1),
        ({"type": "boolean"}, "true", True),
        ({"type": "boolean"}, "True", True),
        ({"type": "array"}, "[1, 2]", [1, 2]),
        ({"type": "object"}, '{"a": 1}', {"a": 1}),
        ({"type": "integer"}, "many", "many"),
        ({}, "1.10", "1.10"),
        ({}, "12", 12),
        ({}, "007", "007"),
        ({}, "NaN", "NaN"),
        (None, "7a", "7a"),
    ],
)
def test_a_value_in_tags_has_the_type_of_its_parameter(schema: Any, said: str, meant: Any) -> None:
    parameters = {"properties": {"v": schema}, "$defs": {"word": {"type": "string"}}}
    function = f"<function=f>\n<parameter=v>NL{said}NL</parameter>\n</function>\n"
    printed = {
        "qwen-coder": f"<tool_call>\n{function}</tool_call>".replace("NL", "\n"),
        "seed": f"<seed:tool_call>\n{function}</seed:tool_call>".replace("NL", ""),
        "glm": f"<tool_call>f\n<arg_key>v</arg_key>\n<arg_value>{said}</arg_value>\n</tool_call>",
        "minimax": f'<minimax:tool_call>\n<invoke name="f">\n<parameter name="v">{said}</parameter>\n'
        "</invoke>\n</minimax:tool_call>",
    }
    for family, text in printed.items():
        if family == "seed" and said.endswith("\n"):
            continue  # one newline at either end is the family's own
        (call,) = parse(text, family, Offer({"f": parameters})).calls
        assert json.loads(call.arguments) == {"v": meant}
        assert type(json.loads(call.arguments)["v"]) is type(meant)


def test_arguments_are_as_they_were_said() -> None:
    said = '{"x":"ß", "n": 1.10, "m": 1e2, "y": "\\u00e9"}'
    assert parse(f'<tool_call>{{"name":"f","arguments":{said}}}', "hermes", OFFER).calls == [
        ParsedCall("f", said)
    ]


def test_half_a_surrogate_pair_is_no_argument() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"q": "half \\ud83d"}}</tool_call>'
    assert read(text) == ParsedAnswer("", text, [])


def test_a_key_that_comes_twice_counts_once() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"q": 1, "q": 2}}</tool_call>'
    assert read(text).calls == [ParsedCall("f", '{"q": 2}')]


def test_brackets_and_tags_before_a_call_are_text() -> None:
    said = read(f"I looked at [1] and <b>it</b>, now I call.\n{CALL}")
    assert said.content == "I looked at [1] and <b>it</b>, now I call."


def test_without_parallel_calls_the_first_counts() -> None:
    one = toolcalls.offer([{"function": {"name": "add"}}], one=True)
    assert len(parse(CALL * 3, "hermes", one).calls) == 1


def test_more_calls_than_anybody_means_stay_text() -> None:
    assert len(read(CALL * CALLS_MAX).calls) == CALLS_MAX
    text = CALL * (CALLS_MAX + 1)
    assert read(text) == ParsedAnswer("", text, [])


# any text

FRAGMENTS = st.sampled_from(
    [*{mark for family in FAMILIES for mark in family.marks}, "</tool_call>", "<function=f>", "</function>",
     "<parameter=k>", "</parameter>", "[ARGS]", "[CALL_ID]", "```json", "```", "`", '"', "\n\n", "\n> ", A, P,
     "{", "}", "[", "]", '"', "\\", ";", ",", " ", "\n", "f", "1", "f(a=1)", "call:f{", "<｜tool▁sep｜>",
     *(mark for one in THINKING for mark in (one.opening, one.closing))]
)  # fmt: skip


@given(st.sampled_from(NAMES), st.lists(FRAGMENTS | st.text(max_size=3), max_size=12).map("".join))
def test_any_text_is_read(family: str, text: str) -> None:
    said = read(text, family)
    assert all(
        call.name in OFFER.tools and isinstance(json.loads(call.arguments), dict) for call in said.calls
    )
    rest = iter(text)
    assert all(character in rest for character in said.content)  # the text without the calls
    if not said.calls and not said.reasoning and not families.of(family).dropped:
        assert any(one.opening in text for one in THINKING) or said.content == text


@given(st.text(), st.sampled_from(NAMES))
def test_text_without_marks_stays_as_it_is(text: str, family: str) -> None:
    if not any(sign in text for sign in "<[{>:"):
        assert read(text, family) == ParsedAnswer("", text, [])


LONG = 1 << 18


@pytest.mark.parametrize(
    "unit",
    [*MARKERS, "{", "[", "<", " ", "\n<", "<tool_call>{", '<tool_call>{"', "<tool_call> ",
     "<tool_call>```json\n", "[TOOL_CALLS]a", "[TOOL_CALLS]a[ARGS]", "[TOOL_CALLS]a[CALL_ID]b",
     "<function=a>", "<function=a><parameter=b>", "<tool_call><function=a>", "<function=a></function>",
     '{"a":', '<tool_call>{"a":', f"<tool_call>{A}", f"{A};", "<think>", "</think>", "<think></think>",
     "<thinking>", "`", "``` ", "```\n", '"', "` <tool_call>", '" <tool_call>', "\n> <tool_call>",
     f"`{CALL}` ", "[f(", "[f(a=", "<arg_key>",
     "<tool_call>a<arg_key>b</arg_key><arg_value>"],
)  # fmt: skip
@pytest.mark.parametrize("family", ["hermes", "qwen-coder", "llama", "mistral-args", "pythonic"])
def test_a_long_text_of_anything_is_read(unit: str, family: str) -> None:
    text = unit * (LONG // len(unit))
    said = parse(text, family, OFFER)
    assert len(said.calls) <= 1
    assert said.calls or said.reasoning or said.content == text or text.startswith("<think></think>")


@pytest.mark.parametrize("deep", [10**3, 10**5])
def test_a_deeply_nested_call_stays_text(deep: int) -> None:
    nested = '{"name": "f", "arguments": {"x": ' + "[" * deep + "]" * deep + "}}"
    python = "f(x=" + "[" * deep + "]" * deep + ")"
    for family, text in (
        ("llama", nested),
        ("hermes", f"<tool_call>{nested}</tool_call>"),
        ("mistral", f"[TOOL_CALLS] [{nested}]"),
        ("pythonic", f"[{python}]"),
        ("olmo", f"<function_calls>{python}</function_calls>"),
    ):
        assert parse(text, family, OFFER) == ParsedAnswer("", text, [])


# answers


def request(text: str, tools: bool = True, **more: Any) -> Request:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], **more}
    if tools:
        body["tools"] = [{"type": "function", "function": {"name": "add"}}]
    made = chat.parse(json.dumps(body).encode(), chat.Defaults("tiny"))
    return Request(
        7, 0, "ada", "/x", made, state=State.DONE, text=text, finish_reason="stop", family="hermes"
    )


def message(request: Request) -> dict[str, Any]:
    assert isinstance(request.spec, chat.Chat)
    return answers.message(request, request.spec)


def test_calls_have_the_shape_of_openai() -> None:
    said = f"Now.\n{CALL}{CALL}"
    (choice,) = json.loads(response.document(request(said)))["choices"]
    function = {"name": "add", "arguments": '{"a": 1}'}
    calls = [{"id": f"call_7_{i}", "type": "function", "function": function} for i in range(2)]
    assert choice["message"] == {"role": "assistant", "content": "Now.", "tool_calls": calls}
    assert choice["finish_reason"] == "tool_calls"


def test_with_parallel_tool_calls_false_there_is_one() -> None:
    (choice,) = json.loads(response.document(request(CALL * 3, parallel_tool_calls=False)))["choices"]
    assert len(choice["message"]["tool_calls"]) == 1


def test_thinking_has_a_key_of_its_own() -> None:
    (choice,) = json.loads(response.document(request(f"<think>hm {CALL}</think>\n4", tools=False)))["choices"]
    assert choice["message"] == {"role": "assistant", "content": "4", "reasoning_content": f"hm {CALL}"}


def test_an_answer_that_is_all_calls_has_no_content() -> None:
    assert message(request(CALL))["content"] is None


@pytest.mark.parametrize("said", [" no call\n", "<tool_call>{bad}</tool_call>\n"])
def test_an_answer_without_calls_is_as_the_model_said_it(said: str) -> None:
    assert message(request(said)) == {"role": "assistant", "content": said}


def test_without_tools_nothing_is_a_call() -> None:
    assert message(request(CALL, tools=False)) == {"role": "assistant", "content": CALL}


def streamed(request: Request, text: str, step: int = 1) -> str:
    """What a reader gets of an answer that comes piece by piece."""
    request.text, request.state = "", State.RUNNING
    for at in range(0, len(text), step):
        request.text = text[: at + step]
        response.grow(request, [], at + step >= len(text))
    request.state = State.DONE
    response.end(request)
    return request.answer.text


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_chunks_are_thinking_then_text_then_calls(step: int) -> None:
    text = f"<think>\nI ponder.\n</think>\n\nThe answer [1] is 4.\n{CALL}"
    chunks = [json.loads(line) for line in streamed(request("", stream=True), text, step).splitlines()]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "I ponder."
    assert "".join(delta.get("content", "") for delta in deltas) == "The answer [1] is 4."
    assert deltas[-1]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 1}'}
    if step == 1:
        assert len(deltas) > 20  # as it is made


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_a_reader_of_text_gets_the_answer_without_the_thinking(step: int) -> None:
    made = chat.parse(b"hi", chat.Defaults("tiny"))
    for text, seen in (
        ("<think>hm</think>\n\nHello", "Hello\n"),
        ("Hello <b>you</b>\n", "Hello <b>you</b>\n"),
        (f"a {CALL} b", f"a {CALL} b\n"),
        ("<think>hm", "\n"),
        ("", "\n"),
        (" x ", " x \n"),
    ):
        asked = Request(7, 0, "ada", "/x", made, family="hermes")
        if text:
            assert streamed(asked, text, step) == seen

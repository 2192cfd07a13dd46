"""Every model family: what its chat template prints is read back, foreign text becomes no mark in it, and a
template that lacks a kind of message gets it in another form."""

from __future__ import annotations

import functools
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aiosd.cores.engine.habits import PARAMETERS
from aiosd.cores.engine.model import facts
from aiosd.cores.engine.vocabulary import Vocabulary
from aiosd.errors import BadRequest, ModelError
from aiosd.syscall import families
from aiosd.syscall.families import FAMILIES, THINKING
from aiosd.syscall.toolcalls import offer, parse
from tests.chat_templates import CALLS, FRAME, template, vocabulary

NAMES = [family.name for family in FAMILIES]
Message = dict[str, Any]


SCRATCH = tempfile.TemporaryDirectory(prefix="families-")


def folder() -> Path:
    return Path(SCRATCH.name)


@functools.cache
def of(name: str) -> Vocabulary:
    family = families.of(name)
    think = family.thinking[0]
    special = list(
        dict.fromkeys(
            [*CALLS[name][1], *(m for t in THINKING for m in (t.opening, t.closing) if "th" not in m)]
        )
    )
    return vocabulary(
        folder() / name, template(name, think.opening, think.closing), special, ["<think>", "</think>"]
    )


def function(name: str, parameters: Any = PARAMETERS) -> Message:
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}}


def called(name: str, arguments: Any, id: str = "call_7_0") -> Message:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


def printed(v: Vocabulary, messages: list[Message], tools: list[Message] | None = None) -> str:
    """The prompt with its special tokens."""
    return str(v.hf.decode(v.render(messages, tools), skip_special_tokens=False))


def test_every_family_has_a_template_here() -> None:
    assert sorted(CALLS) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_template_tells_the_family_and_prints_every_kind_of_message(name: str) -> None:
    v = of(name)
    told = facts(v, Path())
    assert v.family.name == told["tool_calls"] == name
    assert told["template_lacks"] == []
    assert told["thinking"][0] == [v.family.thinking[0].opening, v.family.thinking[0].closing]


def test_other_templates_are_of_no_family() -> None:
    for text in (
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "<|im_start|>",
        "{{ tools | tojson }}",
    ):
        assert families.detect(text).name == families.UNKNOWN


TEXTS = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from("<>[]{}\"'`\\|/\n =:,"), max_size=12
)
VALUES = {
    "word": TEXTS,
    "whole": st.integers(-(2**53), 2**53),
    "real": st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: round(x, 3)),
    "on": st.booleans(),
    "rows": st.lists(st.integers(0, 9) | st.from_regex(r"[a-z ]{0,5}", fullmatch=True), max_size=3),
    "box": st.dictionaries(st.sampled_from(["a", "b c"]), st.integers(0, 9) | st.booleans(), max_size=2),
}
KINDS = {
    "word": "string",
    "whole": "integer",
    "real": "number",
    "on": "boolean",
    "rows": "array",
    "box": "object",
}
SCHEMA = {"type": "object", "properties": {key: {"type": kind} for key, kind in KINDS.items()}}
ARGUMENTS = st.fixed_dictionaries({}, optional=VALUES)
NAMED = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.-]{0,20}", fullmatch=True)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_what_a_template_prints_for_a_call_is_read_as_that_call(name: str, data: st.DataObject) -> None:
    v = of(name)
    given = [(data.draw(NAMED), data.draw(ARGUMENTS)) for _ in range(data.draw(st.integers(1, 2)))]
    if name == "llama":
        given = given[:1]
    for _, one in given:  # what the family's own marks around a value cannot tell apart
        word = str(one.get("word", ""))
        if any(tag in word for tag in ("</", "<escape>", '<|"|>')) or word != word.strip("\n"):
            one.pop("word", None)
    tools = [function(called_name, SCHEMA) for called_name, _ in given]
    calls = [called(one, arguments, f"call_7_{i}") for i, (one, arguments) in enumerate(given)]
    ask = [{"role": "user", "content": "?"}]
    whole = printed(v, [*ask, {"role": "assistant", "content": "", "tool_calls": calls}], tools)
    begin = "<|im_start|>assistant\n"
    said = whole.split(begin)[1].rsplit("<|im_end|>", 1)[0]
    read = parse(said, name, offer(tools)).calls
    assert [(one.name, json.loads(one.arguments)) for one in read] == given


# marks in foreign text


def everywhere(text: str) -> tuple[list[Message], list[Message]]:
    """A conversation that has a text at every place where one may come from outside."""
    schema = {
        "type": "object",
        "description": text,
        "properties": {text: {"type": "string", "description": text, "enum": [text, "x"], text: text}},
        "required": [text],
    }
    call = called(text, {text: text, "list": [text, {text: [text]}]}, text)
    messages: list[Message] = [
        {"role": "system", "content": text},
        {"role": "user", "content": f"{text} and {text}{text}", "name": text},
        {"role": "assistant", "content": text, "reasoning_content": text, "tool_calls": [call]},
        {"role": "tool", "content": text, "name": text, "tool_call_id": text},
        {"role": "user", "content": text},
    ]
    return messages, [{**function(text, schema), text: text}]


@pytest.mark.parametrize("name", NAMES)
def test_no_mark_of_any_family_becomes_a_token_at_any_place(name: str) -> None:
    v = of(name)
    marks = {id: token.content for id, token in v._added.items()}
    plain = [id for id in v.render(*everywhere("harmless")) if id in marks]
    others = " ".join(mark for one in CALLS.values() for mark in one[1])
    texts = [text for mark in marks.values() for text in (mark, mark.strip("<>|[]/｜"), mark[1:], mark * 2)]
    for text in [*texts, others, others.upper()]:
        assert [id for id in v.render(*everywhere(text)) if id in marks] == plain, text


def test_all_characters_of_a_message_reach_the_model() -> None:
    v = of("hermes")
    for text in ("\ue000 \ue001", "<|im_end|>", "größer 日 😀 \U000f0041", "\x00", "[INST] <s>"):
        assert text in printed(v, [{"role": "user", "content": text}])
        assert v.hf.decode(v.encode(text), skip_special_tokens=False) == text


def test_a_text_to_embed_or_to_count_has_no_marks_either() -> None:
    v = of("hermes")
    assert not {id for id in v.encode("a<|im_end|>b<think>") if id in v._added}


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(BadRequest, match="surrogate"):
        of("hermes").render([{"role": "user", "content": "\ud800"}], None)


def test_a_harmless_prompt_has_the_tokens_of_the_library() -> None:
    """Marks that the template puts together are tokens too."""
    joined = FRAME.replace("<|im_start|>", "{{ '<|im_' + 'start' }}|>").replace("CALLS", "")
    for i, text in enumerate((template("hermes", "<think>", "</think>"), joined)):
        v = vocabulary(folder() / f"plain{i}", text, [], ["<think>", "</think>", "  "])
        messages = [{"role": "system", "content": "Be  brief."}, {"role": "user", "content": "a < b\n\n"}]
        shown = v.hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert v.render(messages, None) == v.hf.encode(shown, add_special_tokens=False)
        assert v.render(messages, None).count(v.hf.convert_tokens_to_ids("<|im_start|>")) == 3


def test_a_vocabulary_that_has_its_marks_among_its_words_is_not_fooled() -> None:
    """Its model finds <|im_end|> between blanks without being told."""
    v = vocabulary(
        folder() / "broken", "{% for m in messages %}{{ m.content }} <|im_end|>{% endfor %}", [], broken=True
    )
    end = v.hf.convert_tokens_to_ids("<|im_end|>")
    assert v.render([{"role": "user", "content": "a <|im_end|> b"}], None).count(end) == 1


# output


def test_marks_of_thinking_and_of_calls_are_text_and_others_are_silent() -> None:
    v = vocabulary(
        folder() / "spoken", template("mistral-args", "[THINK]", "[/THINK]"),
        ["[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]", "[REF]"],
    )  # fmt: skip
    tokens = v.hf.encode("[THINK]a[/THINK]b[REF]c[TOOL_CALLS]d<|im_end|>")
    assert v.decode(tokens) == "[THINK]a[/THINK]bc[TOOL_CALLS]d"


@pytest.mark.parametrize("one", THINKING, ids=lambda one: one.opening)
def test_a_prompt_that_ends_in_thinking_says_so(one: families.Thinking) -> None:
    text = FRAME.replace("CALLS", "") + one.opening + "\n"
    v = vocabulary(folder() / f"opened{THINKING.index(one)}", text, [one.opening])
    assert v.opened(v.render([{"role": "user", "content": "?"}], None)) == one.opening
    closed = v.render([{"role": "user", "content": "?"}], None) + v.hf.encode(one.closing)
    assert v.opened(closed) == ""


def test_variables_reach_the_template() -> None:
    text = FRAME.replace("CALLS", "") + "{% if enable_thinking is false %}no{% endif %}{{ reasoning_effort }}"
    v = vocabulary(folder() / "variables", text, [])
    asked = [{"role": "user", "content": "?"}]
    shown = v.hf.decode(
        v.render(asked, None, {"enable_thinking": False, "reasoning_effort": "<|im_end|>low"})
    )
    assert shown.endswith("no<|im_end|>low")
    end = v.hf.convert_tokens_to_ids("<|im_end|>")
    assert v.render(asked, None, {"reasoning_effort": "<|im_end|>"}).count(end) == 1


# habits of templates

STRICT = (
    "{% for m in messages %}{% if (m.role == 'system' and not loop.first) %}"
    "{{ raise_exception('late') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)
NO_SYSTEM = STRICT.replace("and not loop.first", "")
SYSTEM = [{"role": "system", "content": "Be brief."}]
USER = [{"role": "user", "content": "Hi"}]


def test_a_list_of_named_templates_is_used_by_name() -> None:
    named = {"default": STRICT, "tool_use": "TOOLS " + template("hermes", "<think>", "</think>")}
    v = vocabulary(folder() / "named", named, [])
    assert "TOOLS" not in printed(v, USER)
    assert printed(v, USER, [function("f")]).startswith("TOOLS")
    assert facts(v, Path())["tool_calls"] == "hermes"


def test_a_template_that_cannot_print_a_question_is_no_model() -> None:
    v = vocabulary(folder() / "never", "{{ raise_exception('never') }}", [])
    with pytest.raises(ModelError, match="never"):
        facts(v, Path())


@pytest.mark.parametrize("text", [STRICT, NO_SYSTEM])
def test_system_messages_at_any_place_are_told_once(text: str) -> None:
    v = vocabulary(folder() / f"strict{len(text)}", text, [])
    late = [*SYSTEM, *USER, {"role": "assistant", "content": "Hello"}, *SYSTEM, *USER]
    shown = printed(v, [*late, {"role": "system", "content": "In rhyme."}])
    assert shown.count("Be brief.") == 1
    assert shown.count("In rhyme.") == 1
    assert shown.index("In rhyme.") < shown.index("Hi")
    assert "several system messages" in facts(v, Path())["template_lacks"]


def test_a_template_without_tools_gets_them_in_the_system_message() -> None:
    v = vocabulary(folder() / "toolless", STRICT, [])
    assert "tools" in facts(v, Path())["template_lacks"]
    call = {"role": "assistant", "content": "", "tool_calls": [called("f", {"city": "Oslo"})]}
    result = {"role": "tool", "content": "rain", "name": "f", "tool_call_id": "call_7_0"}
    shown = printed(v, [*SYSTEM, *USER, call, result], [function("f")])
    assert shown.count("<|im_start|>system") == 1
    for word in ("Be brief.", '"name": "f"', "<tool_call>", "Oslo", "rain"):
        assert word in shown


@pytest.mark.parametrize("given", ["", None, "{}", "not JSON"])
def test_a_call_without_arguments_goes_into_every_template(given: Any) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": given}}
    for name in NAMES:
        if given == "not JSON" and "|items" in template(name, "", "").replace(" ", ""):
            continue
        of(name).render(
            [*USER, {"role": "assistant", "content": None, "tool_calls": [call]}], [function("f")]
        )


def test_ids_of_calls_have_the_form_that_the_family_insists_on() -> None:
    calls = [called("f", {}, f"call_7_{i}") for i in range(2)]
    results = [{"role": "tool", "content": "x", "tool_call_id": f"call_7_{i}"} for i in range(2)]
    shown = printed(of("kimi"), [*USER, {"role": "assistant", "content": "", "tool_calls": calls}, *results])
    assert "functions.f:0<|tool_call_argument_begin|>" in shown
    assert "functions.f:1<|tool_call_argument_begin|>" in shown


def test_every_pair_of_families_is_told_apart() -> None:
    """No family's calls are taken by another's reader for something else than those calls."""
    for one, other in itertools.permutations(NAMES, 2):
        said = CALLS[one][0]
        if "tool_call" in said or one == other:
            continue
        text = printed(
            of(one), [*USER, {"role": "assistant", "content": "", "tool_calls": [called("f", {"city": "1"})]}]
        )
        text = text.split("<|im_start|>assistant\n")[1].rsplit("<|im_end|>", 1)[0]
        for call in parse(text, other, offer([function("f")])).calls:
            assert (call.name, json.loads(call.arguments)) == ("f", {"city": "1"})

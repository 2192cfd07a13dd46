"""Constrained decoding: whatever a model would say, its answer fits; and it is the same alone, among others
and after being moved."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from typing import Any

import jsonschema
import numpy as np
import pytest

from aiosd.cores.engine.constraint import COMPILED_MAX, Constraints
from aiosd.cores.engine.engine import Engine
from aiosd.cores.engine.model import LoadedModel, load
from aiosd.cores.engine.vocabulary import Vocabulary
from aiosd.errors import BadRequest
from aiosd.syscall import families, grammar, toolcalls
from aiosd.syscall.grammar import Form, Voice
from aiosd.syscall.sampling import Sampling
from tests.conftest import TINY
from tests.t1_engine_models import Answer, alone, engine, model, prompt, run
from tests.t1_engine_text import words

WILD = Sampling(max_tokens=400, temperature=1.0, seed=1)
PENALTIES: dict[str, Any] = {
    "frequency_penalty": 0.4,
    "repetition_penalty": 1.2,
    "min_p": 0.01,
    "logit_bias": {"70": 5.0},
}
TEXT: dict[str, Any] = {"type": "string", "maxLength": 6}
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {"name": TEXT, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
SMALL: list[dict[str, Any]] = [
    TEXT,
    PERSON,
    {"type": "boolean"},
    {"type": "null"},
    {"type": "integer", "minimum": -5, "maximum": 70000},
    {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
    {"enum": ["red", "green", "größer", 5, None, True]},
    {"const": {"a": [1, 2.5]}},
    {"type": "string", "pattern": "^[A-F0-9]{4}-[a-z]{2,3}$"},
    {"type": "string", "minLength": 3, "maxLength": 5},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "uuid"},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {"type": "array", "prefixItems": [TEXT, {"type": "null"}], "items": False, "minItems": 2},
    {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"], "maxProperties": 1},
    {"type": ["integer", "null"], "minimum": 1, "maximum": 9},
    {"anyOf": [{"type": "boolean"}, {"type": "array", "items": {"type": "null"}, "maxItems": 2}]},
    {"allOf": [PERSON, {"properties": {"age": {"maximum": 9}}}]},
    {"$ref": "#/$defs/p", "$defs": {"p": PERSON}},
    {"$ref": "#/$defs/t", "$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}, "maxItems": 2}}},
    {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 700},
    {"type": "string", "enum": ['a"b', "c\\d", "e\nf", "\u2028", "<|im_end|>"]},
    {"type": "string", "const": "x", "x-guidance": {"lenient": True, "whitespace_flexible": False}},
]  # fmt: skip
SCHEMAS = [
    *SMALL,
    *({"type": "array", "items": one, "minItems": 1, "maxItems": 2} for one in SMALL[:14]),
    *(
        {
            "type": "object",
            "properties": {"a": one, "b": one},
            "required": ["b"],
            "additionalProperties": False,
        }
        for one in SMALL[:14]
    ),
]


STYLED = [family.name for family in families.FAMILIES if family.style]


def called_by(
    tools: list[dict[str, Any]], choice: str, family: str, m: LoadedModel | None = None, parallel: bool = True
) -> str:
    """The grammar of an answer of a model of that family."""
    silent = m.vocabulary.silent if m else []
    form = Form(functions=tools, choice=choice, parallel=parallel)
    return grammar.grammar(form, Voice(family, silent=silent))


def of(schema: dict[str, Any]) -> str:
    grammar.check(json.dumps(schema))
    return grammar.grammar(Form(json.dumps(schema)), Voice())


def answer(m: LoadedModel, form: str, sampling: Sampling = WILD, asked: list[int] | None = None) -> Answer:
    return alone(m, asked or prompt(20), sampling, grammar=form)


@functools.cache
def tiny() -> LoadedModel:
    return load(TINY)


def function(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [function("find", PERSON), function("count-ä", SMALL[14]), function("now", {})]


def judged(text: str, family: str = "hermes") -> list[str]:
    """Check all calls of an answer, and return their names."""
    calls = toolcalls.parse(text, family, toolcalls.offer(TOOLS)).calls
    parameters = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
    for call in calls:
        jsonschema.validate(json.loads(call.arguments), parameters[call.name])
    return [call.name for call in calls]


def test_there_are_fifty_schemas() -> None:
    assert len(SCHEMAS) >= 50


@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_answer_of_a_random_model_fits_the_schema(schema: dict[str, Any], temperature: float) -> None:
    got = answer(model("llama"), of(schema), dataclasses.replace(WILD, temperature=temperature))
    if got.finish == "length":  # a recursive schema may have no end
        assert len(got.tokens) == WILD.max_tokens
        assert "$defs" in json.dumps(schema)
        return
    value = json.loads(got.text)
    jsonschema.validate(value, schema, jsonschema.Draft202012Validator)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_penalties_and_a_bias_make_no_token_legal_and_change_the_answer(temperature: float) -> None:
    changed, m = 0, model("llama")
    for schema in SCHEMAS[:20]:
        free = dataclasses.replace(WILD, temperature=temperature)
        penalised = dataclasses.replace(free, **PENALTIES, presence_penalty=2.0)
        got = answer(m, of(schema), penalised)
        if got.finish == "stop":
            jsonschema.validate(json.loads(got.text), schema, jsonschema.Draft202012Validator)
            changed += got.tokens != answer(m, of(schema), free).tokens
    assert changed > 5


@pytest.mark.parametrize("name", ["llama-odd", "gemma3", "phi3-long"])
def test_every_core_decodes_by_a_schema(name: str) -> None:
    for seed in range(4):
        got = answer(model(name), of(PERSON), dataclasses.replace(WILD, seed=seed))
        jsonschema.validate(json.loads(got.text), PERSON)


def test_a_schema_of_any_object_gives_an_object() -> None:
    for seed in range(20):
        got = answer(model("llama"), of({"type": "object"}), dataclasses.replace(WILD, seed=seed))
        assert got.finish == "length" or isinstance(json.loads(got.text), dict)


def test_an_answer_that_the_model_would_give_anyway_is_not_changed() -> None:
    """With greedy sampling, the constraint removes only tokens that are not the likeliest."""
    m, calc = tiny(), function("calc", {"type": "object", "properties": {"expression": {"type": "string"}}})
    form, called = called_by([calc], "auto", "hermes", m), 0
    for question in ("What is 12*34?", "Who are you?", "What is in /aios/models?", "Hello!"):
        asked = m.render([{"role": "user", "content": question}], [calc])
        free = alone(m, asked, Sampling(max_tokens=60))
        called += "<tool_call>" in free.text
        assert answer(m, form, Sampling(max_tokens=60), asked).tokens == free.tokens
    assert called


@pytest.mark.parametrize("core", ["llama", "gemma3"])
def test_a_constrained_answer_is_the_same_alone_and_among_others(core: str) -> None:
    m = model(core)
    forms = [of(PERSON), "", of(SMALL[12]), "", called_by(TOOLS, "required", "hermes")]
    samplings = [dataclasses.replace(WILD, seed=i, max_tokens=60) for i in range(5)]
    expected = [
        alone(m, prompt(21 + i), s, grammar=f) for i, (f, s) in enumerate(zip(forms, samplings, strict=True))
    ]
    e, answers = engine(m), dict[int, Answer]()
    for i, (f, s) in enumerate(zip(forms, samplings, strict=True)):
        e.add(i, prompt(21 + i), s, owner="ada", grammar=f)
    run(e, answers)
    for i, one in enumerate(expected):
        assert (answers[i].tokens, answers[i].text, answers[i].finish) == (one.tokens, one.text, one.finish)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("penalties", [{}, PENALTIES], ids=["free", "penalised"])
def test_being_moved_at_any_token_changes_nothing(keep: bool, penalties: dict[str, Any]) -> None:
    """The request continues with its KV, or in another engine with only its tokens."""
    m, form = model("llama"), called_by(TOOLS, "required", "hermes")
    sampling = dataclasses.replace(WILD, seed=3, max_tokens=90, **penalties)
    whole = answer(m, form, sampling)
    assert len(whole.tokens) > 40
    for cut in range(1, len(whole.tokens)):
        e, got = engine(m), Answer()
        e.add(1, prompt(20), sampling, owner="ada", grammar=form)
        while len(got.tokens) < cut:
            for output in e.step():
                got.take(output)
        e.remove(1)
        e = e if keep else engine(m)
        e.add(1, prompt(20), sampling, owner="ada", resume=tuple(got.tokens), grammar=form)
        run(e, {1: got})
        assert (got.tokens, got.text, got.finish) == (whole.tokens, whole.text, whole.finish)


def test_a_request_pushed_out_of_memory_continues_unchanged() -> None:
    m, form = model("llama"), of({"type": "array", "items": PERSON, "minItems": 3, "maxItems": 3})
    samplings = [dataclasses.replace(WILD, seed=i, max_tokens=150) for i in range(4)]
    expected = [answer(m, form, s).tokens for s in samplings]
    e, answers = engine(m, tokens=288), {i: Answer() for i in range(4)}
    for i, s in enumerate(samplings):
        e.add(i, prompt(20), s, owner=str(i), grammar=form)
    pushed = 0
    while not e.idle:
        for output in e.step():
            answers[output.id].take(output)
            if output.finish == "preempted":
                pushed += 1
                i = output.id
                e.add(i, prompt(20), samplings[i], owner=str(i), resume=answers[i].tokens, grammar=form)
    assert pushed
    assert [answers[i].tokens for i in range(4)] == expected


def test_a_whole_answer_ends_whatever_min_tokens_and_ignore_eos_say() -> None:
    for more in ({"min_tokens": 100}, {"ignore_eos": True}):
        got = answer(model("llama"), of(PERSON), dataclasses.replace(WILD, **more))
        assert got.finish == "stop"
        jsonschema.validate(json.loads(got.text), PERSON)
    grown = dataclasses.replace(WILD, min_tokens=30, max_tokens=60)  # it could end early, and does not
    form = called_by(TOOLS, "required", "hermes")
    assert len(answer(model("llama"), form, grown).tokens) >= 30


def test_max_tokens_ends_an_answer_in_the_middle() -> None:
    got = answer(model("llama"), of(PERSON), dataclasses.replace(WILD, max_tokens=5))
    assert (got.finish, len(got.tokens)) == ("length", 5)


def test_a_stop_string_ends_an_answer_before_it() -> None:
    got = answer(model("llama"), of(PERSON), dataclasses.replace(WILD, stop=('"age"',)))
    assert got.finish == "stop"
    assert '"name"' in got.text
    assert '"age"' not in got.text


def test_logprobs_are_the_models_own() -> None:
    free = alone(model("llama"), prompt(20), Sampling(max_tokens=1, logprobs=3))
    bound = answer(model("llama"), of(PERSON), Sampling(max_tokens=1, logprobs=3))
    assert bound.logprobs[0].top == free.logprobs[0].top
    assert bound.logprobs[0].logprob < bound.logprobs[0].top[0][1]


# calls


@pytest.mark.parametrize("family", STYLED)
@pytest.mark.parametrize("choice", ["required", f"{grammar.FUNCTION}count-ä", f"{grammar.FUNCTION}find"])
def test_an_answer_that_is_to_be_a_call_is_one(family: str, choice: str) -> None:
    form = called_by(TOOLS, choice, family)
    for seed in range(5):
        got = answer(model("llama"), form, dataclasses.replace(WILD, seed=seed, max_tokens=500))
        if got.finish == "length":
            continue  # `now` takes any object
        if family == "mistral-args" and "count-ä" in got.text:
            continue  # the family has no such names
        if re.search(r"[eE]\+?0*[1-9]\d{2}", got.text):
            continue  # the grammar knows digits, and no float is as large
        names = judged(got.text, family)
        assert names
        assert choice == "required" or names == [choice.removeprefix(grammar.FUNCTION)]


OPENED = {family.name: f"Let me see. {family.marks[0]}" for family in families.FAMILIES if family.style}
OPENED["llama"] = ' {"name": '
OPENED["mistral"] += ' [{"name": '
OPENED["hermes"] += '\n{"name": '


@pytest.mark.parametrize("family", STYLED)
def test_a_call_that_the_model_has_begun_will_be_right(family: str) -> None:
    m, tools = model("llama"), TOOLS[:1]
    form = called_by(tools, "auto", family, m, parallel=family == "hermes")  # nonsense ends sooner with one
    begun = m.encode(OPENED[family])
    ended = 0
    for seed in range(8):
        e, sampling, got = engine(m), dataclasses.replace(WILD, seed=seed, max_tokens=900), Answer()
        e.add(1, prompt(20), sampling, owner="ada", resume=begun, grammar=form)
        if ended:
            break
        run(e, {1: got})
        text = m.decode([*begun, *got.tokens])
        ended += judged(text, family)[:1] == ["find"]
        assert ended or got.finish == "length", text
    assert ended


@pytest.mark.parametrize("family", STYLED)
def test_what_is_no_call_may_be_said(family: str) -> None:
    m = model("llama")
    constraint = m.constraints.make(called_by(TOOLS, "auto", family, m))
    for token in [*m.encode("An <answer> with [brackets] and {braces}, größer. "), *m.vocabulary.silent]:
        assert constraint.allowed()[token]
        assert not constraint.accept(token)
    assert constraint.allowed()[sorted(m.eos)].all()


def test_without_parallel_calls_an_answer_ends_behind_the_first() -> None:
    m = model("llama")
    for family in STYLED:
        for choice in ("auto", "required"):
            form = called_by(TOOLS[:1], choice, family, m, parallel=False)
            begun = m.encode(OPENED[family]) if choice == "auto" else []
            for seed in range(3):
                e, got = engine(m), Answer()
                sampling = dataclasses.replace(WILD, seed=seed, max_tokens=300)
                e.add(1, prompt(20), sampling, owner="ada", resume=begun, grammar=form)
                run(e, {1: got})
                text = m.decode([*begun, *got.tokens])
                assert got.finish == "length" or judged(text, family) == ["find"], (family, text)


THOUGHT = "Maybe <tool_call> or {not}</think>"


@pytest.mark.parametrize("opened", ["", "<think>"])
@pytest.mark.parametrize("form", [Form(json.dumps(SMALL[2])), Form(functions=TOOLS[:1], choice="required")])
def test_a_model_may_think_before_an_answer_of_a_form(opened: str, form: Form) -> None:
    m = model("llama")
    constraint = m.constraints.make(grammar.grammar(form, Voice("hermes", True, opened)))
    for token in m.encode(THOUGHT if opened else "<think>" + THOUGHT):
        assert constraint.allowed()[token]
        assert not constraint.accept(token)
    for wrong in ("Hello", "<function"):
        assert not constraint.allowed()[m.encode(wrong)[0]] or wrong[0] == "<"
    plain = m.constraints.make(grammar.grammar(form, Voice("hermes", False)))
    assert not plain.allowed()[m.encode("M")[0]]


def test_with_a_schema_beside_tools_the_answer_is_calls_or_json() -> None:
    seen = set()
    for family in (*STYLED, ""):
        form = grammar.grammar(Form(json.dumps(SMALL[12]), TOOLS[:1]), Voice(family))
        for seed in range(6):
            got = answer(model("llama"), form, dataclasses.replace(WILD, seed=seed, temperature=3.0))
            if got.finish == "stop":
                calls = judged(got.text, family)
                seen.add(bool(calls))
                if not calls:
                    said = toolcalls.parse(got.text, family, toolcalls.NOTHING).content
                    jsonschema.validate(json.loads(said), SMALL[12])
    assert seen == {True, False}


def test_the_built_in_models_calls_are_right() -> None:
    m = tiny()
    assert m.info["tool_calls"] == "hermes"
    asked = m.render([{"role": "user", "content": "Who is there?"}], TOOLS)
    for choice in ("required", f"{grammar.FUNCTION}find"):
        got = answer(m, called_by(TOOLS[:1], choice, "hermes"), Sampling(max_tokens=200), asked)
        assert judged(got.text) == ["find"]


# tokenizers and limits


def test_a_sentencepiece_vocabulary_has_the_bytes_of_its_tokens() -> None:
    vocabulary = words()
    constraint = Constraints(vocabulary, len(vocabulary)).make(of({"const": "a die größer 日"}))
    rng, text, token = np.random.default_rng(0), [], -1
    for _ in range(100):
        allowed = np.flatnonzero(constraint.allowed())
        token = int(rng.choice(allowed))
        text.append(token)
        if constraint.accept(token):
            break
    assert json.loads(vocabulary.decode(text)) == "a die größer 日"


def test_tokens_that_do_not_fit_a_grammar_are_not_resumed() -> None:
    e = engine(model("llama"))
    with pytest.raises(BadRequest, match="cannot be decoded"):
        e.add(1, prompt(20), WILD, owner="ada", resume=model("llama").encode("Hello"), grammar=of(PERSON))
    assert e.idle


def test_a_too_expensive_grammar_ends_only_its_own_request() -> None:
    many = [{"type": "string", "pattern": f"^(.*[a-m]){{{i}}}.{{{i}}}$"} for i in range(1, 40)]
    form = of({"type": "array", "items": {"anyOf": many}, "minItems": 9})
    m = model("llama")
    expected = alone(m, prompt(9), WILD).tokens
    e = Engine(m, kv_bytes=2048 * m.kv_bytes_per_token)
    e.add(1, prompt(20), WILD, owner="ada", grammar=form)
    e.add(2, prompt(9), WILD, owner="ada")
    tokens, failed = list[int](), False
    while not e.idle:
        for output in e.step():
            tokens += output.tokens if output.id == 2 else ()
            failed |= output.id == 1 and output.error is not None
    assert failed
    assert tokens == expected


def test_a_compiled_grammar_is_used_again_as_it_was_and_few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, compiled, real = Vocabulary(TINY, {}), list[str](), Constraints._compile

    def counted(self: Constraints, form: str) -> Any:
        compiled.append(form)
        return real(self, form)

    monkeypatch.setattr(Constraints, "_compile", counted)
    made, first = Constraints(vocabulary, len(vocabulary)), of({"const": "ab"})
    before = made.make(first)
    expected = before.allowed()
    before.accept(vocabulary.encode('"')[0])
    assert (made.make(first).allowed() == expected).all()
    assert compiled == [first]
    for i in range(COMPILED_MAX):
        made.make(of({"const": i}))
    made.make(first)
    assert compiled.count(first) == 2

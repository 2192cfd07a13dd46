"""What an answer may look like: JSON that fits a schema, tool calls as a model's family prints them.

A grammar is a text in llguidance's dialect of Lark, which the engine decodes by
(aiosd.cores.engine.constraint). The daemon judges schemas here, and never needs torch for it. What is read
back out of an answer is in aiosd.syscall.toolcalls. Pure.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from aiosd.errors import BadRequest
from aiosd.syscall import argument_types, families
from aiosd.syscall.decodable import LOOSE, decodable
from aiosd.syscall.families import THINKING, Family, Style
from aiosd.syscall.judging import Court, serve
from aiosd.syscall.references import References

if TYPE_CHECKING:
    from llguidance import LLParserLimits

CALLS_MAX = 16  # of one answer that is to be made of calls
SCHEMA_CHARS = 64 << 10
GRAMMAR_CHARS = 256 << 10  # with the schemas of all functions
# llguidance goes down a schema by recursion, references too: 3900 was too much for 8 MiB of stack.
REACH_MAX = 1000
COMPILE_S = 0.25  # of the processor, that a schema may take: a worker compiles between two steps of others
COURT = Court("aiosd.syscall.grammar")
TOO_LONG = "it takes too long to be understood"
LENGTH_MAX = 2000  # a text whose bound is higher has none here
ANY_KEY = r"/[^<>\s\"]{1,64}/"
LOOSELY = 'or give "strict": false beside it'
REASONS = (  # what llguidance says, and what that means to who wrote the schema
    (r"Unimplemented keys: \[(.*)\]", rf"no answer can be made by \1; leave it out, {LOOSELY}"),
    (r"oneOf constraints are not.*", f"a value may fit two parts of a oneOf; write anyOf, {LOOSELY}"),
    (r"patternProperty regexes (.*) are not disjoint",
     rf"a name may fit two of patternProperties, \1; make them differ, {LOOSELY}"),
    (r"min/maxProperties only.*",
     f"minProperties and maxProperties need all properties to be required; require them, {LOOSELY}"),
    (r"(regex parse error.*look-around.*)", rf"\1; write the pattern without it, {LOOSELY}"),
    (r"Unsatisfiable schema: .*", "no value fits it"),
)  # fmt: skip
SPACE = r" |\n{1,2}[ \t]{0,20}"  # bounded: a model that has lost its way would say nothing else
FUNCTION = "function "  # with a name behind it, the tool_choice of that one
HEAD = '%llguidance {"no_forcing": true, "ignore_once": true}\n'  # forcing would need the tokenizer's say
IGNORE = f"%ignore /{SPACE}/\n"  # as in the JSON: then what is outside and inside of it is one grammar


@dataclass(frozen=True, slots=True)
class Form:
    """What an answer is to be."""

    schema: str = ""  # JSON Schema of an answer that is no call, as JSON; empty: it may be any text
    functions: Sequence[dict[str, Any]] = ()  # OpenAI tools
    decoded: Sequence[str] = ()  # of each what arguments() made of its parameters
    choice: str = "auto"  # or required, or FUNCTION and a name
    parallel: bool = True  # False: it has one call at the most


@dataclass(frozen=True, slots=True)
class Voice:
    """How the model says it."""

    family: str = ""  # the name in aiosd.syscall.families
    thinks: bool = False  # it may think before it answers
    opened: str = ""  # the mark of thinking that the prompt ends with
    silent: Sequence[int] = ()  # special tokens, not of the end, that may come in a text


def grammar(form: Form, voice: Voice) -> str:
    """Of an answer; empty where anything goes, also for functions that are too many. Raises BadRequest."""
    family = families.of(voice.family)
    how = family.style
    if form.choice != "auto" and how is None:
        raise BadRequest("how this model prints tool calls is not known here", "leave tool_choice at auto")
    thought, rule = thinking(family, voice)
    if not form.functions or how is None:
        if not form.schema:
            return ""
        return f"{HEAD}start: {thought} {family.answers} %json {with_options(form.schema)}\n{rule}"
    call = calls_of(how, _offered(form))
    if form.choice == "auto" and not form.schema:
        made = HEAD + IGNORE + free(family, form, voice, thought) + call + rule
        return made if len(made) <= GRAMMAR_CHARS else ""
    calls = " | ".join(_calls(how, mark, form) for mark in family.marks[:1])
    otherwise = f" | {family.answers} %json {with_options(form.schema)}" if form.choice == "auto" else ""
    made = f"{HEAD}{IGNORE}start: {thought} ({calls}{otherwise})\n{call}{rule}"
    if len(made) > GRAMMAR_CHARS:
        raise BadRequest(f"the schemas of the tools have more than {GRAMMAR_CHARS} characters")
    return made


def _offered(form: Form) -> list[tuple[str, str]]:
    """The functions that may be called: names, and what their arguments are decoded by."""
    each = form.decoded or [arguments(parameters(f)) for f in form.functions]
    named = [(f["function"]["name"], one) for f, one in zip(form.functions, each, strict=True)]
    if not form.choice.startswith(FUNCTION):
        return named
    return [(name, one) for name, one in named if name == form.choice.removeprefix(FUNCTION)]


def _calls(how: Style, mark: str, form: Form) -> str:
    opening, one = json.dumps(mark, ensure_ascii=False), single(form)
    opened = f"{opening}?" if how.bare else opening
    turn = _turn(how, one)
    return f"{opened} {turn}" if how.between or one else f"({opened} {turn}){{1,{CALLS_MAX}}}"


def _turn(how: Style, one: bool) -> str:
    """The calls behind one opening."""
    more = f"({how.between} call){{0,{CALLS_MAX - 1}}}" if how.between and not one else ""
    return f"{how.before} call {more} {how.after}"


def single(form: Form) -> bool:
    return not form.parallel or form.choice.startswith(FUNCTION)


def thinking(family: Family, voice: Voice) -> tuple[str, str]:
    """What comes before an answer, and the rule for it; nothing where the model does not think."""
    marks = {one.opening: one.closing for one in (*THINKING, *family.thinking)}
    opening = voice.opened or family.thinking[0].opening
    if not (voice.opened or voice.thinks):
        return "", ""
    rule = f"thought[lazy]: /(?s:.*)/ {quoted(marks[opening])}\n"
    return ("thought" if voice.opened else f"({quoted(opening)} thought)?"), rule


def free(family: Family, form: Form, voice: Voice, thought: str) -> str:
    """Text until a call begins, and between calls."""
    how, one = family.style, not form.parallel
    assert how is not None
    turn, opening = _turn(how, one), quoted(family.marks[0])
    silent = f"<[{','.join(map(str, voice.silent))}]>" if voice.silent else ""
    noise = f" | TEXT {silent}" if silent else ""
    rest = f"(TEXT {silent})* (head {turn} | TEXT)" if silent else f"(head {turn} | TEXT)"
    said = rest if one else f"(head {turn}{noise})* TEXT"
    rules = f"{thought} {said}\nhead[lazy]: TEXT {opening}\n"
    if how.bare:
        return f"start: {thought} GAP? {turn} | {rules}GAP: /\\s+/\nTEXT: /(\\s*[^{{\\s](?s:.*))?/\n"
    return f"start: {rules}TEXT: /(?s:.*)/\n"


def calls_of(how: Style, functions: Sequence[tuple[str, str]]) -> str:
    """`functions`: names, and what arguments() made of their parameters."""
    calls = "\n    | ".join(call_of(how, i, name) for i, (name, _) in enumerate(functions))
    heads = (how.head.replace("NAME", quoted(name)) for name, _ in functions)
    rules = "".join(f"HEAD{i}: {head}\n" for i, head in enumerate(heads) if head)
    for i, (_, decoded) in enumerate(functions):
        rules += fields(how, i, decoded) if how.field else f"arguments{i}: %json {decoded}\n"
    return f"call: {calls}\n{rules}"


def call_of(how: Style, i: int, name: str) -> str:
    pieces = {
        "QUOTED": quoted(quoted(name)),
        "HEAD": f"HEAD{i}",
        "ARGUMENTS": f"arguments{i}",
        "FIELDS": f"fields{i}",
    }
    return re.sub("|".join(pieces), lambda piece: pieces[piece[0]], how.call)


def fields(how: Style, i: int, decoded: str) -> str:
    """The rules of a call whose arguments stand one by one between tags: those known, in their order."""
    schema = json.loads(decoded)
    known, needed = schema.get("properties") or {}, schema.get("required") or []
    if not known:
        return f"fields{i}: any{i}*\n" + _text(how, f"any{i}", _tag(how, ANY_KEY, True), {})
    shared = {key: schema[key] for key in ("$defs", "definitions", "x-guidance") if key in schema}
    made, rules = list[str](), ""
    for n, (key, one) in enumerate(known.items()):
        name, is_text = f"field{i}_{n}", argument_types.types(one, schema) == {"string"}
        made.append(name if key in needed else f"{name}?")
        whole = {**shared, **(one if isinstance(one, dict) else {})}
        rules += (_text if is_text else _value)(how, name, _tag(how, quoted(key), is_text), whole)
    return f"fields{i}: {' '.join(made)}\n{rules}"


def _tag(how: Style, key: str, is_text: bool) -> str:
    """What stands before a value."""
    pieces = {"KEY": key, "STRING": "true" if is_text else "false"}
    return re.sub(r"\b(?:KEY|STRING)\b", lambda piece: pieces[piece[0]], how.field)


def _value(how: Style, name: str, tag: str, schema: Any) -> str:
    """The tag is a terminal, so that no white space comes between its parts."""
    return f'{name}: {name.upper()} %json {json.dumps(schema)} "{how.field_end}"\n{name.upper()}: {tag}\n'


def _text(how: Style, name: str, tag: str, schema: Any) -> str:
    """A text between its tags; the rest of its schema is for the judge of the call."""
    options = [one for one in schema.get("enum", [schema.get("const")]) if isinstance(one, str)]
    least, most = schema.get("minLength", 0), schema.get("maxLength", LENGTH_MAX)
    bounds = f"{{{least},{most}}}" if least <= most < LENGTH_MAX else "*"
    text = f"({' | '.join(map(quoted, options))})" if options else f"/(?s:.{bounds})/"
    return f'{name}[lazy]: {tag} {text} "{how.field_end}"\n'


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def parameters(function: dict[str, Any]) -> str:
    return json.dumps(function["function"].get("parameters") or {})


def arguments(parameters: str, trusted: bool = False) -> str:
    """The schema of a function's arguments, as far as an answer can be decoded by it."""
    raw = json.loads(parameters)
    if isinstance(raw, dict) and raw.get("type", "object") == "object":
        made = with_options(json.dumps({"type": "object", **raw}), lenient=True)
        if not wrong(made, trusted):
            return made
    return with_options('{"type": "object"}')


def with_options(schema: str, lenient: bool = False) -> str:
    """With ours in place of any that the schema brings. Lenient, or by its own word, it is made weaker where
    no answer can be made by it."""
    raw = json.loads(schema)
    loose = lenient or raw.get(LOOSE) is True
    ours = {"whitespace_pattern": SPACE, "lenient": loose, "coerce_one_of": loose}
    return json.dumps({**decodable({**raw, LOOSE: loose}), "x-guidance": ours})


def check(schema: str) -> None:
    """That answers can be decoded by it. Raises BadRequest."""
    if why := wrong(with_options(schema)):
        raise BadRequest(
            f"the JSON schema cannot be used: {why}", "aios-transaction(7) says what a schema may have"
        )


def wrong(schema: str, trusted: bool = False) -> str:
    """Why nothing can be decoded by it; empty: it can."""
    if len(schema) > SCHEMA_CHARS:
        return f"it has more than {SCHEMA_CHARS} characters"
    if reach(json.loads(schema)) > REACH_MAX:
        return "its depth times its references is too much"
    if lost := References(json.loads(schema)).lost():
        return f"{lost[0]} names no part of it"
    return compiled(schema) if trusted else refused(schema)


@lru_cache(maxsize=1024)
def refused(schema: str) -> str:
    """Asked of a process of its own: some small schemas take for ever."""
    verdict = COURT.verdict(schema)
    return TOO_LONG if verdict is None else verdict


@lru_cache(maxsize=1024)
def compiled(schema: str) -> str:
    """The same in this process."""
    import llguidance

    start = f"{HEAD}start: %json {schema}\n"
    return reason(llguidance.LLMatcher.validate_grammar(start, limits=limits()))


def verdict(schema: str) -> str:
    """Why nothing can be decoded by it, judged in this process, which may take long; empty: it can."""
    began = time.process_time()
    return compiled(schema) or (TOO_LONG if time.process_time() - began > COMPILE_S else "")


def reason(error: str) -> str:
    """What llguidance says, in words of JSON Schema and on one line."""
    said = " ".join(error.replace("<non-verbose/>", "").split())
    said = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?| 1 \| %llguidance.*", "", said)
    for pattern, plain in REASONS:
        said = re.sub(pattern, plain, said)
    return said


@cache
def limits() -> LLParserLimits:
    """Of a grammar, and of one step of an answer: some hundredths of a second, some tens of megabytes."""
    import llguidance

    return llguidance.LLParserLimits(max_items_in_row=10_000, max_lexer_states=25_000, verbose_errors=False)


def reach(schema: object) -> int:
    """An upper bound of how deep it goes, references followed."""
    level, deep, references = [schema], 0, set[str]()
    while level:
        deep += 1
        objects = [value for value in level if isinstance(value, dict)]
        references |= {str(value["$ref"]) for value in objects if "$ref" in value}
        level = [child for value in objects for child in value.values()] + [
            child for value in level if isinstance(value, list) for child in value
        ]
    return deep * (1 + len(references))


if __name__ == "__main__":
    limits()  # imports the library
    serve(verdict)

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
from aiosd.syscall.decodable import LOOSE, decodable
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
class Style:
    """How a family prints calls, as pieces of a grammar; QUOTED, NAME and ARGUMENTS are a function's."""

    opening: str  # what makes a text a call
    call: str
    before: str = ""  # the first of the calls behind one opening
    between: str = ""  # empty: each call has its own opening
    after: str = ""
    head: str = ""  # of a call, as one terminal: no space in it
    bare: bool = False  # an answer that begins with { is a call too


OBJECT = r'"{" "\"name\"" ":" QUOTED "," "\"KEY\"" ":" ARGUMENTS'
STYLES = {
    "hermes": Style("<tool_call>", OBJECT.replace("KEY", "arguments") + ' "}"', after='"</tool_call>"'),
    "llama": Style("<|python_tag|>", OBJECT.replace("KEY", "parameters") + ' "}"', between='";"', bare=True),
    "mistral": Style(
        "[TOOL_CALLS]",
        OBJECT.replace("KEY", "arguments") + r' ("," "\"id\"" ":" /"[A-Za-z0-9]{1,64}"/)? "}"',
        before='"["',
        between='","',
        after='"]"',
    ),
    "mistral-args": Style(
        "[TOOL_CALLS]", "HEAD ARGUMENTS", head='NAME ("[CALL_ID]" /[A-Za-z0-9]{9}/)? "[ARGS]"'
    ),
}


def style(template: str) -> str:
    """Which of STYLES a chat template prints calls in; empty: none of them."""
    if "[TOOL_CALLS]" in template:
        listed = re.search(r"\[TOOL_CALLS\]\s*\[", template)
        return "mistral-args" if "[ARGS]" in template else "mistral" if listed else ""
    named = '"name":' in template
    if "<tool_call>" in template:
        return "hermes" if named and not re.search("<function=|<arg_key>", template) else ""
    return "llama" if named and '"parameters":' in template and "ipython" in template else ""


def grammar(
    schema: str,
    functions: Sequence[dict[str, Any]],
    choice: str,
    family: str,
    silent: Sequence[int] = (),
    decoded: Sequence[str] = (),
) -> str:
    """Of an answer; empty where anything goes, also for functions that are too many. Raises BadRequest.

    `schema`: of an answer that is no call, as JSON, or empty. `functions`: OpenAI tools; `decoded`: what
    arguments() made of the parameters of each. `choice`: auto,
    required, or FUNCTION and a name. `family`: of STYLES, or empty. `silent`: special tokens, not of the end,
    that may come in a text.
    """
    how = STYLES.get(family)
    if choice != "auto" and how is None:
        raise BadRequest("how this model prints tool calls is not known here", "leave tool_choice at auto")
    if not functions or how is None:
        return f"{HEAD}start: %json {with_options(schema)}\n" if schema else ""
    one = choice.startswith(FUNCTION)
    each = decoded or [arguments(parameters(f)) for f in functions]
    named = [
        (f["function"]["name"], schema_)
        for f, schema_ in zip(functions, each, strict=True)
        if not one or f["function"]["name"] == choice[len(FUNCTION) :]
    ]
    call = calls_of(how, named)
    opening = json.dumps(how.opening)
    opened = f"{opening}?" if how.bare else opening
    turn = f"{how.before} call {how.after}"
    if how.between and not one:
        turn = f"{how.before} call ({how.between} call){{0,{CALLS_MAX - 1}}} {how.after}"
    calls = f"{opened} {turn}" if how.between or one else f"({opened} {turn}){{1,{CALLS_MAX}}}"
    if choice == "auto" and not schema:
        made = HEAD + IGNORE + free(how, turn, opening, silent) + call
        return made if len(made) <= GRAMMAR_CHARS else ""
    otherwise = f" | %json {with_options(schema)}" if choice == "auto" else ""
    made = f"{HEAD}{IGNORE}start: {calls}{otherwise}\n{call}"
    if len(made) > GRAMMAR_CHARS:
        raise BadRequest(f"the schemas of the tools have more than {GRAMMAR_CHARS} characters")
    return made


def free(how: Style, turn: str, opening: str, silent: Sequence[int]) -> str:
    """Text until a call begins, and between calls."""
    noise = f" | TEXT <[{','.join(map(str, silent))}]>" if silent else ""
    rules = f"(head {turn}{noise})* TEXT\nhead[lazy]: TEXT {opening}\n"
    if how.bare:
        return f"start: GAP? {turn} | {rules}GAP: /\\s+/\nTEXT: /(\\s*[^{{\\s](?s:.*))?/\n"
    return f"start: {rules}TEXT: /(?s:.*)/\n"


def calls_of(how: Style, functions: Sequence[tuple[str, str]]) -> str:
    """`functions`: names, and what arguments() made of their parameters."""
    calls = "\n    | ".join(call_of(how, i, *function) for i, function in enumerate(functions))
    heads = (how.head.replace("NAME", quoted(name)) for name, _ in functions)
    named = "".join(f"HEAD{i}: {head}\n" for i, head in enumerate(heads) if head)
    return f"call: {calls}\n{named}"


def call_of(how: Style, i: int, name: str, decoded: str) -> str:
    pieces = {
        "QUOTED": quoted(quoted(name)),
        "HEAD": f"HEAD{i}",
        "ARGUMENTS": "%json " + decoded,
    }
    return re.sub("|".join(pieces), lambda piece: pieces[piece[0]], how.call)


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

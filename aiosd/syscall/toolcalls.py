"""The tool calls in what a model said, in the ways that the model families print them.

Hermes and Qwen, Llama 3, Mistral, and the XML of Qwen3-Coder; which of them it is, the text tells. All or
nothing: where a call is broken, the whole text stays text. A call that a broken one quotes (a web page, a
file it was to write) must not become a call of its own. Linear in the text. Pure.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

CALLS_MAX = 64  # a model that says more than these goes in circles

MARKER = re.compile(r"<tool_call>|<\|python_tag\|>|\[TOOL_CALLS\]|<function=")
# A quantifier never stands beside another that matches the same: the patterns would be quadratic.
OPENED = re.compile(r"\s*(?:```(?:json)?\s*)?")  # what may be between <tool_call> and its call: a fence
CLOSED = re.compile(r"\s*(?:```\s*)?(?:</tool_call>|(?=<tool_call>)|\Z)")
BETWEEN = re.compile(r"[\s;]*")  # two objects of Llama
NAMED = re.compile(r"\s*([\w.:/-]{1,256})(?:\[CALL_ID\]\w{1,64})?(?:\[ARGS\])?\s*(?=\{)")  # Mistral
FUNCTION = re.compile(r"<function=([^<>\s]{1,256})>\s*")
FUNCTION_CLOSED = re.compile(r"\s*</function>(?:\s*</tool_call>)?")
PARAMETER = re.compile(r"\s*<parameter=([^<>\s]{1,256})>")
PARAMETER_CLOSED = "</parameter>"


@dataclass(frozen=True, slots=True)
class Call:
    name: str
    arguments: str  # JSON of an object


def parse(text: str) -> tuple[str, list[Call]]:
    """(prose, calls): the stripped text without the calls, and those in their order."""
    try:
        return _split(text.strip())
    except (ValueError, RecursionError):  # broken; or nested deeper than the decoder goes
        return text.strip(), []


def hold(text: str) -> int:
    """How many characters of a growing text are surely no part of a call, whatever follows."""
    begin = re.search(r"[<\[]|\A\s*\{", text)
    return begin.end() - 1 if begin else len(text)


def _split(text: str) -> tuple[str, list[Call]]:
    calls, end = _bare(text)
    if end == len(text):
        return ("", calls) if calls else (text, [])
    prose, calls, at = "", [], 0
    marker = MARKER.search(text, end)
    while marker:
        found, end = _read(text, marker)
        if found:
            prose, at = prose + text[at : marker.start()], end
            calls += found
            if len(calls) > CALLS_MAX:
                raise ValueError("too many calls")
        marker = MARKER.search(text, end)
    return (prose + text[at:]).strip(), calls


def _bare(text: str) -> tuple[list[Call], int]:
    """Llama's calls without a mark, and where the objects end that the text begins with. Others among them
    are an answer in JSON: then there are no calls, also none that it quotes."""
    calls, others, end = list[Call](), 0, 0
    while text.startswith("{", end):
        try:
            said, at = DECODER.raw_decode(text, end)
        except ValueError:
            break
        if said.keys() - {"type"} in ({"name", "arguments"}, {"name", "parameters"}):
            calls.append(_call(said))
        else:
            others += 1
        end = _skip(BETWEEN, text, at)
    return calls if not others and len(calls) <= CALLS_MAX else [], end


def _read(text: str, marker: re.Match[str]) -> tuple[list[Call], int]:
    """The calls behind a marker and where they end; none where it is only mentioned. Raises ValueError."""
    at = marker.end()
    if marker[0] == "<function=":
        return _function(text, marker.start(), at)
    if marker[0] == "<|python_tag|>":
        return _objects(text, _skip(BETWEEN, text, at), at)
    if marker[0] == "[TOOL_CALLS]":
        if named := NAMED.match(text, at):
            arguments, end = DECODER.raw_decode(text, named.end())
            return [_made(named[1], arguments)], end
        return _objects(text, _skip(OPENED, text, at), at)
    begin = _skip(OPENED, text, at)
    if text.startswith("<function=", begin):
        return _function(text, begin, at)
    calls, end = _objects(text, begin, at)
    if calls:
        closed = CLOSED.match(text, end)
        if closed is None:
            raise ValueError("more than a call in a call")
        end = closed.end()
    return calls, end


def _objects(text: str, begin: int, nothing: int) -> tuple[list[Call], int]:
    """One call or more as JSON objects, or as a list of them. `nothing` is the end where there is none."""
    if not text.startswith(("{", "["), begin):
        return [], nothing
    calls = []
    while True:
        said, end = DECODER.raw_decode(text, begin)
        calls += [_call(one) for one in (said if isinstance(said, list) else [said])]
        begin = _skip(BETWEEN, text, end)
        if not text.startswith("{", begin):
            return calls, end


def _function(text: str, begin: int, nothing: int) -> tuple[list[Call], int]:
    """<function=NAME> with JSON behind it (Llama), or with <parameter=KEY> tags (Qwen3-Coder)."""
    head = FUNCTION.match(text, begin)
    if head is None:
        return [], nothing
    at = head.end()
    if text.startswith("{", at):
        arguments, at = DECODER.raw_decode(text, at)
        closed = FUNCTION_CLOSED.match(text, at)
        if closed is None and text[at:].strip():
            raise ValueError("more than an object in a function")
    elif text.startswith(("<parameter=", "</function>"), at):
        arguments, at = _parameters(text, at)
        closed = FUNCTION_CLOSED.match(text, at)
        if closed is None:  # cut off: an argument may be missing
            raise ValueError("no end of the function")
    else:
        return [], nothing
    return [_made(head[1], arguments)], closed.end() if closed else len(text)


def _parameters(text: str, at: int) -> tuple[dict[str, Any], int]:
    arguments = {}
    while key := PARAMETER.match(text, at):
        end = text.index(PARAMETER_CLOSED, key.end())
        arguments[key[1]] = _value(text[key.end() : end].removeprefix("\n").removesuffix("\n"))
        at = end + len(PARAMETER_CLOSED)
    return arguments, at


def _value(text: str) -> Any:
    """Nothing here tells a number from a text of digits: what can be JSON is meant so."""
    try:
        return DECODER.decode(text)
    except ValueError:
        return text


def _call(said: Any) -> Call:
    if not isinstance(said, dict):
        raise ValueError("a call is not an object")
    return _made(said.get("name"), said.get("arguments", said.get("parameters")))


def _made(name: Any, arguments: Any) -> Call:
    if arguments is None or arguments == "":
        arguments = {}
    elif isinstance(arguments, str):
        arguments = DECODER.decode(arguments)
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise ValueError("a call has a name and an object")
    return Call(name, json.dumps(arguments, ensure_ascii=False))


def _skip(pattern: re.Pattern[str], text: str, at: int) -> int:
    found = pattern.match(text, at)
    return found.end() if found else at


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("JSON could not say it again")
    return number


DECODER = json.JSONDecoder(parse_float=_number, parse_constant=_number)  # no NaN, no Infinity

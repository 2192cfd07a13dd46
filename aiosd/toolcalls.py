"""The tool calls in what a model said: parsed out of the syntaxes of the model families. Pure.

Tolerant where models are sloppy, and strict where a text only mentions a call: what is not surely one stays
text, so that the reader sees what was said. Formats: Hermes and Qwen (<tool_call>), Llama 3 (<|python_tag|>,
<function=>, or the bare JSON object), Mistral ([TOOL_CALLS], with or without [ARGS]).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

CALLS_MAX = 64
MARKER = re.compile(
    r"<tool_call>\s*(?:```(?:json)?\s*)?|<\|python_tag\|>\s*|<function=([\w.:-]{1,64})>\s*"
    r"|\[TOOL_CALLS\]\s*(?:([\w.:-]{1,64})\s*\[ARGS\]\s*)?"
)
END = re.compile(r"\s*(?:```)?\s*(?:</tool_call>|</function>|<\|eom_id\|>|<\|eot_id\|>|;)?")
JSON = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class Call:
    name: str
    arguments: str  # a JSON object


class _NoCall(ValueError):
    """It looks like one, and is not."""


def parse(text: str) -> tuple[str, list[Call]]:
    """(prose, calls). Where one call cannot be read all is prose."""
    try:
        calls, prose = _marked(text)
        if not calls and (bare := text.strip())[:1] == "{":
            calls, prose = _bare(bare), [""]
    except (ValueError, RecursionError):
        return text.strip(), []
    return ("".join(prose).strip(), calls) if calls else (text.strip(), [])


def hold(text: str) -> int:
    """How many characters of a growing text cannot be part of a call any more."""
    blank = len(text) - len(text.lstrip())
    if text[blank : blank + 1] in ("{", ""):
        return 0
    return min((at for mark in "<[" if (at := text.find(mark)) >= 0), default=len(text))


def _marked(text: str) -> tuple[list[Call], list[str]]:
    calls: list[Call] = []
    prose: list[str] = []
    at = 0
    while (found := MARKER.search(text, at)) and len(calls) < CALLS_MAX:
        prose.append(text[at : found.start()])
        raw, at = JSON.raw_decode(text, found.end())
        if name := found[1] or found[2]:
            calls.append(_named(name, raw))
        else:
            calls += [_call(one) for one in (raw if isinstance(raw, list) else [raw])]
        end = END.match(text, at)
        at = end.end() if end else at
        while found[0].startswith("<|python_tag|>") and text[at:].lstrip()[:1] == "{":
            raw, at = JSON.raw_decode(text, at + len(text[at:]) - len(text[at:].lstrip()))
            calls.append(_call(raw))
            end = END.match(text, at)
            at = end.end() if end else at
    return calls[:CALLS_MAX], [*prose, text[at:]]


def _bare(text: str) -> list[Call]:
    """Llama 3 says nothing but the object, or several with semicolons between."""
    return [_call(raw) for raw in _objects(text)]


def _objects(text: str) -> Iterator[Any]:
    at = 0
    while at < len(text):
        raw, at = JSON.raw_decode(text, at)
        if not isinstance(raw, dict) or raw.keys() - {"type"} not in (
            {"name", "arguments"},
            {"name", "parameters"},
        ):
            raise _NoCall
        yield raw
        rest = text[at:].lstrip("; \n")
        at = len(text) - len(rest)


def _call(raw: Any) -> Call:
    if not isinstance(raw, dict):
        raise _NoCall
    return _named(raw.get("name"), raw.get("arguments", raw.get("parameters", {})))


def _named(name: Any, given: Any) -> Call:
    given = json.loads(given) if isinstance(given, str) else given
    if not isinstance(name, str) or not name or not isinstance(given, dict):
        raise _NoCall
    return Call(name, json.dumps(given, ensure_ascii=False))

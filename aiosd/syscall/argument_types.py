"""The values of a call that were said as text: what each means, the schema of its parameter tells. Pure."""

from __future__ import annotations

import json
from typing import Any

from aiosd.syscall.call_syntax import DECODER, Spoken

REFERENCES_MAX = 16
KINDS = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}


def arguments(call: Spoken, parameters: Any) -> str:
    """The arguments of a call as JSON. `parameters`: the JSON Schema of the tool, or anything else."""
    if call.tagged is None:
        return call.arguments
    known = parameters.get("properties") if isinstance(parameters, dict) else None
    made = dict[str, str]()
    for key, text in call.tagged:
        if key in made:
            raise ValueError("an argument comes twice")
        schema = known.get(key) if isinstance(known, dict) else None
        made[key] = value(text, types(schema, parameters))
    pairs = (f"{json.dumps(key, ensure_ascii=False)}: {said}" for key, said in made.items())
    return "{" + ", ".join(pairs) + "}"


def types(schema: Any, root: Any, budget: int = REFERENCES_MAX) -> frozenset[str]:
    """The JSON types that a schema lets through, as far as it names them; empty: it does not."""
    if not isinstance(schema, dict) or budget <= 0:
        return frozenset()
    named = schema.get("type")
    if isinstance(named, str):
        found = {named}
    elif isinstance(named, list):
        found = {one for one in named if isinstance(one, str)}
    elif isinstance(schema.get("enum"), list) or "const" in schema:
        found = {_kind(one) for one in schema.get("enum", [schema.get("const")])}
    else:
        parts = [part for key in ("anyOf", "oneOf", "allOf") for part in _list(schema.get(key))]
        parts += [_referred(schema["$ref"], root)] if isinstance(schema.get("$ref"), str) else []
        each = budget // (len(parts) or 1) - 1 if len(parts) > 1 else budget - 1
        found = {one for part in parts for one in types(part, root, each)}
    return frozenset(found | ({"null"} if schema.get("nullable") is True and found else set()))


def value(text: str, wanted: frozenset[str]) -> str:
    """A text as the JSON of a value of these types. Where it may be text, it is the text that was said."""
    stripped = text.strip()
    if "null" in wanted and stripped in ("null", "None"):
        return "null"
    if "string" in wanted:
        return json.dumps(text, ensure_ascii=False)
    if "boolean" in wanted and stripped in ("True", "False"):
        return stripped.lower()
    try:
        said = DECODER.decode(stripped)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    if not wanted and not isinstance(said, (dict, list)) and json.dumps(said) != stripped:
        return json.dumps(text, ensure_ascii=False)  # 1.10 may be a version: as a number it would be another
    return stripped


def _kind(value: Any) -> str:
    return "null" if value is None else KINDS.get(type(value), "object")


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _referred(reference: str, root: Any) -> Any:
    at = root
    for step in reference.removeprefix("#").split("/")[1:]:
        key = step.replace("~1", "/").replace("~0", "~")
        at = at.get(key) if isinstance(at, dict) else None
    return at

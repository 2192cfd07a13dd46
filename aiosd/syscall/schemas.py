"""Make untrusted JSON Schemas harmless: those of MCP servers' tools and of users' own tools.

A schema can make its judge fetch addresses ($ref), take exponential time ($ref, pattern) or never end. So
arguments are judged by a weaker one: the plain keywords, references within it put in place, of bounded size.
A word that is wrong or cannot be judged is left out, with a note, and spoils nothing beside it. The tool
judges the rest. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import islice
from typing import Any

import jsonschema
from jsonschema.exceptions import best_match

from aiosd.syscall.dialects import modern
from aiosd.syscall.references import References

NODES = 500  # nodes of a reduced schema
DEEPEST = 24
FOLLOWED = 4  # references in each other
CHARS = 32  # of a value in a schema that count as a node
WORK = 500_000  # nodes times values of what is judged
WRONG = 50  # words that are left out, before all of the schema is
NOTES = 10  # that are kept
NOTE_CHARS = 200
ERRORS = 100  # of one value that are looked at
PLAIN = {
    "type", "enum", "const", "required", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
    "minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties", "dependentRequired",
}  # fmt: skip
ANYTHING: dict[str, Any] = {"type": "object"}


class TooLarge(Exception):
    """The schema is so large that a check could take long."""


def reduced(schema: object, notes: list[str] | None = None) -> dict[str, Any]:
    """The weaker schema of an object. `notes` gets the reasons for what is not judged. Raises ValueError
    where the schema is not one of an object."""
    kind = schema.get("type", "object") if isinstance(schema, dict) else None
    if not isinstance(schema, dict) or "object" not in (kind if isinstance(kind, list) else [kind]):
        raise ValueError("its arguments are to be an object")
    wrong: list[str] = []
    try:
        found = _without_wrong(_Reduction(schema, wrong).reduce(schema, "", 0, 0), wrong)
    except TooLarge:
        found, wrong = ANYTHING, ["the schema is too large"]
    if notes is not None:
        notes += [f"not judged here: {why[:NOTE_CHARS]}" for why in dict.fromkeys(wrong)][:NOTES]
    return {**found, **ANYTHING} if isinstance(found, dict) else ANYTHING


def can_judge(schema: object, text: str) -> bool:
    """Whether checking takes at most seconds. The values of the JSON `text` are estimated by its
    separators.
    """
    values = sum(map(text.count, ",[{")) + 1
    return values * (len(json.dumps(schema)) // CHARS + 1) <= WORK


def quarrel(schema: object, value: object) -> str:
    """Why a tool's structured result does not fit the schema that its server gave; empty: it does, as far as
    can be judged."""
    try:
        judge = reduced(schema)
    except ValueError:
        return ""
    if not can_judge(judge, json.dumps(value)):
        return ""
    wrong = best_match(islice(jsonschema.Draft202012Validator(judge).iter_errors(value), ERRORS))
    return f"{place(wrong.absolute_path)}{wrong.message}" if wrong else ""


def place(path: Iterable[object]) -> str:
    return "".join(f"{step}: " for step in path)


def _without_wrong(found: Any, wrong: list[str]) -> Any:
    """Without the keywords whose values are none: {"type": "int"}, {"required": "a"}."""
    meta = jsonschema.Draft202012Validator(jsonschema.Draft202012Validator.META_SCHEMA)
    for _ in range(WRONG):
        error = best_match(meta.iter_errors(found))
        if error is None:
            return found
        path = list(error.absolute_path)
        while path and not isinstance(path[-1], str):  # an item of a list that is a keyword's value
            path.pop()
        if not path:
            break
        at = found
        for step in path[:-1]:
            at = at[step]
        del at[path[-1]]
        wrong.append(f"{place(path)}{error.message}")
    raise TooLarge


class _Reduction:
    def __init__(self, root: dict[str, Any], wrong: list[str]) -> None:
        self._references, self._wrong, self._room = References(root), wrong, NODES

    def reduce(self, schema: object, base: str, depth: int, followed: int) -> Any:
        self._take(1)
        if isinstance(schema, bool) or depth > DEEPEST:
            return schema if isinstance(schema, bool) else True
        if not isinstance(schema, dict):
            self._wrong.append(f"{json.dumps(schema)[:80]} is not a schema")
            return True
        base = self._references.base_of(schema, base)
        if "$ref" in schema or "$dynamicRef" in schema:
            return self._follow(schema, base, depth, followed)
        schema = modern(schema)
        found = {key: schema[key] for key in PLAIN & schema.keys()}
        self._take(len(json.dumps(found)) // CHARS)

        def one(value: object) -> Any:
            return self.reduce(value, base, depth + 1, followed)

        for key in ("anyOf", "prefixItems"):
            if parts := self._list(schema, key):
                found[key] = [one(part) for part in parts]
        both = [one(part) for part in self._list(schema, "allOf")]
        if parts := self._list(schema, "oneOf"):  # not as it is: of two weaker parts both may fit
            both.append({"anyOf": [one(part) for part in parts]})
        if both:
            found["allOf"] = both
        for key in ("properties", "dependentSchemas"):
            if isinstance(named := schema.get(key, {}), dict):
                found |= {key: {name: one(part) for name, part in named.items()}} if named else {}
            else:
                self._wrong.append(f"{key} is not an object")
        if "items" in schema and ("prefixItems" in found) == ("prefixItems" in schema):
            found["items"] = one(schema["items"])
        judged = "patternProperties" not in schema and ("properties" in found) == bool(
            schema.get("properties")
        )
        if "additionalProperties" in schema and judged:
            found["additionalProperties"] = one(schema["additionalProperties"])
        return found

    def _follow(self, schema: dict[str, Any], base: str, depth: int, followed: int) -> Any:
        target = self._references.find(schema.get("$ref"), base)
        if target is None:
            named = schema.get("$ref", schema.get("$dynamicRef"))
            self._wrong.append(f"{json.dumps(named)[:80]} names no part of the schema")
        if target is None or followed == FOLLOWED:
            return True
        return self.reduce(*target, depth + 1, followed + 1)

    def _list(self, schema: dict[str, Any], key: str) -> list[Any]:
        parts = schema.get(key, [])
        if isinstance(parts, list):
            return parts
        self._wrong.append(f"{key} is not a list")
        return []

    def _take(self, nodes: int) -> None:
        self._room -= nodes
        if self._room < 0:
            raise TooLarge

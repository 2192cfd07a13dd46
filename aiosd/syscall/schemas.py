"""Make untrusted JSON Schemas harmless: those of MCP servers' tools and of users' own tools.

A schema can make a validator fetch addresses ($ref), take exponential time ($ref, pattern) or never end. So
arguments are checked by a weaker schema of bounded size: it has only the plain keywords, and inner references
are replaced by their targets. The tool checks the rest. Pure.
"""

from __future__ import annotations

import json
from typing import Any

import jsonschema

NODES = 500  # nodes of a reduced schema
DEEPEST = 24
FOLLOWED = 4  # nested references that are followed
CHARS = 32  # so many characters of a value count as one node
WORK = 500_000  # the most nodes of a schema times values of the checked JSON
PLAIN = {
    "type", "enum", "const", "required", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
    "minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties",
}  # fmt: skip
ANYTHING: dict[str, Any] = {"type": "object"}


class TooLarge(Exception):
    """The schema is so large that a check could take long."""


def reduced(schema: object) -> dict[str, Any]:
    """Return the weaker schema. Raises ValueError if `schema` is not the schema of an object."""
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        raise ValueError("its arguments must be an object")
    try:
        found = _Reduction(schema).reduce(schema, 0, 0)
    except TooLarge:
        return ANYTHING
    if not isinstance(found, dict):
        return ANYTHING
    try:
        jsonschema.Draft202012Validator.check_schema(found)
    except jsonschema.SchemaError as error:
        raise ValueError(f"not a JSON Schema: {error.message[:200]}") from None
    return {**found, **ANYTHING}


def can_judge(schema: object, text: str) -> bool:
    """Whether checking takes at most seconds. The values of the JSON `text` are estimated by its
    separators.
    """
    values = sum(map(text.count, ",[{")) + 1
    return values * (len(json.dumps(schema)) // CHARS + 1) <= WORK


class _Reduction:
    def __init__(self, root: dict[str, Any]) -> None:
        self._root, self._room = root, NODES

    def reduce(self, schema: object, depth: int, followed: int) -> Any:
        self._take(1)
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise ValueError("not a JSON Schema: an object is missing")
        if depth > DEEPEST:
            return True
        if "$ref" in schema or "$dynamicRef" in schema:
            target = self._find(schema.get("$ref"))
            return (
                True
                if target is None or followed == FOLLOWED
                else self.reduce(target, depth + 1, followed + 1)
            )
        found = {key: schema[key] for key in PLAIN & schema.keys()}
        self._take(len(json.dumps(found)) // CHARS)

        def each(values: object) -> list[Any]:
            if not isinstance(values, list):
                raise ValueError("not a JSON Schema: a list is missing")
            return [self.reduce(value, depth + 1, followed) for value in values]

        for key in ("anyOf", "prefixItems"):
            if key in schema:
                found[key] = each(schema[key])
        both = each(schema.get("allOf", []))
        if "oneOf" in schema:  # not oneOf: a value may fit two parts after both were weakened
            both.append({"anyOf": each(schema["oneOf"])})
        if both:
            found["allOf"] = both
        if "properties" in schema:
            if not isinstance(schema["properties"], dict):
                raise ValueError("not a JSON Schema: properties is not an object")
            found["properties"] = dict(
                zip(schema["properties"], each(list(schema["properties"].values())), strict=True)
            )
        if "items" in schema:
            found["items"] = self.reduce(schema["items"], depth + 1, followed)
        if "additionalProperties" in schema and "patternProperties" not in schema:
            found["additionalProperties"] = self.reduce(schema["additionalProperties"], depth + 1, followed)
        return found

    def _take(self, nodes: int) -> None:
        self._room -= nodes
        if self._room < 0:
            raise TooLarge

    def _find(self, reference: object) -> object:
        """Return the target of a reference within the schema; None: there is none, or it points elsewhere."""
        if not isinstance(reference, str) or not reference.startswith("#"):
            return None
        at: object = self._root
        for step in reference[1:].split("/")[1:]:
            at = at.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(at, dict) else None
        return at

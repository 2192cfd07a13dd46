"""Words of JSON Schema that an answer is made by: what is rewritten means the same, the rest is refused."""

from __future__ import annotations

import itertools
import json
import re
import time
from typing import Any

import jsonschema
import pytest
from jsonschema.validators import validator_for

from aiosd.errors import BadRequest
from aiosd.syscall import grammar
from aiosd.syscall.chat import Defaults, parse
from aiosd.syscall.decodable import decodable

TEXT, WHOLE = {"type": "string"}, {"type": "integer"}
AB = {"type": "object", "properties": {"a": TEXT, "b": WHOLE}}
CLOSED = {**AB, "additionalProperties": False}
OLD = {"$schema": "http://json-schema.org/draft-07/schema#"}
KIND = {"type": "object", "required": ["k"]}
WORDS: list[dict[str, Any]] = [
    {**CLOSED, "dependentRequired": {"a": ["b"]}},
    {**AB, "dependentSchemas": {"a": {"properties": {"b": {"const": 1}}}}},
    {**AB, **OLD, "dependencies": {"a": ["b"], "b": {"required": ["a"]}}},
    {"type": "object", "propertyNames": {"pattern": "^a"}, "additionalProperties": WHOLE},
    {"type": "object", "propertyNames": {"enum": ["a", "k"]}},
    {"type": "object", "propertyNames": {"maxLength": 1}},
    {**AB, "unevaluatedProperties": False},
    {"allOf": [AB], "properties": {"k": TEXT}, "unevaluatedProperties": False},
    {"type": "array", "prefixItems": [TEXT], "unevaluatedItems": False},
    {**CLOSED, "minProperties": 1},
    {**CLOSED, "minProperties": 2},
    {**CLOSED, "maxProperties": 2},
    {**CLOSED, "required": ["a"], "minProperties": 1},
    {"type": "object", "patternProperties": {"^a": TEXT, "^ab": TEXT}, "additionalProperties": False},
    {"$dynamicRef": "#n", "$defs": {"n": {"$dynamicAnchor": "n", **TEXT}}},
    {"properties": {"a": {"$ref": "#/$defs/my%20n"}}, "$defs": {"my n": TEXT}, "type": "object"},
    {"type": "string", "format": "color"},
    {"type": "string", "format": "uri-reference"},
    {"oneOf": [TEXT, {"type": "null"}]},
    {"oneOf": [{"const": 1}, {"const": 2}]},
    {"oneOf": [{"enum": ["x", 1]}, {"type": "array"}]},
    {"oneOf": [{**KIND, "properties": {"k": {"const": one}}} for one in "xy"]},
    {"type": "object", "required": ["k"], "oneOf": [{"properties": {"k": {"enum": ["x"]}}},
                                                    {"properties": {"k": {"enum": ["y"]}}}]},
    {"oneOf": [{**CLOSED, "required": ["a"]}, {"type": "object", "required": ["k"]}]},
    {**CLOSED, "oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
    {**AB, "not": {"required": ["a", "b"]}},
    {**AB, "not": {"anyOf": [{"required": ["a"]}, {"required": ["b"]}]}},
    {"not": {"type": "string"}},
    {"not": {"type": ["null", "object"]}},
    {"enum": ["x", "y", 1], "not": {"const": "y"}},
    {**OLD, "type": "array", "items": [TEXT, WHOLE], "additionalItems": False},
]  # fmt: skip
PARTS: list[Any] = ["x", "y", 1, 2, 0.5, None, True]
OBJECTS = [
    dict(pairs)
    for n in range(4)
    for names in itertools.combinations(["a", "b", "k", "ab"], n)
    for pairs in itertools.product(*([(name, value) for value in PARTS[:4]] for name in names))
]
VALUES = [*PARTS, *OBJECTS, [], ["x"], ["x", 1], ["x", 1, 2], [1]]


@pytest.mark.parametrize("schema", WORDS, ids=lambda schema: json.dumps(schema)[:70])
def test_what_is_said_in_other_words_means_the_same_and_can_be_made(schema: dict[str, Any]) -> None:
    whole = validator_for(schema, jsonschema.Draft202012Validator)(schema)
    made = jsonschema.Draft202012Validator(decodable(schema))
    assert [v for v in VALUES if whole.is_valid(v) != made.is_valid(v)] == []
    assert len({whole.is_valid(value) for value in VALUES}) == 2
    assert grammar.compiled(grammar.with_options(json.dumps(schema))) == ""


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"oneOf": [TEXT, {"type": "string", "maxLength": 3}]}, "may fit two parts of a oneOf"),
    ({"oneOf": [{"maximum": 2}, {"minimum": 5}]}, "may fit two parts of a oneOf"),
    ({"type": "array", "uniqueItems": True}, '"uniqueItems"'),
    ({"type": "array", "contains": TEXT}, '"contains"'),
    ({**AB, "if": {"required": ["a"]}, "then": {"required": ["b"]}}, '"if"'),
    ({**AB, "minProperties": 1}, "minProperties"),
    ({"type": "object", "patternProperties": {"^a": TEXT, "^ab": WHOLE}}, "two of patternProperties"),
    ({"type": "string", "pattern": "^(?=a).*"}, "look-around"),
    ({"not": {"minimum": 3}}, '"not"'),
]


@pytest.mark.parametrize(("schema", "why"), REFUSED, ids=lambda value: json.dumps(value)[:70])
def test_what_no_answer_can_be_made_by_is_refused_in_plain_words_and_taken_loosely(
    schema: dict[str, Any], why: str
) -> None:
    with pytest.raises(BadRequest, match=why) as refused:
        asked(schema)
    for inner in ("%llguidance", "coerce_one_of", "Unimplemented", "at 2("):
        assert inner not in str(refused.value)
    assert '"strict": false' in str(refused.value)
    loose = asked(schema, strict=False)
    assert grammar.compiled(grammar.with_options(loose)) == ""
    weak = jsonschema.Draft202012Validator(decodable(json.loads(loose)))
    whole = jsonschema.Draft202012Validator(schema)
    assert all(weak.is_valid(value) for value in VALUES if whole.is_valid(value))


def asked(schema: dict[str, Any], **more: Any) -> str:
    wanted = {"name": "n", "schema": schema, **more}
    form = {"type": "json_schema", "json_schema": wanted}
    body = {"prompt": "q", "response_format": form}
    return parse(json.dumps(body).encode(), Defaults("m")).schema


@pytest.mark.parametrize("reference", ["http://127.0.0.1:1/s", "#/$defs/none", "other.json"])
def test_a_reference_to_elsewhere_is_refused_by_its_name(reference: str) -> None:
    with pytest.raises(BadRequest, match=re.escape(reference)):
        asked({"type": "object", "properties": {"a": {"$ref": reference}}})


def test_a_schema_of_very_many_parts_is_compared_no_longer_than_a_moment() -> None:
    def part(i: int) -> dict[str, Any]:
        return {"required": [f"p{i}"], "properties": {f"p{j}": {"oneOf": [TEXT, WHOLE]} for j in range(9)}}

    for schema in (
        {"oneOf": [{"required": [f"p{i}"]} for i in range(3000)]},
        {"oneOf": [{"const": i} for i in range(5000)]},
        {"oneOf": [part(i) for i in range(300)]},
        {"oneOf": [{"type": "object", "required": [f"p{i}" for i in range(40)]} for _ in range(64)]},
    ):
        began = time.process_time()
        decodable(schema)
        assert time.process_time() - began < 1

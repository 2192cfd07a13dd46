"""Tools that an MCP server describes: schemas that would harm the daemon, and faulty lists."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from aiosd.config.mcp import Server, server
from aiosd.errors import BadRequest
from aiosd.syscall import schemas
from aiosd.tools import catalog
from aiosd.tools.catalog import Tool
from aiosd.tools.manifest import Manifest
from aiosd.tools.mcp.listing import manifests

SERVER = Server("s", ("/bin/true",))


def listed(name: str = "t", **facts: Any) -> dict[str, Any]:
    return {
        "name": name,
        "description": "d",
        "schema": {"type": "object"},
        "read_only": False,
        "destructive": True,
    } | facts


def judge(schema: Any, arguments: Any) -> None:
    [manifest], _ = manifests(SERVER, [listed(schema=schema)])
    catalog.arguments(Tool(manifest, 1), json.dumps(arguments))


def test_plain_schemas_are_judged_as_they_are() -> None:
    schema = {
        "type": "object",
        "required": ["a"],
        "properties": {
            "a": {"$ref": "#/$defs/A"},
            "b": {"anyOf": [{"type": "integer", "minimum": 3}, {"type": "null"}]},
            "c": {"type": "array", "items": {"enum": ["x", "y"]}, "uniqueItems": True},
        },
        "additionalProperties": False,
        "$defs": {"A": {"type": "string", "maxLength": 3}},
    }
    judge(schema, {"a": "abc", "b": None, "c": ["x", "x"]})
    for wrong in ({}, {"a": "abcd"}, {"a": 1}, {"a": "", "b": 2}, {"a": "", "c": ["z"]}, {"a": "", "d": 1}):
        with pytest.raises(BadRequest):
            judge(schema, wrong)


BOMB = {f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(60)}
NESTED: dict[str, Any] = {}
for _ in range(60):
    NESTED = {"anyOf": [NESTED, NESTED]} if len(json.dumps(NESTED)) < 20_000 else {"items": NESTED}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "$ref": "#"},
        {"type": "object", "properties": {"a": {"$ref": "#/properties/a"}}},
        {"type": "object", "properties": {"a": {"$ref": "http://127.0.0.1:1/schema"}}},
        {"type": "object", "properties": {"a": {"$ref": "file:///etc/passwd"}}},
        {"type": "object", "$id": "http://127.0.0.1:1/", "properties": {"a": {"$ref": "x"}}},
        {"type": "object", "properties": {"a": {"$ref": "#/$defs/a0"}}, "$defs": BOMB},
        {"type": "object", "properties": {"a": {"pattern": "^(a+)+$"}}},
        {"type": "object", "patternProperties": {"^(a+)+$": False}, "additionalProperties": False},
        {"type": "object", "properties": {"a": {"oneOf": [{"pattern": "x"}, {"type": "string"}]}}},
        {"type": "object", "properties": {"a": NESTED}},
        {"type": "object", "properties": {"a": {"enum": list(range(5000))}}},
        {"type": "object", "properties": {"a": {"multipleOf": 1e-300}}},
        {"type": "object", "$dynamicRef": "#", "unevaluatedProperties": False},
    ],
    ids=lambda schema: json.dumps(schema)[:60],
)
def test_a_schema_that_would_fetch_loop_or_take_long_is_weakened(schema: Any) -> None:
    began = time.monotonic()
    judge(schema, {"a": "a" * 40 + "!"})
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    "schema",
    [{"type": "array"}, {"type": "object", "properties": 5}, {"properties": {"a": {"type": "strin"}}},
     {"allOf": {}}, {"properties": {"a": 3}}, {"required": "a"}],
    ids=str,
)  # fmt: skip
def test_a_tool_without_a_valid_schema_is_left_out(schema: Any) -> None:
    assert manifests(SERVER, [listed(schema=schema), listed("good")])[0][0].name == "s.good"


def test_arguments_of_very_many_values_are_refused_where_that_would_take_long() -> None:
    part: dict[str, Any] = {"anyOf": [{"const": i} for i in range(100)]}
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": part}}}
    with pytest.raises(BadRequest, match="too many values"):
        judge(schema, {"a": [0] * 100_000})
    judge(schema, {"a": [0] * 1000})


def test_the_valid_part_of_a_list_is_taken() -> None:
    wrong: list[Any] = [
        None, 5, {}, listed("a/b"), listed(".."), listed(""), listed("x" * 64), listed("é"), listed("a\nb"),
        listed(schema=[]), listed(description=3), listed(schema={"type": "object", "x": "y" * 70_000}),
    ]  # fmt: skip
    made, complaints = manifests(SERVER, [*wrong, listed("good"), listed("good")])
    assert [m.name for m in made] == ["s.good"]
    assert len(complaints) == len(wrong) + 1
    assert manifests(SERVER, {"tools": []}) == ([], [])
    [long] = manifests(SERVER, [listed(description="x" * 100_000)])[0]
    assert len(long.description) < 3000


@pytest.mark.parametrize(
    ("configured", "hints", "waits"),
    [
        (None, {}, True),
        (None, {"read_only": True}, False),
        (None, {"destructive": False}, False),
        (None, {"read_only": "yes", "destructive": "no"}, True),
        (True, {"read_only": True}, True),
        (False, {}, False),
        (["t"], {"read_only": True}, True),
        (["u"], {}, False),
    ],
)
def test_which_calls_wait_for_a_decision(configured: Any, hints: dict[str, Any], waits: bool) -> None:
    table: dict[str, Any] = {"command": ["x"]} | ({} if configured is None else {"irreversible": configured})
    [made] = manifests(server("s", table), [listed(**hints)])[0]
    assert made.irreversible is waits


def test_a_server_does_not_take_the_name_of_an_existing_tool(tmp_path: Path) -> None:
    known = catalog.Tools(tmp_path, tmp_path / "own")
    manifest = Manifest("calc", "another", (), {"type": "object"}, Path("/"), server="s")
    known.offer("s", [manifest])
    assert not known.get("calc").manifest.server
    known.offer("s", [*manifests(SERVER, [listed("a")])[0]])
    known.get("s.a").calls = 3
    known.load(tmp_path, {})
    assert known.get("s.a").calls == 3
    known.offer("s", [])
    assert known.find("s.a") is None


def test_a_reduced_schema_accepts_all_that_the_whole_one_does() -> None:
    whole = {
        "type": "object",
        "properties": {
            "a": {"oneOf": [{"type": "string", "pattern": "^x"}, {"type": "string", "pattern": "^y"}]},
            "b": {
                "type": "object",
                "patternProperties": {"^n": {"type": "integer"}},
                "additionalProperties": False,
            },
            "c": {"type": "array", "prefixItems": [{"type": "integer"}], "items": {"type": "string"}},
        },
    }
    right = {"a": "xa", "b": {"n1": 1}, "c": [1, "a"]}
    jsonschema.Draft202012Validator(whole).validate(right)
    jsonschema.Draft202012Validator(schemas.reduced(whole)).validate(right)

"""Tools that an MCP server describes: schemas that would harm the daemon, and faulty lists."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from aiosd.config.mcp import Server, server
from aiosd.errors import BadRequest, BadValue
from aiosd.syscall import schemas
from aiosd.syscall.foreign import depth
from aiosd.tools import catalog
from aiosd.tools.catalog import Tool
from aiosd.tools.manifest import Manifest
from aiosd.tools.mcp.offered import manifests

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


def objects(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


WORD = {"type": "string"}
PAIR = [{"type": "number"}, {"type": "number"}]


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        (objects(a={"type": "array", "items": PAIR}), {"a": [1, 2, "more"]}, {"a": [1, "2"]}),
        (objects(a={"type": "array", "items": PAIR, "additionalItems": False}), {"a": [1]}, {"a": [1, 2, 3]}),
        (objects(a={"minimum": 0, "exclusiveMinimum": True}), {"a": 0.5}, {"a": 0}),
        (objects(a={"maximum": 9, "exclusiveMaximum": False}), {"a": 9}, {"a": 10}),
        (objects(a={"$ref": "#word"}) | {"$defs": {"w": {"$anchor": "word", **WORD}}}, {"a": "x"}, {"a": 1}),
        (objects(a={"$ref": "#word"}) | {"definitions": {"w": {"$id": "#word", **WORD}}}, {"a": "x"},
        {"a": 1}), (objects(a={"$ref": "#/$defs/My%20Word"}) | {"$defs": {"My Word": WORD}}, {"a": "x"},
        {"a": 1}), (objects(a={"$ref": "#/$defs/a~1b"}) | {"$defs": {"a/b": WORD}}, {"a": "x"}, {"a": 1}),
        (objects(a={"anyOf": [{"type": "null"}, WORD]}, b={"$ref": "#/properties/a/anyOf/1"}), {"b": "x"},
        {"b": 1}), (objects(a={"$ref": "http://e.org/s#/$defs/w"}) | {"$id": "http://e.org/s", "$defs":
        {"w": WORD}},
         {"a": "x"}, {"a": 1}),
        (objects(a={"$ref": "w.json"}) | {"$id": "http://e.org/s.json", "$defs": {"w": {"$id": "w.json",
        **WORD}}},
         {"a": "x"}, {"a": 1}),
        (objects(a={"enum": ["$id"], "default": {"$id": "#x"}}), {"a": "$id"}, {"a": "x"}),
        (objects(a={"type": "string", "nullable": True}), {"a": None}, {"a": 1}),
        (objects(a={"type": "string", "required": True}), {}, {"a": 1}),
        (objects(a=WORD) | {"dependencies": {"a": ["b"]}}, {"a": "x", "b": 1}, {"a": "x"}),
        (objects(a=WORD) | {"type": ["object", "null"]}, {"a": "x"}, {"a": 1}),
    ],
    ids=lambda value: json.dumps(value)[:60],
)  # fmt: skip
def test_older_drafts_and_odd_references_are_judged_rightly(schema: Any, right: Any, wrong: Any) -> None:
    judge(schema, right)
    with pytest.raises(BadRequest):
        judge(schema, wrong)
    assert not note(schema)


def note(schema: Any) -> str:
    [manifest], _ = manifests(SERVER, [listed(schema=schema)])
    return " ".join(manifest.notes)


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        (objects(a={"type": "int"}, b={"type": "integer"}), "'int'"),
        (objects(a={"enum": "x"}, b={"type": "integer"}), "'x'"),
        (objects(a=5, b={"type": "integer"}), "5 is not a schema"),
        (objects(b={"type": "integer"}) | {"required": "a"}, "'a'"),
        (objects(b={"type": "integer"}) | {"required": [3]}, "3"),
        (objects(b={"type": "integer"}) | {"allOf": {}}, "allOf is not a list"),
        (objects(b={"type": "integer"}, a={"$ref": "#/$defs/none"}), "#/$defs/none"),
        (objects(b={"type": "integer"}, a={"$ref": "http://127.0.0.1:1/"}), "http://127.0.0.1:1/"),
        (objects(b={"type": "integer"}, a={"properties": 5, "additionalProperties": False}), "properties"),
        (objects(b={"type": "integer"}, a={"prefixItems": 5, "items": False}), "prefixItems"),
    ],
    ids=lambda value: json.dumps(value)[:60],
)
def test_a_wrong_word_of_a_schema_is_not_judged_and_spoils_nothing_beside_it(schema: Any, said: str) -> None:
    for a in ("x", 1, {"x": 1}, [1], None):
        judge(schema, {"a": a, "b": 1})
    with pytest.raises(BadRequest):
        judge(schema, {"a": "x", "b": "x"})
    assert said in note(schema)


@pytest.mark.parametrize("schema", [{"type": "array"}, {"type": ["array", "null"]}, "not JSON"], ids=str)
def test_a_tool_whose_arguments_are_no_object_is_left_out(schema: Any) -> None:
    made, [complaint] = manifests(SERVER, [listed(schema=schema), listed("good")])
    assert [tool.name for tool in made] == ["s.good"]
    assert "s.t" in complaint


def test_a_schema_that_is_too_deep_is_cut() -> None:
    deep: dict[str, Any] = {"type": "integer"}
    for _ in range(70):
        deep = objects(a=deep)
    [tool], _ = manifests(SERVER, [listed(schema=json.dumps(deep))])
    assert "deeper" in tool.notes[0]
    assert depth(tool.parameters) <= 33
    catalog.arguments(Tool(tool, 1), '{"a": {"a": {"a": {}}}}')


def test_a_tool_that_runs_only_as_a_task_is_left_out() -> None:
    made, [complaint] = manifests(SERVER, [listed(as_task=True), listed("good", as_task=False)])
    assert [tool.name for tool in made] == ["s.good"]
    assert "task" in complaint


@pytest.mark.parametrize(
    ("output", "structured", "quarrels"),
    [
        (objects(n={"type": "integer"}), {"n": 7}, False),
        (objects(n={"type": "integer"}), {"n": "seven"}, True),
        (objects(n={"$ref": "#/$defs/none"}), {"n": "seven"}, False),
        (objects(n={"type": "int"}), {"n": "seven"}, False),
        ({"type": "array"}, {"n": 1}, False),
    ],
    ids=str,
)
def test_what_does_not_fit_an_output_schema_is_said_as_far_as_it_can_be_judged(
    output: Any, structured: Any, quarrels: bool
) -> None:
    assert bool(schemas.quarrel(output, structured)) is quarrels


def test_arguments_of_very_many_values_are_refused_where_that_would_take_long() -> None:
    part: dict[str, Any] = {"anyOf": [{"const": i} for i in range(100)]}
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": part}}}
    with pytest.raises(BadRequest, match="too many values"):
        judge(schema, {"a": [0] * 90_000})
    judge(schema, {"a": [0] * 1000})


def test_the_valid_part_of_a_list_is_taken() -> None:
    wrong: list[Any] = [
        None, 5, {}, listed(""), listed(schema=[]), listed(description=3),
        listed(schema={"type": "object", "x": "y" * 70_000}),
    ]  # fmt: skip
    made, complaints = manifests(SERVER, [*wrong, listed("good"), listed("good")])
    assert [m.name for m in made] == ["s.good"]
    assert len(complaints) == len(wrong) + 1
    assert manifests(SERVER, {"tools": []}) == ([], [])
    [long] = manifests(SERVER, [listed(description="x" * 100_000)])[0]
    assert len(long.description) < 3000


def test_names_that_make_no_file_are_changed_here_and_stay_at_the_server() -> None:
    own = ["a/b", "..", "x" * 64, "é", "a\nb"]
    made, _ = manifests(SERVER, [listed(name) for name in own])
    assert [tool.name for tool in made] == ["s.a_b", "s._.", "s." + "x" * 62, "s._"]  # the last is s.a_b too
    assert [tool.served.name for tool in made if tool.served] == own[:4]


def test_prompts_and_resources_are_tools() -> None:
    given = {"name": "style", "description": "how", "required": True}
    resources = [{"uri": f"file:///{i}/a.txt", "name": "a b.txt", "type": "text/plain"} for i in range(3)]
    found = {
        "tools": [listed()],
        "prompts": [{"name": "greet", "description": "d", "arguments": [given]}, {"name": ""}],
        "resources": [*resources, {"uri": 5}],
    }
    made, [complaint] = manifests(SERVER, found)
    tools = {tool.name: tool for tool in made}
    assert tools.keys() == {"s.t", "s.prompt.greet", "s.read_resource"}
    assert "prompt" in complaint
    assert not any(tool.irreversible for name, tool in tools.items() if name != "s.t")
    catalog.arguments(Tool(tools["s.prompt.greet"], 1), '{"style": "short"}')
    with pytest.raises(BadRequest):
        catalog.arguments(Tool(tools["s.prompt.greet"], 1), "{}")
    served = tools["s.read_resource"].served
    assert served
    assert [(r.file, r.uri) for r in served.resources] == [
        ("a_b.txt", "file:///0/a.txt"), ("a_b-2.txt", "file:///1/a.txt"), ("a_b-3.txt", "file:///2/a.txt"),
    ]  # fmt: skip


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


def test_no_tools_name_is_the_alias_of_another(tmp_path: Path) -> None:
    known = catalog.Tools(tmp_path, tmp_path / "own")
    two = [*manifests(Server("s", ("x",)), [listed("a_b"), listed("a.b"), listed("x" * 80)])[0]]
    known.offer("s", two)
    known.offer("read", manifests(Server("read", ("x",)), [listed("file")])[0])
    names = [tool.alias for tool in map(known.get, ("s.a_b", "s.a.b", two[2].name, "read.file"))]
    assert names == ["s_a_b", "s_a_b_2", "s_" + "x" * 62, "read_file_2"]
    assert known.get("read_file").manifest.server == ""
    assert known.get("s_a_b_2").name == "s.a.b"
    assert known.find("s_a_b") is None  # no file has the name: modes are those of the tool
    with pytest.raises(BadValue):
        known.make("s_a_b")


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

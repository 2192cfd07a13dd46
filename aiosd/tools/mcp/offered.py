"""What an MCP server says that it has, as tools of the daemon: each judged by itself, so that one mistake
spoils no other. Its prompts and resources are tools too, which say no more than they are asked. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from aiosd.config.config import NAME
from aiosd.config.mcp import Server
from aiosd.syscall import schemas
from aiosd.syscall.foreign import depth
from aiosd.tools.catalog import shorten
from aiosd.tools.manifest import Manifest, Resource, Served

SCHEMA_CHARS = 64 << 10
DEEPEST = 32  # of a schema
DESCRIPTION_CHARS = 2048
NAME_CHARS = 64
NAMED = 20  # resources that the description of the tool that reads them names
READ = "read_resource"
PROMPT = "prompt."


def manifests(server: Server, found: object) -> tuple[list[Manifest], list[str]]:
    """Of what a server said, and what is wrong with the rest."""
    made, wrong = dict[str, Manifest](), list[str]()
    for make in makers(server, found):
        try:
            tool = make()
            if tool.name in made:
                raise ValueError(f"two tools are called {tool.name}")
            made[tool.name] = tool
        except ValueError as error:
            wrong.append(f"a tool is left out: {shorten(str(error))}")
    return list(made.values()), wrong


def makers(server: Server, found: object) -> Iterator[Callable[[], Manifest]]:
    lists = found if isinstance(found, dict) else {"tools": found}  # as older versions kept it
    tools, resources, prompts = (
        value if isinstance(value := lists.get(key), list) else []
        for key in ("tools", "resources", "prompts")
    )
    yield from (partial(manifest, server, one) for one in tools)
    yield from (partial(prompt, server, one) for one in prompts)
    if resources:
        yield partial(reader, server, resources)


def manifest(server: Server, said: object) -> Manifest:
    """Of one tool. Raises ValueError."""
    match said:
        case {"name": str(own), "description": str(about), "schema": (str() | dict()) as given, **hints}:
            name = named(server, own)
        case _:
            raise ValueError("it has no name, description or schema")
    if hints.get("as_task") is True:
        raise ValueError(f"{name} runs only as a task of MCP, and aiosd makes none")
    notes: list[str] = []
    try:
        schema = parameters(given, notes)
        judge = schemas.reduced(schema, notes)
        promised = hints.get("output")
        output = parameters(promised, []) if isinstance(promised, str) else None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    reads = hints.get("read_only") is True or hints.get("destructive") is False  # no word of it: the worst
    return offered(server, name, about, schema, judge, not reads, Served(own, output=output), notes)


def prompt(server: Server, said: object) -> Manifest:
    """The tool that gives one. Raises ValueError."""
    match said:
        case {"name": str(own), "description": str(about), "arguments": list(given)} if own:
            name = named(server, PROMPT + own)
        case _:
            raise ValueError("a prompt has no name")
    texts = {str(one["name"]): {"type": "string", "description": one["description"]} for one in given}
    schema = {
        "type": "object",
        "properties": texts,
        "required": [str(one["name"]) for one in given if one["required"]],
        "additionalProperties": False,
    }
    return offered(server, name, about, schema, schema, False, Served(own, "prompts/get"), [])


def reader(server: Server, said: list[Any]) -> Manifest:
    """The tool that reads resources, of which it has a folder. Raises ValueError."""
    found: dict[str, Resource] = {}
    for one in said:
        match one:
            case {"uri": str(uri), "name": str(name), "type": str(kind)} if uri:
                file = free(safe(name or uri.rstrip("/").rpartition("/")[2]), found)
                found[file] = Resource(file, uri, kind)
    uris = ", ".join(resource.uri for resource in list(found.values())[:NAMED])
    about = f"Reads a resource of {server.name} by its URI, such as {uris}"
    uri_text = {"type": "string", "minLength": 1}
    schema = {
        "type": "object", "properties": {"uri": uri_text}, "required": ["uri"], "additionalProperties": False,
    }  # fmt: skip
    served = Served(READ, "resources/read", resources=tuple(found.values()))
    return offered(server, named(server, READ), about, schema, schema, False, served, [])


def offered(
    server: Server,
    name: str,
    about: str,
    schema: dict[str, Any],
    judge: dict[str, Any],
    acts: bool,
    served: Served,
    notes: list[str],
) -> Manifest:
    """`acts`: what the server says; the configuration goes before it."""
    irreversible = acts if server.irreversible is None else server.irreversible
    if isinstance(irreversible, tuple):
        irreversible = served.name in irreversible
    return Manifest(
        name,
        about if len(about) <= DESCRIPTION_CHARS else about[:DESCRIPTION_CHARS] + "…",
        (),
        schema,
        Path("/"),
        timeout_s=server.timeout_s,
        limit=server.limit,
        irreversible=irreversible,
        server=server.name,
        judge=judge,
        notes=tuple(notes),
        served=served,
    )


def named(server: Server, own: str) -> str:
    """SERVER.TOOL, as the name of a file. Raises ValueError."""
    name = f"{server.name}.{safe(own)}"[:NAME_CHARS]
    if not own or not NAME.fullmatch(name):
        raise ValueError("it has no name")
    return name


def safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]|^\.", "_", text)[:NAME_CHARS]


def free(name: str, taken: dict[str, Resource]) -> str:
    name = name or "_"
    stem, dot, end = name.rpartition(".")
    for number in range(2, len(taken) + 3):
        if name not in taken:
            break
        name = f"{stem or end}-{number}{dot + end if stem else ''}"[-NAME_CHARS:]
    return name


def parameters(given: str | dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """A schema as JSON, or as a list that was kept by an older version has it. Raises ValueError."""
    text = given if isinstance(given, str) else json.dumps(given)
    if len(text) > SCHEMA_CHARS:
        raise ValueError(f"its schema has more than {SCHEMA_CHARS} characters")
    try:
        raw = json.loads(text, parse_constant=lambda _: None)
    except RecursionError:
        raise ValueError("its schema is nested too deep") from None
    if depth(raw) > DEEPEST:
        notes.append(f"not judged here: the schema is deeper than {DEEPEST}, and is cut there")
        raw = cut(raw, DEEPEST)
    return raw if isinstance(raw, dict) else {"type": "object"}


def cut(value: Any, deepest: int) -> Any:
    """Without what is deeper: an object there is an empty one, and so any value fits."""
    if isinstance(value, dict):
        return {key: cut(child, deepest - 1) for key, child in value.items()} if deepest else {}
    if isinstance(value, list):
        return [cut(child, deepest - 1) for child in value] if deepest else []
    return value

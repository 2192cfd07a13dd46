"""Tools: executables that agents may call, each with a manifest. Which exist, and what a right call is.

A tool is a folder NAME with `tool.toml` and what it runs (aios-tool(5)), from the built-in ones and the
administrator's folder. How one is run is in aiosd.runner, in what cage in aiosd.sandbox. Any thread may ask.
"""

from __future__ import annotations

import json
import logging
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import jsonschema
from jsonschema.exceptions import best_match

from aiosd.errors import BadRequest, ConfigError, NotFound
from aiosd.models import NAME
from aiosd.policy import check_owner
from aiosd.request import Request, State
from aiosd.spec import read_json

log = logging.getLogger(__name__)

BUILT_IN = Path(__file__).parent / "toolbox"
FILE = "tool.toml"
ERRORS = 100  # of one call's arguments that are looked at
SAID = 500  # characters of an error's text
QUEUE = "tools/"  # with a tool's name: what its calls wait for, where others wait for a model
TEXT = {"type": "string"}
PATHS = {"type": "array", "items": {"type": "string", "pattern": "^/"}}
NUMBER = {"type": "number", "exclusiveMinimum": 0, "maximum": 86400}
COUNT = {"type": "integer", "minimum": 1}
SCHEMA = {  # of tool.toml
    "type": "object",
    "required": ["name", "description", "command", "parameters"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "pattern": r"^(?!\.)[A-Za-z0-9._-]{1,64}$"},
        "description": {"type": "string", "minLength": 1, "maxLength": 1024},
        "command": {"type": "array", "items": TEXT, "minItems": 1},
        "parameters": {
            "type": "object",
            "required": ["type"],
            "properties": {"type": {"const": "object"}},
        },
        "read": PATHS,
        "write": PATHS,
        "env": {"type": "object", "additionalProperties": TEXT},
        "timeout_s": NUMBER,
        "cpu_s": COUNT,
        "memory_bytes": COUNT,
        "limit": COUNT,
        "exclusive": TEXT,
        "irreversible": {"type": "boolean"},
    },
}


@dataclass(frozen=True)
class Manifest:
    name: str
    description: str
    command: tuple[str, ...]  # one that begins with ./ is a file beside the manifest
    parameters: Mapping[str, Any]  # JSON Schema of the arguments
    folder: Path
    read: tuple[str, ...] = ()  # paths that are shown to it besides
    write: tuple[str, ...] = ()  # and those it may write to, where its caller may
    env: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float = 30.0
    cpu_s: int = 30
    memory_bytes: int = 512 << 20
    limit: int = 4  # calls at once
    exclusive: str = ""  # calls of tools with the same word never overlap
    irreversible: bool = False

    @property
    def function(self) -> dict[str, Any]:
        """As the chat-completion API names a tool to a model."""
        facts = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": facts}


@dataclass(slots=True, eq=False)
class Tool:
    manifest: Manifest
    limit: int
    calls: int = 0
    failed: int = 0
    busy_s: float = 0.0

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def queue(self) -> str:
        return QUEUE + self.name

    def account(self, request: Request) -> None:
        self.calls += 1
        self.failed += request.state is not State.DONE
        if request.started_s and request.finished_s:
            self.busy_s += request.finished_s - request.started_s


class Tools:
    def __init__(self, folder: Path) -> None:
        self._by_name: dict[str, Tool] = {}
        self.load(folder)

    def load(self, folder: Path) -> None:
        """Reads all again; a tool that is there already keeps its counts."""
        found: dict[str, Tool] = {}
        for file in (*sorted(BUILT_IN.glob(f"*/{FILE}")), *sorted(folder.glob(f"*/{FILE}"))):
            try:
                manifest = read(file)
            except ConfigError as error:
                log.error("tool %s is not used: %s", file.parent.name, error.explanation)
                continue
            tool = self._by_name.get(manifest.name)
            if tool is None:
                tool = Tool(manifest, manifest.limit)
            elif tool.manifest != manifest:
                tool.manifest, tool.limit = manifest, manifest.limit
            found[manifest.name] = tool
        self._by_name = found

    def all(self) -> list[Tool]:
        return list(self._by_name.values())

    def names(self) -> list[str]:
        return list(self._by_name)

    def find(self, name: str) -> Tool | None:
        return self._by_name.get(name)

    def get(self, name: str) -> Tool:
        try:
            return self._by_name[name]
        except KeyError:
            raise NotFound(f"no tool {name[:64]!r}", f"tools are {', '.join(self._by_name)}") from None

    def of(self, queue: str) -> Tool | None:
        """Whose calls wait there."""
        return self._by_name.get(queue.removeprefix(QUEUE)) if queue.startswith(QUEUE) else None


def read(file: Path) -> Manifest:
    """A manifest, from a place that only root or the daemon's user may write to. Raises ConfigError."""
    try:
        check_owner(file.parent, os.stat(file.parent))
        with file.open("rb") as opened:
            check_owner(file, os.fstat(opened.fileno()))
            raw = tomllib.load(opened)
    except (OSError, ValueError) as error:  # ValueError: not TOML, not UTF-8, another's
        raise ConfigError(f"{file}: {error}", "aios-tool(5) says what a manifest holds") from None
    if wrong := best_match(jsonschema.Draft202012Validator(SCHEMA).iter_errors(raw)):
        raise ConfigError(f"{file}: {place(wrong)}{wrong.message}", "see aios-tool(5)")
    if raw["name"] != file.parent.name or not NAME.fullmatch(raw["name"]):
        raise ConfigError(f"{file}: the tool {raw['name']!r} is to be in a folder of that name")
    try:
        jsonschema.Draft202012Validator.check_schema(raw["parameters"])
    except jsonschema.SchemaError as error:
        raise ConfigError(f"{file}: parameters: {place(error)}{error.message}") from None
    if "uniqueItems" in mentioned(raw["parameters"]):
        raise ConfigError(f"{file}: parameters: uniqueItems takes the square of what a caller writes")
    lists: dict[str, Any] = {key: tuple(raw[key]) for key in ("command", "read", "write") if key in raw}
    return Manifest(**{**raw, **lists}, folder=file.parent)


def mentioned(value: object) -> set[str]:
    """All keys in it, however deep."""
    if isinstance(value, list):
        return set[str]().union(*map(mentioned, value))
    return set(value).union(*map(mentioned, value.values())) if isinstance(value, dict) else set()


def arguments(tool: Tool, text: str) -> dict[str, Any]:
    """The arguments of a call, judged by the tool's schema. Raises BadRequest."""
    raw = read_json(text)
    errors = jsonschema.Draft202012Validator(tool.manifest.parameters).iter_errors(raw)
    if wrong := best_match(islice(errors, ERRORS)):
        names = ", ".join(tool.manifest.parameters.get("properties", {}))
        raise BadRequest(shorten(f"{tool.name}: {place(wrong)}{wrong.message}"), f"its arguments are {names}")
    assert isinstance(raw, dict)  # the schema of every tool wants an object
    return raw


def place(error: jsonschema.ValidationError | jsonschema.SchemaError) -> str:
    return "".join(f"{step}: " for step in error.absolute_path)


def shorten(text: str) -> str:
    """What a caller or a tool said, to be kept in logs."""
    return text if len(text) <= SAID else text[:SAID] + "…"


def call(text: str) -> tuple[str, str]:
    """(tool, arguments) of {"name": …, "arguments": {…} or its JSON}: what a model says and the API gives."""
    raw = read_json(text)
    if (
        not isinstance(raw, dict)
        or not isinstance(raw.get("name"), str)
        or raw.keys() - {"name", "arguments"}
    ):
        raise BadRequest("a call is JSON with name and arguments", '{"name":"calc","arguments":{…}}')
    given = raw.get("arguments", {})
    return raw["name"], given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)

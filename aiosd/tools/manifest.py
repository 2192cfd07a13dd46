"""Manifests of tools: the keys of tool.toml (aios-tool(5)), and the parser for administrators' and users'
files."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import jsonschema
from jsonschema.exceptions import best_match
from jsonschema.validators import validator_for

from aiosd import __version__
from aiosd.config.config import NAME
from aiosd.config.endpoints import parse as parse_grant
from aiosd.errors import BadValue, ConfigError
from aiosd.host import toml
from aiosd.host.administered import unreadable
from aiosd.host.beneath import open_owned
from aiosd.syscall import grammar, schemas
from aiosd.syscall.judging import Court, serve
from aiosd.syscall.references import References

COURT = Court("aiosd.tools.manifest")
FILE, PROGRAM = "tool.toml", "program"
VERDICT = "verdict.json"  # beside a user's own manifest
OWN_BYTES = {FILE: 64 << 10, PROGRAM: 1 << 20}  # largest files of a user's own tool
DOTS = 200
LIMIT_OWN = 16  # simultaneous calls of a user's own tool
ADMINISTRATORS = (
    "read",
    "write",
    "exclusive",
    "network",
    "credentials",
)  # keys that a user's own manifest may not have
TEXT = {"type": "string"}
FILE_NAME = {"type": "string", "pattern": r"^(?!\.)[A-Za-z0-9._-]{1,64}$"}
PATHS = {"type": "array", "items": {"type": "string", "pattern": "^/"}}
NUMBER = {"type": "number", "exclusiveMinimum": 0, "maximum": 86400}
COUNT = {"type": "integer", "minimum": 1}
GRANTS = 64
HINT = "aios-tool(5) says what a manifest holds"
SCHEMA = {  # of tool.toml
    "type": "object",
    "required": ["name", "description", "command", "parameters"],
    "additionalProperties": False,
    "properties": {
        "name": FILE_NAME,
        "description": {"type": "string", "minLength": 1, "maxLength": 1024},
        "command": {"type": "array", "items": TEXT, "minItems": 1},
        "parameters": {
            "type": "object",
            "required": ["type"],
            "properties": {"type": {"const": "object"}},
        },
        "read": PATHS,
        "write": PATHS,
        "network": {"type": "array", "items": TEXT, "maxItems": GRANTS},
        "env": {"type": "object", "additionalProperties": TEXT},
        "timeout_s": NUMBER,
        "cpu_s": COUNT,
        "memory_bytes": COUNT,
        "limit": COUNT,
        "exclusive": TEXT,
        "credentials": {"type": "array", "items": FILE_NAME},
        "irreversible": {"type": "boolean"},
    },
}


class Incomplete(BadValue):
    """The manifest is not valid yet, but more text could make it valid."""


@dataclass(frozen=True, slots=True)
class Resource:
    file: str  # its name here
    uri: str
    type: str


@dataclass(frozen=True, slots=True)
class Served:
    """How a tool is called at its MCP server."""

    name: str  # there
    method: str = "tools/call"
    output: Mapping[str, Any] | None = None  # JSON Schema of its structured result
    resources: tuple[Resource, ...] = ()  # that it reads


@dataclass(frozen=True)
class Manifest:
    name: str
    description: str
    command: tuple[str, ...]  # a word that begins with ./ names a file beside the manifest
    parameters: Mapping[str, Any]  # JSON Schema of the arguments
    folder: Path
    read: tuple[str, ...] = ()  # further paths in its sandbox, read-only
    write: tuple[str, ...] = ()  # further paths that it may write to, if its caller may
    network: tuple[str, ...] = ()  # host:port that it may reach; empty: no network
    env: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float = 30.0
    cpu_s: int = 30
    memory_bytes: int = 512 << 20
    limit: int = 4  # simultaneous calls
    exclusive: str = ""  # calls of tools with the same word never overlap
    credentials: tuple[str, ...] = ()  # names of the secrets that it gets
    irreversible: bool = False
    server: str = ""  # the MCP server whose tool it is
    address_bytes: int = 0  # that a process may map, also without using it; 0: memory_bytes
    judge: Mapping[str, Any] | None = None  # what arguments are judged by, where not by `parameters`
    served: Served | None = None
    notes: tuple[str, ...] = ()  # what of the parameters is not judged, and why
    verdict: str = ""  # of a user's own: what its judge said of it

    @property
    def is_users_own(self) -> bool:
        """A user wrote it, so it has no grants and its schema is judged with care."""
        return self.judge is not None and not self.server

    @cached_property
    def decoded(self) -> str:
        """The grammar that constrains the arguments that a model writes."""
        text = json.dumps(self.parameters)
        return grammar.arguments(text, trusted=self.judge is None)


def read(file: Path) -> Manifest:
    """Read a manifest from a folder that only root or the daemon's user can change. Raises ConfigError."""
    try:
        with os.fdopen(open_owned(file.parent, file.name), "rb") as opened:
            raw = toml.parse(toml.decoded(opened.read()))
    except PermissionError as error:
        raise unreadable(file, error) from None
    except (OSError, ValueError) as error:  # ValueError: not TOML, not UTF-8, another's
        raise ConfigError(f"{file}: {error}", HINT) from None
    try:
        return manifest(file.parent, raw)
    except BadValue as error:
        raise ConfigError(f"{file}: {error}", error.hint) from None


def own(folder: Path, data: bytes) -> Manifest:
    """A user's own, which may leave out its name. A judge reads it, as it may take long. Raises BadValue."""
    said = COURT.verdict(json.dumps([folder.name, data.decode("latin-1")]))
    if said is None:
        raise BadValue("the manifest takes too long to read", "give it fewer keys and parameters")
    found = json.loads(said)
    if "wrong" in found:
        raise (Incomplete if found["incomplete"] else BadValue)(found["wrong"], found["hint"])
    return _own(folder, said)


def _own(folder: Path, said: str) -> Manifest:
    found = json.loads(said)
    made = _made(folder, found["raw"])
    return replace(made, judge=found["judge"], notes=tuple(found["notes"]), verdict=said)


def remember(manifest: Manifest, data: bytes) -> None:
    """Keep the verdict on a user's own manifest `data`, so that the next start need not judge it. A verdict
    that is not written whole is no verdict.
    """
    found = json.dumps([__version__, sha256(data).hexdigest(), manifest.verdict])
    with suppress(OSError):  # the disk is full
        (manifest.folder / VERDICT).write_text(found)


def kept(folder: Path) -> Manifest:
    """A user's own as it was kept. It is judged again only by another version. Raises BadValue, OSError."""
    data = (folder / FILE).read_bytes()
    with suppress(OSError, ValueError, LookupError, TypeError):  # there is none, or it is damaged
        version, digest, said = json.loads((folder / VERDICT).read_bytes())
        if (version, digest) == (__version__, sha256(data).hexdigest()):
            return _own(folder, said)
    made = own(folder, data)
    remember(made, data)
    return made


def verdict(text: str) -> str:
    """The judge's: what it finds in a user's own manifest, or what is wrong there, as JSON."""
    name, data = json.loads(text)
    try:
        return json.dumps(_read_own(name, data.encode("latin-1")))
    except BadValue as error:
        about = {"wrong": str(error), "hint": error.hint, "incomplete": isinstance(error, Incomplete)}
        return json.dumps(about)


def _read_own(name: str, data: bytes) -> dict[str, Any]:
    if max((line.count(b".") for line in data.split(b"\n")), default=0) > DOTS:
        raise BadValue(f"a line has more than {DOTS} dots")  # tomllib takes the square of a key's parts
    try:
        raw = toml.parse(toml.decoded(data))
    except tomllib.TOMLDecodeError as error:
        raise Incomplete(str(error), HINT) from None
    except ValueError as error:
        raise BadValue(str(error), HINT) from None
    try:
        return _judged_own(name, {"name": name, **raw})
    except RecursionError:
        raise BadValue("the manifest is nested too deep") from None


def _judged_own(name: str, raw: dict[str, Any]) -> dict[str, Any]:
    if refused := [key for key in ADMINISTRATORS if key in raw]:
        raise BadValue(f"{refused[0]} is only for tools of the administrator", f"leave out {refused[0]}")
    check(name, raw)
    if raw.get("limit", 1) > LIMIT_OWN:
        raise BadValue(f"limit is at most {LIMIT_OWN}")
    if any(part.startswith("./") and part != f"./{PROGRAM}" for part in raw["command"]):
        raise BadValue(
            f"command names a file other than ./{PROGRAM}", f"cp the file to tools/{name}/{PROGRAM}"
        )
    notes: list[str] = []
    try:
        judge = schemas.reduced(raw["parameters"], notes)
    except ValueError as error:
        raise BadValue(f"parameters: {error}") from None
    return {"raw": raw, "judge": judge, "notes": notes}


def manifest(folder: Path, raw: dict[str, Any]) -> Manifest:
    """Raises BadValue."""
    check(folder.name, raw)
    return _made(folder, raw)


def _made(folder: Path, raw: dict[str, Any]) -> Manifest:
    keys = ("command", "read", "write", "network", "credentials")
    lists: dict[str, Any] = {key: tuple(raw[key]) for key in keys if key in raw}
    return Manifest(**{**raw, **lists}, folder=folder)


def check(name: str, raw: dict[str, Any]) -> None:
    """Check the keys and values of a manifest in a folder of that name. Raises BadValue."""
    try:
        json.dumps(raw, allow_nan=False)
    except (TypeError, ValueError):
        raise BadValue("a value is a date, nan or inf, which JSON lacks", "write a text instead") from None
    errors = list(jsonschema.Draft202012Validator(SCHEMA).iter_errors(raw))
    if wrong := best_match(error for error in errors if error.validator != "required"):
        raise BadValue(f"{place(wrong)}{wrong.message}", "see aios-tool(5)")
    if errors:
        raise Incomplete(f"{place(errors[0])}{errors[0].message}", "see aios-tool(5)")
    if raw["name"] != name or not NAME.fullmatch(raw["name"]):
        raise BadValue(f"the tool {raw['name']!r} is in a folder {name!r}", "use one name for both")
    check_parameters(raw["parameters"])
    for grant in raw.get("network", ()):
        parse_grant(grant)


def check_parameters(schema: dict[str, Any]) -> None:
    """Raises BadValue; Incomplete for a reference to what a later line may bring."""
    try:
        validator_for(schema, jsonschema.Draft202012Validator).check_schema(schema)
    except jsonschema.SchemaError as error:
        raise BadValue(f"parameters: {place(error)}{error.message}") from None
    if "uniqueItems" in mentioned(schema):
        raise BadValue("parameters: uniqueItems takes the square of what a caller writes")
    if lost := References(schema).lost():
        hint = "references are within the schema, such as #/$defs/NAME"
        raise Incomplete(f"parameters: $ref {lost[0]!r} names no part of the schema", hint)


def mentioned(value: object) -> set[str]:
    """All keys in the value, at any depth."""
    if isinstance(value, list):
        return set[str]().union(*map(mentioned, value))
    return set(value).union(*map(mentioned, value.values())) if isinstance(value, dict) else set()


def place(error: jsonschema.ValidationError | jsonschema.SchemaError) -> str:
    return schemas.place(error.absolute_path)


if __name__ == "__main__":
    serve(verdict)

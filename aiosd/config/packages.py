"""Packaged agents: find them, and read their agent.toml (aios-agent(5)).

Reads folders, writes nothing and knows no /aios. aiosd.cli.packaged runs the agents.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
from jsonschema.exceptions import best_match

from aiosd.config.config import NAME, STEPS_MAX, TomlSource
from aiosd.errors import ConfigError
from aiosd.host import toml
from aiosd.host.ownership import check_owner

FILE = "agent.toml"
FOLDERS = tuple(map(Path, ("/etc/aios/agents", "/usr/local/lib/aios/agents", "/usr/lib/aios/agents")))
# The agent's user is aios-agent-NAME, and a dynamic user's name has at most 31 characters.
PACKAGE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,19}")
HINT = "aios-agent(5) describes agent.toml"
TEXT = {"type": "string", "minLength": 1}
NAMED = {"type": "string", "pattern": f"^{NAME.pattern}$"}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["description", "command"],
    "additionalProperties": False,
    "properties": {
        "description": {**TEXT, "maxLength": 1024},
        "command": {"type": "array", "items": {"type": "string"}, "minItems": 1},
        "model": NAMED,
        "context": NAMED,
        "system": {"type": "string"},
        "tools": {"type": "array", "items": NAMED},
        "max_steps": {"type": "integer", "minimum": 0, "maximum": STEPS_MAX},
        "nice": {"type": "integer", "minimum": -20, "maximum": 19},
        "params": {"type": "object"},
    },
}


@dataclass(frozen=True)
class Package:
    name: str
    folder: Path
    description: str
    command: tuple[str, ...]  # with FOLDER/FILE for ./FILE of agent.toml
    settings: Mapping[str, str]  # file of /aios/agents/NAME → the text to write to it
    lines: Mapping[str, str]  # the same file → the place in agent.toml that sets it


def find(name: str) -> Package:
    """Find an agent by its name in FOLDERS, or by a path. Raises ConfigError."""
    if "/" in name:
        return read(Path(name).resolve())
    for folder in FOLDERS:
        if PACKAGE.fullmatch(name) and (folder / name / FILE).exists():
            return read(folder / name, trusted=True)
    raise ConfigError(f"no packaged agent {name!r}", f"put its folder into {' or '.join(map(str, FOLDERS))}")


def names() -> Iterator[tuple[str, Path]]:
    """Return name and folder of the agents in FOLDERS; of several with one name, the first."""
    found: dict[str, Path] = {}
    for parent in FOLDERS:
        for file in parent.glob(f"*/{FILE}"):
            found.setdefault(file.parent.name, file.parent)
    return iter(sorted(found.items()))


def read(folder: Path, trusted: bool = False) -> Package:
    """Read one agent. `trusted`: it is in FOLDERS, so only root may be able to write its files."""
    file = folder / FILE
    try:
        for path in (folder, file) if trusted else ():
            check_owner(path, os.stat(path))
        text = toml.text(file)
        table = toml.parse(text)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}", HINT) from None
    except ValueError as error:  # not TOML, not UTF-8, or a wrong owner
        raise ConfigError(f"{file}: {error}", HINT) from None
    if not PACKAGE.fullmatch(folder.name):
        raise ConfigError(f"{folder}: its name must be 1 to 20 of A-Z a-z 0-9 _ -, no - in front")
    source = TomlSource(file, text)
    _check(source, table)
    command = tuple(str(folder / part[2:]) if part.startswith("./") else part for part in table["command"])
    program = Path(command[0])
    if shutil.which(program) is None:
        raise ConfigError(
            f"{source.at(['command'])}: {command[0]} is not an executable file", f"chmod +x {program}"
        )
    try:
        if trusted and folder in program.parents:
            check_owner(program, os.stat(program))
        settings = _settings(table)
    except ValueError as error:
        raise ConfigError(f"{file}: {error}", HINT) from None
    lines = {name: source.at([name.removesuffix(".json")]) for name in settings}
    return Package(folder.name, folder, table["description"], command, settings, lines)


def _check(source: TomlSource, table: Mapping[str, Any]) -> None:
    wrong = best_match(jsonschema.Draft202012Validator(SCHEMA).iter_errors(table))
    if wrong is None:
        return
    if unknown := sorted(table.keys() - SCHEMA["properties"]):
        keys = ", ".join(SCHEMA["properties"])
        raise ConfigError(f"{source.at([unknown[0]])}: unknown key {unknown[0]!r}", f"keys are {keys}")
    key = [str(wrong.absolute_path[0])] if wrong.absolute_path else []
    raise ConfigError(f"{source.at(key)}: {': '.join([*key, wrong.message])}", HINT)


def _settings(table: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts for the agent's files. Raises ValueError."""
    text = {
        key: str(table[key]) for key in ("model", "context", "system", "max_steps", "nice") if key in table
    }
    if "tools" in table:
        text["tools"] = " ".join(table["tools"])
    if "params" in table:
        try:
            text["params.json"] = json.dumps(table["params"], allow_nan=False)
        except TypeError:
            raise ValueError("params: JSON has no dates; write a text") from None
    return text

"""Rules of access: which tool calls start at once, which wait for a person, which are refused.

The rules are read from TOML files, the administrator's before the built-in ones. The first rule that fits a
call decides. Rules fail closed: with an unusable file the daemon does not start, and does not reload.
"""

from __future__ import annotations

import grp
import json
import os
import pwd
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

import jsonschema
from jsonschema.exceptions import best_match

from aiosd.access.caller import Caller
from aiosd.errors import ConfigError
from aiosd.host import toml
from aiosd.host.administered import listed, unreadable
from aiosd.host.ownership import check_owner

BUILT_IN = Path(__file__).parents[1] / "policies/access"
TEXT = {"type": "string", "minLength": 1}
GLOBS = {"anyOf": [TEXT, {"type": "array", "items": TEXT, "minItems": 1}]}
BY_NAME = ("tool", "agent", "user", "group", "privilege", "model")
HINT = "aios-access(5) describes the files of rules"
SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["rule"],
    "properties": {
        "rule": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["decision"],
                "properties": {
                    **dict.fromkeys(BY_NAME, GLOBS),
                    "arguments": {"type": "object", "additionalProperties": GLOBS},
                    "irreversible": {"type": "boolean"},
                    "decision": {"enum": ["allow", "ask", "deny"]},
                    "by": TEXT,
                    "why": TEXT,
                },
            },
        }
    },
}


@dataclass(frozen=True, slots=True)
class CallFacts:
    """A call, as rules see it. A rule looks up only the names that it compares."""

    tool: str
    irreversible: bool
    arguments: Callable[[], Mapping[str, Any]]
    caller: Caller
    agent: str
    privileges: Callable[[], Collection[str]]
    model: str  # the model that made the call; empty: a person or a program made it

    def names(self, key: str) -> Collection[str]:
        match key:
            case "user":
                return [user_name(self.caller.uid)]
            case "group":
                return [group_name(gid) for gid in (self.caller.gid, *self.caller.groups)]
            case "privilege":
                return self.privileges()
            case _:
                return [getattr(self, key)]


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. A key that it leaves out fits every call; of a list, one glob has to fit."""

    decision: str  # allow, ask, deny
    place: str  # file and number, for the audit log
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # globs, by key of BY_NAME
    arguments: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # globs, by argument
    irreversible: bool | None = None
    by: str = ""  # the group that decides; empty: the caller
    why: str = ""  # shown with the decision

    def fits(self, asked: CallFacts) -> bool:
        if self.irreversible not in (None, asked.irreversible):
            return False
        if not all(any_fits(globs, asked.names(key)) for key, globs in self.names.items()):
            return False
        said = asked.arguments() if self.arguments else {}
        return all(
            name in said and any_fits(globs, [text_of(said[name])]) for name, globs in self.arguments.items()
        )


class Rules:
    def __init__(self, folder: Path) -> None:
        """Read all rules. `folder`: the administrator's. Raises ConfigError."""
        user_name.cache_clear()
        group_name.cache_clear()
        files = [*listed(folder, "*.toml"), *listed(BUILT_IN, "*.toml")]
        texts = {file: read(file) for file in files}
        self.text = "\n".join(f"# {file}\n{text}" for file, text in texts.items())
        self._rules = [rule for file, text in texts.items() for rule in parse(file, text)]

    def judge(self, asked: CallFacts) -> Rule:
        # the last built-in rule fits every call
        return next(rule for rule in self._rules if rule.fits(asked))


def read(file: Path) -> str:
    try:
        check_owner(file.parent, os.stat(file.parent))
        with file.open("rb") as opened:
            check_owner(file, os.fstat(opened.fileno()))
            return toml.decoded(opened.read())
    except OSError as error:
        raise unreadable(file, error) from None
    except ValueError as error:  # a wrong owner, or not UTF-8
        raise ConfigError(f"{file}: {error}", HINT) from None


def parse(file: Path, text: str) -> Iterable[Rule]:
    try:
        raw = toml.parse(text)
    except ValueError as error:
        raise ConfigError(f"{file}: {error}", HINT) from None
    if wrong := best_match(jsonschema.Draft202012Validator(SCHEMA).iter_errors(raw)):
        place = "".join(f"{step}: " for step in wrong.absolute_path)
        raise ConfigError(f"{file}: {place}{wrong.message}", "see aios-access(5)")
    for number, one in enumerate(raw["rule"], 1):
        if "by" in one and one["decision"] != "ask":
            raise ConfigError(f"{file}: rule {number}: `by` is only for rules that ask")
        yield Rule(
            one["decision"],
            f"{file.name}, rule {number}",
            {key: several(one[key]) for key in BY_NAME if key in one},
            {name: several(globs) for name, globs in one.get("arguments", {}).items()},
            one.get("irreversible"),
            one.get("by", ""),
            one.get("why", ""),
        )


def several(value: str | list[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def any_fits(globs: Iterable[str], names: Collection[str]) -> bool:
    """fnmatch(3), case-sensitive. Its time depends only on the lengths, even for hostile text."""
    return any(fnmatchcase(name, glob) for glob in globs for name in names)


def text_of(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@lru_cache(1024)
def user_name(uid: int) -> str:
    """Return the user's name, or the uid as text if it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


@lru_cache(1024)
def group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)

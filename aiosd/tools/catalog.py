"""The tools that agents may call, and the check of a call's arguments.

A tool is a folder NAME with a manifest, `tool.toml`, and its program (aios-tool(5)). It is built in, or the
administrator's, or a user's own in the state folder. aiosd.tools.run.runner runs calls,
aiosd.tools.run.sandbox builds their sandbox. Any thread may ask.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import jsonschema
from jsonschema.exceptions import best_match
from jsonschema.validators import validator_for

from aiosd.errors import (
    AiosError,
    BadRequest,
    BadValue,
    ConfigError,
    NotAllowed,
    NotFound,
    shown,
)
from aiosd.host import disk
from aiosd.host.administered import is_there, listed
from aiosd.syscall import schemas
from aiosd.syscall.foreign import NotJson, read_json
from aiosd.syscall.request import Request, State
from aiosd.syscall.toolcall import QUEUE
from aiosd.tools.manifest import FILE, LIMIT_OWN, Manifest, kept, own, place, read, remember

log = logging.getLogger(__name__)

BUILT_IN = Path(__file__).parent / "toolbox"
PACKAGED = Path("/usr/lib/aios/tools")  # of other packages
SAID = 500  # characters of an error's text
LIMIT_MAX = 1024
ALIAS_CHARS = 64
CALL = '{"name":"calc","arguments":{…}}'  # what a call looks like


@dataclass(slots=True, eq=False)
class Tool:
    manifest: Manifest
    limit: int
    alias: str = ""  # the name that models and clients of MCP are told: they take no dots
    own: Path | None = None  # a user's: the folder of its manifest and program
    error: str = ""  # why the last manifest was not taken
    note: str = ""  # what was wrong with the last result of an MCP server's tool
    calls: int = 0
    failed: int = 0
    busy_s: float = 0.0

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def function(self) -> dict[str, Any]:
        """As the chat-completion API names it to a model."""
        facts = {"description": self.manifest.description, "parameters": self.manifest.parameters}
        return {"type": "function", "function": {"name": self.alias or self.name, **facts}}

    @property
    def queue(self) -> str:
        return QUEUE + self.name

    @property
    def ready(self) -> bool:
        """Whether the tool has a manifest, and so can be called."""
        return bool(self.manifest.command or self.manifest.server)

    @property
    def limit_max(self) -> int:
        return LIMIT_OWN if self.own else LIMIT_MAX

    def judge(self, data: bytes) -> Manifest:
        """Parse a manifest for a user's own tool. Raises BadValue, and keeps the reason in `error`."""
        assert self.own
        try:
            found = own(self.own, data)
        except BadValue as error:
            self.error = str(error)
            raise
        self.error = ""
        return found

    def account(self, request: Request) -> None:
        self.calls += 1
        self.failed += request.state is not State.DONE
        if request.started_s and request.finished_s:
            self.busy_s += request.finished_s - request.started_s


class Tools:
    def __init__(self, folder: Path, own: Path, grants: Mapping[str, Sequence[str]] | None = None) -> None:
        """`folder`: the administrator's tools. `own`: the folder of the tools that users make."""
        self._by_name: dict[str, Tool] = {}
        self._aliases: dict[str, str] = {}  # of MCP servers' tools
        self._own = own
        self.ousted: set[str] = set()  # users' own tools that lost their name to another tool
        self._installed: list[Manifest] = []
        self._offered: dict[str, list[Manifest]] = {}  # by MCP server
        self._lock = threading.Lock()
        self.load(folder, grants or {})

    def load(self, folder: Path, grants: Mapping[str, Sequence[str]]) -> None:
        """Read all manifests again."""
        self.install(read_all(folder, grants))

    def install(self, manifests: Sequence[Manifest]) -> None:
        """Replace all tools but users' own and MCP servers'. A tool that exists keeps its counts."""
        with self._lock:
            self._installed = list(manifests)
            self._merge()

    def offer(self, server: str, manifests: Sequence[Manifest]) -> None:
        """Replace the tools of an MCP server. An empty list removes the server."""
        with self._lock:
            self._offered[server] = list(manifests)
            self._merge()

    def _merge(self) -> None:
        """When names are equal, the administrator's tool wins over a server's, and both over a user's own."""
        found: dict[str, Tool] = {}
        for manifest in chain(chain.from_iterable(self._offered.values()), self._installed):
            tool = self._by_name.get(manifest.name)
            if tool is None or tool.own:
                tool = Tool(manifest, manifest.limit)
            elif tool.manifest != manifest:
                tool.manifest, tool.limit = manifest, manifest.limit
            found[manifest.name] = tool
        for folder in sorted(self._own.glob("*")):
            if folder.name in found:
                self.ousted.add(folder.name)
            else:
                known = self._by_name.get(folder.name)
                found[folder.name] = known if known and known.own else self._kept(folder)
        self._aliases = aliases(found)
        self._by_name = found

    @staticmethod
    def _kept(folder: Path) -> Tool:
        tool = Tool(Manifest(folder.name, "", (), {}, folder), 1, own=folder)
        try:
            if (folder / FILE).exists():
                tool.manifest = kept(folder)
                tool.limit = tool.manifest.limit
        except (AiosError, OSError) as error:
            tool.error = str(error)
        return tool

    def make(self, name: str) -> None:
        """A user's own, without a manifest. Raises BadValue, StoreFailed."""
        if "." in name:
            raise BadValue("names with a dot belong to tools of MCP servers", "choose a name without a dot")
        if name in self._aliases:
            raise BadValue(f"{name} is what models call the tool {self._aliases[name]}", "take another")
        folder = self._own / name
        with self._lock, full(folder):
            self._own.mkdir(0o700, exist_ok=True)
            folder.mkdir(0o700)
            self._by_name = {**self._by_name, name: self._kept(folder)}

    def remove(self, tool: Tool) -> None:
        if tool.own is None:
            where = f"it is in {tool.manifest.folder}, which only the administrator can remove"
            raise NotAllowed(f"tool {tool.name} is not a user's own", where)
        with self._lock:
            self._by_name = {name: one for name, one in self._by_name.items() if one is not tool}
            self._discard(tool.name)

    def discard_ousted(self) -> None:
        with self._lock:
            while self.ousted:
                self._discard(self.ousted.pop())

    def _discard(self, name: str) -> None:
        for file in (self._own / name).iterdir():
            file.unlink()
        (self._own / name).rmdir()

    def keep(self, tool: Tool, file: str, data: bytes, manifest: Manifest | None) -> None:
        """The program of a user's own, or its manifest as it was judged. Raises StoreFailed."""
        assert tool.own
        if self._by_name.get(tool.name) is not tool:
            raise NotFound(f"tool {tool.name} was removed")
        with full(tool.own):
            new = tool.own / ".new"
            new.write_bytes(data)
            os.replace(new, tool.own / file)
        if manifest:
            remember(manifest, data)
            tool.manifest, tool.limit = manifest, manifest.limit

    def all(self) -> list[Tool]:
        return list(self._by_name.values())

    def names(self) -> list[str]:
        return list(self._by_name)

    def find(self, name: str) -> Tool | None:
        return self._by_name.get(name)

    def resolve(self, name: str) -> str:
        """The name of a tool that may be called by its alias."""
        return name if name in self._by_name else self._aliases.get(name, name)

    def get(self, name: str) -> Tool:
        """Find a tool that can be called, by its name or alias. Raises NotFound."""
        tool = self._by_name.get(self.resolve(name))
        if tool is None:
            raise NotFound(f"no tool {name[:64]!r}", f"tools are {', '.join(self._by_name)}")
        if not tool.ready:
            raise NotFound(f"tool {name} has no manifest", f"cp tool.toml tools/{name}/manifest")
        return tool

    def of(self, queue: str) -> Tool | None:
        """The tool whose calls wait in this queue."""
        return self._by_name.get(queue.removeprefix(QUEUE)) if queue.startswith(QUEUE) else None


def aliases(tools: Mapping[str, Tool]) -> dict[str, str]:
    """Names without dots for those that have some, SERVER_TOOL for SERVER.TOOL, and what they are of. No
    tool's name is another's alias."""
    found: dict[str, str] = {}
    for name, tool in tools.items():
        if tool.manifest.server:
            plain = re.sub(r"[^A-Za-z0-9_-]", "_", name)
            ends = chain([""], (f"_{number}" for number in count(2)))
            tool.alias = next(
                alias
                for end in ends
                if (alias := plain[: ALIAS_CHARS - len(end)] + end) not in tools and alias not in found
            )
            found[tool.alias] = name
    return found


def read_all(folder: Path, grants: Mapping[str, Sequence[str]], strict: bool = False) -> list[Manifest]:
    """Read the built-in tools, the packaged ones and the administrator's. Log and skip a faulty manifest, or
    raise ConfigError if `strict`.

    `grants`: tool name → hosts that the administrator lets the tool reach, in addition to its manifest.
    """
    found: dict[str, Manifest] = {}
    for tools in (BUILT_IN, PACKAGED, folder):
        folders: list[Path] = []
        with unused("the tools are", strict):
            folders = listed(tools, "*")
        for one in folders:
            with unused(f"tool {one.name} is", strict):
                if is_there(one / FILE):
                    manifest = read(one / FILE)
                    granted = dict.fromkeys((*manifest.network, *grants.get(manifest.name, ())))
                    found[manifest.name] = replace(manifest, network=tuple(granted))
    for name in grants.keys() - found:
        log.warning("[tools.network] grants hosts to %s, but there is no such tool", name)
    return list(found.values())


@contextmanager
def unused(what: str, strict: bool) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        if strict:
            raise
        log.error("%s not used: %s", what, error.explanation)


@contextmanager
def full(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise disk.failed(folder, error) from None


def arguments(tool: Tool, text: str) -> dict[str, Any]:
    """Parse the arguments of a call and check them by the tool's schema. Raises BadRequest."""
    names = ", ".join(tool.manifest.parameters.get("properties", {}))
    try:
        raw = read_json(text)
    except NotJson as error:
        error.hint = f"the arguments of {tool.name} are one JSON object with {names or 'no keys'}"
        raise
    schema = tool.manifest.parameters
    if tool.manifest.judge is not None:
        schema = tool.manifest.judge
        if not schemas.can_judge(schema, text):
            raise BadRequest(f"{tool.name}: too many values to be judged", "give fewer, or longer ones")
    errors = validator_for(schema, jsonschema.Draft202012Validator)(schema).iter_errors(raw)
    if wrong := best_match(islice(errors, schemas.ERRORS)):
        raise BadRequest(shorten(f"{tool.name}: {place(wrong)}{wrong.message}"), f"its arguments are {names}")
    assert isinstance(raw, dict)  # every tool's schema demands an object
    return raw


def shorten(text: str) -> str:
    """What a caller or a tool said, to be kept in logs."""
    text = shown(text)
    return text if len(text) <= SAID else text[:SAID] + "…"


def call(text: str) -> tuple[str, str]:
    """Parse a call as in the chat-completion API: {"name": …, "arguments": an object or its JSON text}.
    Returns the tool's name and the arguments as JSON."""
    try:
        raw = read_json(text)
    except NotJson as error:
        error.hint = CALL
        raise
    if (
        not isinstance(raw, dict)
        or not isinstance(raw.get("name"), str)
        or raw.keys() - {"name", "arguments"}
    ):
        raise BadRequest("a call must be JSON with name and arguments", CALL)
    given = raw.get("arguments", {})
    return raw["name"], given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)

"""The configuration: aiosd.toml, then conf.d/*.toml in name order, then command-line options.

A frozen `Config`. Every key has a default. An unknown or ill-typed key is an error that names file and line.
The main thread calls, once at start and at each reload.
"""

from __future__ import annotations

import dataclasses
import os
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import jsonschema
from jsonschema.exceptions import best_match

from aiosd.config import duration, mcp
from aiosd.config.endpoints import parse as parse_grant
from aiosd.config.mcp import Server
from aiosd.errors import BadValue, ConfigError
from aiosd.host import toml
from aiosd.host.administered import is_there, listed, unreadable

NAME = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,64}")  # the names of objects with a folder below /aios
UNBOUNDED = 1 << 62
STEPS_MAX = 64  # the most often that one request may ask the model
DEFAULT_FILE = Path("/etc/aios/aiosd.toml")
TEXTS = tuple[str, ...]
WORDS: dict[Any, str] = {
    int: "a whole number",
    str: "text in quotes",
    bool: "true or false",
    float: "a number",
    TEXTS: "a list of texts",
}
Section = TypeVar("Section")


def at_least(low: int, default: int) -> Any:
    return field(default=default, metadata={"low": low})


def auto_or(low: int, default: int) -> Any:
    """A number, or "auto", which is kept as 0."""
    return field(default=default, metadata={"low": low, "auto": True})


def lasts(default: str) -> Any:
    """A duration, see aiosd.config.duration."""
    return field(default=default, metadata={"lasts": True})


def path(default: str) -> Any:
    """Empty: none. The daemon's working folder is nobody's business, so the path is absolute."""
    return field(default=default, metadata={"path": True})


def one_of(default: str, *choices: str) -> Any:
    return field(default=default, metadata={"choices": choices})


@dataclass(frozen=True)
class DaemonConfig:
    mount: str = path("/aios")
    state: str = path("/var/lib/aios")
    group: str = "aios"  # if it exists, the group of agents/ and contexts/
    admin_group: str = "aios-admin"  # if it exists, administers models, workers and scheduler as root does
    log_level: str = one_of("info", "debug", "info", "notice", "warning", "error")
    drain_s: int = 5  # how long running requests may go on after the daemon is told to stop


@dataclass(frozen=True)
class SchedulerConfig:
    policy: str = "fair"
    policies: str = path("/etc/aios/policies")  # the administrator's own: files with rank() and preempt()
    quantum: int = at_least(1, 64)  # tokens a request may generate before another may take its place


@dataclass(frozen=True)
class LimitsConfig:
    request_bytes: int = 4 << 20
    queued_requests: int = 10_000
    pending_bytes: int = 512 << 20  # memory of the half-written and waiting requests of all users
    context_bytes: int = 8 << 20  # messages of one context
    keep_requests: int = 100  # finished requests kept per agent
    disk_reserve_bytes: int = 8 << 20  # free space below the state folder; with less, requests are refused
    worker_deaths_per_request: int = 2
    audit_bytes: int = at_least(4096, 64 << 20)  # of audit.jsonl; then another file begins
    audit_files: int = at_least(1, 16)  # earlier files that are kept


@dataclass(frozen=True)
class Quota:
    """Limits of one user; keys marked "agent too" also limit one agent. A table for one user, group or agent
    ([quota.user.NAME]) holds only the keys that differ.
    """

    queued_requests: int = 2_000  # agent too
    running_requests: int = 0  # agent too; 0: as many as there is room for
    tokens_per_minute: int = 0  # agent too; of prompts and answers; 0: no bound
    writing_ms_per_minute: int = 3_000  # of the processor, for refused and large writes; 0: no bound
    open_files: int = 4096  # below the mount; root has no bound
    open_bytes: int = 64 << 20  # contents that the open files keep from their open()
    agents: int = 20_000
    contexts: int = 20_000
    tools: int = 100
    keys: int = 100
    kv_bytes: int = 4 << 30  # KV of the user's contexts, on all tiers
    model_bytes: int = 20 << 30  # files of the models that the user pulled
    pending_bytes: int = 64 << 20  # memory of half-written and waiting requests


WHO = ("user", "group", "agent")
OF_AGENTS = ("queued_requests", "running_requests", "tokens_per_minute")


@dataclass(frozen=True)
class EngineConfig:
    max_running: int = at_least(1, 64)  # requests in one batch
    kv_bytes: int = auto_or(1, 1 << 30)  # KV in a worker
    host_kv_bytes: int = 1 << 30  # KV in the daemon's memory, of conversations that left the workers
    disk_kv_bytes: int = 8 << 30  # the same on disk
    prefill_tokens: int = at_least(1, 512)  # prompt tokens computed beside the decodes of one step
    threads: int = 0  # 0: one per CPU the worker may use
    deterministic: bool = True  # answers are the same to the bit in any batch (CPU, float32)
    quantization: str = one_of("none", "none", "int4", "int8")
    device: str = "auto"
    device_table: str = path("")  # for tests: a file with devices that replaces the machine's own
    dtype: str = "auto"
    keep_alive: str = lasts("5m")  # how long a model stays after its last request
    warm: bool = True  # a worker without a model waits for the next one that is loaded


@dataclass(frozen=True)
class ToolsConfig:
    folder: str = path("/etc/aios/tools.d")  # the administrator's own, beside the built-in ones
    output_bytes: int = at_least(1, 1 << 20)  # output of one call
    work_bytes: int = at_least(1, 256 << 20)  # the folder that an agent's tools work in
    pending_s: int = at_least(1, 600)  # how long a call waits for a decision
    credentials: str = path("/etc/aios/credentials")  # the folder of the secrets that manifests name
    notify: str = path("")  # a program that is run for each call that waits for a person
    network: Mapping[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # by tool: host:port that it may reach beside its manifest's
    system_users: tuple[str, ...] = ()  # system accounts that tools may run as


@dataclass(frozen=True)
class ModelConfig:
    path: str
    replicas: int = at_least(1, 1)
    default: bool = False
    devices: tuple[str, ...] = ()  # one worker on each; "A,B": one across both; empty: the daemon chooses
    memory_fraction: float = 1.0  # the share of each of its devices' memory that a worker may use
    keep_alive: str = lasts("")  # empty: as [engine] says


@dataclass(frozen=True)
class Config:
    daemon: DaemonConfig = field(default_factory=DaemonConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    quota: Quota = field(default_factory=Quota)
    quotas: Mapping[tuple[str, str], Mapping[str, int]] = field(default_factory=dict)  # ("user", "ada")
    engine: EngineConfig = field(default_factory=EngineConfig)
    tools: ToolsConfig = field(default_factory=ToolsConfig)
    models: Mapping[str, ModelConfig] = field(default_factory=dict)
    mcp: Mapping[str, Server] = field(default_factory=dict)


def load(file: Path | None) -> Config:
    """Read the configuration. `file` None: the system's file, if it exists. Any other file must exist.

    Raises ConfigError.
    """
    config = Config()
    if file is None:
        file = DEFAULT_FILE
    if file is not DEFAULT_FILE or is_there(file):
        config = _merge(config, file)
    for extra in listed(file.parent / "conf.d", "*.toml"):
        config = _merge(config, extra)
    return config


def _merge(config: Config, file: Path) -> Config:
    try:
        text = toml.text(file)
        tables = toml.parse(text)
    except OSError as error:
        raise unreadable(file, error) from None
    except ValueError as error:
        raise ConfigError(f"{file}: {error}", "aiosd.toml(5) shows the format") from None
    source = TomlSource(file, text)
    changed: dict[str, Any] = {}
    sections = [name for name in _fields(Config) if name != "quotas"]
    for name, table in tables.items():
        if name not in sections:
            raise ConfigError(
                f"{source.at([name])}: unknown section [{name}]", f"sections are {', '.join(sections)}"
            )
        if not isinstance(table, dict):
            raise ConfigError(f"{source.at([name])}: {name} is a section: write [{name}]")
        if name == "quota":
            some = {kind: table.pop(kind) for kind in WHO if kind in table}
            changed["quotas"] = {**config.quotas, **_quotas(source, some)}
        if name == "tools" and "network" in table:
            grants = {**config.tools.network, **_grants(source, table.pop("network"))}
            config = dataclasses.replace(config, tools=dataclasses.replace(config.tools, network=grants))
        if name == "models":
            changed[name] = {
                **config.models,
                **{key: _model(source, key, value) for key, value in table.items()},
            }
        elif name == "mcp":
            changed[name] = {**config.mcp, **{key: _server(source, key, t) for key, t in table.items()}}
        else:
            changed[name] = _section(source, [name], getattr(config, name), table)
    return dataclasses.replace(config, **changed)


def _model(source: TomlSource, name: str, table: object) -> ModelConfig:
    where = ["models", name]
    if not isinstance(table, dict) or "path" not in table:
        raise ConfigError(f"{source.at(where)}: a model needs a path", f'[models.{name}] path = "/folder"')
    devices = table.pop("devices", [])
    if not isinstance(devices, list) or not all(isinstance(word, str) for word in devices):
        at = source.at([*where, "devices"])
        raise ConfigError(f"{at}: devices must be a list of texts", 'devices = ["gpu0"]')
    if type(table.get("memory_fraction")) is int:
        table["memory_fraction"] = float(table["memory_fraction"])
    model = _section(source, where, ModelConfig(path="", devices=tuple(devices)), table)
    if not 0 < model.memory_fraction <= 1:
        raise ConfigError(
            f"{source.at([*where, 'memory_fraction'])}: memory_fraction must be above 0 and at most 1"
        )
    return model


def _server(source: TomlSource, name: str, table: object) -> Server:
    where = ["mcp", name]
    if not re.fullmatch(mcp.NAME, name):
        raise ConfigError(f"{source.at(where)}: a server's name must be 1 to 32 of A-Z a-z 0-9 _ -")
    if not isinstance(table, dict):
        raise ConfigError(f"{source.at(where)}: write [mcp.{name}]")
    if wrong := best_match(jsonschema.Draft202012Validator(mcp.SCHEMA).iter_errors(table)):
        key = wrong.absolute_path[0] if wrong.absolute_path else min(table.keys() - mcp.SCHEMA["properties"])
        raise ConfigError(f"{source.at([*where, str(key)])}: {key}: {wrong.message}", "see aiosd.toml(5)")
    try:
        return mcp.server(name, table)
    except ValueError as error:
        hint = 'command = ["/usr/bin/NAME"], or url = "http://HOST:PORT/mcp"'
        raise ConfigError(f"{source.at(where)}: {error}", hint) from None


def _quotas(source: TomlSource, some: dict[str, Any]) -> dict[tuple[str, str], Mapping[str, int]]:
    """Check the tables [quota.user.NAME], [quota.group.NAME] and [quota.agent.NAME]."""
    found: dict[tuple[str, str], Mapping[str, int]] = {}
    for kind, by_name in some.items():
        where = ["quota", kind]
        if not isinstance(by_name, dict) or not all(isinstance(t, dict) for t in by_name.values()):
            raise ConfigError(f"{source.at(where)}: write [quota.{kind}.NAME]")
        for name, table in by_name.items():
            _section(source, [*where, name], Quota(), table)
            wrong = table.keys() - OF_AGENTS if kind == "agent" else ()
            if wrong:
                at = source.at([*where, name, min(wrong)])
                raise ConfigError(f"{at}: an agent has no {min(wrong)}", f"keys are {', '.join(OF_AGENTS)}")
            found[kind, name] = table
    return found


def _grants(source: TomlSource, by_tool: object) -> dict[str, tuple[str, ...]]:
    """Check [tools.network]: a list of host:port for each tool."""
    where = ["tools", "network"]
    if not isinstance(by_tool, dict):
        raise ConfigError(f"{source.at(where)}: network is a section: write [tools.network]")
    for tool, grants in by_tool.items():
        at = source.at([*where, tool])
        if not isinstance(grants, list) or not all(isinstance(grant, str) for grant in grants):
            raise ConfigError(f"{at}: {tool} must be a list of texts", f'{tool} = ["example.org:443"]')
        try:
            for grant in grants:
                parse_grant(grant)
        except BadValue as error:
            raise ConfigError(f"{at}: {error.explanation}") from None
    return {tool: tuple(grants) for tool, grants in by_tool.items()}


def _section(source: TomlSource, where: list[str], now: Section, table: dict[str, Any]) -> Section:
    known = _fields(type(now))
    rules = {f.name: f.metadata for f in dataclasses.fields(type(now))}  # type: ignore[arg-type]
    for key, value in table.items():
        if known.get(key) == TEXTS and isinstance(value, list) and all(isinstance(one, str) for one in value):
            table[key] = tuple(value)
    for key, value in table.items():
        at = source.at([*where, key])
        if key not in known:
            raise ConfigError(f"{at}: unknown key {key!r}", f"keys of this section are {', '.join(known)}")
        if value == "auto" and rules[key].get("auto"):
            table[key] = 0
            continue
        if type(value) is not (typing.get_origin(known[key]) or known[key]):
            raise ConfigError(f"{at}: {key} must be {WORDS[known[key]]}, not {value!r}")
        if value not in rules[key].get("choices", (value,)):
            raise ConfigError(f"{at}: {key} must be one of {', '.join(rules[key]['choices'])}, not {value!r}")
        if rules[key].get("lasts") and value:
            try:
                duration.seconds(value)
            except BadValue as error:
                raise ConfigError(f"{at}: {key}: {error}", error.hint) from None
        if "path" in rules[key] and value and not value.startswith("/"):
            raise ConfigError(f"{at}: {key} must be an absolute path, not {value!r}")
        if type(value) is int and value < rules[key].get("low", 0):
            raise ConfigError(f"{at}: {key} must be at least {rules[key].get('low', 0)}")
    return dataclasses.replace(now, **table)  # type: ignore[type-var]


def _fields(section: type[Any]) -> dict[str, type[Any]]:
    hints = typing.get_type_hints(section)
    return {f.name: hints[f.name] for f in dataclasses.fields(section)}


class TomlSource:
    """Find the line of a key for error texts, because tomllib keeps no positions."""

    def __init__(self, file: Path, text: str) -> None:
        self._file, self._lines = file, text.splitlines()

    def at(self, path: list[str]) -> str:
        section, wanted = "", ".".join(path)
        for number, line in enumerate(self._lines, 1):
            bare = line.strip()
            if bare.startswith("["):
                section = bare.strip("[] ").replace('"', "")
                if section == wanted:
                    return f"{self._file}:{number}"
                continue
            key = bare.partition("=")[0].strip().strip('"')
            if key and wanted in (f"{section}.{key}".lstrip("."), key):
                return f"{self._file}:{number}"
        return str(self._file)


def private_mount() -> Path:
    """Return an ordinary user's mount: in the runtime folder, else in the home folder. Others must not be
    able to write there.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}"
    return Path(runtime) / "aios" if os.access(runtime, os.W_OK) else Path.home() / ".aios"

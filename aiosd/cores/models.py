"""Models: their names, folders and states. Knows no torch and no processes.

A model's state is told by its workers (aiosd.cores.pool sets it). Any thread may read.
"""

from __future__ import annotations

import logging
import re
import sys
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from aiosd.config.config import NAME, Config, ModelConfig
from aiosd.database.store import Store
from aiosd.errors import ConfigError, Exists, ModelError, NotFound
from aiosd.syscall.request import Usage

log = logging.getLogger(__name__)

BUILT_IN = (
    Path(__file__).parents[2] / "models/tiny",  # a checkout
    Path(sys.prefix) / "share/aios/models/tiny",  # a virtual environment
    Path("/usr/share/aios/models/tiny"),
)


class ModelState(StrEnum):
    ABSENT = "absent"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    WAITING = "waiting"  # until a device is free
    FAILED = "failed"


@dataclass(slots=True, eq=False)
class Model:
    name: str
    path: Path
    replicas: int = 1
    pins: tuple[
        str, ...
    ] = ()  # devices, as aiosd.cores.devices.parse_pin has them; none: the daemon places it
    fraction: float = 1.0  # of each device's memory, per worker
    configured: bool = True  # by file or option; False: a user made it through the mount
    state: ModelState = ModelState.ABSENT
    error: str = ""
    info: dict[str, Any] = field(default_factory=dict)
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def account(self, usage: Usage) -> None:
        self.requests += 1
        self.prompt_tokens += usage.prompt_tokens
        self.completion_tokens += usage.completion_tokens


class Models:
    def __init__(self, config: Config, store: Store, option: Path | None) -> None:
        self._store = store
        self._option = ""  # the model of the command line
        self._by_name: dict[str, Model] = {}
        for name, path in store.models():
            self._by_name[name] = Model(name, Path(path), configured=False)
        self._by_name |= {model.name: model for model in configured(config)}
        self.default = next((name for name, entry in config.models.items() if entry.default), "")
        if option is not None:
            name = re.sub(r"[^A-Za-z0-9._-]", "-", option.resolve().name).lstrip(".")[:64] or "model"
            self._by_name[name] = Model(name, option.resolve())
            self.default = self._option = name
        if not config.models and option is None:
            self._by_name["tiny"] = Model("tiny", next((p for p in BUILT_IN if p.exists()), BUILT_IN[0]))
        for name, devices in store.pins().items():
            if model := self.find(name):
                pin(model, tuple(devices.split()))
        for model in self._by_name.values():
            model.state = ModelState.LOADING  # requests may come before the workers are ready
        self.default = self.default or next((m.name for m in self._by_name.values() if m.configured), "")

    def changed(self, old: Config, new: Config) -> dict[str, ModelConfig]:
        """Return the entries that a reload changes. A change by `ctl` stays while the model's entry is the
        same.
        """
        return {
            name: entry
            for name, entry in new.models.items()
            if name != self._option and old.models.get(name) != entry
        }

    def judge(self, old: Config, new: Config) -> None:
        """Check the changed entries. Raises ConfigError, ModelError."""
        configured(new)
        for entry in self.changed(old, new).values():
            check_folder(Path(entry.path))

    def reload(self, old: Config, new: Config) -> list[tuple[Model, ModelConfig]]:
        """Return each added or changed model with its new entry. Models that left the configuration stay
        until rmdir.
        """
        wanted = self.changed(old, new)
        self._by_name |= {m.name: m for m in configured(new) if m.name not in self._by_name}
        for name in old.models.keys() - new.models.keys() - {self._option}:
            if model := self.find(name):
                log.info("model %s is not configured any more; rmdir models/%s removes it", name, name)
                model.configured = False
        default = next((name for name, entry in new.models.items() if entry.default), "")
        self.default = default or self.default
        for name in wanted:
            self._by_name[name].configured = True
        return [(self._by_name[name], entry) for name, entry in wanted.items()]

    def names(self) -> list[str]:
        return list(self._by_name)

    def all(self) -> list[Model]:
        return list(self._by_name.values())

    def find(self, name: str) -> Model | None:
        return self._by_name.get(name)

    def get(self, name: str) -> Model:
        try:
            return self._by_name[name]
        except KeyError:
            raise NotFound(f"no model {name}", "ls models lists all") from None

    def add(self, name: str) -> Model:
        if name in self._by_name:
            raise Exists(f"model {name} exists")
        self._by_name[name] = Model(name, Path(), configured=False)
        return self._by_name[name]

    def set_path(self, model: Model, path: Path) -> None:
        check_folder(path)
        model.path = path
        self._store.save_model(model.name, str(path))

    def set_pins(self, model: Model, pins: tuple[str, ...]) -> None:
        """Pin a model. The pin survives restarts, until the model's entry in the configuration changes."""
        self._store.save_pin(model.name, " ".join(pins))
        pin(model, pins)

    def take(self, model: Model, entry: ModelConfig) -> None:
        """Apply the configuration's entry, which replaces a pin by `ctl`."""
        self._store.save_pin(model.name, None)
        model.pins, model.fraction, model.replicas = entry.devices, entry.memory_fraction, replicas(entry)

    def remove(self, name: str) -> None:
        self._store.remove_model(name)
        self._by_name.pop(name, None)


def configured(config: Config) -> list[Model]:
    for name in config.models:
        if not NAME.fullmatch(name):
            raise ConfigError(f"[models.{name}]: not a name", "letters, digits, dot, dash, underscore")
    return [made(name, entry) for name, entry in config.models.items()]


def made(name: str, entry: ModelConfig) -> Model:
    return Model(name, Path(entry.path), replicas(entry), entry.devices, entry.memory_fraction)


def replicas(entry: ModelConfig) -> int:
    return max(entry.replicas, len(entry.devices))


def pin(model: Model, pins: tuple[str, ...]) -> None:
    """Let the model have a worker on each of these devices."""
    model.pins = pins
    model.replicas = len(pins) or model.replicas


def check_folder(path: Path) -> None:
    """Check what can be checked without torch. The worker checks the rest. Raises ModelError."""
    if not path.is_absolute():
        raise ModelError(
            f"{path}: not an absolute path",
            "write a path that begins with /: the daemon does not know your working folder",
        )
    if not path.is_dir():
        raise ModelError(f"{path}: no such folder", "name the folder that holds config.json")
    if not (path / "config.json").is_file():
        raise ModelError(f"{path / 'config.json'}: no such file", "name a Hugging Face model folder")

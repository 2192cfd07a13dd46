"""Models: which exist, where their files are, how far they are loaded. Knows no torch and no processes.

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
    WAITING = "waiting"  # for a device
    FAILED = "failed"


@dataclass(slots=True, eq=False)
class Model:
    name: str
    path: Path
    replicas: int = 1
    pins: tuple[
        str, ...
    ] = ()  # devices, as aiosd.cores.devices.parse_pin has them; none: the daemon places it
    fraction: float = 1.0  # of the memory of each device that a worker is on
    configured: bool = True  # by file or option; else by a user through the mount
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
            model.state = ModelState.LOADING  # requests may come before the workers do
        self.default = self.default or next((m.name for m in self._by_name.values() if m.configured), "")

    def changed(self, old: Config, new: Config) -> dict[str, ModelConfig]:
        """What a reload brings; what was changed by `ctl` meanwhile stays, as long as its entry does."""
        return {
            name: entry
            for name, entry in new.models.items()
            if name != self._option and old.models.get(name) != entry
        }

    def judge(self, old: Config, new: Config) -> None:
        """Whether it may. Raises ConfigError, ModelError."""
        configured(new)
        for entry in self.changed(old, new).values():
            check_folder(Path(entry.path))

    def reload(self, old: Config, new: Config) -> list[tuple[Model, ModelConfig]]:
        """The models that are new or another now, with what they are to be; those gone from the configuration
        stay until they are removed."""
        wanted = self.changed(old, new)
        self._by_name |= {m.name: m for m in configured(new) if m.name not in self._by_name}
        for name in old.models.keys() - new.models.keys() - {self._option}:
            if model := self.find(name):
                log.info("model %s is not configured any more; rmdir models/%s ends it", name, name)
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
            raise NotFound(f"no model {name}", "ls models shows those there are") from None

    def add(self, name: str) -> Model:
        if name in self._by_name:
            raise Exists(f"model {name} exists")
        self._by_name[name] = Model(name, Path(), configured=False)
        return self._by_name[name]

    def set_path(self, model: Model, path: Path) -> None:
        check_folder(path)
        model.path = path
        self._store.save_model(model.name, str(path))

    def taken(self) -> list[str]:
        """Added models whose name the configuration has taken since."""
        return [name for name, _ in self._store.models() if (found := self.find(name)) and found.configured]

    def forget_path(self, name: str) -> None:
        self._store.forget_path(name)

    def set_pins(self, model: Model, pins: tuple[str, ...]) -> None:
        """Holds over a restart, and until its entry in the configuration is another."""
        self._store.save_pin(model.name, " ".join(pins))
        pin(model, pins)

    def take(self, model: Model, entry: ModelConfig) -> None:
        """What the configuration says of it now; a pin by `ctl` is over."""
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
    """A worker on each."""
    model.pins = pins
    model.replicas = len(pins) or model.replicas


def check_folder(path: Path) -> None:
    """What can be seen wrong without torch: the worker judges the rest."""
    if not path.is_absolute():
        raise ModelError(f"{path}: not an absolute path", "the daemon does not share your working folder")
    if not path.is_dir():
        raise ModelError(f"{path}: no such folder", "name the folder that holds config.json")
    if not (path / "config.json").is_file():
        raise ModelError(f"{path / 'config.json'}: no such file", "name a Hugging Face model folder")

"""The models: their names, folders, pins and states. Knows no torch and no processes.

aiosd.cores.pool sets a model's state, as its workers report. Any thread may read.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from aiosd.config import duration
from aiosd.config.config import NAME, Config, EngineConfig, ModelConfig
from aiosd.cores.stay import Stay
from aiosd.database.store import Store
from aiosd.errors import ConfigError, Exists, ModelError, NotFound
from aiosd.host.readable import Reader, first_closed
from aiosd.syscall.request import Usage

log = logging.getLogger(__name__)

TINY = "tiny"
BUILT_IN = (
    Path(__file__).parents[2] / "models/tiny",  # a checkout
    Path(sys.prefix) / "share/aios/models/tiny",  # a virtual environment
    Path("/usr/share/aios/models/tiny"),
)
READ_BY_WORKERS = ("*.json", "*.safetensors", "*.jinja")
HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # ProtectHome=, PrivateTmp= of the units


class ModelState(StrEnum):
    ABSENT = "absent"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    WAITING = "waiting"  # until a device or memory is free
    LEAVING = "leaving"  # its running requests end, then its workers
    FAILED = "failed"


@dataclass(slots=True, eq=False)
class Model:
    name: str
    path: Path
    replicas: int = 1
    pins: tuple[
        str, ...
    ] = ()  # device words as in aiosd.cores.devices.parse_pin; empty: the daemon chooses the devices
    fraction: float = 1.0  # of the memory of each device that a worker is on
    configured: bool = True  # by file or option; else by a user through the mount
    leaving: bool = False  # it left the configuration, and goes when its requests have ended
    state: ModelState = ModelState.ABSENT
    error: str = ""
    pulling: str | None = None  # how far its pull is; None: none runs
    info: dict[str, Any] = field(default_factory=dict)
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    stay: Stay = field(default_factory=lambda: Stay(duration.seconds(EngineConfig.keep_alive)))

    @property
    def family(self) -> str:
        """Return the family by which its answers are parsed (aiosd.syscall.families)."""
        return str(self.info.get("tool_calls", ""))

    @property
    def shown_state(self) -> ModelState:
        if self.leaving:
            return ModelState.DRAINING
        return ModelState.LEAVING if self.stay.yields else self.state

    @property
    def state_in_words(self) -> str:
        """Return its state, or its pull's while one runs. It may serve meanwhile what it had before."""
        return self.shown_state if self.pulling is None else f"pulling {self.pulling}".rstrip()

    def account(self, usage: Usage) -> None:
        self.requests += 1
        self.prompt_tokens += usage.prompt_tokens
        self.completion_tokens += usage.completion_tokens


class Models:
    def __init__(
        self, config: Config, store: Store, option: Path | None, workers_uid: int, pulled: Mapping[str, Path]
    ) -> None:
        """`pulled`: the models of the model store. One without a path is not whole."""
        self._store, self._config, self._workers_uid = store, config, workers_uid
        self._option = ""  # the model of the command line
        self._by_name: dict[str, Model] = {}
        for name, path in store.models():
            self._by_name[name] = Model(name, Path(path), configured=False)
            self._by_name[name].stay.keep(duration.seconds(config.engine.keep_alive))
        for name, found in pulled.items():
            self._by_name[name] = Model(name, found, configured=False)
            self._by_name[name].stay.keep(duration.seconds(config.engine.keep_alive))
        if option is not None:
            file = option.resolve().name.removesuffix(".gguf")
            self._option = re.sub(r"[^A-Za-z0-9._-]", "-", file).lstrip(".")[:64] or "model"
        self._by_name |= {model.name: model for model in self._configured(config)}
        if option is not None:
            self._by_name[self._option] = Model(self._option, option.resolve())
            self._by_name[self._option].stay.keep(duration.ALWAYS)
        for name, devices in store.pins().items():
            if pinned := self.find(name):
                pin(pinned, tuple(devices.split()))
        for name, keep_alive in store.stays().items():
            if known := self.find(name):
                known.stay.by_ctl = True
                known.stay.keep(duration.seconds(keep_alive))

    @property
    def default(self) -> str:
        """The model of agents that name none: that of the command line, else the one with `default = true`,
        else the first of the configuration. Empty: there is none."""
        entries = self.entries(self._config)
        marked = [name for name, entry in entries.items() if entry.default]
        return next(filter(None, (self._option, *marked, *entries)), "")

    def entries(self, config: Config) -> Mapping[str, ModelConfig]:
        """The models of the configuration: the built-in one if there is no other."""
        if config.models or self._option:
            return config.models
        return {TINY: ModelConfig(path=str(next((p for p in BUILT_IN if p.exists()), BUILT_IN[0])))}

    def _configured(self, config: Config) -> list[Model]:
        """Raises ConfigError."""
        check_names(config)
        return [made(name, entry, config.engine) for name, entry in self.entries(config).items()]

    def changed(self, old: Config, new: Config) -> dict[str, ModelConfig]:
        """Return the entries that a reload adds or changes. While an entry stays as it is, so does what `ctl`
        changed."""
        before = self.entries(old)
        return {
            name: entry
            for name, entry in self.entries(new).items()
            if name != self._option and before.get(name) != entry
        }

    def judge(self, old: Config, new: Config) -> None:
        """Whether it may. Raises ConfigError, ModelError."""
        check_names(new)
        for entry in self.changed(old, new).values():
            check_folder(Path(entry.path), Reader.of(self._workers_uid))

    def reload(self, old: Config, new: Config) -> list[tuple[Model, ModelConfig]]:
        """Return each added or changed model with its new entry. Models without an entry begin to leave."""
        self._config, wanted = new, self.changed(old, new)
        if old.engine.keep_alive != new.engine.keep_alive:
            for known in self._by_name.values():
                if not known.stay.by_ctl:
                    known.stay.keep(duration.seconds(self._configured_stay(known.name)))
        self._by_name |= {m.name: m for m in self._configured(new) if m.name not in self._by_name}
        for name in self.entries(old).keys() - self.entries(new).keys() - {self._option}:
            if model := self.find(name):
                log.warning("model %s left the configuration: it takes no more requests, and goes when"
                            " those that it has have ended", name)  # fmt: skip
                model.configured, model.leaving = False, True
        for name in wanted:
            self._by_name[name].configured, self._by_name[name].leaving = True, False
        return [(self._by_name[name], entry) for name, entry in wanted.items()]

    def is_built_in(self, name: str) -> bool:
        """Whether the model is served because the configuration names none."""
        return name == TINY and name not in self._config.models

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
            raise NotFound(f"no model {name}", "ls models lists the models") from None

    def add(self, name: str) -> Model:
        if name in self._by_name:
            raise Exists(f"model {name} exists")
        model = self._by_name[name] = Model(name, Path(), configured=False)
        model.stay.keep(duration.seconds(self._config.engine.keep_alive))
        return model

    def set_path(self, model: Model, path: Path) -> None:
        check_folder(path, Reader.of(self._workers_uid))
        model.path = path
        self._store.save_model(model.name, str(path))

    def set_pulled(self, model: Model, path: Path) -> None:
        """The model store says from now on where the model is."""
        model.path = path
        self._store.forget_path(model.name)

    def taken(self) -> list[str]:
        """Added models whose name the configuration has taken since."""
        return [name for name, _ in self._store.models() if (found := self.find(name)) and found.configured]

    def forget_path(self, name: str) -> None:
        self._store.forget_path(name)

    def set_pins(self, model: Model, pins: tuple[str, ...]) -> None:
        """Pin a model. The pin survives a restart, until the model's entry in the configuration changes."""
        self._store.save_pin(model.name, " ".join(pins))
        pin(model, pins)

    def take(self, model: Model, entry: ModelConfig) -> None:
        """Apply the model's entry in the configuration. A pin by `ctl` ends."""
        self._store.save_pin(model.name, None)
        model.pins, model.fraction, model.replicas = entry.devices, entry.memory_fraction, replicas(entry)
        self.keep_alive(model, "")

    def keep_alive(self, model: Model, text: str) -> None:
        """Set how long a model stays. It survives a restart. Empty: as the configuration says."""
        seconds = duration.seconds(text or self._configured_stay(model.name))
        self._store.save_stay(model.name, text)
        model.stay.by_ctl = bool(text)
        model.stay.keep(seconds)

    def _configured_stay(self, name: str) -> str:
        if name == self._option:
            return "always"
        entry = self.entries(self._config).get(name)
        return (entry and entry.keep_alive) or self._config.engine.keep_alive

    def remove(self, name: str) -> None:
        self._store.remove_model(name)
        self._by_name.pop(name, None)


def check_names(config: Config) -> None:
    """Raises ConfigError."""
    for name in config.models:
        if not NAME.fullmatch(name):
            raise ConfigError(f"[models.{name}]: not a name", "letters, digits, dot, dash, underscore")


def made(name: str, entry: ModelConfig, engine: EngineConfig) -> Model:
    stay = Stay(duration.seconds(entry.keep_alive or engine.keep_alive))
    return Model(name, Path(entry.path), replicas(entry), entry.devices, entry.memory_fraction, stay=stay)


def replicas(entry: ModelConfig) -> int:
    return max(entry.replicas, len(entry.devices))


def pin(model: Model, pins: tuple[str, ...]) -> None:
    """Set one worker for each pin."""
    model.pins = pins
    model.replicas = len(pins) or model.replicas


def check_path(path: Path) -> None:
    """Refuse a path that is not UTF-8: the tokenizers library takes no other. Raises ModelError."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ModelError(f"{path}: the path is not UTF-8", "rename it, or name a link: ln -s") from None


def check_folder(path: Path, reader: Reader) -> None:
    """Raise ModelError for what can be seen wrong without torch; the worker, which is `reader`, judges the
    rest."""
    if not path.is_absolute():
        raise ModelError(f"{path}: not an absolute path", "the daemon does not share your working folder")
    check_path(path)
    try:
        present(path, out_of_sight(path, reader))
        files = [path, *(file for kind in READ_BY_WORKERS for file in sorted(path.glob(kind)))]
        closed = first_closed(reader, files)
    except PermissionError as error:
        reader = Reader.of(os.geteuid())
        closed = first_closed(reader, [path]) or Path(error.filename or path)
    except OSError as error:
        raise ModelError(f"{error.filename or path}: {error.strerror}", out_of_sight(path, reader)) from None
    if closed is None:
        return
    bits = "r" if not closed.is_dir() else "rx" if closed == path else "x"
    raise ModelError(
        f"{closed}: user {reader.name}, who loads models, may not read it",
        out_of_sight(path, reader) or f"chmod a+{bits} {shlex.quote(str(closed))}",
    )


def present(path: Path, remedy: str) -> None:
    """Raises ModelError, and OSError where the daemon may not look."""
    try:
        names = os.listdir(path)
    except FileNotFoundError:
        what = "a folder with config.json, or a file that ends in .gguf"
        raise ModelError(f"{path}: no such file or folder", remedy or f"name {what}") from None
    except NotADirectoryError:
        if path.suffix == ".gguf":
            return
        raise ModelError(f"{path}: not a model", "name a folder with config.json, or a .gguf file") from None
    if "config.json" in names:
        return
    files = [path / name for name in sorted(names) if name.endswith(".gguf")]
    if files:
        raise ModelError(f"{path}: no config.json, but GGUF files", f"name the file: {files[0]}")
    raise ModelError(f"{path / 'config.json'}: no such file", "name a Hugging Face model folder")


def out_of_sight(path: Path, reader: Reader) -> str:
    """The remedy for a folder that the service does not see, whatever its mode is."""
    top = next((top for top in HIDDEN if path.is_relative_to(top)), None)
    if top is None or reader.uid == os.geteuid():
        return ""
    return f"the service does not see {top}: copy the folder to /srv/models, for example"

"""Decides on which devices each model's workers run, from the device table, the pins and the failed devices.

A policy chooses (aiosd.policies.placement). aiosd.cores.pool then starts and ends workers accordingly. Any
thread may ask. The pool holds its lock around `plan` and `judge`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from aiosd.config.config import EngineConfig
from aiosd.cores import devices
from aiosd.cores.devices import CPU, Device
from aiosd.cores.models import Model
from aiosd.errors import BadValue
from aiosd.host.message_ids import about
from aiosd.policies.placement import Devices, Room, Want, spread, sums

log = logging.getLogger(__name__)

Probe = Callable[[str], list[Device]]
Now = Mapping[str, Sequence[Devices]]  # model name → the devices of each of its workers now


@dataclass(frozen=True, slots=True)
class Place:
    """The devices of one worker, and the fraction of their memory that it gets."""

    devices: Devices
    fraction: float


class Assignment:
    def __init__(self, engine: EngineConfig, probe: Probe) -> None:
        self.engine, self._probe = engine, probe
        self._table: list[Device] | None = None
        self._over: dict[str, list[tuple[str, float]]] = {}
        self.failed: dict[str, str] = {}  # why, by UUID; until somebody has it tried again
        self._told: set[str] = set()  # of those
        self._said: dict[str, str] = {}  # by workers, of their device
        self._warned: dict[str, str] = {}

    @property
    def table(self) -> list[Device]:
        if self._table is None:
            self.look()
        return self._table or []

    def look(self) -> None:
        """Probe the devices again. A device that has disappeared stays in the table, marked as failed."""
        found = self._probe(self.engine.device_table)
        there = {device.uuid for device in found}
        gone = [device for device in self._table or () if device.uuid not in there]
        for device in gone:
            self.failed.setdefault(device.uuid, "it is not there any more")
        self._table = [*found, *(replace(device, index=-1) for device in gone)]
        self._warn()

    @property
    def warnings(self) -> dict[str, str]:
        """By device: why it is not used as it should be, and the remedy."""
        return {device.uuid: device.trouble for device in self.table if device.trouble} | self._said

    def heard(self, place: Place, trouble: str) -> None:
        """What a worker says of the devices it is on; empty: all is well."""
        for uuid in place.devices:
            self._said.pop(uuid, None)
            if trouble:
                self._said[uuid] = trouble
        self._warn()

    def _warn(self) -> None:
        warnings = self.warnings
        for uuid, why in warnings.items():
            if self._warned.get(uuid) != why:
                log.warning("device %s: %s", uuid, why, extra=about(device=uuid))
        self._warned = warnings

    def newly_failed(self) -> list[str]:
        """Return each failed device once."""
        new = [uuid for uuid in self.failed if uuid not in self._told]
        self._told = set(self.failed)
        return new

    def retry(self, uuids: Iterable[str] | None = None) -> None:
        """Clear the failure of these devices and probe again. None: of all; missing devices are dropped."""
        if uuids is None:
            self._table = None
        for uuid in list(self.failed) if uuids is None else uuids:
            self.failed.pop(uuid, None)
        self._told &= self.failed.keys()
        self.look()

    def on(self, uuids: Iterable[str]) -> list[Device]:
        by_uuid = {device.uuid: device for device in self.table}
        return [by_uuid[uuid] for uuid in uuids if uuid in by_uuid]

    def state(self, device: Device) -> str:
        return "failed" if device.uuid in self.failed else "ok"

    def free(self, device: Device, places: Iterable[Place]) -> float:
        return 1.0 - sum(p.fraction for p in places if device.divided and device.uuid in p.devices)

    # choosing

    def plan(self, models: Iterable[Model], now: Now) -> dict[str, list[Place]]:
        wants = [self._want(model, now) for model in models]
        rooms = self._rooms()
        chosen = spread(rooms, wants)
        if (over := sums(rooms, wants, chosen)) != self._over:
            for uuid, asked in over.items():  # the configuration asks for it; such a pin by `ctl` is refused
                log.error("the configuration asks for more than %s has: %s of its memory", uuid, total(asked))
            self._over = over
        return {want.model: [Place(found, want.fraction) for found in chosen[want.model]] for want in wants}

    def pins(self, model: Model) -> list[Devices]:
        """The model's pins as UUIDs. A word that names no present device stays: the device may come back."""
        found: list[Devices] = []
        for word in model.pins:
            try:
                found += devices.parse_pin(self.table, [word])
            except BadValue:
                found.append(tuple(word.split(",")))
        return found

    def candidates(self, model: Model) -> list[Devices]:
        """The places that a worker of the model may have, without failed devices."""
        there = {device.uuid for device in self.table} - self.failed.keys()
        if pins := self.pins(model):
            return [pin for pin in pins if there.issuperset(pin)]
        return self.anywhere()

    def anywhere(self) -> list[Devices]:
        """The places of models without pins."""
        return [(device.uuid,) for device in self._allowed()]

    def judge(self, model: Model, others: Iterable[Model], now: Now) -> None:
        """Check that the pins of `model` fit beside the other models. Raises BadValue."""
        wants = [self._want(each, now) for each in (model, *others)]
        rooms = self._rooms()
        chosen = spread(rooms, wants)
        for uuid, asked in sums(rooms, wants, chosen).items():
            if model.name in [name for name, _ in asked]:
                raise BadValue(
                    f"{uuid} has too little memory: the models ask for {total(asked)}",
                    "lower memory_fraction in [models.NAME], or pin to another device",
                )
        for want in wants[1:]:
            if want.now and not want.pins and not chosen[want.model]:
                raise BadValue(
                    f"model {want.model} would have no device left",
                    f"unload {want.model}, pin it elsewhere, or give both models a memory_fraction",
                )

    def why_not(self, model: Model) -> str:
        """Say why no device runs this model."""
        pinned = [uuid for pin in self.pins(model) for uuid in pin]
        if pinned:
            wrong = [f"{uuid} ({self.failed.get(uuid, 'there is no such device')})" for uuid in pinned]
            return f"it is pinned to {', '.join(wrong)}"
        failed = "".join(f"; {uuid} has failed: {why}" for uuid, why in self.failed.items())
        return f"no device has {model.fraction:g} of its memory free{failed}"

    def _rooms(self) -> list[Room]:
        return [Room(d.uuid, d.memory_bytes, d.divided) for d in self.table if d.uuid not in self.failed]

    def _want(self, model: Model, now: Now) -> Want:
        may = [device.uuid for device in self._allowed()]
        where = now.get(model.name, ())
        return Want(model.name, model.replicas, model.fraction, self.pins(model), may, where)

    def _allowed(self) -> list[Device]:
        """The devices for models without pins, by [engine] device.

        When the table has no GPU, the worker's PyTorch may still find one: see torch_device.
        """
        gpus = [device for device in self.table if device.divided]
        kind, _, number = self.engine.device.partition(":")
        if not gpus or kind not in ("auto", "cuda"):
            return [device for device in self.table if not device.divided]
        return [d for d in gpus if d.uuid not in self.failed and number in ("", str(d.index))]

    # the worker's device

    def torch_device(self, place: Place, pinned: bool) -> str:
        """See aiosd.cores.wire.Load."""
        on = self.on(place.devices)
        if len(on) > 1:
            return "span"
        if any(device.backend == CPU and device.divided for device in on):
            return CPU
        if place.devices == (CPU,):
            return CPU if pinned else self.engine.device
        return "cuda" if pinned or self.engine.device != "auto" else "auto"


def total(asked: Sequence[tuple[str, float]]) -> str:
    terms = " + ".join(f"{fraction:g} ({model})" for model, fraction in asked)
    return f"{terms} = {sum(fraction for _, fraction in asked):g}"

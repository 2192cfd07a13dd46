"""Where the workers of each model are to be: the device table, what is pinned, and which devices have failed.

The choice is a policy's (aiosd.policies.placement); aiosd.cores.pool starts and ends workers so that it comes
true. Any thread may ask; the pool's lock is held where that matters.
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
from aiosd.policies.placement import Devices, Room, Want, spread, sums

log = logging.getLogger(__name__)

Probe = Callable[[str], list[Device]]
Now = Mapping[str, Sequence[Devices]]  # by model name: the devices of its workers


@dataclass(frozen=True, slots=True)
class Place:
    """Of one worker."""

    devices: Devices
    fraction: float


class Places:
    def __init__(self, engine: EngineConfig, probe: Probe) -> None:
        self.engine, self._probe = engine, probe
        self._table: list[Device] | None = None
        self._over: dict[str, list[tuple[str, float]]] = {}
        self.failed: dict[str, str] = {}  # by UUID: why the device failed, until somebody retries it
        self._told: set[str] = set()  # failed devices that `newly_failed` has returned

    @property
    def table(self) -> list[Device]:
        if self._table is None:
            self.look()
        return self._table or []

    def look(self) -> None:
        """Probe the devices again. A device that is gone stays in the table, as failed."""
        found = self._probe(self.engine.device_table)
        there = {device.uuid for device in found}
        gone = [device for device in self._table or () if device.uuid not in there]
        for device in gone:
            self.failed.setdefault(device.uuid, "it is not there any more")
        self._table = [*found, *(replace(device, index=-1) for device in gone)]

    def newly_failed(self) -> list[str]:
        """Return each failed device once."""
        new = [uuid for uuid in self.failed if uuid not in self._told]
        self._told = set(self.failed)
        return new

    def retry(self, uuids: Iterable[str] | None = None) -> None:
        """Let failed devices be used again if they exist. Without `uuids`: all of them; forget those that are
        gone.
        """
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
            for uuid, asked in over.items():  # the configuration's doing: `judge` refuses such a pin
                log.error("%s would have to give %s of its memory", uuid, total(asked))
            self._over = over
        return {want.model: [Place(found, want.fraction) for found in chosen[want.model]] for want in wants}

    def pins(self, model: Model) -> list[Devices]:
        """Return the devices that a model is pinned to. A word that names no present device stays as it is:
        the device may come back.
        """
        found: list[Devices] = []
        for word in model.pins:
            try:
                found += devices.parse_pin(self.table, [word])
            except BadValue:
                found.append(tuple(word.split(",")))
        return found

    def judge(self, model: Model, others: Iterable[Model], now: Now) -> None:
        """Check that the model's pins have room beside the other models. Raises BadValue."""
        wants = [self._want(each, now) for each in (model, *others)]
        rooms = self._rooms()
        chosen = spread(rooms, wants)
        for uuid, asked in sums(rooms, wants, chosen).items():
            if model.name in [name for name, _ in asked]:
                raise BadValue(
                    f"{uuid} would have to give {total(asked)} of its memory",
                    "memory_fraction in [models.NAME], or another device",
                )
        for want in wants[1:]:
            if want.now and not want.pins and not chosen[want.model]:
                raise BadValue(
                    f"model {want.model} would have no device left",
                    "unload it, pin it elsewhere, or give both a memory_fraction",
                )

    def why_not(self, model: Model) -> str:
        """Return why the model has no place."""
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
        """Return the devices that [engine] device allows to models without a pin. PyTorch may find GPUs that
        the table does not have.
        """
        gpus = [device for device in self.table if device.divided]
        kind, _, number = self.engine.device.partition(":")
        if not gpus or kind not in ("auto", "cuda"):
            return [device for device in self.table if not device.divided]
        return [d for d in gpus if d.uuid not in self.failed and number in ("", str(d.index))]

    # for messages to workers

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

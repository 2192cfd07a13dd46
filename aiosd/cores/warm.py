"""Spare worker processes: they have imported PyTorch, have no model, and wait for the next one to load.

aiosd.cores.pool starts them, and makes a worker of one when it needs one on the same devices.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass

from aiosd.cores.launch import Process
from aiosd.policies.placement import Devices

AGAIN_S = 60.0  # after a spare that ended by itself


@dataclass(frozen=True, slots=True)
class Spare:
    id: int
    process: Process
    devices: Devices


class Spares:
    """The pool holds its lock."""

    def __init__(self) -> None:
        self._by_devices: dict[Devices, Spare] = {}
        self._ended_s: dict[Devices, float] = {}  # when a spare there ended by itself

    def all(self) -> list[Spare]:
        return list(self._by_devices.values())

    @property
    def ids(self) -> set[int]:
        return {spare.id for spare in self.all()}

    def add(self, spare: Spare) -> None:
        self._by_devices[spare.devices] = spare

    def take(self, devices: Devices) -> Spare | None:
        spare = self._by_devices.pop(devices, None)
        if spare is None or spare.process.alive():
            return spare
        end(spare)
        return None

    def lacking(self, wanted: Collection[Devices]) -> list[Devices]:
        """End the spares that are not wanted any more. Return the devices without one."""
        for devices, spare in list(self._by_devices.items()):
            if not spare.process.alive():
                self._ended_s[devices] = time.monotonic()
            elif devices in wanted:
                continue
            del self._by_devices[devices]
            end(spare)
        soon = time.monotonic() - AGAIN_S
        return [d for d in wanted if d not in self._by_devices and self._ended_s.get(d, soon) <= soon]


def end(spare: Spare) -> None:
    spare.process.kill()
    spare.process.wait()
    spare.process.close()

"""Placement: which worker of its model gets a job, and which devices get a model's workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ROUNDING = 1e-9  # tolerance for sums of fractions

Devices = tuple[str, ...]  # UUIDs of the devices that one worker spans


@dataclass(frozen=True, slots=True)
class Seat:
    """One worker with a free place."""

    worker: int
    running: int


def place(seats: Sequence[Seat], last_worker: int | None) -> int | None:
    """Return the worker that holds the job's KV if it has room, else the least loaded one."""
    for seat in seats:
        if seat.worker == last_worker:
            return last_worker
    best = min(seats, key=lambda seat: (seat.running, seat.worker), default=None)
    return best.worker if best else None


@dataclass(frozen=True, slots=True)
class Room:
    """One working device."""

    uuid: str
    memory_bytes: int  # 0: not known
    divided: bool  # its memory is shared out in fractions; False: no limit


@dataclass(frozen=True, slots=True)
class Want:
    """One model to run."""

    model: str
    replicas: int
    fraction: float  # of each device's memory, per worker
    pins: Sequence[Devices]  # devices of its workers, used in turn; empty: any one of `may`
    may: Sequence[str]
    now: Sequence[Devices]  # devices of its present workers


def spread(rooms: Sequence[Room], wants: Sequence[Want]) -> dict[str, list[Devices]]:
    """Return the devices of each model's workers, fewer than wanted if there is no room.

    A pinned worker goes where it is pinned, even if it does not fit (see `sums`). The others stay where they
    are, if they can. A new worker goes to the device with the fewest of its model, then with the most free
    memory.
    """
    free = {room.uuid: 1.0 for room in rooms}
    divided = {room.uuid for room in rooms if room.divided}
    bytes_of = {room.uuid: max(room.memory_bytes, 1) for room in rooms}
    chosen: dict[str, list[Devices]] = {want.model: [] for want in wants}

    def fits(want: Want, devices: Devices) -> bool:
        return all(d in free and (d not in divided or free[d] + ROUNDING >= want.fraction) for d in devices)

    def take(want: Want, devices: Devices) -> None:
        chosen[want.model].append(devices)
        for device in devices:
            free[device] -= want.fraction if device in divided else 0.0

    for want in wants:
        for number in range(want.replicas if want.pins else 0):
            pin = want.pins[number % len(want.pins)]
            if all(device in free for device in pin):
                take(want, pin)
    loose = [want for want in wants if not want.pins]
    for want in loose:
        for devices in want.now[: want.replicas]:
            if set(devices) <= set(want.may) and fits(want, devices):
                take(want, devices)
    for want in loose:
        for _ in range(want.replicas - len(chosen[want.model])):
            open_ = [device for device in want.may if fits(want, (device,))]
            if not open_:
                break
            mine = chosen[want.model]
            best = min(open_, key=lambda d: (mine.count((d,)), -free[d] * bytes_of[d], want.may.index(d)))
            take(want, (best,))
    return chosen


def sums(
    rooms: Sequence[Room], wants: Sequence[Want], chosen: Mapping[str, Sequence[Devices]]
) -> dict[str, list[tuple[str, float]]]:
    """Return the overbooked devices, each with the models and fractions that it would have to give."""
    asked: dict[str, list[tuple[str, float]]] = {room.uuid: [] for room in rooms if room.divided}
    for want in wants:
        for devices in chosen[want.model]:
            for device in devices:
                if device in asked:
                    asked[device].append((want.model, want.fraction))
    return {device: of for device, of in asked.items() if sum(f for _, f in of) > 1 + ROUNDING}

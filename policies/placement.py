"""Where things run: a job on a worker of its model, and the workers of models on devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ROUNDING = 1e-9  # of sums of fractions

Devices = tuple[str, ...]  # by UUID; a worker on several spans them


@dataclass(frozen=True, slots=True)
class Seat:
    """One worker with a free place."""

    worker: int
    running: int


def place(seats: Sequence[Seat], last_worker: int | None) -> int | None:
    """The worker that holds the job's KV if that has room, else the least loaded one."""
    for seat in seats:
        if seat.worker == last_worker:
            return last_worker
    best = min(seats, key=lambda seat: (seat.running, seat.worker), default=None)
    return best.worker if best else None


@dataclass(frozen=True, slots=True)
class Room:
    """One device that works."""

    uuid: str
    memory_bytes: int  # 0: not known
    divided: bool  # its memory is given away in fractions; of others there is always enough


@dataclass(frozen=True, slots=True)
class Want:
    """One model that is to run."""

    model: str
    replicas: int
    fraction: float  # of the memory of each device that a worker of it is on
    pins: Sequence[Devices]  # where they are to be, in turn; empty: on any one of `may`
    may: Sequence[str]
    now: Sequence[Devices]  # where its workers are


def spread(rooms: Sequence[Room], wants: Sequence[Want]) -> dict[str, list[Devices]]:
    """Where the workers of each model are to be: fewer than it wants where there is no room.

    The pinned ones are where they are pinned, also beyond what fits (see `sums`). The others stay where they
    are if they can; one that is new goes where the fewest of its model are, then where most is free.
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
    """What each divided device would have to give, to whom, where that is more than all of it."""
    asked: dict[str, list[tuple[str, float]]] = {room.uuid: [] for room in rooms if room.divided}
    for want in wants:
        for devices in chosen[want.model]:
            for device in devices:
                if device in asked:
                    asked[device].append((want.model, want.fraction))
    return {device: of for device, of in asked.items() if sum(f for _, f in of) > 1 + ROUNDING}

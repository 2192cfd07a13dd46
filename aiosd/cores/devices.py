"""The devices that models run on: their facts, their names, and the unit settings of a worker on them.

Only `probe` and `processor` look at the machine. Tests replace the probed GPUs by a table in a file. The
processor is a device too, and any number of workers share it. Knows no models and no processes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from aiosd.cores import nvidia
from aiosd.errors import BadValue, ConfigError
from aiosd.host import proc, toml

CPU = "cpu"
PREFIX_MIN = 8  # shortest prefix of a UUID that names a device


@dataclass(frozen=True, slots=True)
class Device:
    uuid: str  # of a GPU, as nvidia-smi -L prints it; "cpu" for the processor
    name: str = ""
    index: int = -1  # place in the table: 1 is also gpu1
    memory_bytes: int = 0  # 0: not known
    pci: str = ""
    numa: int = -1  # the memory node next to it; -1: none, or not known
    cpus: str = ""  # of that node, as in cpuset(7): 0-3,8
    paths: tuple[str, ...] = ()  # in /dev, what it takes to use it
    trouble: str = ""  # why workers may not use it as they should, and the remedy; of cpu: of all GPUs
    backend: str = "cuda"  # what its workers compute on; cpu only in tables for tests

    @property
    def divided(self) -> bool:
        """Whether workers get fractions of its memory."""
        return self.uuid != CPU


def probe(table: str = "") -> list[Device]:
    """Those there are now, the processor last. `table`: a file to believe instead of the machine. Raises
    ConfigError for that file."""
    troubles: list[str] = []
    if table:
        found = read_table(Path(table))
    else:
        gpus, troubles = nvidia.probe()
        found = [received(facts) for facts in gpus]
    numbered = [received({**asdict(device), "index": i}) for i, device in enumerate(found)]
    return [*numbered, replace(processor(), trouble="; ".join(troubles))]


def processor() -> Device:
    try:
        lines = proc.lines("/proc/cpuinfo")
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(CPU, names[0] if names else os.uname().machine, memory_bytes=memory, backend=CPU)


def read_table(file: Path) -> list[Device]:
    """Read a TOML file of [[device]] tables, whose keys are the fields of Device."""
    try:
        return [received(facts) for facts in toml.parse(toml.text(file)).get("device", ())]
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{file}: {error}", "see device_table in aiosd.toml(5)") from None


def received(facts: Mapping[str, Any]) -> Device:
    """Make a Device of the facts in a table or a message. Raises TypeError, ValueError."""
    wrong = facts.keys() - {f.name for f in fields(Device)}
    if wrong or not isinstance(facts.get("uuid"), str):
        raise ValueError(f"{min(wrong, default='uuid')}: no such field" if wrong else "a device needs a uuid")
    known = {**facts, "paths": tuple(map(str, facts.get("paths", ())))}
    numbers = ("index", "memory_bytes", "numa")
    typed: dict[str, Any] = {k: int(value) if k in numbers else value for k, value in known.items()}
    device = Device(**typed)
    # they become lines of a unit file that root writes
    texts = (device.uuid, device.name, device.pci, device.cpus, device.backend, device.trouble, *device.paths)
    if not all(isinstance(text, str) and text.isprintable() for text in texts) or re.search(
        "[ ,]", device.uuid
    ):
        raise ValueError("a text of a device is not one printable line, or its uuid has a space or comma")
    cpu_numbers(device.cpus)
    return device


def find(devices: Sequence[Device], word: str) -> Device:
    """Find a device by its UUID, a unique prefix of the UUID, or gpuN. Raises BadValue."""
    whole = [d for d in devices if word == d.uuid or (d.index >= 0 and word == f"gpu{d.index}")]
    begun = [d for d in devices if len(word) >= PREFIX_MIN and d.uuid.lower().startswith(word.lower())]
    if len(found := whole or begun) == 1:
        return found[0]
    there = ", ".join(named(device) for device in devices)
    if found:
        raise BadValue(f"{word[:60]} may be {' or '.join(d.uuid for d in found)}", "write more of the UUID")
    raise BadValue(f"there is no device {word[:60]!r}", f"the devices are {there}")


def named(device: Device) -> str:
    return device.uuid if device.index < 0 else f"gpu{device.index} ({device.uuid})"


def parse_pin(devices: Sequence[Device], words: Iterable[str]) -> list[tuple[str, ...]]:
    """`A B` means one worker on A and one on B, `A,B` one worker on both. Raises BadValue."""
    sets = []
    for word in words:
        chosen = [find(devices, name) for name in word.split(",")]
        uuids = tuple(device.uuid for device in chosen)
        if len(set(uuids)) < len(uuids):
            raise BadValue(f"{word[:60]!r} names a device twice", "write A,B for one worker on A and B")
        if CPU in uuids and len(uuids) > 1:
            raise BadValue("one worker cannot use both the processor and GPUs", "name cpu or GPUs, not both")
        sets.append(uuids)
    if not sets:
        raise BadValue("no device is named", f"write auto, or {', '.join(named(d) for d in devices)}")
    return sets


def environment(devices: Iterable[Device]) -> dict[str, str]:
    """Variables that make these GPUs the only ones of a process: cuda:0, cuda:1, … They name UUIDs, because
    numbers change between boots."""
    return {"CUDA_VISIBLE_DEVICES": ",".join(d.uuid for d in devices if d.divided)}


def drop_in(devices: Sequence[Device]) -> str:
    """Unit settings for a worker on these devices, see systemd.resource-control(5) and systemd.exec(5). Empty
    for the processor."""
    if not any(device.divided for device in devices):
        return ""
    paths = dict.fromkeys(path for device in devices for path in device.paths)
    lines = ["# Made by aios-privileged with each start of the worker.", "[Service]"]
    lines += [f"DeviceAllow={path} rw" for path in paths]
    lines += [f"Environment={key}={value}" for key, value in environment(devices).items()]
    if near := cpus_of(devices):
        lines.append(f"CPUAffinity={near}")
    if nodes := numa_of(devices):
        # "preferred" and not "bind", so that a model larger than the node still loads
        lines += ["NUMAPolicy=preferred" if len(nodes) == 1 else "NUMAPolicy=interleave"]
        lines += [f"NUMAMask={','.join(map(str, nodes))}"]
    return "".join(f"{line}\n" for line in lines)


def cpus_of(devices: Iterable[Device]) -> str:
    """The CPUs near any of the devices. Empty means all CPUs: some device has no CPUs near it."""
    lists = [device.cpus for device in devices]
    return ",".join(dict.fromkeys(lists)) if all(lists) else ""


def numa_of(devices: Iterable[Device]) -> list[int]:
    return sorted({device.numa for device in devices if device.numa >= 0})


def cpu_numbers(text: str) -> set[int]:
    """Parse a list of CPUs as in cpuset(7). Raises ValueError."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found

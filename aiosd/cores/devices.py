"""The devices that models run on: what each is, how people name it, what of the machine a worker on it gets.

Pure, but for `probe`, the one place that looks at the machine; a table in a file replaces it, for tests. The
processor is a device as well, of which any number of workers have a share. Knows no models and no processes.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from aiosd.cores import nvidia
from aiosd.errors import BadValue, ConfigError

CPU = "cpu"
PREFIX_MIN = 8  # the shortest prefix of a UUID that names a device


@dataclass(frozen=True, slots=True)
class Device:
    uuid: str  # of a GPU, as nvidia-smi -L shows it; or cpu
    name: str = ""
    index: int = -1  # place in the table: 1 is also gpu1
    memory_bytes: int = 0  # 0: not known
    pci: str = ""
    numa: int = -1  # its NUMA node; -1: none, or not known
    cpus: str = ""  # CPUs of that node, as in cpuset(7): 0-3,8
    paths: tuple[str, ...] = ()  # files in /dev that its workers open
    backend: str = "cuda"  # what its workers compute on; cpu only in test tables

    @property
    def divided(self) -> bool:
        """Whether workers get fractions of its memory."""
        return self.uuid != CPU


def probe(table: str = "") -> list[Device]:
    """Those there are now, the processor last. `table`: a file to believe instead of the machine. Raises
    ConfigError for that file."""
    found = read_table(Path(table)) if table else [received(facts) for facts in nvidia.probe()]
    numbered = [received({**asdict(device), "index": i}) for i, device in enumerate(found)]
    return [*numbered, processor()]


def processor() -> Device:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(CPU, names[0] if names else os.uname().machine, memory_bytes=memory, backend=CPU)


def read_table(file: Path) -> list[Device]:
    """Read a file of [[device]] tables with the fields of Device."""
    try:
        return [received(facts) for facts in tomllib.loads(file.read_text()).get("device", ())]
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{file}: {error}", "see device_table in aiosd.toml(5)") from None


def received(facts: Mapping[str, Any]) -> Device:
    """Make a Device from a table or a message. Raises TypeError, ValueError."""
    wrong = facts.keys() - {f.name for f in fields(Device)}
    if wrong or not isinstance(facts.get("uuid"), str):
        raise ValueError(f"{min(wrong, default='uuid')}: no such field" if wrong else "a device has a uuid")
    known = {**facts, "paths": tuple(map(str, facts.get("paths", ())))}
    numbers = ("index", "memory_bytes", "numa")
    typed: dict[str, Any] = {k: int(value) if k in numbers else value for k, value in known.items()}
    device = Device(**typed)
    # root writes these texts into lines of a unit file
    texts = (device.uuid, device.name, device.pci, device.cpus, device.backend, *device.paths)
    if not all(isinstance(text, str) and text.isprintable() for text in texts) or re.search(
        "[ ,]", device.uuid
    ):
        raise ValueError("the texts of a device must be one line each")
    cpu_numbers(device.cpus)
    return device


def find(devices: Sequence[Device], word: str) -> Device:
    """Find a device by its UUID, an unambiguous prefix of it, or gpuN. Raises BadValue."""
    whole = [d for d in devices if word == d.uuid or (d.index >= 0 and word == f"gpu{d.index}")]
    begun = [d for d in devices if len(word) >= PREFIX_MIN and d.uuid.lower().startswith(word.lower())]
    if len(found := whole or begun) == 1:
        return found[0]
    there = ", ".join(named(device) for device in devices)
    if found:
        raise BadValue(f"{word[:60]} may be {' or '.join(d.uuid for d in found)}", "write more of the UUID")
    raise BadValue(f"there is no device {word[:60]!r}", f"there are {there}")


def named(device: Device) -> str:
    return device.uuid if device.index < 0 else f"gpu{device.index} ({device.uuid})"


def parse_pin(devices: Sequence[Device], words: Iterable[str]) -> list[tuple[str, ...]]:
    """Parse a pin: `A B` is one worker on each device, `A,B` one worker on both. Raises BadValue."""
    sets = []
    for word in words:
        chosen = [find(devices, name) for name in word.split(",")]
        uuids = tuple(device.uuid for device in chosen)
        if len(set(uuids)) < len(uuids):
            raise BadValue(f"{word[:60]!r} names a device twice", "A,B is one worker on both")
        if CPU in uuids and len(uuids) > 1:
            raise BadValue("one worker cannot use the processor and a GPU", "name one or the other")
        sets.append(uuids)
    if not sets:
        raise BadValue("pin needs a device", f"auto, or {', '.join(named(d) for d in devices)}")
    return sets


def environment(devices: Iterable[Device]) -> dict[str, str]:
    """Return variables that show a process only these GPUs, as cuda:0, cuda:1, … They name UUIDs, because GPU
    numbers change between boots.
    """
    return {"CUDA_VISIBLE_DEVICES": ",".join(d.uuid for d in devices if d.divided)}


def drop_in(devices: Sequence[Device]) -> str:
    """What the unit of a worker on them has besides: systemd.resource-control(5), systemd.exec(5). Empty for
    the processor."""
    if not any(device.divided for device in devices):
        return ""
    paths = dict.fromkeys(path for device in devices for path in device.paths)
    lines = ["# Made by aios-privileged with each start of the worker.", "[Service]"]
    lines += [f"DeviceAllow={path} rw" for path in paths]
    lines += [f"Environment={key}={value}" for key, value in environment(devices).items()]
    if near := cpus_of(devices):
        lines.append(f"CPUAffinity={near}")
    if nodes := numa_of(devices):
        # preferred, not bound, so that a model larger than the node still loads
        lines += ["NUMAPolicy=preferred" if len(nodes) == 1 else "NUMAPolicy=interleave"]
        lines += [f"NUMAMask={','.join(map(str, nodes))}"]
    return "".join(f"{line}\n" for line in lines)


def cpus_of(devices: Iterable[Device]) -> str:
    """Those near any of them; empty: all, one of them has none of its own."""
    lists = [device.cpus for device in devices]
    return ",".join(dict.fromkeys(lists)) if all(lists) else ""


def numa_of(devices: Iterable[Device]) -> list[int]:
    return sorted({device.numa for device in devices if device.numa >= 0})


def cpu_numbers(text: str) -> set[int]:
    """Parse a list as in cpuset(7). Raises ValueError."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found

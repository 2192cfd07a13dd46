"""NVIDIA's GPUs, as NVML tells of them, or else /proc and /sys. Reads only; never raises, none is no error.

NVML (nvidia-ml-py) tells the memory and MIG instances; it needs the control device, so that a sandboxed
daemon asks aios-privileged. Facts are fields of aiosd.cores.devices.Device.
"""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

GPUS = Path("/proc/driver/nvidia/gpus")
PCI = Path("/sys/bus/pci/devices")
# Each GPU has /dev/nvidiaN besides. The tools node is what profilers open.
CONTROL = ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools")

Facts = dict[str, Any]


def probe() -> list[Facts]:
    if not Path("/dev/nvidiactl").exists() and not GPUS.is_dir():
        return []  # no driver, so the library cannot work
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception as error:  # noqa: BLE001 - library or driver may be missing in many ways
        log.debug("NVML: %s", error)
        return list(by_proc())
    try:
        return list(by_nvml(nvml))
    except nvml.NVMLError as error:
        log.warning("NVML: %s", error)
        return list(by_proc())
    finally:
        with suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def by_nvml(nvml: Any) -> Iterator[Facts]:
    for number in range(nvml.nvmlDeviceGetCount()):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(number)
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            bus = text(nvml.nvmlDeviceGetPciInfo(handle).busId)
            minor = nvml.nvmlDeviceGetMinorNumber(handle)
            whole = facts(
                text(nvml.nvmlDeviceGetUUID(handle)), text(nvml.nvmlDeviceGetName(handle)), bus, minor
            )
            whole["memory_bytes"] = int(memory.total)
        except nvml.NVMLError as error:  # the GPU fell off the bus: leave it out
            log.warning("GPU %d: %s", number, error)
            continue
        yield from mig(nvml, handle, whole) or [whole]


def mig(nvml: Any, handle: Any, whole: Facts) -> list[Facts]:
    """Return the MIG instances of a GPU. Not tested on a GPU with MIG."""
    found = []
    with suppress(nvml.NVMLError):
        if nvml.nvmlDeviceGetMigMode(handle)[0] != nvml.NVML_DEVICE_MIG_ENABLE:
            return []
        for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
            with suppress(nvml.NVMLError):  # the numbers have gaps
                part = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
                memory = int(nvml.nvmlDeviceGetMemoryInfo(part).total)
                paths = (*whole["paths"], *map(str, sorted(Path("/dev/nvidia-caps").glob("nvidia-cap*"))))
                names = {"uuid": text(nvml.nvmlDeviceGetUUID(part)), "name": f"{whole['name']} MIG {number}"}
                found.append({**whole, **names, "memory_bytes": memory, "paths": paths})
    return found


def by_proc() -> Iterator[Facts]:
    """Find GPUs in /proc, which does not tell their memory."""
    for file in sorted(GPUS.glob("*/information")):
        try:
            lines = file.read_text().splitlines()
        except OSError:
            continue
        told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        if "GPU UUID" in told:
            minor = int(told.get("Device Minor", "-1"))
            yield facts(told["GPU UUID"], told.get("Model", ""), file.parent.name, minor)


def facts(uuid: str, name: str, bus: str, minor: int) -> Facts:
    pci = address(bus)
    paths = tuple(path for path in (f"/dev/nvidia{minor}", *CONTROL) if Path(path).exists())
    found: Facts = {"uuid": uuid, "name": name, "pci": pci, "paths": paths}
    with suppress(OSError, ValueError):
        found["numa"] = int((PCI / pci / "numa_node").read_text())
        found["cpus"] = (PCI / pci / "local_cpulist").read_text().strip()
    return found


def address(bus: str) -> str:
    """Write a PCI address as /sys does: four digits of domain, where NVML has eight, in lower case."""
    return re.sub(r"^0000(?=[0-9a-f]{4}:)", "", bus.lower())


def text(value: str | bytes) -> str:
    """Decode a text that older bindings return as bytes."""
    return value.decode() if isinstance(value, bytes) else value

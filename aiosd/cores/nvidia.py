"""List the NVIDIA GPUs, from NVML or else from /proc and /sys. Read-only; raises nothing, no GPU is no error.

Only NVML (nvidia-ml-py) knows memory sizes and MIG instances. It needs the control device, so a sandboxed
daemon asks aios-privileged to call this. Facts are fields of aiosd.cores.devices.Device.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from aiosd.host import proc

GPUS = Path("/proc/driver/nvidia/gpus")
CONTROL_DEVICE = Path("/dev/nvidiactl")
PCI = Path("/sys/bus/pci/devices")
# Each GPU has /dev/nvidiaN besides. The tools node is what profilers open.
CONTROL = (str(CONTROL_DEVICE), "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools")
REMEDIES = {  # by nvmlReturn_t
    4: "let this user open /dev/nvidiactl",
    9: "modprobe nvidia, and dmesg says why the driver does not load",
    12: "install the driver's libraries (libnvidia-ml1), or start the container with its GPUs (--gpus all)",
    15: "reboot, and dmesg says why it was lost",
    18: "the driver was upgraded and the old one still runs: reboot, or load its modules again",
}

Facts = dict[str, Any]


def probe() -> tuple[list[Facts], list[str]]:
    """The GPUs, and what is wrong with them or their driver, each with its remedy."""
    if not CONTROL_DEVICE.exists() and not GPUS.is_dir():
        return [], []  # no driver: the library need not be tried
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception as error:  # noqa: BLE001 - of a library that may lack, or its driver, in many ways
        return list(by_proc()), [trouble(error)]
    troubles: list[str] = []
    try:
        return list(by_nvml(nvml, troubles)), troubles
    except nvml.NVMLError as error:
        return list(by_proc()), [trouble(error)]
    finally:
        with suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def trouble(error: Exception) -> str:
    """What an error of NVML means, and what to do about it."""
    if isinstance(error, ImportError):
        return f"{error}; {sys.executable} -m pip install nvidia-ml-py"
    return f"NVML: {error}; {REMEDIES.get(getattr(error, 'value', 0), 'nvidia-smi says more')}"


def by_nvml(nvml: Any, troubles: list[str]) -> Iterator[Facts]:
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
        except nvml.NVMLError as error:  # lost, fallen off the bus: it is not there
            troubles.append(f"GPU {number} is not used: {trouble(error)}")
            continue
        yield from mig(nvml, handle, whole) or [whole]


def mig(nvml: Any, handle: Any, whole: Facts) -> list[Facts]:
    """The MIG instances of a divided GPU. Never run on such a GPU: none was at hand."""
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
    """Read /proc, which does not say how much memory a GPU has."""
    for file in sorted(GPUS.glob("*/information")):
        try:
            lines = proc.lines(file)
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
    """The bus address as /sys writes it: lower case, a domain of four digits. NVML writes eight digits."""
    return re.sub(r"^0000(?=[0-9a-f]{4}:)", "", bus.lower())


def text(value: str | bytes) -> str:
    """Older versions of pynvml return bytes."""
    return value.decode() if isinstance(value, bytes) else value

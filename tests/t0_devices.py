"""Devices: their names, their choice, and the unit settings for them. Pure, and this machine's own table."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pynvml
import pytest

from aiosd.config.config import EngineConfig
from aiosd.cores import devices, nvidia
from aiosd.cores.assignment import Assignment, Place
from aiosd.cores.devices import CPU, Device
from aiosd.cores.models import Model
from aiosd.errors import BadValue, ConfigError
from aiosd.policies.placement import Room, Want, spread, sums
from tests.running import needs

A, B, C = (f"GPU-{letter * 8}-0000-0000-0000-000000000000" for letter in "abc")
PATHS = ("/dev/nvidia0", "/dev/nvidiactl")
TABLE = [
    Device(A, "one", 0, 1000, numa=0, cpus="0-3", paths=PATHS),
    Device(B, "two", 1, 1000, numa=1, cpus="4-7", paths=("/dev/nvidia1", "/dev/nvidiactl")),
    Device(C, "three", 2, 3000),
    devices.processor(),
]
ROOMS = [Room(A, 1000, True), Room(B, 1000, True), Room(C, 3000, True), Room(CPU, 0, False)]


@pytest.mark.parametrize(
    ("word", "uuid"), [(A, A), ("GPU-bbbb", B), ("gpu-CCCCCC", C), ("gpu1", B), (CPU, CPU)]
)
def test_a_device_has_names(word: str, uuid: str) -> None:
    assert devices.find(TABLE, word).uuid == uuid


@pytest.mark.parametrize("word", ["GPU-bbb", "GPU-dddddd", "gpu3", "gpu-1", ""])
def test_an_unknown_name_is_answered_with_the_list_of_devices(word: str) -> None:
    with pytest.raises(BadValue) as caught:
        devices.find(TABLE, word)
    assert all(uuid in caught.value.explanation for uuid in (A, B, C, CPU))


def test_a_prefix_of_two_devices_is_answered_with_both() -> None:
    twins = [Device("GPU-12345678-a", index=0), Device("GPU-12345678-b", index=1)]
    with pytest.raises(BadValue, match=r"GPU-12345678-a or GPU-12345678-b"):
        devices.find(twins, "GPU-12345678")


def test_each_pin_is_a_worker_and_a_comma_makes_it_span() -> None:
    assert devices.parse_pin(TABLE, ["gpu0", "GPU-bbbb,gpu2"]) == [(A,), (B, C)]
    for wrong in (["gpu0,gpu0"], ["gpu0,cpu"], ["gpu0,"], []):
        with pytest.raises(BadValue):
            devices.parse_pin(TABLE, wrong)


def test_a_unit_may_open_its_own_device_only_and_stays_near_it() -> None:
    assert devices.drop_in(TABLE[:1]).splitlines()[1:] == [
        "[Service]", "DeviceAllow=/dev/nvidia0 rw", "DeviceAllow=/dev/nvidiactl rw",
        f"Environment=CUDA_VISIBLE_DEVICES={A}", "CPUAffinity=0-3", "NUMAPolicy=preferred", "NUMAMask=0",
    ]  # fmt: skip
    both = devices.drop_in(TABLE[:2])
    assert both.count("nvidiactl") == 1
    assert {f"Environment=CUDA_VISIBLE_DEVICES={A},{B}", "CPUAffinity=0-3,4-7", "NUMAPolicy=interleave",
            "NUMAMask=0,1"} < set(both.splitlines())  # fmt: skip
    assert "CPUAffinity" not in devices.drop_in(TABLE[:3]), "one has processors of no node"
    assert devices.drop_in(TABLE[3:]) == ""


def test_a_drop_in_is_what_systemd_understands(tmp_path: Path) -> None:
    analyze = needs("systemd-analyze")
    unit = tmp_path / "some.service"
    unit.write_text(devices.drop_in(TABLE[:2]) + "ExecStart=/bin/true\nDevicePolicy=closed\n")
    said = subprocess.run([analyze, "verify", "--man=no", unit], capture_output=True, text=True)
    assert "some.service" not in said.stderr, said.stderr


def test_a_table_cannot_add_lines_to_a_unit(tmp_path: Path) -> None:
    table = tmp_path / "table"
    for wrong in ('uuid = "GPU-a\\nExecStart=/bin/sh"', 'uuid = "a,b"', 'name = "x"', 'uuid = "a"\nsize = 1',
                  'uuid = "a"\ncpus = "all"', 'uuid = "a"\npaths = ["/dev/x\\ny"]'):  # fmt: skip
        table.write_text(f"[[device]]\n{wrong}\n")
        with pytest.raises(ConfigError, match="table"):
            devices.probe(str(table))
    table.write_text('[[device]]\nuuid = "a"\nbackend = "cpu"\n[[device]]\nuuid = "b"\n')
    assert [(d.uuid, d.index) for d in devices.probe(str(table))] == [("a", 0), ("b", 1), (CPU, -1)]
    with pytest.raises(ConfigError):
        devices.probe(str(tmp_path / "none"))


def test_the_processor_is_always_a_device() -> None:
    *gpus, cpu = devices.probe()
    assert (cpu.uuid, cpu.divided) == (CPU, False)
    assert cpu.memory_bytes > 1 << 20
    assert all(gpu.uuid.startswith(("GPU-", "MIG-")) for gpu in gpus)


def test_gpus_are_found_without_nvml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the files of /proc as driver version 550 writes them."""
    folder, pci = tmp_path / "gpus/0000:17:00.0", tmp_path / "pci/0000:17:00.0"
    folder.mkdir(parents=True)
    pci.mkdir(parents=True)
    (folder / "information").write_text(
        f"Model: \t\t NVIDIA L4\nIRQ:   \t\t 16\nGPU UUID: \t {A}\n"
        "Bus Location: \t 0000:17:00.0\nDevice Minor: \t 0\n"
    )
    (pci / "numa_node").write_text("1\n")
    (pci / "local_cpulist").write_text("8-15\n")
    monkeypatch.setattr(nvidia, "GPUS", tmp_path / "gpus")
    monkeypatch.setattr(nvidia, "PCI", tmp_path / "pci")
    [found] = map(devices.received, nvidia.by_proc())
    assert (found.uuid, found.name, found.numa, found.cpus) == (A, "NVIDIA L4", 1, "8-15")
    assert nvidia.address("00000000:3B:00.0") == "0000:3b:00.0"


def test_a_driver_that_does_not_answer_is_told_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a container that sees the driver's files and was not given its library."""
    if os.path.exists("/dev/nvidiactl"):
        pytest.skip("the driver of this machine answers")
    monkeypatch.setattr(nvidia, "GPUS", tmp_path)
    [cpu] = devices.probe()
    assert cpu.trouble.startswith("NVML: NVML Shared Library Not Found; install the driver's libraries")
    assert devices.received(asdict(cpu)) == cpu, "as aios-privileged tells it"
    places = Assignment(EngineConfig(), devices.probe)
    places.look()
    places.look()
    assert places.warnings == {CPU: cpu.trouble}
    assert [record.message for record in caplog.records] == [f"device cpu: {cpu.trouble}"], "once"
    monkeypatch.setattr(nvidia, "GPUS", tmp_path / "none")
    places.look()
    assert places.warnings == {}


@pytest.mark.parametrize(("number", "remedy"), [(18, "reboot"), (9, "modprobe nvidia"), (999, "nvidia-smi")])
def test_an_error_of_nvml_has_a_remedy(number: int, remedy: str) -> None:
    assert remedy in nvidia.trouble(pynvml.NVMLError(number))
    assert "pip install" in nvidia.trouble(ImportError("No module named 'pynvml'"))


def test_what_a_worker_says_of_its_device_holds_until_another_is_well_there() -> None:
    places = Assignment(EngineConfig(), lambda table: TABLE)
    places.heard(Place((A, B), 1.0), "no CUDA")
    assert places.warnings == {A: "no CUDA", B: "no CUDA"}
    places.heard(Place((A,), 1.0), "")
    assert places.warnings == {B: "no CUDA"}


def test_a_process_stays_near_and_prefers_the_memory_of_its_node() -> None:
    cpu = min(os.sched_getaffinity(0))
    script = (
        f"from aiosd.cores.numa import stay_near; stay_near('{cpu},100000', [0]); import os;"
        "print(os.sched_getaffinity(0), open('/proc/self/numa_maps').readline().split()[1])"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert said.stdout.startswith(f"{{{cpu}}}") or "numa_maps" in said.stderr, said.stderr


# placement


def want(model: str, fraction: float = 1.0, replicas: int = 1, **more: object) -> Want:
    facts = {"pins": [], "may": [A, B, C], "now": [], **more}
    return Want(model, replicas, fraction, **facts)  # type: ignore[arg-type]


def test_a_worker_goes_where_most_memory_is_free_and_the_next_one_elsewhere() -> None:
    assert spread(ROOMS, [want("m", 0.5)]) == {"m": [(C,)]}
    assert spread(ROOMS, [want("m", 0.5, replicas=4)]) == {"m": [(C,), (A,), (B,), (C,)]}


def test_workers_keep_their_devices_and_pinned_models_come_first() -> None:
    assert spread(ROOMS, [want("m", now=[(A,)]), want("n")]) == {"m": [(A,)], "n": [(C,)]}
    wants = [want("m", now=[(A,)]), want("n", pins=[(A,)])]
    assert spread(ROOMS, wants) == {"m": [(C,)], "n": [(A,)]}


def test_without_room_fewer_workers_run() -> None:
    assert spread(ROOMS[:1], [want("m", 0.6), want("n", 0.6), want("o", 0.4)]) == {
        "m": [(A,)], "n": [], "o": [(A,)],
    }  # fmt: skip
    assert spread(ROOMS, [want("m", replicas=9, may=[CPU])])["m"] == [(CPU,)] * 9, "it is not divided"


def test_a_failed_device_is_left_out_and_the_others_get_no_more_than_their_own() -> None:
    left = [ROOMS[1]]
    assert spread(left, [want("m", replicas=2, pins=[(A,), (B,)])]) == {"m": [(B,)]}
    assert spread(left, [want("m", pins=[(A, B)])]) == {"m": []}


def test_fractions_that_add_up_to_more_than_one_are_found() -> None:
    wants = [want("m", 0.6, pins=[(A,)]), want("n", 0.5, pins=[(A,)]), want("o", 0.1, pins=[(B,)])]
    assert sums(ROOMS, wants, spread(ROOMS, wants)) == {A: [("m", 0.6), ("n", 0.5)]}
    thirds = [want(name, 1 / 3, pins=[(A,)]) for name in "mno"]
    assert not sums(ROOMS, thirds, spread(ROOMS, thirds))


def places(device: str = "auto", table: list[Device] = TABLE) -> Assignment:
    return Assignment(EngineConfig(device=device), lambda _: list(table))


def model(*pins: str, fraction: float = 1.0, name: str = "m") -> Model:
    return Model(name, Path(), max(1, len(pins)), pins, fraction)


def test_the_configuration_limits_the_choice() -> None:
    chosen = {
        device: places(device).plan([model()], {})["m"] for device in ("auto", "cpu", "cuda:1", "cuda:7")
    }
    on = {device: [p.devices for p in found] for device, found in chosen.items()}
    assert on == {"auto": [(C,)], "cpu": [(CPU,)], "cuda:1": [(B,)], "cuda:7": []}
    assert places(table=TABLE[3:]).plan([model()], {})["m"] == [Place((CPU,), 1.0)]


def test_a_pin_that_does_not_fit_is_refused_with_the_sum() -> None:
    p = places()
    with pytest.raises(BadValue, match=rf"{A} has too little memory: .* 0.6 \(m\) \+ 0.5 \(n\) = 1.1"):
        p.judge(model("gpu0", fraction=0.6), [model("gpu0", fraction=0.5, name="n")], {})
    p.judge(model("gpu0", fraction=0.6), [model("gpu1", fraction=0.5, name="n")], {})
    alone = places(table=TABLE[:1])
    with pytest.raises(BadValue, match="model n would have no device left"):
        alone.judge(model("gpu0"), [model(name="n")], {"n": [(A,)]})


def test_a_missing_device_has_failed_and_a_retry_brings_it_back() -> None:
    table = list(TABLE)
    p = Assignment(EngineConfig(), lambda _: list(table))
    m = model("gpu0")
    assert p.plan([m], {})["m"] == [Place((A,), 1.0)]
    m.pins = (A,)
    lost = table.pop(0)
    p.look()
    assert (list(p.failed), p.plan([m], {})["m"]) == ([A], [])
    assert p.why_not(m) == f"it is pinned to {A} (it is not there any more)"
    assert [p.state(device) for device in p.table] == ["ok", "ok", "ok", "failed"]
    table.insert(0, lost)
    p.look()
    assert p.failed, "what has failed once is not believed"
    p.retry([A])
    assert p.plan([m], {})["m"] == [Place((A,), 1.0)]
    table.pop(0)
    p.look()
    p.retry()
    assert (p.failed, [device.uuid for device in p.table]) == ({}, [B, C, CPU])


def test_a_worker_gets_pytorchs_name_of_its_device() -> None:
    p = places()
    assert p.torch_device(Place((A,), 1), pinned=True) == "cuda"
    assert p.torch_device(Place((A,), 1), pinned=False) == "auto"
    assert p.torch_device(Place((A, B), 1), pinned=True) == "span"
    assert p.torch_device(Place((CPU,), 1), pinned=True) == "cpu"
    assert places("xpu").torch_device(Place((CPU,), 1), pinned=False) == "xpu"
    assert places(table=[Device("x", backend="cpu")]).torch_device(Place(("x",), 1), pinned=True) == "cpu"

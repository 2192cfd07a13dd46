"""Models on devices, on the real mount: pins, moves under load, shared devices, failed devices.

The devices are of a table, and their workers, real ones, compute on the processor.
For GPUs there is tests/t6_gpu.py.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import random_model
from tests.running import Daemon, wait_until

MakeDaemon = Callable[..., Daemon]
pytestmark = [pytest.mark.mount, pytest.mark.root, pytest.mark.slow]
A, B, C = (f"GPU-{letter * 8}-0000-0000-0000-000000000000" for letter in "abc")
MANY = 4
LONG = {"prompt": "Tell me.", "max_tokens": 500, "ignore_eos": True, "seed": 7, "temperature": 0.8}


class Machine:
    """Write a table with some of three GPUs."""

    def __init__(self, folder: Path) -> None:
        self.table = folder / "devices.toml"
        self.cpus = sorted(os.sched_getaffinity(0))
        self.has(A, B, C)

    def has(self, *uuids: str) -> None:
        self.table.write_text("".join(
            f'[[device]]\nuuid = "{uuid}"\nbackend = "cpu"\nmemory_bytes = 1000\n'
            f'cpus = "{self.cpus[number % len(self.cpus)]}"\n'
            for number, uuid in enumerate((A, B, C)) if uuid in uuids
        ))  # fmt: skip

    @property
    def config(self) -> str:
        return f'[engine]\ndevice_table = "{self.table}"\n'


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def workers(daemon: Daemon, model: str) -> dict[str, list[str]]:
    """The devices of each ready worker."""
    numbers = daemon.read(f"models/{model}/workers").split()
    ready = [n for n in numbers if daemon.read(f"workers/{n}/state") == "ready\n"]
    return {n: daemon.read(f"workers/{n}/device").split() for n in ready}


def on(daemon: Daemon, model: str) -> list[list[str]]:
    return sorted(workers(daemon, model).values())


def state(daemon: Daemon, uuid: str) -> str:
    return next(line.split()[2] for line in daemon.read("devices").splitlines() if line.startswith(uuid))


def ask(daemon: Daemon, model: str) -> str:
    fd = os.open(daemon.root / f"models/{model}/llm", os.O_RDWR)
    try:
        os.write(fd, json.dumps(LONG).encode())
        text = b""
        while piece := os.read(fd, 1 << 16):
            text += piece
        return str(json.loads(text)["choices"][0]["message"]["content"])
    finally:
        os.close(fd)


def refused(daemon: Daemon, model: str, command: str) -> None:
    with pytest.raises(OSError) as caught:
        daemon.write(f"models/{model}/ctl", f"{command}\n")
    assert caught.value.errno == errno.EINVAL


def progress(daemon: Daemon, model: str) -> list[int]:
    """How many tokens each unfinished request has."""
    lines = [line.split() for line in daemon.read("scheduler/queue").splitlines()[1:]]
    return [int(words[6]) for words in lines if words[4] == model]


def meanwhile(daemon: Daemon, model: str, act: Callable[[], None]) -> set[str]:
    """Send requests in a row until the event has happened during some answers. Return the answers."""
    answers: list[str] = []
    over = threading.Event()

    def go_on() -> None:
        while not over.is_set():
            answers.append(ask(daemon, model))

    threads = [threading.Thread(target=go_on) for _ in range(MANY)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: any(tokens > 20 for tokens in progress(daemon, model)), "some tokens")
        act()
    finally:
        over.set()
        for thread in threads:
            thread.join(120)
    assert len(answers) >= MANY
    return set(answers)


def test_a_pin_moves_a_model_while_it_answers_with_the_same_tokens(
    make_daemon: MakeDaemon, machine: Machine, slow_llama: Path
) -> None:
    daemon = make_daemon(machine.config, slow_llama).start()
    wanted = ask(daemon, "slow")
    assert on(daemon, "slow") == [[A]]

    def move() -> None:
        daemon.write("models/slow/ctl", "pin GPU-bbbb\n")
        wait_until(lambda: on(daemon, "slow") == [[B]], "the move", 60)

    assert meanwhile(daemon, "slow", move) == {wanted}
    [number] = workers(daemon, "slow")
    pid = int(daemon.read(f"workers/{number}/pid"))
    assert f"CUDA_VISIBLE_DEVICES={B}\0" in Path(f"/proc/{pid}/environ").read_text()
    assert os.sched_getaffinity(pid) == {machine.cpus[1 % len(machine.cpus)]}

    for wrong in ("pin GPU-dddddddd", "pin gpu0,gpu0", "pin gpu9", "pin", "pin gpu0,cpu"):
        refused(daemon, "slow", wrong)
    daemon.write("models/slow/ctl", "pin gpu0 gpu2\n")
    wait_until(lambda: on(daemon, "slow") == [[A], [C]], "a worker on each")
    daemon.stop()
    daemon.start()
    wait_until(lambda: on(daemon, "slow") == [[A], [C]], "the same places after a restart")
    assert json.loads(daemon.read("models/slow/info.json"))["pin"] == [A, C]
    daemon.write("models/slow/ctl", "pin auto\n")
    daemon.write("models/slow/ctl", "replicas 1\n")
    wait_until(lambda: len(daemon.read("models/slow/workers").split()) == 1, "one of them")
    assert ask(daemon, "slow") == wanted


def test_one_worker_spans_two_devices(make_daemon: MakeDaemon, machine: Machine) -> None:
    daemon = make_daemon(machine.config).start()
    daemon.write("models/random/ctl", "pin gpu0,gpu1\n")
    wait_until(lambda: on(daemon, "random") == [[A, B]], "the move", 60)
    info = json.loads(daemon.read("models/random/info.json"))
    assert (info["device"], "batched" in info) == ("auto", True), (
        "accelerate's device map, on transformers' path"
    )
    assert ask(daemon, "random")


def test_a_device_that_fails_is_drained_and_its_requests_go_on(
    make_daemon: MakeDaemon, machine: Machine, slow_llama: Path
) -> None:
    daemon = make_daemon(machine.config, slow_llama).start()
    daemon.write("models/slow/ctl", "pin gpu0 gpu1\n")
    wait_until(lambda: on(daemon, "slow") == [[A], [B]], "a worker on each")
    wanted = ask(daemon, "slow")

    def fail(*left: str) -> None:
        machine.has(*left)
        for number in workers(daemon, "slow"):
            os.kill(int(daemon.read(f"workers/{number}/pid")), signal.SIGKILL)

    events, told = os.open(daemon.root / "events.jsonl", os.O_RDONLY | os.O_NONBLOCK), b""

    def is_told() -> bool:
        nonlocal told
        told += os.read(events, 1 << 16)
        return b'"event": "device"' in told

    assert meanwhile(daemon, "slow", lambda: fail(A, C)) == {wanted}
    wait_until(lambda: on(daemon, "slow") == [[A]], "the other one", 60)
    assert (state(daemon, A), state(daemon, B)) == ("ok", "failed")
    wait_until(is_told, "the event")
    os.close(events)
    [event] = [e for e in map(json.loads, told.splitlines()) if e["event"] == "device"]
    assert (event["device"], event["state"], event["error"]) == (B, "failed", "it is not there any more")

    fail(C)
    wait_until(lambda: daemon.model_state() == "waiting", "the model without a device")
    assert A in json.loads(daemon.read("models/slow/info.json"))["error"]
    refused(daemon, "slow", f"pin {A}")
    daemon.sh("mkdir agents/waits && echo hello > agents/waits/syscall/llm")
    [id] = [name for name in os.listdir(daemon.root / "agents/waits/requests") if name.isdecimal()]
    assert daemon.read(f"agents/waits/requests/{id}/state").split()[0] == "queued"
    machine.has(A, B, C)
    daemon.write("models/slow/ctl", f"pin {A[:12]}\n")
    wait_until(lambda: on(daemon, "slow") == [[A]], "the device that is back", 60)
    assert ask(daemon, "slow") == wanted
    daemon.says(f"device {B} has failed: it is not there any more")


def test_two_models_share_a_device_by_fractions(
    make_daemon: MakeDaemon, machine: Machine, random_llama: Path, tmp_path: Path
) -> None:
    machine.has(A)
    other = random_model.make(tmp_path / "other")
    section = "[models.{0}]\npath = {1}\nmemory_fraction = {2}\ndevices = {3}\nkeep_alive = 'always'\n"
    models = [("x", 0.5, ["gpu0"]), ("y", 0.5, ["gpu0"]), ("z", 0.3, [])]
    config = machine.config + "".join(
        section.format(name, json.dumps(str(other)), fraction, devices) for name, fraction, devices in models
    )
    daemon = make_daemon(config).start(ready=False)
    wait_until(lambda: (on(daemon, "x"), on(daemon, "y")) == ([[A]], [[A]]), "both", 60)
    assert "no device has 0.3 of its memory free" in json.loads(daemon.read("models/z/info.json"))["error"]
    assert {daemon.read(f"models/{name}/state") for name in ("random", "z")} == {"waiting\n"}
    assert daemon.sh(f"grep {A} devices").stdout.split()[4] == "0.00"
    refused(daemon, "z", "pin gpu0")
    daemon.write("models/y/ctl", "unload\n")
    wait_until(lambda: on(daemon, "z") == [[A]], "the one that waited", 60)
    assert daemon.read("models/random/state") == "waiting\n"
    daemon.write("models/random/ctl", "pin cpu\n")
    wait_until(lambda: on(daemon, "random") == [["cpu"]], "the processor", 60)


def test_a_model_that_runs_on_the_processor_instead_of_its_gpu_says_so(
    make_daemon: MakeDaemon, tmp_path: Path
) -> None:
    """PyTorch for CPUs on a machine with a GPU: its table is believed, and the torch is real."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("this PyTorch sees a GPU")
    table = tmp_path / "devices.toml"
    table.write_text(f'[[device]]\nuuid = "{A}"\n[[device]]\nuuid = "{B}"\ntrouble = "NVML: lost; reboot"\n')
    daemon = make_daemon(f'[engine]\ndevice_table = "{table}"\n').start()
    said = f"{A}: the model runs on the processor: "
    status = daemon.table("status")["warning"]
    assert said in status
    assert f"{B}: NVML: lost; reboot" in status
    lines = daemon.read("devices").splitlines()
    assert any(line.startswith(f"# {said}") for line in lines)
    assert f"# {B}: NVML: lost; reboot" in lines
    daemon.says(f"WARNING aiosd.cores.assignment: device {said}")
    assert "on the processor" in json.loads(daemon.read("models/random/info.json"))["warning"]

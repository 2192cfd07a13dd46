"""NVIDIA GPUs: find, pin and share them. Skipped with a clear message on machines without GPUs."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from aiosd.cores import devices
from tests import random_model
from tests.running import Daemon, wait_until
from tests.t5_devices import ask, meanwhile, on

MakeDaemon = Callable[..., Daemon]
GPUS = [device for device in devices.probe() if device.divided]
pytestmark = [
    pytest.mark.mount, pytest.mark.root, pytest.mark.gpu,
    pytest.mark.skipif(not GPUS, reason="NOTHING ABOUT GPUS IS TESTED: there is no NVIDIA GPU here"),
]  # fmt: skip


def test_each_gpu_is_what_nvidia_smi_says() -> None:
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    for gpu in GPUS:
        assert gpu.uuid in listed
        assert all(Path(path).exists() for path in gpu.paths)
        assert gpu.paths


def test_a_model_is_pinned_and_computes_there(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon().start()
    assert on(daemon, "random") == [[GPUS[-1].uuid]] or len(GPUS) > 1
    daemon.write("models/random/ctl", f"pin {GPUS[0].uuid}\n")
    wait_until(lambda: on(daemon, "random") == [[GPUS[0].uuid]], "the GPU", 120)
    assert json.loads(daemon.read("models/random/info.json"))["device"].startswith("cuda")
    [pid] = daemon.worker_pids()
    query = ["nvidia-smi", "--query-compute-apps=pid,gpu_uuid", "--format=csv,noheader"]
    using = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    # in a container the driver may not know this container's pids
    assert f"{pid}, {GPUS[0].uuid}" in using or str(pid) not in using
    assert ask(daemon, "random")


def test_a_model_moves_from_the_gpu_to_the_processor_while_it_answers(
    make_daemon: MakeDaemon, slow_llama: Path
) -> None:
    """The test compares no tokens, because the devices round differently."""
    daemon = make_daemon("", slow_llama).start()
    daemon.write("models/slow/ctl", "pin gpu0\n")
    wait_until(lambda: on(daemon, "slow") == [[GPUS[0].uuid]], "the GPU", 120)
    assert meanwhile(daemon, "slow", lambda: daemon.write("models/slow/ctl", "pin cpu\n"))
    wait_until(lambda: on(daemon, "slow") == [["cpu"]], "the processor", 120)


def test_two_models_share_a_gpu(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    folder = json.dumps(str(random_model.make(tmp_path / "other")))
    section = "[models.{0}]\npath = {1}\nmemory_fraction = 0.4\ndevices = ['gpu0']\nkeep_alive = 'always'\n"
    config = "[engine]\nkv_bytes = 1000000\n" + "".join(section.format(name, folder) for name in "xy")
    daemon = make_daemon(config).start(ready=False)
    for name in "xy":
        wait_until(lambda name=name: on(daemon, name) == [[GPUS[0].uuid]], name, 120)  # type: ignore[misc]
        assert ask(daemon, name)


@pytest.mark.skipif(len(GPUS) < 2, reason="one worker on two GPUs is not tested: there are not two here")
def test_a_worker_spans_two_gpus(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon().start()
    daemon.write("models/random/ctl", "pin gpu0,gpu1\n")
    wait_until(lambda: on(daemon, "random") == [[gpu.uuid for gpu in GPUS[:2]]], "both", 120)
    assert ask(daemon, "random")

"""Models on demand, on the real mount with real uids. The device that they share is of a table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.running import REPOSITORY, Daemon, wait_until
from tests.t5_devices import A
from tests.t5_users import ALICE, BOB, as_user

pytestmark = [pytest.mark.mount, pytest.mark.root, pytest.mark.slow]
MakeDaemon = Callable[..., Daemon]
POLICY = """
from aiosd.policies.fair import preempt, rank

def leave(full):
    return [one.model for one in full.residents if not one.requests]
"""


def aiosctl(daemon: Daemon, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "aiosd.cli.aiosctl", "--mount", str(daemon.root), *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=100)


@pytest.fixture
def sharing(make_daemon: MakeDaemon, tmp_path: Path, random_llama: Path, slow_llama: Path) -> Daemon:
    """A daemon with the models a and b, which share a GPU that has room for one."""
    table = tmp_path / "devices.toml"
    table.write_text(f'[[device]]\nuuid = "{A}"\nbackend = "cpu"\nmemory_bytes = 8000000000\n')
    policies = tmp_path / "policies"
    policies.mkdir()
    (policies / "swift.py").write_text(POLICY)
    config = f"[engine]\ndevice_table = '{table}'\n[scheduler]\npolicies = '{policies}'\n" + "".join(
        f"[models.{name}]\npath = '{folder}'\ndevices = ['gpu0']\n"
        for name, folder in (("a", random_llama), ("b", slow_llama))
    )  # fmt: skip
    daemon = make_daemon(config)
    for folder in [daemon.root.parent, *daemon.root.parent.parents][:4]:
        folder.chmod(0o755)
    daemon.start(ready=False)
    daemon.write("models/random/ctl", "pin cpu\n")
    wait_until(lambda: daemon.model_state() == "ready", "the model", 120)
    return daemon


def ask(daemon: Daemon, uid: int, model: str, tokens: int = 3) -> subprocess.CompletedProcess[str]:
    request = json.dumps({"prompt": "hi", "max_tokens": tokens, "ignore_eos": True})
    return as_user(daemon, uid, f"echo '{request}' > models/{model}/llm && cat models/{model}/llm")


def state(daemon: Daemon, model: str) -> str:
    return daemon.read(f"models/{model}/state").strip()


def test_two_users_share_a_device_and_a_policy_file_says_which_model_leaves(sharing: Daemon) -> None:
    sharing.write("scheduler/policy", "swift\n")
    for uid, model, other in ((ALICE, "a", "b"), (BOB, "b", "a"), (ALICE, "a", "b")):
        assert '"finish_reason"' in ask(sharing, uid, model).stdout
        assert (state(sharing, model), state(sharing, other)) == ("ready", "absent")
    listed = aiosctl(sharing, "ps")
    rows = {line.split()[0]: line.split() for line in listed.stdout.splitlines()}
    assert rows["a"][1:3] == ["ready", A]
    assert "always" in rows["random"]
    assert "b" not in rows


def test_asking_two_models_in_turn_loads_no_faster_than_a_fifth_of_the_time(sharing: Daemon) -> None:
    """With the built-in policy a model stays four times as long as its load took."""
    assert ask(sharing, ALICE, "a").returncode == 0
    ready_s = time.monotonic()
    answers: list[subprocess.CompletedProcess[str]] = []
    asking = threading.Thread(target=lambda: answers.append(ask(sharing, BOB, "b")))
    asking.start()
    wait_until(lambda: state(sharing, "b") == "waiting", "b waits", 60)
    [id] = [row.split()[0] for row in sharing.read("scheduler/queue").splitlines() if f" {BOB} " in row]
    shown = as_user(sharing, BOB, f"cat requests/{id}/state").stdout
    assert shown.startswith("queued 0 - model b waits: ")
    wait_until(lambda: state(sharing, "a") == "absent", "a leaves", 120)
    assert time.monotonic() - ready_s >= 2
    asking.join()
    assert answers[0].returncode == 0


def test_nobody_but_an_administrator_keeps_a_model_for_always(sharing: Daemon) -> None:
    os.chown(sharing.root / "models/a", ALICE, ALICE)
    refused = as_user(sharing, ALICE, "echo keep_alive always > models/a/ctl; cat models/a/error")
    assert "only an administrator keeps a model for always; name a time" in refused.stdout, refused
    assert as_user(sharing, ALICE, "echo keep_alive 1h > models/a/ctl").returncode == 0
    assert json.loads(sharing.read("models/a/info.json"))["keep_alive"] == "1h"
    assert as_user(sharing, BOB, "echo keep_alive 1h > models/a/ctl").returncode != 0


def test_load_waits_for_room_and_says_for_what_and_unload_tells_what_waits(sharing: Daemon) -> None:
    sharing.write("models/b/ctl", "keep_alive always\n")
    assert aiosctl(sharing, "model", "load", "b").stdout == "b: ready\n"
    loading = subprocess.Popen(
        [sys.executable, "-m", "aiosd.cli.aiosctl", "--mount", str(sharing.root), "model", "load", "a"],
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_until(lambda: state(sharing, "a") == "waiting", "a waits", 60)
    unloaded = aiosctl(sharing, "model", "unload", "b")
    assert unloaded.stdout == "b: unloaded; the next request or load brings it back\n"
    said, heard = loading.communicate(timeout=100)
    assert (said, loading.returncode) == ("a: ready\n", 0)
    assert heard.startswith("a: waits: ")

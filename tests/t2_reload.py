"""A reload reaches every part that holds something of the configuration."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aiosd.access.caller import Caller
from aiosd.config.changes import AT_RESTART, BY_NEW_WORKERS, flat, story
from aiosd.config.config import Config, load
from aiosd.config.doubts import doubts
from aiosd.cores.models import ModelState
from aiosd.errors import AiosError, BadValue, NotFound
from aiosd.kernel import Kernel
from aiosd.reload import reload
from aiosd.syscall.request import State
from tests.running import REPOSITORY
from tests.t2_scheduler import ME, ask, ended

MakeKernel = Callable[..., Kernel]


def changed(kernel: Kernel, file: Path, text: str) -> str:
    file.write_text(text)
    old, new = kernel.config, load(file)
    reload(kernel, new)
    return story(old, new)


@pytest.mark.parametrize(
    ("key", "value", "get"),
    [
        ("limits.context_bytes", 5, lambda k: k.contexts.bytes_max),
        ("limits.request_bytes", 5, lambda k: k.config.limits.request_bytes),
        ("limits.disk_reserve_bytes", 5, lambda k: k.residency.swap._reserve_bytes),
        ("engine.host_kv_bytes", 5, lambda k: k.residency.swap.host_bytes),
        ("engine.disk_kv_bytes", 5, lambda k: k.residency.swap.disk_bytes),
        ("engine.threads", 5, lambda k: k.pool.places.engine.threads),
        ("scheduler.quantum", 5, lambda k: k.scheduler.quantum_tokens),
        ("tools.pending_s", 5, lambda k: k.approvals.pending_s),
        ("tools.output_bytes", 5, lambda k: k.sessions.output_bytes),
        ("tools.work_bytes", 5, lambda k: k.sessions.work_bytes),
        ("daemon.drain_s", 7, lambda k: k.config.daemon.drain_s),
    ],
)
def test_a_key_that_applies_at_once_does(
    make_kernel: MakeKernel, tmp_path: Path, key: str, value: int, get: Callable[[Kernel], Any]
) -> None:
    kernel = make_kernel()
    section, _, name = key.partition(".")
    assert get(kernel) != value
    said = changed(kernel, tmp_path / "new.toml", f"[{section}]\n{name} = {value}\n")
    assert get(kernel) == value
    assert key in said
    assert ("for workers that start from now on: " + key in said) == (key in BY_NEW_WORKERS)


def test_the_keys_that_wait_exist() -> None:
    assert flat(Config()).keys() >= AT_RESTART | BY_NEW_WORKERS


def test_models_come_change_and_go(make_kernel: MakeKernel, tmp_path: Path, random_llama: Path) -> None:
    kernel, file = make_kernel(), tmp_path / "new.toml"
    entry = f"[models.second]\nkeep_alive = 'always'\npath = '{random_llama}'\n"
    changed(kernel, file, entry)
    second = kernel.models.get("second")
    assert second.state is ModelState.LOADING
    assert len(kernel.pool.of(second)) == 1
    assert changed(kernel, file, entry + "replicas = 2\n") == "models.second"
    assert len(kernel.pool.of(second)) == 2
    kernel.pool.resize(second, 1)
    changed(kernel, file, entry + "replicas = 2\n[limits]\nkeep_requests = 3\n")
    assert second.replicas == 1, "what was changed by ctl stays while its entry does"
    with pytest.raises(AiosError, match="no such file or folder"):
        changed(kernel, file, "[models.second]\npath = '/nonexistent'\n")
    assert second.path == random_llama
    assert kernel.models.default == kernel.models.names()[0], "the one of the command line"
    changed(kernel, file, "")
    assert not kernel.models.find("second")


def test_the_default_model_is_always_one_that_is_there(
    make_kernel: MakeKernel, tmp_path: Path, random_llama: Path, slow_llama: Path
) -> None:
    kernel, file = make_kernel(model=None), tmp_path / "new.toml"
    assert kernel.models.default == "tiny"
    first, second = f"[models.first]\npath = '{random_llama}'\n", f"[models.second]\npath = '{slow_llama}'\n"
    for text, default in (
        (first, "first"),
        (first + second + "default = true\n", "second"),
        (first, "first"),
        (second, "second"),
        ("", "tiny"),
    ):
        changed(kernel, file, text)
        assert kernel.models.default == default
        assert kernel.models.names() == [name for name in ("first", "second") if name in text] or ["tiny"]


@pytest.mark.slow
def test_a_model_that_left_the_configuration_answers_what_it_has_and_goes(
    make_kernel: MakeKernel, tmp_path: Path, random_llama: Path, slow_llama: Path
) -> None:
    kernel, file = make_kernel(), tmp_path / "new.toml"
    kernel.start()
    entry = f"[models.second]\npath = '{slow_llama}'\n"
    changed(kernel, file, entry)
    asked = ask(kernel, '{"prompt": "x", "model": "second"}', max_tokens=300)
    changed(kernel, file, "")
    second = kernel.models.get("second")
    assert second.shown_state is ModelState.DRAINING
    with pytest.raises(NotFound, match="left the configuration"):
        kernel.names.check_model(ME, "second")
    changed(kernel, file, entry)
    kernel.names.check_model(ME, "second")
    changed(kernel, file, "")
    assert ended(asked).state is State.DONE
    kernel.model_objects.let_go()
    assert not kernel.models.find("second")
    assert not kernel.pool.of(second)


def test_a_model_that_the_configuration_takes_over_is_nobody_elses(
    make_kernel: MakeKernel, tmp_path: Path, random_llama: Path, slow_llama: Path
) -> None:
    kernel, file = make_kernel(), tmp_path / "new.toml"
    kernel.model_objects.add("second", Caller(1234, 1234, 1))
    second = kernel.models.get("second")
    kernel.model_objects.load(second, str(slow_llama))
    entry = f"[models.second]\npath = '{random_llama}'\n"
    changed(kernel, file, entry)
    assert second.path == random_llama
    assert kernel.permissions.get("/models/second") is None
    with pytest.raises(BadValue, match="in the configuration"):
        kernel.model_objects.load(second, str(slow_llama))
    changed(kernel, file, "")
    kernel.stop()
    assert not make_kernel().models.find("second"), "a restart does not bring the added one back"


def test_a_check_names_all_that_is_wrong_and_starts_nothing(tmp_path: Path, random_llama: Path) -> None:
    file = tmp_path / "aiosd.toml"
    good = f"[models.a]\npath = '{random_llama}'\ndefault = true\n"

    def checked(text: str) -> tuple[int, str]:
        file.write_text(text)
        command = [sys.executable, "-m", "aiosd", "--check", str(file)]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stderr

    assert checked(good + f"[quota.user.{pwd.getpwuid(0).pw_name}]\nagents = 3\n[quota.user.4242]\n") == (
        0,
        "",
    )
    status, said = checked(good + good.replace(".a]", ".b]") + "[quota.user.adda]\n[quota.group.staf]\n")
    assert status == 0
    for word in ("no user adda", "no group staf", "a, b all have default = true; a is"):
        assert word in said
    assert said.count("warning") == 3
    assert checked("[models.a]\npaths = 1\n") == (
        1, f"aiosd: {file}:1: a model needs a path; [models.a] path = \"/folder\"\n",
    )  # fmt: skip
    status, said = checked("[scheduler]\npolicy = 'x'\n[models.a]\npath = '/x'\n[models.b]\npath = '/y'\n")
    assert status == 1
    assert [word in said for word in ("no policy 'x'", "[models.a]: /x", "[models.b]: /y")] == [True] * 3


def test_the_tree_hides_no_files(tmp_path: Path) -> None:
    """With mount = "/etc" the whole machine would see the tree in place of its configuration."""
    file, folder = tmp_path / "aiosd.toml", tmp_path / "used"
    (folder / "sub").mkdir(parents=True)
    file.write_text(f"[daemon]\nmount = '{folder}'\n")
    for option in ("--check", "--config"):
        command = [sys.executable, "-m", "aiosd", option, str(file), "--state", str(tmp_path / "state")]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
        assert done.returncode == (1 if option == "--check" else os.EX_CONFIG)
        assert f"{folder} has files, which the tree would hide; name an empty folder" in done.stderr
    assert os.listdir(folder) == ["sub"]


def test_a_group_that_does_not_exist_lets_nobody_in(make_kernel: MakeKernel) -> None:
    """A machine may lack the default group. Any other name is a mistake."""
    for name, gid in (("nosuchgroup", 0), ("", None)):
        kernel = make_kernel(f"[daemon]\ngroup = '{name}'")
        assert kernel.group == gid
        kernel.stop()


def test_what_is_named_and_not_there_is_doubtful(tmp_path: Path) -> None:
    file = tmp_path / "aiosd.toml"
    file.write_text(
        "[daemon]\ngroup = 'nosuch'\nadmin_group = 'nosuch'\n[scheduler]\npolicies = '/nosuch/a'\n"
        "[tools]\nfolder = '/nosuch/b'\ncredentials = '/nosuch/c'\nnotify = '/nosuch/d'\n"
        "system_users = ['root', 'nosuch']\n[mcp.x]\ncommand = ['/nosuch/e']\n[mcp.y]\ncommand = ['npx']\n"
    )
    found = doubts(load(file))
    assert len(found) == 8
    for words in ("[daemon] group: this machine has no group nosuch, so only root may use",
                  "[daemon] admin_group", "[scheduler] policies: /nosuch/a is not there", "[tools] folder",
                  "[tools] credentials", "[tools] notify", "no user nosuch", "[mcp.x] command"):  # fmt: skip
        assert any(words in line for line in found), words
    assert doubts(Config()) == []


def test_a_quota_for_nobody_is_doubtful() -> None:
    assert doubts(Config(quotas={("user", "adda"): {}, ("agent", "any"): {}, ("group", "12"): {}})) == [
        "[quota.user.adda]: this machine has no user adda, so the quota is nobody's;"
        " getent passwd lists the names"
    ]

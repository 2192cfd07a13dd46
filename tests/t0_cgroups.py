"""Where calls get their control groups, on each kind of machine. Plain folders replace the kernel's."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from aiosd.host import proc, usage
from aiosd.host.usage import Spent
from aiosd.tools.run import cgroups
from aiosd.tools.run.cgroups import Cgroups, Group

KNOWN = Spent(0.25, 0)


def machine(folder: Path, mounts: dict[str, str], own: str) -> Path:
    """Make a /proc/self. `mounts`: folder → (type, options)."""
    for name in mounts:
        (folder / name).mkdir(parents=True, exist_ok=True)
    lines = (f"cgroup {folder / name} {kind} 0 0\n" for name, kind in mounts.items())
    (folder / "mounts").write_text("proc /proc proc rw 0 0\n" + "".join(lines))
    (folder / "cgroup").write_text(own)
    return folder


def made(proc: Path) -> dict[str, Path]:
    found = Cgroups()
    found.find(proc)
    return dict(found._parents)


def test_v2_is_used_at_the_root_or_where_it_was_delegated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proc = machine(tmp_path, {"v2": "cgroup2 rw"}, "0::/system.slice/aiosd.service\n")
    (tmp_path / "v2/cgroup.controllers").write_text("cpu memory pids\n")
    own = tmp_path / "v2/system.slice/aiosd.service"
    (own / "daemon").mkdir(parents=True)
    assert made(proc) == {"pids": tmp_path / "v2/aios-tools", "memory": tmp_path / "v2/aios-tools"}
    assert (tmp_path / "v2/aios-tools/cgroup.subtree_control").read_text() == "+pids +memory"
    monkeypatch.setattr(cgroups, "delegated", lambda folder: folder == own)
    assert set(made(proc).values()) == {own / "aios-tools"}
    assert (own / "daemon/cgroup.procs").read_text() == str(os.getpid())
    assert (own / "cgroup.subtree_control").read_text() == "+pids +memory"


def test_v1_is_used_below_the_own_group_where_v2_lacks_controllers(tmp_path: Path) -> None:
    mounts = {"pids": "cgroup rw,pids", "memory": "cgroup rw,memory", "v2": "cgroup2 rw"}
    proc = machine(tmp_path, mounts, "4:memory:/box\n3:cpu,cpuacct:/\n2:pids:/gone\n0::/\n")
    (tmp_path / "v2/cgroup.controllers").write_text("hugetlb\n")
    (tmp_path / "memory/box").mkdir()
    assert made(proc) == {"pids": tmp_path / "pids/aios-tools", "memory": tmp_path / "memory/box/aios-tools"}


def test_v1_counts_time_where_that_is_counted(tmp_path: Path) -> None:
    mounts = {"pids": "cgroup rw,pids", "memory": "cgroup rw,memory", "cpu": "cgroup rw,cpu,cpuacct"}
    found = made(machine(tmp_path, mounts, "4:memory:/\n3:cpu,cpuacct:/\n2:pids:/\n"))
    assert found["cpuacct"] == tmp_path / "cpu/aios-tools"
    (found["cpuacct"] / "cpuacct.usage").write_text("1500000000\n")
    (found["memory"] / "memory.max_usage_in_bytes").write_text("4096\n")
    assert Group(found).spent(KNOWN) == Spent(1.5, 4096)
    del found["cpuacct"]
    assert Group(found).spent(KNOWN) == Spent(0.25, 4096)


def test_v2_counts_time_and_newer_ones_the_most_memory(tmp_path: Path) -> None:
    group = Group({"pids": tmp_path, "memory": tmp_path})
    (tmp_path / "cpu.stat").write_text("usage_usec 2000000\nuser_usec 1\nsystem_usec 2\n")
    assert group.spent(KNOWN) == Spent(2.0, 0)
    (tmp_path / "memory.peak").write_text("8192\n")
    assert group.spent(KNOWN) == Spent(2.0, 8192)


def test_without_any_the_log_says_so_and_calls_have_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = Cgroups()
    found.find(machine(tmp_path, {}, "0::/\n"))
    assert found.make(64, 1 << 20) is None
    assert "tools run without cgroups (no cgroup v2; no cgroup v1 of pids); run the daemon" in caplog.text


def test_groups_of_daemons_that_are_gone_are_removed(tmp_path: Path) -> None:
    proc = machine(tmp_path, {"v2": "cgroup2 rw"}, "0::/\n")
    (tmp_path / "v2/cgroup.controllers").write_text("memory pids\n")
    gone, mine, other = "4194305.1", f"{os.getpid()}.1", f"{os.getppid()}.1"  # 4194305 exceeds all pids
    for name in (gone, mine, other):
        (tmp_path / "v2/aios-tools" / name).mkdir(parents=True)
    made(proc)
    there = {path.name for path in (tmp_path / "v2/aios-tools").iterdir() if path.is_dir()}
    assert there == {other}


def test_the_bounds_of_v2_are_of_all_memory(tmp_path: Path) -> None:
    for name in ("memory.max", "memory.swap.max", "memory.events"):
        (tmp_path / name).write_text("max\n")
    group = Group({"pids": tmp_path, "memory": tmp_path})
    group.limit(66, 1 << 20)
    found = {name: (tmp_path / name).read_text() for name in ("pids.max", "memory.max", "memory.swap.max")}
    assert found == {"pids.max": "66", "memory.max": "1048576", "memory.swap.max": "0"}
    (tmp_path / "memory.events").write_text("low 0\noom 3\noom_kill 0\noom_group_kill 0\n")
    assert not group.out_of_memory()
    (tmp_path / "memory.events").write_text("low 0\noom 3\noom_kill 1\noom_group_kill 0\n")
    assert group.out_of_memory()


@pytest.mark.parametrize(
    ("kind", "own"), [("cgroup2 rw", "0::/a/b\n"), ("cgroup rw,pids", "3:cpu:/\n2:pids:/a/b\n")]
)
def test_the_tasks_that_the_groups_of_the_daemon_allow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, own: str
) -> None:
    monkeypatch.setattr(proc, "SELF", machine(tmp_path, {"groups": kind}, own))
    assert usage.tasks_most() == math.inf
    for folder, most in (("a/b", "max"), ("a", "700"), (".", "900")):
        (tmp_path / "groups" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / folder / "pids.max").write_text(most + "\n")
    assert usage.tasks_most() == 700

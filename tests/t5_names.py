"""Names that are not plain ASCII, on the real mount: of foreign mounts, of the mount itself, of processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aiosd.host.mount import is_mounted
from tests.running import REPOSITORY, Daemon, Manager, managed, wait_until
from tests.t0_host import NAMES
from tests.t5_faults import run_aiosd

pytestmark = [pytest.mark.mount, pytest.mark.root]
MakeDaemon = Callable[..., Daemon]
LATIN1 = os.fsdecode(b"caf\xe9")
ODD = ("Zoë 日本", "new\nline", "back\\slash\\040", "😀 ")  # as TOML can say them too
SHOWS = """
name = "shows"
description = "Shows what of /aios it sees"
command = ["/bin/sh", "-c", "cat /aios/version"]
[parameters]
type = "object"
"""


@pytest.fixture(autouse=True)
def passable(tmp_path: Path) -> None:
    """The daemon may be a user of its own."""
    for parent in [tmp_path, *tmp_path.parents][:3]:
        parent.chmod(0o755)


@pytest.fixture
def foreign(tmp_path: Path) -> Iterator[list[Path]]:
    """Mounts of each kind of name, as a user may make them with FUSE."""
    folders = [tmp_path / "foreign" / os.fsdecode(name) for name in NAMES]
    for folder in folders:
        folder.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "none", folder], check=True)
    yield folders
    for folder in folders:
        subprocess.run(["umount", "-l", folder], check=True)


def tools(daemon: Daemon, folder: Path) -> None:
    """With a tool that shows /aios."""
    place = folder / "tools/shows"
    place.mkdir(parents=True)
    (place / "tool.toml").write_text(SHOWS)
    daemon._config.write_text(f"[tools]\nfolder = {json.dumps(str(place.parent))}\n")


def calls(daemon: Daemon) -> None:
    done = daemon.sh("exec 3<>tools/shows/call; echo '{}' >&3; cat <&3; exec 3>&-; exec 3<>tools/calc/call; "
                     """echo '{"expression": "6*7"}' >&3; cat <&3""")  # fmt: skip
    assert (done.stdout, done.stderr) == (daemon.read("version") + "42\n", "")


def test_foreign_mounts_of_any_name_are_nobody_elses_business(
    make_daemon: MakeDaemon,
    manager: Manager,
    foreign: list[Path],
    tmp_path: Path,
) -> None:
    for folder in foreign:
        assert is_mounted(folder)
        (folder / "in").mkdir()
        assert not is_mounted(folder / "in")
    daemon = managed(make_daemon(), watchdog_s=1)
    tools(daemon, tmp_path)
    daemon.start(ready=False)
    calls(daemon)
    fed = manager.count("WATCHDOG")
    wait_until(lambda: manager.count("WATCHDOG") >= fed + 2, "the watchdog")
    daemon.kill()
    daemon.start(ready=False)
    calls(daemon)
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.log.read_text()


@pytest.mark.parametrize("name", [*ODD, LATIN1])
def test_the_mount_and_the_state_have_any_name(
    name: str,
    make_daemon: MakeDaemon,
    manager: Manager,
    tmp_path: Path,
) -> None:
    daemon = make_daemon(state=tmp_path / name / "state")
    if daemon.helped and name == LATIN1:
        pytest.skip("the file of its configuration is UTF-8")
    managed(daemon, watchdog_s=1)
    daemon.root = tmp_path / name / name
    daemon.root.mkdir(parents=True)
    tools(daemon, tmp_path)
    daemon.start(ready=False)
    daemon.kill()
    daemon.start(ready=False)
    calls(daemon)
    second = run_aiosd("--mount", daemon.root, "--state", tmp_path / "other")
    assert daemon.process is not None
    assert (second.returncode, f"pid {daemon.process.pid}" in second.stderr) == (1, True)
    fed = manager.count("WATCHDOG")
    wait_until(lambda: manager.count("WATCHDOG") >= fed + 2, "the watchdog")
    unread = [f for f in everything(daemon.root) if f.name not in ("events.jsonl", "new", "decision")]
    for file in unread:
        file.read_bytes()
    assert daemon.stop() == 0
    assert daemon.helped or not is_mounted(daemon.root)
    assert "Traceback" not in daemon.log.read_text()


def everything(root: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(root):
        for name in names:
            if (file := Path(folder, name)).stat().st_mode & 0o400 and name not in (
                "llm",
                "embed",
                "tokenize",
            ):
                yield file


def test_a_process_has_any_name_and_so_has_its_program(aios: Daemon, tmp_path: Path) -> None:
    program = tmp_path / LATIN1
    shutil.copy("/bin/bash", program)
    script = (
        r"printf '\351) Z 1 (' > /proc/$$/comm; mkdir agents/named && echo $$ > agents/named/pid && "
        """exec 3<>tools/calc/call && echo '{"expression": "6*7"}' >&3 && cat <&3 && echo here"""
    )
    done = subprocess.run([program, "-c", script], cwd=aios.root, capture_output=True)
    assert (done.stdout, done.stderr) == (b"42\nhere\n", b"")
    wait_until(lambda: not (aios.root / "agents/named").exists(), "the agent's end")
    if not aios.helped:  # else not the daemon's to see
        lines = (aios.state / "audit.jsonl").read_bytes().splitlines()
        assert any(json.loads(line).get("exe") == str(program) for line in lines)


def test_a_model_of_no_utf8_is_refused_in_words(aios: Daemon, tmp_path: Path) -> None:
    model = tmp_path / LATIN1
    model.mkdir()
    (model / "config.json").touch()
    command = [sys.executable, "-m", "aiosd.cli.aiosctl", "--mount", str(aios.root), "model", "add"]
    done = subprocess.run([*command, str(model), "--name", "odd"], cwd=REPOSITORY, capture_output=True)
    assert (done.returncode, b"Traceback" in done.stderr) == (1, False), done.stderr
    second = run_aiosd("--mount", tmp_path / "mount", "--model", model)
    assert (second.returncode, "not UTF-8" in second.stderr) == (1, True), second.stderr

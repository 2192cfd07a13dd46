"""The listings of aiosctl over a real tree: a table, JSON, names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from aiosd.cli.pulled import quantization
from tests.running import REPOSITORY, Daemon, wait_until

pytestmark = pytest.mark.mount


def aiosctl(daemon: Daemon, *words: str) -> str:
    command = [sys.executable, "-m", "aiosd.cli.aiosctl", "--mount", str(daemon.root), *words]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_each_listing_is_a_table_json_or_names(aios: Daemon, agent: str) -> None:
    name = agent.removeprefix("agents/")
    aios.write(f"{agent}/ctl", "pause")
    aios.write(f"{agent}/syscall/llm", "Hello")
    with pytest.raises(OSError):
        aios.write(f"{agent}/nice", "many")
    aios.write("tools/shell/call", '{"command": "true"}')
    wait_until(lambda: bool(os.listdir(aios.root / "access/pending")), "a call that waits")
    (asked,) = os.listdir(aios.root / "access/pending")
    request = os.readlink(aios.root / agent / "requests/latest")
    listings: dict[str, tuple[str, dict[str, Any]]] = {
        "queue": ("id", {"id": int(request), "agent": name, "state": "queued", "worker": None}),
        "agents": ("name", {"name": name, "state": "paused", "requests": 0, "completion_tokens": 0}),
        "models": ("name", {"name": "tiny", "state": "ready"}),
        f"log {name}": ("file", {"file": "nice"}),
        "policy": ("name", {"name": "fair", "state": "in force"}),
        "tools": ("name", {"name": "calc"}),
        "access": ("id", {"id": int(asked), "tool": "shell", "arguments": {"command": "true"}}),
    }
    for command, (key, expected) in listings.items():
        table = aiosctl(aios, *command.split()).splitlines()
        assert table[0].split()[0] == key.upper(), command
        bare = aiosctl(aios, *command.split(), "--no-legend").splitlines()
        assert [line.split()[0] for line in bare] == [line.split()[0] for line in table[1:]], command
        rows = json.loads(aiosctl(aios, *command.split(), "--json"))
        row = next(row for row in rows if row[key] == expected[key])
        assert {k: row[k] for k in expected} == expected, command
        names = aiosctl(aios, *command.split(), "-q").splitlines()
        assert names == [str(row[key]) for row in rows], command
    aios.write(f"access/pending/{asked}/decision", "deny")


def test_ls_says_how_the_weights_are_stored() -> None:
    assert quantization({"quantization": "Q4_1", "dtype": "float32"}) == "Q4_1"
    assert quantization({"quantization": "none", "dtype": "float32"}) == "float32"
    assert quantization({}) == ""


def test_the_status_is_one_object(aios: Daemon) -> None:
    said = json.loads(aiosctl(aios, "status", "--json"))
    assert (said["state"], said["models_ready"], said["pid"]) == ("running", ["tiny"], said["pid"])
    assert aiosctl(aios, "status", "--quiet") == "running\n"
    assert "NAME" not in aiosctl(aios, "status", "--no-legend")


def test_a_table_has_no_control_characters_of_an_object(aios: Daemon) -> None:
    folder = aios.root / "tools" / "hostile"
    folder.mkdir()
    try:
        (folder / "manifest").write_text(
            'description = "red \\u001b[31m and\\u009b31m"\ncommand = ["true"]\n'
            '[parameters]\ntype = "object"\n'
        )
        line = next(line for line in aiosctl(aios, "tools").splitlines() if line.startswith("hostile"))
        assert line.endswith(r"red \x1b[31m and\x9b31m")
    finally:
        folder.rmdir()


def test_a_listing_of_nothing_is_empty_and_no_error(aios: Daemon) -> None:
    assert aiosctl(aios, "access") == ""
    assert json.loads(aiosctl(aios, "access", "--json")) == []

"""The configuration: defaults, drop-ins, and errors that name file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiosd.config.config import load
from aiosd.errors import ConfigError


def write(folder: Path, text: str) -> Path:
    file = folder / "aiosd.toml"
    file.write_text(text)
    return file


def test_every_key_has_a_default(tmp_path: Path) -> None:
    config = load(write(tmp_path, ""))
    assert config.scheduler.policy == "fair"
    assert config.limits.request_bytes == 4 << 20


def test_drop_ins_win_in_name_order(tmp_path: Path) -> None:
    file = write(tmp_path, "[scheduler]\nquantum = 1\n[models.a]\npath = '/a'\n")
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d/20.toml").write_text("[scheduler]\nquantum = 3\n")
    (tmp_path / "conf.d/10.toml").write_text("[scheduler]\nquantum = 2\n[models.b]\npath = '/b'\n")
    config = load(file)
    assert config.scheduler.quantum == 3
    assert set(config.models) == {"a", "b"}


def test_grants_of_a_later_file_replace_those_of_the_same_tool(tmp_path: Path) -> None:
    file = write(tmp_path, "[tools.network]\na = ['x:1']\nb = ['x:2']\n[tools]\nwork_bytes = 5\n")
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d/10.toml").write_text("[tools.network]\nb = ['y:3', 'z:4']\n")
    tools = load(file).tools
    assert tools.network == {"a": ("x:1",), "b": ("y:3", "z:4")}
    assert tools.work_bytes == 5


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("[limits]\n\nrequest_byte = 1\n", 3, "unknown key 'request_byte'"),
        ("[limit]\n", 1, r"unknown section \[limit\]"),
        ("[engine]\nthreads = 'two'\n", 2, "threads must be a whole number"),
        ("[engine]\nthreads = true\n", 2, "threads must be a whole number"),
        ("[engine]\nkv_bytes = 0\n", 2, "must be at least 1"),
        ("[daemon]\nmount = 'aios'\n", 2, "mount must be an absolute path"),
        ("[tools]\nnotify = 'notify'\n", 2, "notify must be an absolute path"),
        ("[models.a]\nreplicas = 2\n", 1, "needs a path"),
        ("[models.a]\npath = '/a'\nreplica = 2\n", 3, "unknown key 'replica'"),
        ("[daemon]\nlog_level = 'loud'\n", 2, "must be one of debug"),
        ("[quota]\nuser = 3\n", 2, r"write \[quota.user.NAME\]"),
        ("[quota]\n[quota.user.ada]\nqueue = 1\n", 3, "unknown key 'queue'"),
        ("[quota.group.staff]\nkv_bytes = -1\n", 2, "must be at least 0"),
        ("[quota.agent.ada]\nqueued_requests = 1\nkv_bytes = 1\n", 3, "an agent has no kv_bytes"),
        ("[mcp.a]\ncommand = 'x'\n", 2, "command: 'x' is not of type 'array'"),
        ("[mcp.a]\ncommand = ['x']\nport = 1\n", 3, "port"),
        ("[mcp.a]\ntimeout_s = 3\n", 1, "either a command or a url"),
        ("[mcp.a]\nurl = 'http://x:70000/mcp'\n", 1, "Port out of range"),
        ("[mcp.a]\nurl = 'http://x/mcp'\nread = ['/etc']\n", 1, "of a server with a command"),
        ("[mcp.a]\ncommand = ['x']\nheaders = {a = 'b'}\n", 1, "headers is of a server with a url"),
        ("[mcp.a]\nurl = 'http://x/'\nheaders = {a = '${k}'}\n", 1, "credential 'k', which"),
        ("[mcp.a]\nurl = 'http://x/'\nheaders = {'a b' = 'c'}\n", 3, "does not match"),
        ("[mcp.a]\ncommand = ['x']\ncredentials = ['../k']\n", 3, "does not match"),
        ("[mcp.a]\ncommand = ['x']\nstart_s = 0\n", 3, "start_s"),
        ("[mcp.\"a b\"]\nurl = 'http://x/mcp'\n", 1, "a server's name must be"),
        ("scheduler = 5\n", 1, "is a section"),
        ("[tools]\nnetwork = ['a:1']\n", 2, r"write \[tools.network\]"),
        ("[tools.network]\nhttp_get = 'a:1'\n", 2, "must be a list"),
        ("[tools.network]\nhttp_get = ['a:1', '*:443']\n", 2, r"'\*:443' is not a grant; write host:port"),
    ],
)
def test_an_error_names_file_and_line(tmp_path: Path, text: str, line: int, reason: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError, match=reason) as caught:
        load(file)
    assert f"{file}:{line}:" in str(caught.value)


def test_broken_toml_names_file_and_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"aiosd.toml: .*line 2"):
        load(write(tmp_path, "[limits]\n= 5\n"))


def test_a_named_file_has_to_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "none.toml")

"""API keys on the real mount by real users: making, seeing, checking, revoking, by files and by aiosctl."""

from __future__ import annotations

import errno
import json
import os
import pwd
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from tests.running import REPOSITORY, Daemon, open_to_all

pytestmark = [pytest.mark.mount, pytest.mark.root]
USERS, ADMINS = "games", "operator"  # groups of Debian, for aios and aios-admin
CONFIG = f"[daemon]\ngroup = '{USERS}'\nadmin_group = '{ADMINS}'\n[quota]\nwriting_ms_per_minute = 0\n"
ASK = """ask() { exec 3<>"$1" && echo "$2" >&3 && cat <&3; }\n"""
AIOSCTL = """
import os, sys
from aiosd.cli.aiosctl import main
uid, groups = int(sys.argv.pop(1)), [int(gid) for gid in sys.argv.pop(1).split(",") if gid]
os.setgroups(groups)
os.setresgid(uid, uid, uid)
os.setresuid(uid, uid, uid)
sys.exit(main())
"""
MakeDaemon = Callable[..., Daemon]


def gid(group: str) -> str:
    done = subprocess.run(["getent", "group", group], capture_output=True, text=True, check=True)
    return done.stdout.split(":")[2]


def as_user(daemon: Daemon, name: str, script: str, *groups: str) -> subprocess.CompletedProcess[str]:
    uid = pwd.getpwnam(name).pw_uid
    more = [f"--groups={','.join(groups)}"] if groups else ["--clear-groups"]
    command = ["setpriv", f"--reuid={uid}", f"--regid={uid}", *more, "bash", "-c", ASK + script]
    return subprocess.run(command, cwd=daemon.root, capture_output=True, text=True, timeout=60)


def aiosctl(
    daemon: Daemon, name: str, *words: str, groups: tuple[str, ...] = (USERS,)
) -> subprocess.CompletedProcess[str]:
    """The python of the tests may be root's alone, so it is started as root."""
    uid, gids = str(pwd.getpwnam(name).pw_uid), ",".join(map(gid, groups))
    return subprocess.run(
        [sys.executable, "-c", AIOSCTL, uid, gids, *words], cwd=REPOSITORY, capture_output=True, text=True,
        env={**os.environ, "AIOS": str(daemon.root)}, timeout=60,
    )  # fmt: skip


@pytest.fixture
def daemon(make_daemon: MakeDaemon) -> Daemon:
    daemon = make_daemon(CONFIG)
    daemon.system_users += ("man",)
    open_to_all(daemon.root.parent)
    return daemon.start()


def made(daemon: Daemon, name: str, *words: str) -> str:
    done = aiosctl(daemon, name, "key", "new", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def checks(daemon: Daemon, key: str, user: str = "nobody") -> bool:
    return as_user(daemon, user, f"ask keys/check {key}").returncode == 0


def test_the_life_of_a_key(daemon: Daemon) -> None:
    """Made by one user, seen and revoked by none but him and administrators, and it outlives kill -9."""
    key = made(daemon, "man", "laptop", "--expires", "30d", "--tokens-per-day", "5")
    other = made(daemon, "lp")
    id = key.split("-")[1]
    said = json.loads(as_user(daemon, "nobody", f"ask keys/check {key}").stdout)
    assert (said["user"], said["tokens_per_day"]) == ("man", 5)
    daemon.kill()
    daemon.start()
    assert checks(daemon, key), "after kill -9"
    listed = json.loads(aiosctl(daemon, "man", "key", "list", "--json").stdout)
    assert [(row["id"], row["name"]) for row in listed] == [(id, "laptop")]
    assert aiosctl(daemon, "man", "key", "list", "-q").stdout == f"{id}\n"
    titles = aiosctl(daemon, "man", "key", "list").stdout.splitlines()[0].split()
    assert titles == ["ID", "NAME", "USER", "AGENT", "TOKENS_PER_DAY", "EXPIRES", "LAST_USED"]
    assert len(aiosctl(daemon, "man", "key", "list", "--no-legend").stdout.splitlines()) == 1
    assert as_user(daemon, "lp", f"cat keys/{id}/info.json").returncode != 0
    for name, groups in (("lp", (USERS,)), ("nobody", ())):
        assert aiosctl(daemon, name, "key", "revoke", id, groups=groups).returncode == 1
    assert checks(daemon, key)
    both = aiosctl(daemon, "mail", "key", "list", "-q", groups=(ADMINS,)).stdout.split()
    assert both == sorted([id, other.split("-")[1]])
    assert aiosctl(daemon, "man", "key", "revoke", id, groups=()).returncode == 0, "he left the group"
    assert not checks(daemon, key)
    assert aiosctl(daemon, "mail", "key", "revoke", other.split("-")[1], groups=(ADMINS,)).returncode == 0
    assert not checks(daemon, other)
    missing = aiosctl(daemon, "man", "key", "revoke", id)
    assert (missing.returncode, missing.stderr) == (
        1,
        f"aiosctl: no key {id}; aiosctl key list shows yours\n",
    )


def test_only_the_group_makes_keys_and_everybody_is_told_why(daemon: Daemon) -> None:
    assert "ermission denied" in as_user(daemon, "nobody", "ask keys/new x").stderr
    refused = aiosctl(daemon, "root", "key", "new")
    assert "nobody acts as root by a key" in refused.stderr
    assert "no agent nothing" in aiosctl(daemon, "man", "key", "new", "--agent", "nothing").stderr
    assert "is in the past" in aiosctl(daemon, "man", "key", "new", "--expires", "2001-01-01").stderr
    assert aiosctl(daemon, "man", "key", "revoke", "../agents/x").stderr.startswith(
        "aiosctl: ../agents/x is not"
    )
    wrote = as_user(daemon, "man", "echo x > keys/new", gid(USERS))
    assert "Operation not permitted" in wrote.stderr
    assert as_user(daemon, "man", "ls keys").stdout == "check\nnew\n"


def test_the_write_of_a_wrong_key_is_eacces_and_a_user_cannot_give_his_key_away(daemon: Daemon) -> None:
    key = made(daemon, "man")
    id = key.split("-")[1]
    with (daemon.root / "keys/check").open("r+b", buffering=0) as file:
        with pytest.raises(PermissionError) as refused:
            file.write(key.encode()[:-1] + b"x")
        assert refused.value.errno == errno.EACCES
        file.write(key.encode())
        assert json.loads(file.read(4096))["id"] == id
    for script in (f"chmod 777 keys/{id}", f"chown lp keys/{id}", f"chmod 666 keys/{id}/info.json"):
        assert "Operation not permitted" in as_user(daemon, "man", script).stderr, script
        assert "Operation not permitted" in daemon.sh(script).stderr, script
    assert daemon.sh("chgrp staff keys/new && chmod 620 keys/check").returncode == 0


def test_a_tool_sees_no_keys_and_makes_none(daemon: Daemon) -> None:
    made(daemon, "man")
    command = "cd /aios; ls keys; (: 3<>keys/new); mkdir keys/a; ls -d /aios/keys"
    call = json.dumps({"name": "shell", "arguments": {"command": command}})
    allow = "mkdir agents/x && echo shell > access/allowed/x/tools"
    done = as_user(daemon, "man", f"{allow} && ask agents/x/syscall/tool '{call}'", gid(USERS))
    assert "/aios/keys" in done.stdout, done.stderr
    assert "check" not in done.stdout
    assert "Read-only file system" in done.stdout
    assert "keys/a" not in as_user(daemon, "man", "ls -d keys/*").stdout


def test_user_remove_ends_the_keys_also_when_another_gets_the_objects(daemon: Daemon) -> None:
    key = made(daemon, "man")
    done = aiosctl(daemon, "root", "user", "remove", "man", "--to", "lp", groups=())
    assert done.stdout == f"keys/{key.split('-')[1]}: removed\n", done.stderr
    assert not checks(daemon, key)


@pytest.mark.slow
def test_a_flood_of_wrong_keys_costs_little_and_writes_one_audit_line(daemon: Daemon) -> None:
    """The others' checks go on meanwhile."""
    key, wrong = made(daemon, "man"), b"aios-" + b"0" * 12 + b"-" + b"1" * 64
    began_s, tried = time.monotonic(), 2000
    with (daemon.root / "keys/check").open("r+b", buffering=0) as file:
        for _ in range(tried):
            with pytest.raises(PermissionError):
                file.write(wrong)
    print(f"{(time.monotonic() - began_s) / tried * 1e6:.0f} us for a wrong key")
    assert checks(daemon, key)
    lines = daemon.read("access/audit.jsonl").splitlines()
    assert len([line for line in lines if json.loads(line)["what"] == "key refused"]) == 1
    assert subprocess.run(
        [sys.executable, "-m", "aiosd.cli.aiosctl", "audit", "verify", str(daemon.state / "audit.jsonl")],
        cwd=REPOSITORY, timeout=60,
    ).returncode == 0  # fmt: skip

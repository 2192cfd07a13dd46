"""A uid that belongs to another person now (userdel, useradd): the new one finds nothing of the former.

Each scenario is a process with a passwd file of its own, bound over /etc/passwd in a mount namespace.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from aiosd.host import accounts
from tests.running import REPOSITORY, Daemon, open_to_all, wait_until
from tests.t5_mcp import SERVER, python, table
from tests.t5_requests import aiosctl
from tests.t5_users import as_user

pytestmark = [pytest.mark.mount, pytest.mark.root]
UID, CAROL = 61001, 61003  # UID is alice's, and later bob's
CALL = 'echo \'{"command": "true"}\' > tools/shell/call'  # it waits for a decision
OF_AGENT = '{"name": "shell", "arguments": {"command": "echo hers > /work/file"}}'
TOOL = 'description = "t"\ncommand = ["/bin/true"]\nparameters.type = "object"'
MAKE = f"""
set -e; umask 0; mkdir agents/a contexts/c tools/t; chmod 755 agents/a contexts/c tools/t
echo secret > agents/a/system; chmod 666 agents/a/system agents/a/syscall/llm; echo c > agents/a/context
echo '{{"role":"user","content":"secret"}}' > contexts/c/messages.jsonl; chmod 666 contexts/c/messages.jsonl
echo '{TOOL}' > tools/t/manifest; echo carol > access/owners
echo 'Repeat: mango' > models/tiny/llm; cat models/tiny/llm
echo '{OF_AGENT}' > agents/a/syscall/tool
id=$(ls access/pending); echo allow > access/pending/$id/decision; cat agents/a/syscall/tool
{CALL}; echo pause > agents/a/ctl; echo 'Repeat: fig' > agents/a/syscall/llm
"""
MODEL = REPOSITORY / "models/tiny"


def passwd(**users: int) -> None:
    lines = [f"{name}:x:{uid}:{uid}::/:/bin/sh\n" for name, uid in users.items()]
    Path(accounts.PASSWD).write_text("root:x:0:0::/root:/bin/sh\n" + "".join(lines))


def as_uid(daemon: Daemon, script: str) -> str:
    """What the script prints as UID; an error of it is printed too."""
    done = as_user(daemon, UID, script)
    return done.stdout + done.stderr


def carry(daemon: Daemon) -> list[int]:
    """Let alice make what there is to inherit. Return her unfinished requests."""
    passwd(alice=UID, carol=CAROL)
    assert as_user(daemon, CAROL, "echo alice > access/owners; cat access/owners").stdout == "alice\n"
    done = as_user(daemon, UID, MAKE)
    assert (done.returncode, done.stdout) == (0, "mango\n"), done.stderr
    key = as_user(daemon, UID, "exec 3<>keys/new; echo hers >&3; cat <&3").stdout
    daemon.root.with_name("key").write_text(json.loads(key)["key"])
    return [int(line.split()[0]) for line in daemon.read("scheduler/queue").splitlines()[1:]]


def roots_mode(path: Path) -> int | None:
    """The kernel may show an old one for a second."""
    at = path.stat()
    return None if at.st_uid else at.st_mode & 0o777


def check_inherited(daemon: Daemon, unfinished: list[int]) -> None:
    """What holds after bob's first call, whatever it was."""
    for path in ("agents/a/system", "contexts/c/messages.jsonl", "tools/t/manifest"):
        assert "ermission denied" in as_uid(daemon, f"cat {path}"), path
    assert "ermi" in as_uid(daemon, "echo hello > agents/a/syscall/llm")
    assert as_uid(daemon, "cat access/owners") == "\n"
    assert "mango" not in as_uid(daemon, "cat models/tiny/llm"), "her last answer there"
    assert as_user(daemon, CAROL, "cat access/owners").stdout == "\n"
    modes = {"agents/a": 0o700, "contexts/c": 0o700, "tools/t": 0o600, "agents/a/system": 0o644}
    assert json.loads(daemon.read("tools/t/info"))["description"] == "t"
    wait_until(lambda: modes == {path: roots_mode(daemon.root / path) for path in modes}, f"{modes}")
    assert daemon.read("agents/a/system") == "secret\n", "root reads it"
    assert daemon.read("agents/a/state") == "paused\n"
    called = daemon.sh("echo '{}' > tools/t/call").stderr
    assert "ermission denied" in called, f"it would run as root: {called}"
    assert os.listdir(daemon.root / "requests") == []
    assert sorted(os.listdir(daemon.root / "keys")) == ["check", "new"]
    with pytest.raises(PermissionError), (daemon.root / "keys/check").open("r+b", buffering=0) as file:
        file.write(daemon.root.with_name("key").read_bytes())
    why = f"its user alice was removed: user {UID} is bob by now\n"
    for id in unfinished:
        assert daemon.read(f"requests/{id}/state") == "cancelled\n"
        assert daemon.read(f"requests/{id}/error") == why
        assert "ermission denied" in as_uid(daemon, f"cat requests/{id}/request")
    [aside] = daemon.work.glob(f"{UID}.*")
    assert (aside.stat().st_uid, aside.stat().st_mode & 0o777) == (0, 0o700)
    assert [file.read_text() for file in aside.glob("*/file")] == ["hers\n"]
    daemon.says(f"user {UID} is bob and was alice")


def check_bobs(daemon: Daemon) -> None:
    """What bob makes is his, and stays so."""
    ask = "echo 'Repeat: fig' > agents/b/syscall/llm; cat agents/b/syscall/llm"
    assert as_uid(daemon, f"mkdir agents/b agents/more && {ask}") == "fig\n", "with no quota of alice's"
    daemon.kill()
    daemon.start()
    assert as_uid(daemon, "cat agents/b/syscall/llm") == "fig\n"
    assert "ermission denied" in as_uid(daemon, "cat agents/a/system")


def inherit(daemon: Daemon) -> None:
    unfinished = carry(daemon)
    assert len(unfinished) == 2
    events = (daemon.root / "events.jsonl").open("rb", buffering=0)
    passwd(carol=CAROL)
    assert "secret\n" in as_uid(daemon, "cat agents/a/system"), "a missing name says nothing"
    passwd(bob=UID, carol=CAROL)
    assert "ermission denied" in as_uid(daemon, "cat agents/a/system"), (
        "at once, whatever the kernel remembers"
    )
    if daemon.helped:  # aios-privileged sees it by itself, when bob calls a tool
        as_uid(daemon, "echo '{}' > tools/clock/call; cat tools/clock/call")
    check_inherited(daemon, unfinished)
    with events:
        told = [json.loads(line) for line in events.read(65536).splitlines()]
    seen = [(one["account"], one["name"], one["before"]) for one in told if one["event"] == "account"]
    assert seen == [(UID, "bob", "alice")]
    check_bobs(daemon)


def remove_first(daemon: Daemon) -> None:
    """rmdir is checked by the kernel, with what it remembers of the owner."""
    unfinished = carry(daemon)
    as_uid(daemon, "ls -lR agents contexts tools/t")
    passwd(bob=UID, carol=CAROL)
    assert "ermi" in as_uid(daemon, "rmdir agents/a contexts/c tools/t")
    for path in ("agents/a", "contexts/c", "tools/t"):
        assert path.rpartition("/")[2] in os.listdir(daemon.root / path.partition("/")[0])
    for script in ("chmod 777 agents/a", "cd agents/a && ls", "echo x > contexts/c/messages.jsonl"):
        assert "ermi" in as_uid(daemon, script)
    assert all(daemon.read(f"requests/{id}/state") == "cancelled\n" for id in unfinished)


def replaced_while_down(daemon: Daemon) -> None:
    unfinished = carry(daemon)
    daemon.kill()
    passwd(bob=UID, carol=CAROL)
    daemon.start()
    assert "ermi" in as_uid(daemon, "rmdir agents/a")
    if daemon.helped:
        as_uid(daemon, "echo '{}' > tools/clock/call; cat tools/clock/call")
    check_inherited(daemon, unfinished)


def call_after(daemon: Daemon) -> None:
    """A call that alice left behind does not run as bob, even if he has made no call yet."""
    passwd(alice=UID)
    assert as_uid(daemon, f"{CALL}; {CALL}") == ""
    first, second = sorted(os.listdir(daemon.root / "access/pending"), key=int)
    passwd(bob=UID)
    daemon.write(f"access/pending/{second}/decision", "allow\n")
    wait_until(lambda: daemon.read(f"requests/{second}/state") == "failed\n", "the end of the call")
    assert daemon.read(f"requests/{second}/error") == f"its user was removed: {UID} is another one by now\n"
    assert daemon.read(f"requests/{first}/state").startswith("queued")


def end_sessions(daemon: Daemon) -> None:
    """An MCP server's process and the folder where it keeps things are not the next account's."""
    passwd(alice=UID)
    call = "exec 3<>tools/proof.{}/call; echo '{}' >&3 && cat <&3"
    keep, who = (call.format("keep", '{{"text": "{}"}}'), call.format("who", "{{}}"))
    wait_until(lambda: "proof.who" in os.listdir(daemon.root / "tools"), "the tools of the server")
    assert as_uid(daemon, keep.format("hers")) == "hers\n"
    hers = as_uid(daemon, who.format())
    assert as_uid(daemon, who.format()) == hers, "one process"
    passwd(bob=UID)
    assert as_uid(daemon, keep.format("his")) == "his\n"
    assert as_uid(daemon, who.format()) != hers


def removed_in_time(daemon: Daemon) -> None:
    first, second = carry(daemon)
    [key] = {*os.listdir(daemon.root / "keys")} - {"new", "check"}
    for refused in (["root"], ["nobody-there"], [f"{UID}", "--to", "nobody-there"]):
        assert aiosctl(daemon, 0, "user", "remove", *refused).returncode == 1
    assert "only root" in aiosctl(daemon, UID, "user", "remove", "carol").stderr
    daemon.root.joinpath("models/tiny").chmod(0o750)
    os.chown(daemon.root / "models/tiny", UID, 0)
    done = aiosctl(daemon, 0, "user", "remove", "alice", "--to", "carol")
    assert done.stdout.splitlines() == [
        f"request {first}: cancelled", f"request {second}: cancelled", f"keys/{key}: removed",
        "agents/a: given to carol",
        "contexts/c: given to carol", "tools/t: given to carol", "models/tiny: given to carol",
    ], done.stderr  # fmt: skip
    for path in ("agents/a/system", "contexts/c/messages.jsonl"):  # their modes were changed before
        assert "secret" in as_user(daemon, CAROL, f"cat {path}").stdout
    assert aiosctl(daemon, 0, "user", "remove", "alice").stdout == "user alice has nothing here\n"
    done = aiosctl(daemon, 0, "user", "remove", str(CAROL))
    assert done.stdout.splitlines() == [
        "agents/a: removed", "contexts/c: removed", "tools/t: removed", "models/tiny: given back to root",
    ], done.stderr  # fmt: skip
    assert os.listdir(daemon.root / "agents") == []


ALL = (inherit, remove_first, replaced_while_down, call_after, end_sessions, removed_in_time)
SCENARIOS = {one.__name__: one for one in ALL}


@pytest.mark.parametrize("helped", [False, True])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_new_account_of_a_uid_finds_nothing_of_the_former(
    tmp_path: Path, scenario: str, helped: bool
) -> None:
    own = tmp_path / "passwd"
    own.write_text("")
    script = 'mount --bind "$1" /etc/passwd && shift && exec "$@"'
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", own,
         sys.executable, "-m", "tests.t5_accounts", scenario, tmp_path / "daemon"],
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120,
        env={**{k: v for k, v in os.environ.items() if k != "HELPED"}, **({"HELPED": "1"} if helped else {})},
    )  # fmt: skip
    log = tmp_path / "daemon/log"
    assert done.returncode == 0, done.stdout + (log.read_text() if log.exists() else "")


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    passwd(alice=UID, carol=CAROL)
    folder.mkdir()
    open_to_all(folder)
    config = "[quota.user.alice]\nagents = 1\n"
    if sys.argv[1] == "end_sessions":
        config += table("proof", [*python(), str(SERVER), str(folder)], read=[str(SERVER.parent)])
    daemon = Daemon(folder, MODEL, config)
    try:
        SCENARIOS[sys.argv[1]](daemon.start())
    finally:
        daemon.clean()

"""A daemon that was taken over, against the real aios-privileged: one test for each sentence of aiosd(8).

The attacker (tests/attacker.py) runs as the daemon's user, without a capability, and has the daemon's socket.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from aiosd.tools.run.runner import CALLS_MOST
from tests.running import DAEMON, PATHS, PYTHON, SETPRIV, Daemon, open_to_all, wait_until
from tests.t5_privileged import needs_python

pytestmark = [pytest.mark.mount, pytest.mark.root, pytest.mark.slow]
PATIENCE_S = 60.0
ALICE, BOB, STAFF = 60511, 60512, 60599
KEYED = """
name = "keyed"
description = "has a key"
command = ["./run"]
parameters = { type = "object" }
credentials = ["token"]
"""
OWN: dict[str, Any] = {"env": {}, "timeout_s": 30.0, "cpu_s": 30, "memory_bytes": 1 << 28}


class Attacker:
    def __init__(self, folder: Path, target: Path | None = None) -> None:
        command = [*SETPRIV, PYTHON, "-IS", str(folder / "attacker.py"), str(folder / "privileged")]
        self._process = subprocess.Popen(
            [*command, *([str(target)] if target else [])],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        self.hear("Mounted")

    def say(self, kind: str, *, with_: dict[str, Any] | None = None, **facts: Any) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"say": {"is": kind, **facts}, **(with_ or {})}) + "\n")

    def say_text(self, text: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"say": text}) + "\n")

    def hear(self, kind: str) -> dict[str, Any]:
        """The next message of that kind, or the end; with all that was said by tools before."""
        assert self._process.stdout
        said, late = "", threading.Timer(PATIENCE_S, self._process.kill)
        late.start()
        try:
            for line in self._process.stdout:
                message: dict[str, Any] = json.loads(line)
                said += message["data"] if message["is"] == "Said" else ""
                if message["is"] in (kind, "End"):
                    return {**message, "said": said}
            raise AssertionError(f"no {kind} and no end came")
        finally:
            late.cancel()

    def own(self, script: str, uid: int = ALICE, id: int = 1, **facts: Any) -> dict[str, Any]:
        """A call of a tool that a user is said to have made."""
        self.order_own(script, uid, id, **facts)
        return self.hear("Ended")

    def order_own(self, script: str, uid: int = ALICE, id: int = 1, **facts: Any) -> None:
        whose = {"given": "", "uid": uid, "groups": [uid], "agent": 0}
        command = ["/bin/sh", "-c", script]
        self.say("RunOwn", **{"id": id, "name": "x", "command": command, **OWN, **whose, **facts})

    def see(self, uid: int, pid: int) -> str:
        self.say("See", number=1, uid=uid, pids=[pid])
        return str(self.hear("Answered")["answer"])

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


class Place:
    """aios-privileged, with what an attacker would like to have around it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.attackers, self.users = folder, list[Attacker](), list[subprocess.Popen[str]]()
        open_to_all(folder)
        shutil.copy(Path(__file__).with_name("attacker.py"), folder / "attacker.py")
        for name in ("roots", "credentials"):
            (folder / name).mkdir(mode=0o700)
        for file, text in (("roots/secret", "root's secret"), ("credentials/token", "the token")):
            (folder / file).write_text(text)
            (folder / file).chmod(0o600)
        for file, text in (("hook", f"env > {folder}/told/$(id -u)"), ("tools/keyed/run", "echo lawful")):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(f"#!/bin/sh\n{text}\n")
            (folder / file).chmod(0o755)
        (folder / "tools/keyed/tool.toml").write_text(KEYED)
        (folder / "told").mkdir()
        (folder / "told").chmod(0o1777)
        config = f'[tools]\nfolder = "{folder}/tools"\ncredentials = "{folder}/credentials"\n'
        config += f'notify = "{folder}/hook"\n[mcp.server]\ncommand = ["/bin/echo", "lawful"]\n'
        self.daemon = Daemon(folder, folder, config)
        self.daemon.helped = True
        self.daemon.system_users = ()
        self.daemon._start_privileged()

    def attacker(self, target: Path | None = None) -> Attacker:
        for before in self.attackers:
            before.end()
        self.attackers = [Attacker(self.folder, target)]
        return self.attackers[0]

    def user(self, uid: int, how: str = "3>", groups: str = "--clear-groups") -> int:
        """The pid of a user's process that has a file of the tree open."""
        script = f"exec {how}{self.daemon.root}/file; echo ready; exec sleep 1000"
        user = ["setpriv", "--reuid", str(uid), "--regid", str(uid), groups]
        process = subprocess.Popen([*user, "bash", "-c", script], stdout=subprocess.PIPE, text=True)
        self.users.append(process)
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        return process.pid

    def seen(self, target: Path | None = None) -> Attacker:
        """An attacker that has seen alice write."""
        attacker = self.attacker(target)
        assert attacker.see(ALICE, self.user(ALICE)) == "seen"
        return attacker

    def clean(self) -> None:
        for attacker in self.attackers:
            attacker.end()
        for process in self.users:
            process.kill()
            process.communicate()
        self.daemon.clean()

    def goes_on(self) -> bool:
        return self.daemon.privileged is not None and self.daemon.privileged.poll() is None


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    needs_python()
    place = Place(tmp_path_factory.mktemp("taken"))
    try:
        yield place
        assert place.goes_on()
        assert "Traceback" not in place.daemon.log.read_text()
    finally:
        place.clean()


# whom it acts for


def test_tools_never_run_as_root_or_a_system_account(place: Place) -> None:
    attacker = place.attacker()
    for uid in (0, 1, 999):
        assert attacker.see(uid, place.user(uid)) == "seen"
        ended = attacker.own("head -1 /etc/shadow", uid)
        assert (ended["said"], "system account" in ended["why"]) == ("", True)
    assert "nobody" in attacker.own("id", 65534)["why"]


def test_tools_run_only_as_users_whose_processes_were_seen_writing_to_the_tree(place: Place) -> None:
    attacker = place.attacker()
    ended = attacker.own("id -u", BOB)
    assert (ended["said"], "no process of user" in ended["why"]) == ("", True)
    reader, pid = place.user(BOB, "3<"), place.user(BOB)
    with (place.folder / "told/file").open("w") as other:  # of that name, and not of the tree
        elsewhere = subprocess.Popen(["sleep", "1000"], user=BOB, stdout=other, text=True)
    place.users.append(elsewhere)
    for uid, process in ((BOB, reader), (BOB, elsewhere.pid), (BOB, os.getpid()), (ALICE, pid), (BOB, 1)):
        assert attacker.see(uid, process) == ""
    assert "no process of user" in attacker.own("id -u", BOB)["why"]
    assert attacker.see(BOB, pid) == "seen"
    assert attacker.own("id -u", BOB)["said"] == f"{BOB}\n"
    again = place.attacker()  # a request outlives the daemon that took it
    ended = again.own("id -u", BOB)
    assert ended["said"] == f"{BOB}\n", ended["why"]


def test_a_user_is_seen_whatever_the_names_of_the_mounts_that_its_process_has(place: Place) -> None:
    attacker = place.attacker()
    folder = place.folder / "a\rb\r1 1 0:0 c"
    folder.mkdir()
    write = f"exec 3>{place.daemon.root}/file; echo ready; exec sleep 1000"
    user = f"exec setpriv --reuid {ALICE} --regid {ALICE} --clear-groups bash -c '{write}'"
    script = f'mount -t tmpfs none "$1" && {user}'
    process = subprocess.Popen(
        ["unshare", "--mount", "bash", "-c", script, "bash", folder], stdout=subprocess.PIPE, text=True
    )
    place.users.append(process)
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    assert attacker.see(ALICE, process.pid) == "seen"
    attacker.say("Holds", number=2, pid=process.pid, path="/file")
    assert attacker.hear("Answered")["answer"] == "held"


def test_tools_have_no_group_that_the_process_had_not(place: Place) -> None:
    attacker = place.attacker()
    attacker.see(ALICE, place.user(ALICE, groups=f"--groups={STAFF}"))
    assert len(attacker.own("id -G", groups=[ALICE, STAFF])["said"].split()) == 2
    for groups in ([0], [ALICE, 42], [ALICE, STAFF, 0]):
        ended = attacker.own("head -1 /etc/shadow", groups=groups)
        assert (ended["said"], "groups" in ended["why"]) == ("", True)


def test_the_notify_program_runs_as_such_a_user_or_nobody_and_is_told_names_alone(place: Place) -> None:
    attacker = place.seen()
    call: dict[str, Any] = {"id": 7, "tool": "calc", "agent_name": "ada", "group": ""}
    attacker.say("Notify", **call, uid=0, groups=[0])
    attacker.say("Notify", **{**call, "group": "staff"}, uid=0, groups=[0])
    attacker.say("Notify", **call, uid=ALICE, groups=[ALICE])
    told = place.folder / "told"
    wait_until(lambda: {"65534", str(ALICE)} <= set(os.listdir(told)), "both programs")
    assert not (told / "0").exists()
    wait_until(lambda: "AIOS_REQUEST=7" in (told / str(ALICE)).read_text(), "what it was told")
    names = {line.partition("=")[0] for line in (told / str(ALICE)).read_text().splitlines()}
    own = {"PATH", "PWD", "_", "SHLVL"}
    assert names - own == {f"AIOS_{n}" for n in ("REQUEST", "TOOL", "AGENT", "GROUP", "UID", "DECISION")}
    attacker.say("Notify", **{**call, "tool": "x\nLD_PRELOAD=/tmp/x"}, uid=ALICE, groups=[ALICE])
    assert attacker.hear("Answered")["is"] == "End"


# what tools get


def test_a_tool_with_a_credential_is_the_administrators_file_whatever_comes_along(place: Place) -> None:
    attacker = place.seen()
    call: dict[str, Any] = {
        "id": 1,
        "name": "keyed",
        "given": "{}",
        "uid": ALICE,
        "groups": [ALICE],
        "agent": 0,
    }
    attacker.say("RunTool", with_={"memfd": "#!/bin/sh\ncat /run/credentials/*"}, **call)
    assert attacker.hear("Ended")["said"] == "lawful\n"
    stolen = "cat /run/credentials/* 2>/dev/null; cat tool/run 2>/dev/null; true"
    assert attacker.own(stolen, name="keyed")["said"] == ""
    for name in ("none", "server"):
        attacker.say("RunTool", **{**call, "name": name})
        assert "has no tool" in attacker.hear("Ended")["why"]
    for name in ("../keyed", "/etc", ""):
        attacker = place.seen()
        attacker.say("RunTool", **{**call, "name": name})
        assert attacker.hear("Ended")["is"] == "End"


def test_an_order_has_no_words_for_paths_and_networks(place: Place) -> None:
    for grant in ({"read": ["/etc"]}, {"write": ["/etc"]}, {"network": ["192.0.2.1:80"]}, {"folder": "/"}):
        attacker = place.attacker()
        attacker.order_own("id", **grant)
        assert attacker.hear("Ended")["is"] == "End"
    assert place.goes_on()


def test_a_program_that_comes_along_cannot_change_or_block(place: Place) -> None:
    attacker = place.seen()
    command = {"command": ["./program"]}
    whole = {"memfd": "#!/bin/sh\necho mine\n"}
    mine: dict[str, Any] = {
        "id": 1,
        "name": "x",
        **OWN,
        "given": "",
        "uid": ALICE,
        "groups": [ALICE],
        "agent": 0,
        **command,
    }
    attacker.say("RunOwn", with_=whole, **mine)
    assert attacker.hear("Ended")["said"] == "mine\n"
    for file in ("/etc/hostname", "/dev/zero"):
        attacker.say("RunOwn", with_={"file": file}, **mine)
        assert attacker.hear("Ended")["status"] == -1
    attacker.say("RunOwn", **mine)
    assert "comes with the call" in attacker.hear("Ended")["why"]
    for _ in range(2):  # descriptors that no order takes
        attacker.say("Rest", with_={**whole, "times": 4}, id=9, resting=True)
    assert attacker.hear("Never")["is"] == "End"


def test_a_session_runs_the_command_of_the_configuration(place: Place) -> None:
    attacker = place.seen()
    mark = place.folder / "told/mcp"
    command = json.dumps({"command": ["/bin/touch", str(mark)], "env": {}, "output_bytes": 1000})
    attacker.say("RunServer", id=-1, name="server", listing=False, uid=ALICE, groups=[ALICE])
    attacker.say("Tell", id=-1, data=command + "\n")
    said = attacker.hear("Ended")["said"]
    assert "touch" not in said
    assert not mark.exists()
    attacker.say("RunServer", id=-2, name="server", listing=False, uid=0, groups=[0])
    assert "system account" in attacker.hear("Ended")["why"]
    attacker.say("RunServer", id=-3, name="other", listing=True, uid=0, groups=[0])
    assert "no MCP server" in attacker.hear("Ended")["why"]


# paths


def test_a_tree_of_links_shows_a_sandbox_no_other_folder(place: Place) -> None:
    shown = place.folder / "told"
    (shown / "here").write_text("not of the tree")
    for _ in range(4):
        attacker = place.seen(shown)
        ended = attacker.own("cat /aios/tools/here; ls /aios/tools /aios/access; test -d /aios && echo tree")
        assert "not of the tree" not in ended["said"]
        assert "here" not in ended["said"]


def test_a_tree_as_it_should_be_is_shown_without_access_and_with_tools_to_be_read(place: Place) -> None:
    attacker = place.seen()
    ended = attacker.own("test -w /aios/file && echo w; mkdir /aios/tools/x 2>&1; touch /aios/access/x 2>&1")
    assert ended["said"].count("Read-only file system") == 2
    assert ended["said"].startswith("w\n")


def test_work_folders_are_not_where_the_daemon_may_write(place: Place) -> None:
    attacker = place.seen()
    assert attacker.own("echo mine > note; pwd", agent=7)["said"] == "/work\n"
    work = place.daemon.work
    assert (work / f"{ALICE}/7/note").read_text() == "mine\n"
    assert not (place.daemon.state / "work").exists()
    for folder in (work, work.parent, work / str(ALICE)):
        writes = subprocess.run(["test", "-w", folder], user=DAEMON, group=DAEMON, extra_groups=[])
        assert (writes.returncode, folder.stat().st_uid) == (1, 0)
    for agent in (-1, "../../etc", 1.5):
        attacker = place.seen()
        attacker.order_own("id", agent=agent)
        assert attacker.hear("Ended")["is"] == "End"


def test_what_is_removed_is_a_work_folder(place: Place) -> None:
    victim = place.folder / "victim/7"
    victim.mkdir(parents=True)
    attacker = place.seen()
    attacker.own("ln -s /etc link; true", agent=8)
    (place.daemon.work / "60513").symlink_to(victim.parent)  # as if one had been put there
    for order in ({"is": "Forget", "agent": 7}, {"is": "ForgetBut", "agents": []}):
        attacker.say(order.pop("is"), **order)  # type: ignore[arg-type]
    wait_until(lambda: not (place.daemon.work / f"{ALICE}/8").exists(), "the end of the work folder")
    assert victim.is_dir()
    assert os.path.isdir("/etc")


# floods and nonsense


def test_no_more_calls_run_than_may_and_a_number_is_used_once(place: Place) -> None:
    attacker = place.seen()
    for number in range(CALLS_MOST + 20):
        attacker.order_own("exec sleep 2000", id=number + 1)
    refused = [attacker.hear("Ended") for _ in range(20)]
    assert all("run already" in ended["why"] for ended in refused)
    attacker.order_own("id", id=1)
    assert attacker.hear("Never")["is"] == "End"
    wait_until(lambda: not sleeping(ALICE, "sleep 2000"), "the end of all")


def test_orders_are_paced(place: Place) -> None:
    attacker = place.attacker()
    began = time.monotonic()
    for _ in range(1600):
        attacker.say("Forget", agent=1)
    attacker.say("Program", number=1, pid=1)
    attacker.hear("Answered")
    assert time.monotonic() - began > 2


@pytest.mark.parametrize(
    "order",
    [
        "nonsense", "[]", '{"is": "Run"}', '{"is": "Kill", "id": 1}', "[" * 100_000,
        {"is": "RunOwn", "command": [1]}, {"is": "RunOwn", "command": []}, {"is": "RunOwn", "env": {"a": 1}},
        {"is": "RunOwn", "env": {"a=b": "1"}}, {"is": "RunOwn", "id": True}, {"is": "RunOwn", "id": -1},
        {"is": "RunOwn", "groups": []}, {"is": "RunOwn", "groups": ["0"]}, {"is": "RunOwn", "uid": 2**32},
        {"is": "RunOwn", "timeout_s": 1e99}, {"is": "RunOwn", "memory_bytes": 2**70},
        {"is": "RunOwn", "command": ["a\0--bind\0/\0/"]}, {"is": "RunOwn", "given": "x" * (40 << 20)},
        {"is": "WorkerOrder", "id": 1, "what": "isolate", "devices": []},
        {"is": "WorkerOrder", "id": 1, "what": "start", "devices": ["x"] * 100},
        {"is": "Holds", "number": 1, "pid": 0, "path": ""}, {"is": "See", "number": 1, "uid": 1, "pids": []},
        {"is": "Holds", "number": 1, "pid": 1, "path": "\ud800"},
        {"is": "Notify", "id": 1, "tool": "x", "agent_name": "", "group": "\ud800", "uid": 1, "groups": [1]},
    ],
    ids=lambda order: json.dumps(order)[:50],
)  # fmt: skip
def test_what_no_honest_daemon_says_ends_its_connection_and_nothing_else(place: Place, order: Any) -> None:
    attacker = place.seen()
    if isinstance(order, dict) and order["is"] == "RunOwn":
        whose = {"given": "", "uid": ALICE, "groups": [ALICE], "agent": 0}
        order = {"id": 1, "name": "x", "command": ["/bin/true"], **OWN, **whose, **order}
    if isinstance(order, dict):
        attacker.say(order.pop("is"), **order)
    else:
        attacker.say_text(order)
    assert attacker.hear("Never")["is"] == "End"
    assert place.goes_on()
    assert place.seen().own("id -u")["said"] == f"{ALICE}\n"


def test_words_that_cannot_be_a_command_fail_one_call(place: Place) -> None:
    attacker = place.seen()
    assert attacker.own("x", command=["\ud800"])["status"] == -1
    assert attacker.own("x", env={"A": "\udfff"})["status"] == -1
    assert attacker.own("x", given="\ud800")["status"] == -1
    assert attacker.own("echo well")["said"] == "well\n"


def test_it_tells_nothing_but_what_the_daemon_has_to_know_of_a_process(place: Place) -> None:
    attacker = place.attacker()
    pid, other = place.user(BOB), os.getpid()
    for process, path, answer in ((pid, "/file", "held"), (pid, "/null", ""), (other, "/null", "")):
        attacker.say("Holds", number=5, pid=process, path=path)
        assert attacker.hear("Answered")["answer"] == answer
    attacker.say("Program", number=6, pid=pid)
    assert attacker.hear("Answered")["answer"] == os.path.realpath("/bin/sleep")


def test_without_a_capability_it_reads_no_other_process(place: Place) -> None:
    """The daemon has none: it has the same rights as this attacker."""
    script = f"import os; print(os.listdir('/proc/{place.user(BOB)}/fd'))"
    done = subprocess.run([*SETPRIV, PYTHON, "-c", script], capture_output=True, text=True, env=PATHS)
    assert "Permission denied" in done.stderr


def sleeping(uid: int, command: str) -> list[int]:
    found = psutil.process_iter(["uids", "cmdline"])
    return [
        p.pid for p in found if p.info["uids"].real == uid and " ".join(p.info["cmdline"] or ()) == command
    ]

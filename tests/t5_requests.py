"""requests/ID on the real mount with real uids: each unfinished request has a place for its user and root."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import random_model
from tests.running import PATHS, PYTHON, REPOSITORY, Daemon, wait_until
from tests.t5_users import ALICE, BOB, STAFF, as_user

pytestmark = [pytest.mark.mount, pytest.mark.root]
MakeDaemon = Callable[..., Daemon]
CALL = '{"command": "true"}'  # of the tool shell: it waits for a decision
OF_AGENT = '{"name": "shell", "arguments": {"command": "true"}}'


def queue(daemon: Daemon) -> list[list[str]]:
    return [line.split() for line in daemon.read("scheduler/queue").splitlines()[1:]]


def ids(daemon: Daemon, uid: int) -> list[str]:
    return [row[0] for row in queue(daemon) if row[2] == str(uid)]


def state(daemon: Daemon, id: str) -> str:
    return daemon.read(f"requests/{id}/state").split()[0]


def aiosctl(daemon: Daemon, uid: int, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["setpriv", "--reuid", str(uid), "--regid", str(uid), "--clear-groups",
         PYTHON, "-m", "aiosd.cli.aiosctl", "--mount", str(daemon.root), *words],
        cwd=REPOSITORY, env={**os.environ, **PATHS}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def reachable(daemon: Daemon) -> Daemon:
    for folder in [daemon.root.parent, *daemon.root.parent.parents][:4]:
        folder.chmod(0o755)
    return daemon


@pytest.fixture
def busy(make_daemon: MakeDaemon) -> Daemon:
    """A daemon where alice, who has no agent, has two requests that do not end by themselves."""
    daemon = reachable(make_daemon().start())
    done = as_user(daemon, ALICE, f"for n in 1 2; do echo '{CALL}' > tools/shell/call; done")
    assert done.returncode == 0, done.stderr
    return daemon


def test_a_request_without_an_agent_is_its_users_and_roots(busy: Daemon) -> None:
    first, waiting = ids(busy, ALICE)
    assert as_user(busy, BOB, "ls requests").stdout.split() == [first, waiting]
    assert (busy.root / "requests" / waiting).stat().st_mode & 0o7777 == 0o700
    files = {"ctl", "error", "request", "response", "response.json", "state", "usage"}
    assert set(as_user(busy, ALICE, f"ls requests/{waiting}").stdout.split()) == files
    for script in ("ls {}", "cat {}/request", "cat {}/response", "echo cancel > {}/ctl", "chmod 777 {}"):
        done = as_user(busy, BOB, script.format(f"requests/{waiting}"))
        assert (done.returncode, done.stdout) != (0, "")
        assert "ermi" in done.stderr, script
    assert "not permitted" in as_user(busy, ALICE, f"chmod 755 requests/{waiting}").stderr
    assert aiosctl(busy, BOB, "cancel", waiting).returncode == 1
    assert aiosctl(busy, BOB, "cancel", "--user", "root").returncode == 0, "root has no request"
    assert ids(busy, ALICE) == [first, waiting]

    assert as_user(busy, ALICE, f"echo cancel > requests/{waiting}/ctl").returncode == 0
    assert os.listdir(busy.root / "requests") == [first]
    assert as_user(busy, ALICE, f"cat requests/{waiting}/state").stdout == "cancelled\n", "it is kept"
    assert as_user(busy, BOB, f"cat requests/{waiting}/state").returncode != 0
    assert aiosctl(busy, 0, "cancel", first).returncode == 0
    assert queue(busy) == []
    again = aiosctl(busy, 0, "cancel", first)
    assert again.stderr == f"aiosctl: no unfinished request {first}; aiosctl queue shows them\n"


def test_root_cancels_it_after_a_restart(busy: Daemon) -> None:
    before = ids(busy, ALICE)
    busy.kill()
    busy.start()
    assert ids(busy, ALICE) == before
    for id in before:
        assert aiosctl(busy, 0, "-v", "cancel", id).returncode == 0
    assert [state(busy, id) for id in before] == ["cancelled", "cancelled"]
    assert queue(busy) == []


def test_a_request_of_an_agent_is_a_link_and_a_guests_is_his_own(make_daemon: MakeDaemon) -> None:
    daemon = reachable(make_daemon().start())
    share = f"chgrp {STAFF} agents/a{{,/syscall/tool}}; chmod 750 agents/a; chmod 660 agents/a/syscall/tool"
    asking = f"echo '{OF_AGENT}' > agents/a/syscall/tool"
    made = as_user(daemon, ALICE, f"mkdir agents/a; {share}; {asking}", groups=str(STAFF))
    assert made.returncode == 0, made.stderr
    assert as_user(daemon, BOB, f"{asking}; {asking}", groups=str(STAFF)).returncode == 0
    (hers,), (his, other) = ids(daemon, ALICE), ids(daemon, BOB)
    assert os.readlink(daemon.root / "requests" / hers) == f"../agents/a/requests/{hers}"
    assert as_user(daemon, BOB, f"cat requests/{hers}/state").returncode != 0
    assert set(as_user(daemon, BOB, f"ls requests/{his}").stdout.split()) == {"state", "error", "ctl"}
    assert as_user(daemon, BOB, f"cat agents/a/requests/{his}/state").returncode != 0, "that is the agent's"

    assert aiosctl(daemon, BOB, "cancel", his).returncode == 0
    assert aiosctl(daemon, ALICE, "cancel", other).returncode == 0, "by the owner of the agent"
    assert (
        as_user(daemon, BOB, f"cat requests/{his}/state requests/{other}/state").stdout == "cancelled\n" * 2
    )
    assert aiosctl(daemon, ALICE, "cancel", hers).returncode == 0
    assert queue(daemon) == []


def test_waiting_requests_fail_when_the_quota_of_their_user_becomes_zero(busy: Daemon) -> None:
    hers = ids(busy, ALICE)
    assert as_user(busy, BOB, f"echo '{CALL}' > tools/shell/call").returncode == 0
    (his,) = ids(busy, BOB)
    config = busy.root.with_name("aiosd.toml")
    config.write_text(f"[quota.user.{ALICE}]\nqueued_requests = 0\n")
    busy.signal(signal.SIGHUP)
    wait_until(lambda: not ids(busy, ALICE), "the end of alice's requests")
    assert [state(busy, id) for id in [*hers, his]] == ["failed", "failed", "queued"]
    why = f"the quota of user {ALICE} is 0 requests by now: ask the administrator\n"
    assert as_user(busy, ALICE, f"cat requests/{hers[0]}/error").stdout == why

    busy.kill()
    config.write_text("[quota]\nqueued_requests = 0\n")
    busy.start()
    assert queue(busy) == []
    assert str(BOB) in busy.read(f"requests/{his}/error")


@pytest.fixture
def endless(make_daemon: MakeDaemon, tmp_path: Path) -> Daemon:
    """A daemon whose answers take minutes, where alice has the agent a."""
    model = random_model.make(tmp_path / "slow", hidden=512, layers=8, context_length=30_000)
    daemon = reachable(make_daemon(model=model).start())
    assert as_user(daemon, ALICE, "mkdir agents/a").returncode == 0
    return daemon


BODY = '{"prompt": "hi", "max_tokens": 100000, "ignore_eos": true}'
PRIVATE = "exec 3<>{}; echo '$BODY' >&3; cat <&3"
ASKED = {
    "a model by ask -m": "$AIOSCTL ask -m slow '$BODY'",
    "a model by run": "$AIOSCTL run slow hi",
    "an agent by ask": "$AIOSCTL ask a '$BODY'",
    "a model in a private transaction": PRIVATE.format("models/slow/llm"),
    "an agent in a private transaction": PRIVATE.format("agents/a/syscall/llm"),
    "a model by echo": "echo '$BODY' > models/slow/llm; cat models/slow/llm",
    "an allocated request": "r=agents/a/requests/$(cat agents/a/requests/new);"
    " echo '$BODY' > $r/request; cat $r/response",
    "a loop and its step": "echo calc > agents/a/tools; " + PRIVATE.format("agents/a/syscall/llm"),
}


def test_a_user_cancels_each_own_request_by_its_number(endless: Daemon) -> None:
    command = f"{PYTHON} -m aiosd.cli.aiosctl --mount {endless.root}"
    for name, script in ASKED.items():
        asking = script.replace("$AIOSCTL", command).replace("$BODY", BODY)
        with subprocess.Popen(
            ["setpriv", "--reuid", str(ALICE), "--regid", str(ALICE), "--clear-groups",
             "timeout", "60", "bash", "-c", asking],
            cwd=endless.root, env={**os.environ, **PATHS}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        ) as process:  # fmt: skip
            wait_until(lambda: any(row[1] == "running" and int(row[6]) > 1 for row in queue(endless)), name)
            last = ids(endless, ALICE)[-1]  # of a loop, its step
            if "run" not in name:  # its answer ends by itself after some seconds
                assert aiosctl(endless, BOB, "cancel", last).returncode == 1, name
            done = aiosctl(endless, ALICE, "cancel", last)
            assert done.returncode == 0, f"{name}: {done.stderr}"
            assert "cancelled" in process.communicate(timeout=20)[0], name
        assert queue(endless) == [], name

"""Agents bound to a real process: they end with it, across a kill of the daemon too."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.running import Daemon, wait_until
from tests.t5_users import ALICE, BOB, as_user

MakeDaemon = Callable[..., Daemon]
pytestmark = [pytest.mark.mount, pytest.mark.root]


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "1000"], user=ALICE, group=ALICE)
    yield process
    process.kill()
    process.wait()


def end(process: subprocess.Popen[Any]) -> None:
    process.kill()
    process.wait()


def gone(path: Path) -> None:
    wait_until(lambda: not path.exists(), "the agent's end")


def test_an_agent_ends_with_its_process(aios: Daemon, sleeper: subprocess.Popen[bytes]) -> None:
    asked = as_user(
        aios, ALICE,
        f"mkdir agents/bound && cd agents/bound && echo {sleeper.pid} > pid && cat pid && "
        "echo pause > ctl && echo x > syscall/llm",
    )  # fmt: skip
    assert (asked.stdout, asked.stderr) == (f"{sleeper.pid}\n", "")
    script = f"exec 3< {aios.root}/agents/bound/syscall/llm; echo open; cat <&3"
    reader = subprocess.Popen(
        ["bash", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert reader.stdout is not None
    assert reader.stdout.readline() == "open\n"
    end(sleeper)
    gone(aios.root / "agents/bound")
    assert "Input/output error" in reader.communicate()[1], "its requests are cancelled"
    assert as_user(aios, BOB, "mkdir agents/bound; stat -c %u agents/bound").stdout == f"{BOB}\n"
    (aios.root / "agents/bound").rmdir()


def test_an_unbound_or_rebound_agent_stays(aios: Daemon, sleeper: subprocess.Popen[bytes]) -> None:
    script = f"mkdir agents/free agents/other; echo {sleeper.pid} | tee agents/{{free,other}}/pid; "
    assert as_user(aios, ALICE, script + "echo > agents/free/pid; cat agents/free/pid").stdout.endswith(
        "\n\n"
    )
    as_user(aios, ALICE, f"echo {os.getpid()} > agents/other/pid")
    (aios.root / "agents/other/pid").write_text(f"{os.getpid()}\n")  # root may name any
    end(sleeper)
    assert as_user(aios, ALICE, "cat agents/free/state agents/other/state").stdout == "idle\nidle\n"
    as_user(aios, ALICE, "rmdir agents/free agents/other")


def test_a_process_must_exist_and_belong_to_the_caller(aios: Daemon) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    tried = as_user(
        aios, ALICE,
        f"mkdir agents/bound; cd agents/bound; "
        f"for p in 1 {ended.pid} x -1 99999999999 1e3; do echo $p > pid; done;"
        "cat pid; unshare --user --pid --fork bash -c 'echo $$ > pid'; tail -1 log.jsonl; rmdir ../bound",
    )  # fmt: skip
    assert tried.stdout.startswith("\n"), tried.stdout
    assert tried.stderr.count("Permission denied") == 2, tried.stderr
    assert tried.stderr.count("Invalid argument") == 5, tried.stderr
    assert "outside the container" in tried.stdout


def test_a_thread_is_no_process(aios: Daemon) -> None:
    script = "import os, threading; threading.Thread(target=lambda: print(threading.get_native_id(), "
    script += "flush=True) or threading.Event().wait()).start()"
    process = subprocess.Popen(["python3", "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    thread = process.stdout.readline().strip()
    (aios.root / "agents/bound").mkdir()
    with pytest.raises(OSError, match="Invalid argument"):
        aios.write("agents/bound/pid", thread)
    assert aios.read("agents/bound/pid") == "\n"
    (aios.root / "agents/bound").rmdir()
    end(process)


def test_many_agents_end_with_one_process(make_daemon: MakeDaemon, sleeper: subprocess.Popen[bytes]) -> None:
    """More than 1,024, the limit of select(2). All agents share one descriptor, also when bound
    repeatedly."""
    daemon = make_daemon().start(ready=False)
    assert daemon.process is not None
    files = Path(f"/proc/{daemon.process.pid}/fd")
    before = len(list(files.iterdir()))
    for n in range(1100):
        (daemon.root / f"agents/a{n}").mkdir()
        daemon.write(f"agents/a{n}/pid", str(sleeper.pid))
        daemon.write(f"agents/a{n}/pid", str(sleeper.pid))
    assert len(list(files.iterdir())) <= before + 8
    end(sleeper)
    wait_until(lambda: not list((daemon.root / "agents").iterdir()), "the end of all", 60)
    wait_until(lambda: len(list(files.iterdir())) <= before + 8, "the descriptors")


def test_a_quota_bounds_the_processes_that_a_user_binds(aios: Daemon) -> None:
    script = (
        "for i in $(seq 300); do mkdir agents/m$i; sleep 100 & echo $! > agents/m$i/pid || echo $i; done 2>&1"
        " | grep -m1 -A1 quota; kill $(jobs -p); wait; rmdir agents/m* 2>/dev/null"
    )
    assert "quota exceeded\n257\n" in as_user(aios, ALICE, script).stdout


def test_a_restarted_daemon_knows_the_process_and_whether_it_ended(
    make_daemon: MakeDaemon, sleeper: subprocess.Popen[bytes]
) -> None:
    daemon = make_daemon().start()
    ending = subprocess.Popen(["sleep", "1000"])
    for name, process in (("lives", sleeper), ("ended", ending)):
        (daemon.root / "agents" / name).mkdir()
        daemon.write(f"agents/{name}/pid", str(process.pid))
    daemon.kill()
    end(ending)
    daemon.start(ready=False)
    gone(daemon.root / "agents/ended")
    assert daemon.read("agents/lives/pid") == f"{sleeper.pid}\n"
    end(sleeper)
    gone(daemon.root / "agents/lives")

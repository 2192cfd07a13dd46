"""The daemon under a service manager: READY, watchdog, STATUS, reload, drain and stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from aiosd.host import hashchain
from tests import random_model
from tests.manual import blocks
from tests.running import REPOSITORY, Daemon, Manager, managed, needs, wait_until

pytestmark = pytest.mark.mount
MakeDaemon = Callable[..., Daemon]
LONG = '{"max_tokens": 900, "ignore_eos": true, "temperature": 0.9, "seed": 3}'
ONE = "[engine]\nmax_running = 1\n"


def ask(daemon: Daemon, agent: str, params: str = LONG) -> Path:
    path = daemon.root / "agents" / agent
    path.mkdir()
    (path / "params.json").write_text(params)
    (path / "syscall/llm").write_text(f"question of {agent}")
    return path / "syscall/llm"


def runs(daemon: Daemon) -> None:
    """Wait until a request has a part of its answer."""
    before = daemon.table("scheduler/stats")["tokens"]
    wait_until(lambda: daemon.table("scheduler/stats")["tokens"] != before, "tokens", 60)


def test_a_service_manager_gets_the_daemons_status(make_daemon: MakeDaemon, manager: Manager) -> None:
    daemon = managed(make_daemon(), watchdog_s=1).start()
    wait_until(lambda: manager.says("STATUS", f"serving {daemon.root}: 0 running, 0 waiting"), "the line")
    wait_until(lambda: manager.says("STATUS", "0 agents, model random ready"), "the model")
    wait_until(lambda: manager.count("WATCHDOG") >= 4, "the watchdog")
    assert manager.count("READY") == 1
    daemon.signal(signal.SIGHUP)
    wait_until(lambda: manager.count("READY") == 2, "the reload")
    reloading = next(said for said in manager.heard if "RELOADING" in said)
    assert 0 < int(reloading["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
    assert daemon.stop() == 0
    assert manager.count("STOPPING") == 1
    assert manager.heard[-1] == {"STATUS": "stopping"}


def test_without_a_watchdog_no_message_is_sent_to_it(make_daemon: MakeDaemon, manager: Manager) -> None:
    daemon = managed(make_daemon()).start(ready=False)
    daemon.env["WATCHDOG_PID"] = "1"
    wait_until(lambda: manager.says("STATUS", "0 agents"), "the line")
    assert daemon.stop() == 0
    assert not manager.count("WATCHDOG")


STUCK = """import time
def rank(view, job): return job.id
def preempt(view): time.sleep(3600)
"""


def test_a_hanging_scheduler_stops_the_watchdog_messages_and_loses_nothing(
    make_daemon: MakeDaemon, manager: Manager, tmp_path: Path
) -> None:
    """An administrator's policy that never returns holds the scheduler's lock."""
    policies = tmp_path / "policies"
    policies.mkdir()
    (policies / "stuck.py").write_text(STUCK)
    config = f"[scheduler]\npolicy = 'POLICY'\npolicies = '{policies}'\n" + ONE
    daemon = managed(make_daemon(config.replace("POLICY", "stuck")), watchdog_s=1).start()
    [worker] = daemon.worker_pids()
    os.kill(worker, signal.SIGSTOP)
    accepted = ask(daemon, "a", '{"max_tokens": 5}')
    (daemon.root / "agents/b").mkdir()
    writer = subprocess.Popen(["bash", "-c", f"echo two > {daemon.root}/agents/b/syscall/llm"])
    wait_until(lambda: "the watchdog is not fed" in daemon.log.read_text(), "the hang")
    fed = manager.count("WATCHDOG")
    time.sleep(2)  # time for two watchdog messages
    assert manager.count("WATCHDOG") == fed
    daemon.signal(signal.SIGABRT)  # as the service manager does
    assert daemon.process
    assert daemon.process.wait(10) == -signal.SIGABRT
    writer.wait(10)
    os.kill(worker, signal.SIGCONT)
    assert 'stuck.py", line 3 in preempt' in daemon.log.read_text(), "where it hung"
    (tmp_path / "aiosd.toml").write_text(config.replace("POLICY", "fair"))
    daemon.start()
    assert accepted.read_bytes()


def test_running_requests_end_at_a_stop_and_the_others_continue_later(
    make_daemon: MakeDaemon, manager: Manager, tmp_path: Path
) -> None:
    model = random_model.make(tmp_path / "slow", hidden=256, layers=6, context_length=8192)
    config = ONE + "[scheduler]\npolicy = 'fifo'\n[daemon]\ndrain_s = 60\n"  # fifo preempts nothing
    daemon = managed(make_daemon(config, model)).start()
    running = ask(daemon, "running", LONG.replace("900", "5000"))
    reader = subprocess.Popen(["cat", running], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    runs(daemon)
    waiting = ask(daemon, "waiting", '{"max_tokens": 5}')
    blocked = subprocess.Popen(["cat", waiting], stderr=subprocess.PIPE)
    (daemon.root / "agents/begun").mkdir()
    begun = (daemon.root / "agents/begun/syscall/llm").open("wb", buffering=0)
    begun.write(b"written before, closed after")
    daemon.signal(signal.SIGTERM)
    wait_until(lambda: manager.says("STATUS", "stopping: requests that still run: 1"), "the drain")
    refused = daemon.sh("mkdir agents/late; echo hi > agents/late/syscall/llm; cat agents/late/log.jsonl")
    assert "endpoint shutdown" in refused.stderr
    assert "write the request again after the restart" in refused.stdout
    begun.close()
    answer = reader.communicate(timeout=60)[0]
    assert daemon.process
    assert daemon.process.wait(60) == 0
    assert len(answer) > 100
    assert blocked.wait(5) == 1, "who waited for one that did not start"
    assert "2 requests go on when it starts again" in daemon.log.read_text()
    daemon.start()
    assert running.read_bytes() == answer
    assert waiting.read_bytes()
    assert (daemon.root / "agents/begun/syscall/llm").read_bytes()
    assert daemon.table("agents/running/usage")["requests"] == "1"


def test_a_second_signal_ends_the_drain_and_parked_requests_continue_with_the_same_tokens(
    make_daemon: MakeDaemon, slow_llama: Path
) -> None:
    daemon = make_daemon(ONE + "[daemon]\ndrain_s = 600\n", slow_llama).start()
    undisturbed = ask(daemon, "a").read_bytes()
    total = int(daemon.table("scheduler/stats")["tokens"])
    path = daemon.root / "agents/a/syscall/llm"
    reader = subprocess.Popen(["bash", "-c", f"exec 3<>{path}; echo -n question of a >&3; cat <&3"])
    runs(daemon)
    daemon.signal(signal.SIGTERM)
    wait_until(lambda: "requests that still run: 1" in daemon.log.read_text(), "the drain")
    daemon.signal(signal.SIGTERM)
    assert daemon.process
    assert daemon.process.wait(20) == 0
    assert "SIGTERM again" in daemon.log.read_text()
    assert reader.wait(5) == 1
    daemon.start()
    assert path.read_bytes() == undisturbed, "who had it open read-write has not cancelled it"
    assert int(daemon.table("scheduler/stats")["tokens"]) < total, "it did not begin anew"


def test_a_stop_with_nothing_running_is_immediate(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon("[daemon]\ndrain_s = 600\n").start()
    ask(daemon, "a", '{"max_tokens": 3}').read_bytes()
    ask(daemon, "b", '{"max_tokens": 3}').read_bytes()
    daemon.write("agents/b/ctl", "pause")
    daemon.write("agents/b/syscall/llm", "waits")
    began = time.monotonic()
    assert daemon.stop() == 0
    assert time.monotonic() - began < 10


# reload


def reload(daemon: Daemon) -> str:
    """The log's words about the reload."""
    before = len(daemon.log.read_text())

    def news() -> str:
        return daemon.log.read_text()[before:]

    daemon.signal(signal.SIGHUP)
    wait_until(lambda: "reloaded" in news(), "the reload")
    return news()


def test_a_reload_command_ends_as_the_reload_did(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o777)
    runtime.chmod(0o777)
    daemon = make_daemon()
    daemon.env["RUNTIME_DIRECTORY"] = str(runtime)
    daemon.start(ready=False)
    assert daemon.process is not None

    def asked() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "aiosd", "--reload", daemon.table("status")["pid"]]
        env = {**os.environ, **daemon.env}
        return subprocess.run(command, env=env, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)

    config = tmp_path / "aiosd.toml"
    for text, status, said in (
        ("[scheduler]\nquantum = 9\n", 0, ""),
        ("[scheduler]\nquantum = 10\nspeed = 1\n", 1, f"{config}:3: unknown key 'speed'"),
        ("[scheduler]\nquantum = 10\npolicy = 'none'\n", 1, "no policy 'none'"),
        ("[models.x]\npath = '/nonexistent'\n", 1, "/nonexistent: no such file or folder"),
        ("[scheduler]\nquantum = 11\n", 0, ""),
    ):
        config.write_text(text)
        done = asked()
        assert (done.returncode, said in done.stderr) == (status, True), done.stderr
    assert daemon.read("scheduler/quantum") == "11\n"
    assert daemon.stop() == 0
    alone = subprocess.run(
        [sys.executable, "-m", "aiosd", "--reload", "1"], cwd=REPOSITORY, capture_output=True
    )
    assert alone.returncode == 1, "not of a service"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[scheduler]\nspeed = 1\n", "aiosd.toml:2: unknown key 'speed'"),
        ("[scheduler\n", "aiosd.toml"),
        ("[scheduler]\npolicy = 'none'\n", "no policy 'none'; policies are"),
        ("[models.'a b']\npath = '/'\n", "[models.a b]: not a name"),
    ],
)
def test_a_start_with_a_broken_file_fails_with_the_status_that_is_not_tried_again(
    tmp_path: Path, text: str, said: str
) -> None:
    (tmp_path / "aiosd.toml").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "aiosd", "--config", tmp_path / "aiosd.toml", "--mount", tmp_path / "mnt",
         "--state", tmp_path / "state"],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == os.EX_CONFIG
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "mnt").exists()


TOOL = """name = "greet"
description = "Say hello"
command = ["/bin/echo", "hello"]
parameters.type = "object"
"""


def test_a_reload_takes_over_everything_or_nothing(
    make_daemon: MakeDaemon, manager: Manager, tmp_path: Path
) -> None:
    for folder in ("policies/access", "tools.d/greet"):
        (tmp_path / folder).mkdir(parents=True)
    base = f"[scheduler]\npolicies = '{tmp_path}/policies'\nquantum = QUANTUM\n"
    base += f"[tools]\nfolder = '{tmp_path}/tools.d'\n"
    daemon = managed(make_daemon(base.replace("QUANTUM", "7"))).start()
    config = tmp_path / "aiosd.toml"
    good = base.replace("QUANTUM", "8")
    bad = {
        "policies/mine.py": "def rank(",
        "policies/access/mine.toml": "[[rule]]\ndecision = 'perhaps'\n",
        "tools.d/greet/tool.toml": TOOL.replace("parameters.type", "parameter"),
        "aiosd.toml": good + "[models.none]\npath = '/nonexistent'\n",
    }
    for name, text in bad.items():
        config.write_text(good)
        file = tmp_path / name
        file.write_text(text)
        said = reload(daemon)
        assert "not reloaded, the old configuration stays" in said
        assert ("/nonexistent" if name == "aiosd.toml" else str(file)) in said
        assert daemon.read("scheduler/quantum") == "7\n"
        assert "greet" not in os.listdir(daemon.root / "tools")
        wait_until(lambda: manager.says("STATUS", "the last reload was refused"), "the line")
        if name != "aiosd.toml":
            file.unlink()
    (tmp_path / "tools.d/greet/tool.toml").write_text(TOOL)
    config.write_text(good + "[daemon]\nmount = '/elsewhere'\n[engine]\nthreads = 1\n")
    said = reload(daemon)
    assert (
        "configuration reloaded: scheduler.quantum; for workers that start from now on: engine.threads"
        in said
    )
    assert "after a restart of the daemon" not in said, "the command line named the mount"
    assert daemon.read("scheduler/quantum") == "8\n"
    assert "greet" in os.listdir(daemon.root / "tools")
    wait_until(lambda: manager.heard[-1].get("STATUS", "").endswith("model random ready"), "the line")


# backup and restore


def test_a_state_that_is_restored_as_the_manual_says_goes_on(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    needs("sqlite3")
    daemon = make_daemon(ONE).start()
    daemon.sh("mkdir contexts/chat agents/ada; echo chat > agents/ada/context")
    daemon.write("agents/ada/syscall/llm", "hello")
    answer = daemon.read("agents/ada/syscall/llm")
    messages = daemon.read("contexts/chat/messages.jsonl")
    daemon.sh('echo \'{"expression": "6*7"}\' > tools/calc/call; cat tools/calc/call')
    unfinished = ask(daemon, "unfinished")
    runs(daemon)
    backup, restore = (block.text for block in list(blocks("aios-operations.7", "text"))[:2])
    here = {
        "/var/lib/aios": str(daemon.state),
        "/backup": str(tmp_path / "backup"),
        "aios:aios": str(os.getuid()),
    }

    def follow(commands: str) -> None:
        lines = [line.removeprefix("# ") for line in commands.splitlines()]
        script = "\n".join(line for line in lines if "tar -C / " not in line and "systemctl" not in line)
        for there, place in here.items():
            script = script.replace(there, str(place))
        subprocess.run(["bash", "-euc", script], check=True)

    follow(backup)
    daemon.sh("mkdir agents/later")
    daemon.kill()
    follow(restore)
    daemon.start()
    assert sorted(os.listdir(daemon.root / "agents")) == ["ada", "unfinished"]
    assert daemon.read("agents/ada/requests/latest/response") == answer
    assert daemon.read("contexts/chat/messages.jsonl") == messages
    assert unfinished.read_text()
    with (daemon.state / "audit.jsonl").open("rb") as lines:
        assert hashchain.verify(lines)[:2] == (2, [])

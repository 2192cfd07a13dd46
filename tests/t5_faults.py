"""Faults of real machines: kills, full disks, stale mounts, broken models and configurations."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aiosd.host import mount
from tests import gguf_files
from tests.running import REPOSITORY, Daemon, together, wait_until

pytestmark = [pytest.mark.mount]
PARAMS = '{"max_tokens": 60, "ignore_eos": true, "temperature": 0.9, "seed": 3}'
MakeDaemon = Callable[..., Daemon]


def answers(daemon: Daemon, count: int, meanwhile: Callable[[], None] = lambda: None) -> list[str]:
    """Let `count` agents ask at once, each its own question. Return the answers."""
    got = [""] * count

    def client(i: int) -> None:
        path = daemon.root / f"agents/q{i}"
        path.mkdir(exist_ok=True)
        (path / "params.json").write_text(PARAMS)
        fd = os.open(path / "syscall/llm", os.O_RDWR)
        os.write(fd, f"question {i}".encode())
        data = b""
        while piece := os.read(fd, 4096):
            data += piece
        os.close(fd)
        got[i] = data.decode()

    together(meanwhile, *(lambda i=i: client(i) for i in range(count)))
    return got


def test_workers_killed_during_generation_cost_no_answer(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon("[engine]\nmax_running = 4\n").start()
    expected = [answers_one(daemon, i) for i in range(16)]

    def kill() -> None:
        for _ in range(2):
            before = daemon.table("scheduler/stats")["tokens"]
            wait_until(lambda b=before: daemon.table("scheduler/stats")["tokens"] != b, "tokens", 60)  # type: ignore[misc]
            pids = daemon.worker_pids()
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            wait_until(lambda p=pids: daemon.worker_pids() not in ([], p), "the next worker", 60)  # type: ignore[misc]

    assert answers(daemon, 16, kill) == expected
    assert daemon.table("status")["waiting"] == "0"
    assert int(daemon.table("status")["worker_restarts"]) >= 2


def answers_one(daemon: Daemon, i: int) -> str:
    path = daemon.root / f"agents/q{i}"
    path.mkdir()
    (path / "params.json").write_text(PARAMS)
    (path / "syscall/llm").write_text(f"question {i}")
    return (path / "syscall/llm").read_bytes().decode()


def test_a_killed_daemon_leaves_no_worker_and_loses_no_request(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon("[engine]\nmax_running = 1\n").start()
    expected = [answers_one(daemon, i) for i in range(6)]
    workers = daemon.worker_pids()
    for i in range(6):
        (daemon.root / f"agents/q{i}/syscall/llm").write_text(f"question {i}")
    daemon.kill()
    for pid in workers:
        wait_until(lambda p=pid: not Path(f"/proc/{p}").exists(), "the worker's end")  # type: ignore[misc]
    with pytest.raises(OSError, match="not connected"):
        daemon.read("status")
    daemon.start()  # clears the stale mount
    assert [(daemon.root / f"agents/q{i}/syscall/llm").read_bytes().decode() for i in range(6)] == expected
    assert daemon.table("agents/q0/usage")["requests"] == "2"


def test_a_mount_in_the_root_folder_is_seen() -> None:
    """/aios is such a mount. If it is not seen, nobody can remove the mount of a killed daemon."""
    assert mount.is_mounted(Path("/proc"))
    assert not mount.is_mounted(Path("/proc/self"))


def test_a_stopped_daemon_ends_blocked_readers_and_leaves_nothing(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon().start()
    (daemon.root / "agents/a").mkdir()
    daemon.write("agents/a/ctl", "pause")
    daemon.write("agents/a/syscall/llm", "x")
    readers = [
        subprocess.Popen(["cat", daemon.root / "agents/a/syscall/llm"], stderr=subprocess.PIPE)
        for _ in range(20)
    ]
    workers = daemon.worker_pids()
    assert daemon.stop() == 0
    for reader in readers:
        assert reader.wait(5) == 1
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert not daemon.root.exists(), "the mount point it made is removed again"
    assert str(daemon.root) not in Path("/proc/self/mounts").read_text()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "none", disk], check=True)
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.root
def test_a_full_disk_is_told_at_the_write_and_the_daemon_goes_on(
    make_daemon: MakeDaemon, small_disk: Path
) -> None:
    daemon = make_daemon("[limits]\ndisk_reserve_bytes = 2000000\n", state=small_disk / "state").start()
    (daemon.root / "agents/a").mkdir()
    daemon.write("agents/a/params.json", '{"max_tokens": 5}')
    (small_disk / "filler").write_bytes(b"x" * (small_disk_free(small_disk) - 1_000_000))
    done = daemon.sh("echo hi > agents/a/syscall/llm")
    assert "No space left on device" in done.stderr
    assert "the disk is full" in daemon.read("agents/a/log.jsonl")
    (small_disk / "filler").unlink()
    done = daemon.sh("echo hi > agents/a/syscall/llm; cat agents/a/syscall/llm")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.root
def test_a_disk_that_fills_while_a_request_runs_loses_no_answer(
    make_daemon: MakeDaemon, small_disk: Path
) -> None:
    daemon = make_daemon("[limits]\ndisk_reserve_bytes = 0\n", state=small_disk / "state").start()
    (daemon.root / "agents/a").mkdir()
    daemon.write("agents/a/params.json", '{"max_tokens": 5}')
    [worker] = daemon.worker_pids()
    os.kill(worker, signal.SIGSTOP)
    for _ in range(20):
        daemon.write("agents/a/syscall/llm", "x" * 500)
    subprocess.run(["dd", "if=/dev/zero", f"of={small_disk}/filler", "bs=4k"], stderr=subprocess.DEVNULL)
    assert small_disk_free(small_disk) == 0
    os.kill(worker, signal.SIGCONT)
    wait_until(lambda: daemon.table("scheduler/stats")["done"] == "20", "the answers", 60)
    assert daemon.read("agents/a/syscall/llm")
    (small_disk / "filler").unlink()
    daemon.sh("echo hi > agents/a/syscall/llm; cat agents/a/syscall/llm")
    assert daemon.table("agents/a/usage")["requests"] == "21"
    assert daemon.stop() == 0
    daemon.start()
    assert daemon.table("agents/a/usage")["requests"] == "21", "what could not be stored was stored later"


@pytest.mark.root
def test_a_model_is_removed_from_a_full_disk(
    make_daemon: MakeDaemon, small_disk: Path, tmp_path: Path
) -> None:
    daemon = make_daemon("[limits]\ndisk_reserve_bytes = 0\n", state=small_disk / "state").start()
    (daemon.root / "agents/a").mkdir()
    (daemon.root / "models/m").mkdir()
    daemon.write("models/m/ctl", f"pull {gguf_files.make(tmp_path / 'm.gguf', 'Q4_0')}")
    wait_until(lambda: daemon.read("models/m/state") == "absent\n", "the pull", 60)
    daemon.write("models/m/ctl", "keep_alive 1m")  # which the database forgets with it
    subprocess.run(["dd", "if=/dev/zero", f"of={small_disk}/filler", "bs=4k"], stderr=subprocess.DEVNULL)
    assert small_disk_free(small_disk) == 0
    with pytest.raises(OSError, match="No space left"):  # the database has no room for one page more
        write_much(daemon)
    (daemon.root / "models/m").rmdir()
    assert small_disk_free(small_disk) > 0
    assert "m" not in os.listdir(daemon.root / "models")
    (small_disk / "filler").unlink()


def write_much(daemon: Daemon) -> None:
    for number in range(1000):
        daemon.write("agents/a/nice", str(number % 20))


def small_disk_free(disk: Path) -> int:
    status = os.statvfs(disk)
    return status.f_bavail * status.f_frsize


def run_aiosd(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "aiosd", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)


def test_a_second_daemon_on_the_same_mount_refuses_and_names_the_first(
    make_daemon: MakeDaemon, tmp_path: Path
) -> None:
    daemon = make_daemon().start(ready=False)
    done = run_aiosd("--mount", daemon.root, "--state", tmp_path / "other")
    assert done.returncode == 1
    assert daemon.process is not None
    assert f"pid {daemon.process.pid}" in done.stderr
    assert "--mount" in done.stderr
    assert daemon.read("version")


@pytest.mark.root
def test_a_second_daemon_on_the_same_state_refuses_and_names_the_first(
    make_daemon: MakeDaemon, tmp_path: Path
) -> None:
    daemon = make_daemon().start()
    assert daemon.process is not None
    (daemon.root / "agents/a").mkdir()
    command = [sys.executable, "-m", "aiosd", "--mount", f"{tmp_path}/other", "--state", str(daemon.state)]
    second = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert second.returncode != 0
    assert f"is in use by aiosd with pid {daemon.process.pid}" in second.stderr
    assert "--state" in second.stderr
    assert not (tmp_path / "other").exists()
    assert daemon.sh("echo hi > agents/a/syscall/llm; cat agents/a/syscall/llm").stdout
    daemon.kill()
    daemon.start()
    assert daemon.sh("ls agents").stdout == "a\n"


def test_a_bad_configuration_is_told_with_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "aiosd.toml"
    file.write_text("[scheduler]\npolicy = 'fifo'\nquantums = 3\n")
    done = run_aiosd("--config", file, "--mount", tmp_path / "m", "--state", tmp_path / "s")
    assert done.returncode == 78
    assert f"{file}:3: unknown key 'quantums'" in done.stderr
    assert not (tmp_path / "m").exists()


def test_sighup_takes_over_a_good_configuration_and_keeps_the_old_on_a_bad_one(
    make_daemon: MakeDaemon,
) -> None:
    daemon = make_daemon().start()
    assert daemon.process is not None
    file = daemon.log.parent / "aiosd.toml"
    file.write_text("[scheduler]\npolicy = 'rr'\nquantums = 5\n")
    daemon.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "aiosd.toml:3: unknown key" in daemon.log.read_text(), "the refusal")
    assert daemon.read("scheduler/policy") == "fair\n"
    file.write_text("[scheduler]\npolicy = 'rr'\nquantum = 5\n[quota]\nqueued_requests = 0\n")
    daemon.process.send_signal(signal.SIGHUP)
    wait_until(lambda: daemon.read("scheduler/policy") == "rr\n", "the reload")
    assert daemon.read("scheduler/quantum") == "5\n"
    done = daemon.sh("mkdir agents/a; echo hi > agents/a/syscall/llm")
    assert "temporarily unavailable" in done.stderr


def test_a_broken_model_is_told_by_its_state_and_at_the_write(
    make_daemon: MakeDaemon, random_llama: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(random_llama, broken)
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    daemon = make_daemon(model=broken).start(ready=False)
    wait_until(lambda: daemon.model_state() == "failed", "the failure", 90)
    assert "model.safetensors" in daemon.read("models/broken/info.json")
    done = daemon.sh("mkdir agents/a; echo hi > agents/a/syscall/llm; cat agents/a/log.jsonl")
    assert "write error" in done.stderr
    assert "model.safetensors" in done.stdout
    (broken / "model.safetensors").write_bytes(weights)
    daemon.write("models/broken/ctl", "load")
    wait_until(lambda: daemon.model_state() == "ready", "the model", 90)
    done = daemon.sh("echo hi > agents/a/syscall/llm; cat agents/a/syscall/llm")
    assert done.returncode == 0


def aiosctl(daemon: Daemon, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "aiosd.cli.aiosctl", "--mount", daemon.root, *arguments]
    return subprocess.run(
        list(map(str, command)), cwd=REPOSITORY, capture_output=True, text=True, timeout=100
    )


def test_a_model_is_added_used_and_removed_by_aiosctl(
    make_daemon: MakeDaemon, random_llama: Path, tmp_path: Path
) -> None:
    daemon = make_daemon().start()
    missing = aiosctl(daemon, "model", "add", tmp_path)
    assert missing.returncode == 1
    assert "config.json" in missing.stderr
    added = aiosctl(daemon, "-v", "model", "add", random_llama, "--name", "second")
    assert added.stdout == "second: ready\n", added.stderr
    assert f"+ mkdir {daemon.root}/models/second" in added.stderr
    request = '{"prompt": "hi", "model": "second", "max_tokens": 3, "ignore_eos": true}'
    asked = aiosctl(daemon, "ask", "ada", request)
    assert '"model":"second"' in asked.stdout, asked.stderr
    assert daemon.stop() == 0
    daemon.start(ready=False)
    assert daemon.read("models/second/state") == "absent\n", "it is remembered"
    assert '"model":"second"' in aiosctl(daemon, "ask", "ada", request).stdout
    assert aiosctl(daemon, "model", "remove", "second").returncode == 0
    assert not (daemon.root / "models/second").exists()
    assert aiosctl(daemon, "policy", "nosuch").returncode == 1
    assert aiosctl(daemon, "policy", "rr").returncode == 0
    assert daemon.read("scheduler/policy") == "rr\n"


def test_a_served_name_is_replaced_only_on_demand_and_for_good(
    make_daemon: MakeDaemon, random_llama: Path, slow_llama: Path, tmp_path: Path
) -> None:
    daemon = make_daemon().start()
    name = random_llama.name
    for replace in ([], ["--replace"]):
        refused = aiosctl(daemon, "model", "add", slow_llama, "--name", name, *replace)
        assert refused.returncode == 1
        assert json.loads(daemon.read(f"models/{name}/info.json"))["path"] == str(random_llama)
    assert aiosctl(daemon, "model", "add", random_llama, "--name", "second").returncode == 0
    assert aiosctl(daemon, "model", "add", random_llama, "--name", "second").returncode == 0, "the same again"
    refused = aiosctl(daemon, "model", "add", slow_llama, "--name", "second")
    assert refused.returncode == 1
    assert str(random_llama) in refused.stderr
    assert "--replace" in refused.stderr
    replaced = aiosctl(daemon, "model", "add", slow_llama, "--name", "second", "--replace")
    assert replaced.stdout == "second: ready\n", replaced.stderr
    assert daemon.stop() == 0
    daemon.start(ready=False)
    assert json.loads(daemon.read("models/second/info.json"))["path"] == str(slow_llama)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    failed = aiosctl(daemon, "model", "add", empty)
    assert "model_type" in failed.stderr
    assert not (daemon.root / "models/empty").exists(), "no broken entry stays"


def test_aiosctl_says_what_was_refused_and_why(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    daemon = make_daemon().start()
    name = daemon._model.name
    daemon.sh("mkdir agents/a")
    gguf = tmp_path / "m.gguf"
    gguf.touch()
    daemon.sh(f"echo dance > models/{name}/ctl")  # of another program: not the reason of what comes
    for arguments, said in (
        (["policy", "nosuch"], "scheduler/policy: Invalid argument: no policy 'nosuch'; policies are"),
        (["model", "add", tmp_path], f"config.json, but GGUF files; name the file: {gguf}"),
        (["model", "remove", name], f"models/{name}: Device or resource busy: model {name} is in the config"),
        (["ask", "-m", name, '{"prompt": 1}'], f"models/{name}/llm: Invalid argument: prompt"),
        (["cancel", "999"], "no unfinished request 999"),
        (["log", "nobody"], f"No such file or directory: there is no agent nobody; ls {daemon.root}/agents"),
        (["ask", "-m", "nosuch", "hi"], "no model 'nosuch' for you"),
        (["model", "remove", "nosuch"], "there is no model nosuch; ls"),
        (["model", "add", "/"], "/ gives the model no name: add --name NAME"),
        (
            ["user", "remove", "nosuchuser"],
            "no user nosuchuser; getent passwd lists the users. Name a user who",
        ),
        (["user", "remove", "nobody", "--to", "nobody"], "nobody has the objects already"),
    ):
        done = aiosctl(daemon, *arguments)
        assert done.returncode == 1
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr
    binary = subprocess.run(
        [sys.executable, "-m", "aiosd.cli.aiosctl", "--mount", daemon.root, "ask", "a"],
        cwd=REPOSITORY, input=b"\xff\xfe", capture_output=True, timeout=100,
    )  # fmt: skip
    assert b"not UTF-8" in binary.stderr
    assert b"Traceback" not in binary.stderr
    ctl = f"{sys.executable} -m aiosd.cli.aiosctl --mount {daemon.root}"
    for script, status, said in (
        ("ask a <&-", 1, "the request is empty; write a question"),
        ("ask a hi >&-", 1, "standard output: Bad file descriptor"),
        ("ask a hi > /dev/full", 1, "standard output: No space left on device"),
        ("tools > /dev/full", 1, "standard output: No space left on device"),
        ("status 2>&- <&-", 0, ""),
    ):
        closed = daemon.sh(f"cd {REPOSITORY}; {ctl} {script}")
        assert (closed.returncode, len(closed.stderr.splitlines())) == (status, status), closed.stderr
        assert said in closed.stderr
    cut = daemon.sh(
        f"cd {REPOSITORY}; {sys.executable} -m aiosd.cli.aiosctl --mount {daemon.root} tools | true"
    )
    assert cut.stderr == ""


def test_a_user_reads_why_he_was_refused_and_nobody_else(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon().start()
    for parent in [daemon.root.parent, *daemon.root.parent.parents][:4]:
        parent.chmod(parent.stat().st_mode | 0o055)
    daemon.sh("echo nosuch > scheduler/policy")
    assert "no policy 'nosuch'" in json.loads(daemon.read("refused.jsonl").splitlines()[-1])["message"]
    other = ["setpriv", "--reuid=4242", "--regid=4242", "--clear-groups", "cat", "refused.jsonl"]
    done = subprocess.run(other, cwd=daemon.root, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")

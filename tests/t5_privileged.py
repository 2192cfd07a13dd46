"""A daemon without privileges and aios-privileged, started as the units start them, but without systemd."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aiosd.client import Files
from aiosd.cores.wire import Channel
from aiosd.host import mount, proc
from aiosd.privilege import orders
from tests.running import DAEMON, PYTHON, REPOSITORY, Daemon, open_to_all, wait_until

pytestmark = [pytest.mark.mount, pytest.mark.root, pytest.mark.slow]
ALICE, BOB = 60501, 60502


def needs_python() -> None:
    """The daemon's user runs the checkout with the system's Python."""
    if not os.path.exists(PYTHON):
        pytest.skip(f"the daemon's user has no Python that fits this .venv: there is no {PYTHON}")
    closed = [step for step in (REPOSITORY, *REPOSITORY.parents) if not step.stat().st_mode & 0o001]
    if closed:
        pytest.skip(
            f"other users cannot go to {closed[-1]}: make test shows them the checkout, and so runs this"
        )


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, random_llama: Path) -> Iterator[Daemon]:
    needs_python()
    folder = tmp_path_factory.mktemp("helped")
    open_to_all(folder)
    open_to_all(random_llama / "model.safetensors")
    made = Daemon(folder, random_llama)
    made.helped = True
    try:
        yield made.start()
    finally:
        made.clean()


def call(daemon: Daemon, tool: str, arguments: object, uid: int = ALICE) -> subprocess.CompletedProcess[str]:
    script = f"exec 3<>tools/{tool}/call; cat >&3; cat <&3"
    return subprocess.run(
        ["bash", "-c", script], input=json.dumps(arguments), capture_output=True, text=True,
        cwd=daemon.root, user=uid, group=uid, extra_groups=[], timeout=60,
    )  # fmt: skip


def test_the_daemon_has_no_capability_and_the_tree_is_roots(daemon: Daemon) -> None:
    assert daemon.process
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    assert f"Uid:\t{DAEMON}\t{DAEMON}" in status
    assert all(f"Cap{which}:\t{0:016x}" in status for which in ("Prm", "Eff", "Bnd"))
    assert (daemon.root.stat().st_uid, (daemon.root / "scheduler/policy").stat().st_uid) == (0, 0)
    assert daemon.sh("echo fifo > scheduler/policy").returncode == 0
    assert subprocess.run(["sh", "-c", "echo rr > scheduler/policy"], cwd=daemon.root, user=DAEMON).returncode


def test_tools_run_as_their_callers(daemon: Daemon) -> None:
    for uid in (ALICE, BOB):
        said = call(daemon, "calc", {"expression": "2**64"}, uid)
        assert (said.stdout, said.stderr) == ("18446744073709551616\n", "")
    subprocess.run(["mkdir", "agents/alice"], cwd=daemon.root, user=ALICE, group=ALICE, check=True)
    body = {"name": "write_file", "arguments": {"path": "note", "content": "hers"}}
    done = subprocess.run(
        ["bash", "-c", "exec 3<>agents/alice/syscall/tool; cat >&3; cat <&3"],
        input=json.dumps(body), text=True, capture_output=True, cwd=daemon.root,
        user=ALICE, group=ALICE, extra_groups=[],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [note] = daemon.work.glob(f"{ALICE}/*/note")
    assert (note.read_text(), note.stat().st_uid) == ("hers", ALICE)
    subprocess.run(["rmdir", "agents/alice"], cwd=daemon.root, user=ALICE, group=ALICE, check=True)
    wait_until(lambda: not note.exists(), "the end of her folder")


def test_a_users_own_program_comes_from_the_daemons_state(daemon: Daemon) -> None:
    script = """
        mkdir tools/who
        printf '#!/bin/sh\nid -u; cat /proc/self/status | grep CapEff\n' > tools/who/program
        cat > tools/who/manifest <<END
description = "who"
command = ["./program"]
parameters = { type = "object" }
END
    """
    assert subprocess.run(["bash", "-ec", script], cwd=daemon.root, user=BOB, group=BOB).returncode == 0
    assert call(daemon, "who", {}, BOB).stdout == f"{BOB}\nCapEff:\t{0:016x}\n"


def test_a_descriptor_that_is_still_open_keeps_a_request_from_being_submitted(daemon: Daemon) -> None:
    """The daemon itself cannot see whether the last descriptor was closed."""
    script = "exec 3>agents/many/syscall/llm; echo one >&3; ls agents/many/requests; echo two >&3; exec 3>&-"
    done = daemon.sh(
        f"mkdir agents/many; {script}; cat agents/many/requests/latest/request; rmdir agents/many"
    )
    assert (done.stdout, done.stderr) == ("new\none\ntwo\n", "")


def test_who_has_many_files_open_and_closes_without_end_delays_nobody_else(daemon: Daemon) -> None:
    """aios-privileged looks at all files of a process that closes a written one."""
    program = """
import os, threading
os.mkdir("agents/busy")
open("agents/busy/ctl", "w").write("pause")
kept = [os.open("/dev/null", os.O_RDONLY) for _ in range(3900)]
def close():
    while True:
        try:
            file = os.open("agents/busy/syscall/llm", os.O_WRONLY)
            os.write(file, b"x")
            os.close(file)
        except OSError:
            pass
for _ in range(16):
    threading.Thread(target=close).start()
print("ready", flush=True)
"""
    with subprocess.Popen(
        ["prlimit", "--nofile=4096", PYTHON, "-c", program], cwd=daemon.root, user=ALICE, group=ALICE,
        extra_groups=[], stdout=subprocess.PIPE,
    ) as busy:  # fmt: skip
        try:
            assert busy.stdout
            assert busy.stdout.readline() == b"ready\n"
            took = []
            for _ in range(8):
                began = time.monotonic()
                assert call(daemon, "calc", {"expression": "6*7"}, BOB).stdout == "42\n"
                took.append(time.monotonic() - began)
        finally:
            busy.kill()
    (daemon.root / "agents/busy").rmdir()
    assert sorted(took)[4] < 2, "five seconds for each close, were it to wait for those of the other user"


def test_the_audit_log_has_the_program_that_called(daemon: Daemon) -> None:
    assert call(daemon, "calc", {"expression": "1"}).stdout == "1\n"
    lines = [json.loads(line) for line in daemon.read("access/audit.jsonl").splitlines()]
    assert lines[-2]["exe"].endswith(("/cat", "/bash"))


def test_the_configuration_is_read_again_when_the_daemon_reads_it(daemon: Daemon) -> None:
    before = call(daemon, "python", {"code": "print('x' * 5000)"})
    assert len(before.stdout) == 5001
    extra = daemon.root.parent / "conf.d/output.toml"
    extra.write_text("[tools]\noutput_bytes = 1000\n")
    daemon.signal(signal.SIGHUP)
    read = "aiosd.privilege.administrator: configuration reloaded"
    wait_until(lambda: read in daemon.log.read_text(), "aios-privileged to have read it")
    assert len(call(daemon, "python", {"code": "print('x' * 5000)"}).stdout) == 1000
    extra.unlink()
    daemon.signal(signal.SIGHUP)


def test_a_worker_gets_only_existing_devices(tmp_path: Path, random_llama: Path) -> None:
    needs_python()
    open_to_all(tmp_path)
    table = tmp_path / "table"
    table.write_text('[[device]]\nuuid = "GPU-12345678"\n')
    own = Daemon(tmp_path, random_llama, f'[engine]\ndevice_table = "{table}"\n')
    own.helped = True
    own._start_privileged()
    try:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(30)
        sock.connect(str(tmp_path / "privileged"))
        channel = Channel(sock, orders.ANSWERS)
        assert isinstance(channel.receive(), orders.Mounted)
        channel.send(orders.Probe())
        found = channel.receive()
        assert [facts["uuid"] for facts in found.devices] == ["GPU-12345678", "cpu"]
        (tmp_path / "conf.d/mistake.toml").write_text("[engine]\nno_such_key = 1\n")
        channel.send(orders.Probe())
        assert channel.receive() == found, "a file with a mistake counts for nothing, as in the daemon"
        channel.send(orders.WorkerOrder(99, "start", ["GPU-87654321"]))
        assert channel.receive() == orders.WorkerFailed(
            99, "there is no device GPU-87654321; cat /aios/devices"
        )
    finally:
        own.clean()


class Opener:
    """Opens and reads a file of the tree again and again, and keeps the errors."""

    def __init__(self, read: Callable[[str], str]) -> None:
        self.errors: list[str] = []
        self.count = 0
        self._read = read
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._open)

    def __enter__(self) -> Opener:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        self._thread.join(60)

    def _open(self) -> None:
        while not self._enough.is_set():
            try:
                self._read("version")
                self.count += 1
            except OSError as error:
                self.errors.append(errno.errorcode[error.errno or 0])


def test_no_open_fails_while_the_daemon_restarts(daemon: Daemon) -> None:
    with Opener(daemon.read) as opener:
        for _ in range(3):
            before = opener.count
            daemon.stop()
            daemon.start(ready=False)
            wait_until(lambda: opener.count > before + 10, "clients")  # noqa: B023  # it is called in here
    assert opener.errors == []
    assert kinds(daemon.root) == ["tmpfs", "fuse.aiosd"]


def kinds(folder: Path) -> list[str]:
    """Return the kinds of what is mounted at the folder, the lowest first."""
    return [point.kind for point in proc.mounts() if point.folder == folder]


def test_aiosctl_tries_again_when_the_daemon_was_killed(daemon: Daemon) -> None:
    with Opener(Files(daemon.root, verbose=False).read) as opener:
        for _ in range(5):
            before = opener.count
            daemon.kill()
            daemon.start(ready=False)
            wait_until(lambda: opener.count > before, "a read")  # noqa: B023  # it is called in here
    assert opener.errors == []


@pytest.mark.parametrize("beneath", [mount.BENEATH, 1 << 20], ids=["Linux 6.5", "older"])
def test_one_tree_takes_the_place_of_the_other(
    beneath: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older Linux refuses the flag, as it does any that it does not know."""
    monkeypatch.setattr(mount, "BENEATH", beneath)
    mount.guard(tmp_path)
    first = mount.open_fuse(tmp_path, shared=True)
    second = mount.replace(tmp_path)
    try:
        os.close(first)
        assert kinds(tmp_path) == ["tmpfs", "fuse.aiosd"]
        assert mount.is_tree(tmp_path)
    finally:
        os.close(second)
        mount.clear_stale(tmp_path)
        assert mount.is_guard(tmp_path)
        mount.unmount(tmp_path)


def test_after_an_upgrade_the_helper_goes_on_as_the_new_program(daemon: Daemon) -> None:
    """dpkg gives each file another inode and time."""
    assert daemon.privileged
    became = "going on as the program that was installed meanwhile"
    before = daemon.log.read_text().count(became)
    os.utime(REPOSITORY / "aiosd/__init__.py")
    with Opener(daemon.read) as opener:
        daemon.stop()
        daemon.start()
    assert opener.errors == []
    assert daemon.log.read_text().count(became) == before + 1
    assert daemon.privileged.poll() is None
    assert call(daemon, "calc", {"expression": "1+1"}).stdout == "2\n"
    daemon.stop()
    daemon.start()
    assert daemon.log.read_text().count(became) == before + 1, "once is enough"


def test_the_tree_moves_when_the_configuration_names_another_folder(
    tmp_path: Path, random_llama: Path
) -> None:
    """A restart of the daemon alone is enough, as aiosd.toml(5) says."""
    needs_python()
    open_to_all(tmp_path)
    own = Daemon(tmp_path, random_llama)
    own.helped = True
    own.start(ready=False)
    before, places = own.root, tmp_path / "conf.d/places.toml"
    try:
        own.stop()
        used = tmp_path / "used"
        (used / "sub").mkdir(parents=True)
        moved = tmp_path / "else"
        for folder in (used, moved):
            places.write_text(places.read_text().replace(str(own.root), str(folder)))
            own.root = folder
            if folder == used:
                with pytest.raises(AssertionError, match="has files, which the tree would hide"):
                    own.start(ready=False)
        own.start(ready=False)
        assert own.read("version")
        assert os.listdir(before) == []
        assert kinds(before) == []
        assert kinds(moved) == ["tmpfs", "fuse.aiosd"]
    finally:
        own.clean()


def test_nobody_can_write_into_the_folder_while_nothing_runs(tmp_path: Path, random_llama: Path) -> None:
    needs_python()
    open_to_all(tmp_path)
    own = Daemon(tmp_path, random_llama)
    own.helped = True
    own.start(ready=False)
    try:
        own.stop()
        assert own.privileged
        own.privileged.terminate()
        own.privileged.wait(30)
        assert os.listdir(own.root) == []
        for make in (os.mkdir, os.mkfifo):
            with pytest.raises(OSError, match="Read-only file system"):
                make(own.root / "agents")
        own.start(ready=False)
        assert own.read("version")
    finally:
        own.clean()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--socket", "/nonexistent/socket"], "No such file or directory; name another place with --socket"),
        (["--socket", "/tmp/" + "x" * 120], "AF_UNIX path too long; name another place with --socket"),
        (["--state", "/proc/state"], "No such file or directory; name another folder with --state"),
        (["--user", "nosuchuser"], "no user nosuchuser; systemd-sysusers makes it"),
    ],
)
def test_a_helper_that_cannot_start_says_what_to_do(options: list[str], said: str, tmp_path: Path) -> None:
    config = tmp_path / "aiosd.toml"
    config.write_text(f'[daemon]\nmount = "{tmp_path}/mnt"\nstate = "{tmp_path}/state"\n')
    command = [sys.executable, "-m", "aiosd.privilege.helper", "--config", str(config), "--user", "0"]
    command += ["--socket", str(tmp_path / "socket"), "--state", str(tmp_path / "own"), *options]
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=30)
    finally:
        mount.unmount(tmp_path / "mnt")
    assert done.returncode
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert kinds(tmp_path / "mnt") == []


def test_a_client_waits_while_no_daemon_runs(daemon: Daemon) -> None:
    gone = daemon.log.read_text().count("the daemon is gone")
    daemon.kill()
    said: list[str] = []
    wait_until(lambda: daemon.log.read_text().count("the daemon is gone") > gone, "its end")
    thread = threading.Thread(target=lambda: said.append(daemon.read("version")))
    thread.start()
    assert not said
    daemon.start(ready=False)
    thread.join(60)
    assert said == [daemon.read("version")]


def test_the_daemon_ends_without_its_helper_and_tools_end_with_both(daemon: Daemon) -> None:
    assert daemon.privileged
    assert daemon.process
    waits = subprocess.Popen(
        ["bash", "-c", "exec 3<>tools/python/call; cat >&3; cat <&3"], cwd=daemon.root, user=BOB, group=BOB,
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert waits.stdin
    waits.stdin.write(json.dumps({"code": "import os; os.execv('/bin/sleep', ['sleep', '4739'])"}).encode())
    waits.stdin.close()

    def there() -> bool:
        return subprocess.run(["pgrep", "-f", "sleep 4739"], stdout=subprocess.DEVNULL).returncode == 0

    wait_until(there, "the tool")
    daemon.privileged.send_signal(signal.SIGKILL)
    assert daemon.process.wait(30) == 1
    wait_until(lambda: not there(), "the tool's end")
    waits.wait(30)
    daemon.start()
    assert call(daemon, "calc", {"expression": "1+1"}).stdout == "2\n"

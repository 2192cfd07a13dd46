"""Start, use and kill a real daemon on a private mount."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
START_S = 120.0
DAEMON = 60777  # uid of a daemon with aios-privileged
SETPRIV = [
    "setpriv", f"--reuid={DAEMON}", f"--regid={DAEMON}", "--clear-groups", "--no-new-privs",
    "--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all",
]  # fmt: skip
# That user may not reach the interpreter of a checkout.
PYTHON = f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"
PATHS = {"PYTHONPATH": f"{REPOSITORY}:{sysconfig.get_path('purelib')}"}


class Daemon:
    """`root` is the mount. At the end, an unexpected warning in the log fails the test."""

    helped = "HELPED" in os.environ  # with aios-privileged and a user of its own, as under systemd

    def __init__(self, folder: Path, model: Path, config: str = "", state: Path | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.root, self.state, self.log = folder / "mnt", state or folder / "state", folder / "log"
        self._model = model
        self._config = folder / "aiosd.toml"
        self._config.write_text(config)
        self.system_users: tuple[str, ...] = ("root",)  # with aios-privileged: tests call tools as root too
        self.env: dict[str, str] = {}
        self.process: subprocess.Popen[bytes] | None = None
        self.privileged: subprocess.Popen[bytes] | None = None

    def start(self, ready: bool = True) -> Daemon:
        options = ["--mount", str(self.root), "--state", str(self.state), "--model", str(self._model)]
        if self.helped:
            self._start_privileged()
            self.process = self._run([*SETPRIV, PYTHON, "-P"], "aiosd", *options, *self._helper)
        else:
            self.process = self._run([sys.executable], "aiosd", *options)
        wait_until(lambda: self._ended() or self._serves(), "the mount")
        if ready:
            wait_until(lambda: self.model_state() == "ready", "the model", START_S)
        return self

    @property
    def work(self) -> Path:
        """The folder of work folders."""
        return self._config.with_name("privileged-state") / "work" if self.helped else self.state / "work"

    @property
    def _helper(self) -> list[str]:
        return ["--privileged", str(self._config.with_name("privileged"))]

    def _start_privileged(self) -> None:
        """Start aios-privileged once. It stays while the daemon stops and starts."""
        self.state.mkdir(parents=True, exist_ok=True)
        os.chown(self.state, DAEMON, DAEMON)
        open_to_all(self._config.parent)
        open_to_all(self._model)
        if (weights := self._model / "model.safetensors").exists():
            weights.chmod(0o644)
        if self.privileged and self.privileged.poll() is None:
            return
        extra = self._config.with_name("conf.d")
        extra.mkdir(exist_ok=True)
        places = f"mount = {toml(self.root)}\nstate = {toml(self.state)}\n"
        (extra / "places.toml").write_text(
            f"[daemon]\n{places}[tools]\nsystem_users = {json.dumps(self.system_users)}\n"
        )
        Path(self._helper[1]).unlink(missing_ok=True)  # left by a killed one
        self.privileged = self._run(
            [PYTHON, "-P"], "aiosd.privilege.helper",
            "--socket", self._helper[1], "--user", str(DAEMON), "--state", str(self.work.parent),
        )  # fmt: skip
        wait_until(Path(self._helper[1]).exists, "aios-privileged")

    def _run(self, command: list[str], module: str, *options: str) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [*command, "-m", module, "--config", str(self._config), *options],
                cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={**os.environ, "PYTHONFAULTHANDLER": "1", **(PATHS if self.helped else {}), **self.env},
            )  # fmt: skip

    def stop(self) -> int:
        self.signal(signal.SIGTERM)
        assert self.process is not None
        return self.process.wait(30)

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def clean(self) -> None:
        if self.process and self.process.poll() is None:
            self.signal(signal.SIGINT)  # with the one from stop() this is the second, which ends the drain
            self.stop()
        if self.privileged:
            self.privileged.terminate()
            self.privileged.wait(30)
        subprocess.run(["umount", "-l", self.root], stderr=subprocess.DEVNULL)

    def says(self, words: str) -> None:
        """Wait for words in the log, which is written a moment later."""
        wait_until(lambda: words in self.log.read_text(), f"{words!r} in the log")

    def read(self, path: str) -> str:
        return (self.root / path).read_text()

    def write(self, path: str, text: str) -> None:
        with open(self.root / path, "wb", buffering=0) as file:
            file.write(text.encode())

    def table(self, path: str) -> dict[str, str]:
        return dict(line.split(maxsplit=1) for line in self.read(path).splitlines() if " " in line)

    def model_state(self) -> str:
        return self.read(f"models/{self._model.name}/state").strip()

    def worker_pids(self) -> list[int]:
        return [int((w / "pid").read_text()) for w in (self.root / "workers").iterdir()]

    def sh(self, script: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run bash in the mount's root. dash's echo says "I/O error" for every errno."""
        return subprocess.run(
            ["bash", "-c", script], cwd=self.root, capture_output=True, text=True, timeout=120, env=env
        )

    def _serves(self) -> bool:
        """Whether this daemon serves. After a kill the kernel knows the old names for another second."""
        assert self.process is not None
        if self.helped and f"(pid {self.process.pid})\n" not in self.log.read_text().partition("serves")[2]:
            return False
        return self.table("status")["pid"] == str(self.process.pid)

    def _ended(self) -> bool:
        if self.process and self.process.poll() is not None:
            raise AssertionError(f"the daemon ended:\n{self.log.read_text()}")
        return False


class Manager:
    """The socket that a service manager listens at, and what it heard."""

    def __init__(self, socket: socket.socket) -> None:
        self._socket = socket
        self.heard: list[dict[str, str]] = []
        self.listening = threading.Thread(target=self._listen, daemon=True)
        self.listening.start()

    def _listen(self) -> None:
        while data := self._socket.recv(4096):
            self.heard.append(dict(line.split("=", 1) for line in data.decode().splitlines()))

    def count(self, key: str) -> int:
        return sum(key in said for said in self.heard)

    def says(self, key: str, words: str) -> bool:
        return any(words in said.get(key, "") for said in self.heard)


def managed(daemon: Daemon, watchdog_s: float = 0) -> Daemon:
    daemon.env = {"NOTIFY_SOCKET": f"@aiosd-test-{os.getpid()}"}
    if watchdog_s:
        daemon.env["WATCHDOG_USEC"] = str(int(watchdog_s * 1e6))
    return daemon


def toml(path: Path) -> str:
    """As a text of TOML, which knows no surrogate pairs."""
    return json.dumps(str(path), ensure_ascii=False)


def open_to_all(folder: Path) -> None:
    """Let the user of a daemon with aios-privileged reach the folder."""
    for step in (folder, *folder.parents):
        if step.stat().st_mode & 0o055 != 0o055 and step != Path("/"):
            step.chmod(0o755)


def wait_until(condition: Callable[[], bool], what: str, limit_s: float = 60.0) -> None:
    """Poll for a state that sends no event."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        try:
            if condition():
                return
        except OSError:
            pass
        time.sleep(0.02)
    raise AssertionError(f"{what} did not come within {limit_s} s")


def together(*jobs: Callable[[], None]) -> None:
    """Run all at once, and raise the first failure."""
    failures: list[BaseException] = []

    def guarded(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:  # noqa: BLE001 - handed to the test's thread
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def needs(program: str) -> str:
    """Return the path of a program, or skip the test where it is not installed."""
    if found := shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin"):
        return found
    installs = re.search(rf"\s{re.escape(program)}:", (REPOSITORY / "setup").read_text())
    assert installs, f"{program} is not installed, and ./setup --tests does not install it"
    pytest.skip(f"{program} is not installed: ./setup --tests installs it")


def mounts_work() -> bool:
    return os.geteuid() == 0 and os.path.exists("/dev/fuse")

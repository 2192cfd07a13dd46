"""The real programs of aios-gateway(8) on a mount, with a few lines in place of systemd's Accept=yes."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from pathlib import Path

from tests.running import PATHS, PYTHON, REPOSITORY, Daemon, open_to_all, wait_until

FRONT = 60788  # uid of the front, which has no account and needs none
AS_FRONT = [
    "setpriv", f"--reuid={FRONT}", f"--regid={FRONT}", "--clear-groups", "--no-new-privs",
    "--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all",
]  # fmt: skip


class Gateway:
    """`address` is its Unix socket, `port` that of loopback TCP."""

    def __init__(self, folder: Path, daemon: Daemon, *options: str) -> None:
        self._options = options
        folder.mkdir()
        os.chown(folder, FRONT, FRONT)
        open_to_all(folder)
        self.address, self.log, self._root = folder / "gateway.sock", folder / "gateway.log", daemon.root
        self.sessions = list[subprocess.Popen[bytes]]()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / "session.sock"))
        os.chown(folder / "session.sock", FRONT, FRONT)
        self._listener.listen(64)
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = int(free.getsockname()[1])
        self._front: subprocess.Popen[bytes] | None = None

    def start(self) -> Gateway:
        self._accepting.start()
        return self.begin()

    def begin(self) -> Gateway:
        """Start the front, once more after it was killed."""
        self.address.unlink(missing_ok=True)
        options = ["--sessions", str(self.address.with_name("session.sock")), "--socket", str(self.address)]
        options += self._options
        self._front = self._run(
            [*AS_FRONT, PYTHON, "-P", "-m", "aiosd.gateway", *options, "--port", str(self.port)],
            subprocess.DEVNULL,
        )
        wait_until(self._serves, "the gateway")
        return self

    @property
    def pid(self) -> int:
        assert self._front is not None
        return self._front.pid

    def kill(self) -> None:
        assert self._front is not None
        self._front.kill()
        self._front.wait(30)

    def stop(self) -> None:
        assert self._front is not None
        self._front.terminate()
        self._front.wait(30)
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()
        for session in self.sessions:
            session.wait(30)

    def _serves(self) -> bool:
        with socket.create_connection(("127.0.0.1", self.port)):
            return True

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                command = [PYTHON, "-P", "-m", "aiosd.gateway.session", "--address", str(self.address)]
                self.sessions.append(self._run(command, connection.fileno()))

    def _run(self, command: list[str], given: int) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [*command, "--root", str(self._root)], cwd=REPOSITORY, stdin=given, stdout=log, stderr=log,
                env={**os.environ, **PATHS},
            )  # fmt: skip

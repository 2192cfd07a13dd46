"""Start a worker, or a puller (aiosd.modelstore), as a child of the daemon, where no service manager does.

aiosd.privilege.worker_unit.Unit starts a systemd unit instead. The pool (aiosd.cores.pool) treats both alike.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from aiosd.cores import wire


class Process(Protocol):
    """One process. `connect` waits until it runs, and raises OSError when it cannot start. `kinds`: the
    messages that it may send."""

    @property
    def pid(self) -> int: ...
    def connect(self, kinds: Collection[type[Any]] = wire.MESSAGES) -> wire.Channel: ...
    def alive(self) -> bool:
        """Whether the process may still be there."""
        ...

    def terminate(self) -> None: ...
    def kill(self) -> None: ...
    def wait(self, timeout_s: float | None = None) -> str:
        """Wait for the end, and say how the worker ended. Raises TimeoutError."""
        ...

    def close(self) -> None:
        """Release its resources. The worker has ended, and nothing else is called after this."""
        ...


class Launcher(Protocol):
    def __call__(self, id: int, env: Mapping[str, str], devices: Sequence[str]) -> Process:
        """Start a worker. `devices`: UUIDs of the devices that it may open. A child process may open every
        device, and only `env` says which ones it uses. Raises OSError."""
        ...


class Child:
    def __init__(
        self, id: int, env: Mapping[str, str], devices: Sequence[str], module: str = "aiosd.cores.worker"
    ) -> None:
        del id, devices
        self._ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, "--fd", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C on the terminal must reach only the daemon
                env={**os.environ, **env},
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def connect(self, kinds: Collection[type[Any]] = wire.MESSAGES) -> wire.Channel:
        return wire.Channel(self._ours, kinds)

    def alive(self) -> bool:
        return self._process.poll() is None

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout_s: float | None = None) -> str:
        try:
            return f"exit status {self._process.wait(timeout_s)}"
        except subprocess.TimeoutExpired:
            raise TimeoutError from None

    def close(self) -> None:
        self._ours.close()

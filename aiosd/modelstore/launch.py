"""Start a puller as a child of the daemon, where no service manager does (aiosd.privilege.worker_unit)."""

from __future__ import annotations

from typing import Protocol

from aiosd.cores.launch import Child, Process


class PullLauncher(Protocol):
    def __call__(self, id: int, credentials: str) -> Process:
        """Start a puller. `credentials`: the folder of the administrator's secrets. Raises OSError."""
        ...


def child(id: int, credentials: str) -> Process:
    return Child(id, {"CREDENTIALS_DIRECTORY": credentials}, (), "aiosd.modelstore.puller")

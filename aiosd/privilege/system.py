"""What takes privileges: the mount, tools run as their callers, workers with devices of their own.

Here the daemon does it itself, as root for all users or as an ordinary user for himself. A service of systemd
has another process do it, and no privileges itself: aiosd.privilege.helped has the same functions.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from aiosd.cores import devices
from aiosd.cores.devices import Device
from aiosd.cores.launch import Child, Launcher
from aiosd.host import mount
from aiosd.modelstore.launch import PullLauncher, child
from aiosd.tools.run.runner import Places, Runner
from aiosd.tools.run.toolrunner import ToolRunner


class System(Protocol):
    @property
    def launch(self) -> Launcher: ...
    @property
    def pull(self) -> PullLauncher: ...
    @property
    def lost(self) -> bool:
        """Who did it is gone, and the daemon is to end."""
        ...

    @property
    def workers_uid(self) -> int:
        """The user that reads the folders of models."""
        ...

    def tools(self, places: Places) -> ToolRunner: ...
    def devices(self, table: str) -> list[Device]:
        """See aiosd.cores.devices.probe; not before the tools were started."""
        ...

    def reload(self) -> None:
        """The configuration has changed."""

    def mount(self, folder: Path) -> int:
        """The descriptor to serve. Raises ConfigError."""
        ...

    def unmount(self, folder: Path) -> None:
        """Once; no error when that was done."""


class Own:
    lost = False
    workers_uid = os.geteuid()
    _mounted = _made = False
    launch: Launcher = Child
    pull: PullLauncher = staticmethod(child)
    tools: Callable[[Places], ToolRunner] = Runner
    devices = staticmethod(devices.probe)

    def reload(self) -> None:
        """This process has read it."""

    def mount(self, folder: Path) -> int:
        mount.clear_stale(folder)
        self._made = not folder.exists()
        fd = mount.open_fuse(folder, shared=mount.others_allowed())
        self._mounted = True
        return fd

    def unmount(self, folder: Path) -> None:
        if self._mounted:
            mount.unmount(folder)
        self._mounted = False
        if self._made:
            mount.remove_if_empty(folder)

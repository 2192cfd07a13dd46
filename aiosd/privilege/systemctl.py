"""Starts, stops and kills aios-worker@N.service for the daemon, with the devices that it names, and
aios-pull@N.service.

One thread does the orders in their sequence, so that a kill never meets the next worker of the number.
"""

from __future__ import annotations

import logging
import subprocess
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from aiosd.cores import devices
from aiosd.errors import AiosError, Denied, in_words
from aiosd.host.eventloop import EventLoop
from aiosd.privilege.administrator import Administrator
from aiosd.privilege.orders import Found, PullerFailed, PullOrder, WorkerFailed, WorkerOrder

log = logging.getLogger(__name__)

DROP_INS = Path("/run/systemd/system")
WAITING_MOST = 64  # orders; the connection waits while there are more
RUNNING_MOST = {"aios-worker": 256, "aios-pull": 8}  # at once
WORDS = {
    "start": ["restart"],  # a worker of a daemon that just ended may still be ending
    "stop": ["stop", "--no-block"],
    "kill": ["kill", "--signal=SIGKILL"],
}


class Systemctl:
    def __init__(self, administrator: Administrator, answer: Callable[[Any], None]) -> None:
        self._administrator, self._answer = administrator, answer
        self._loop = EventLoop("workers")
        self._room = threading.BoundedSemaphore(WAITING_MOST)
        self.start, self.stop = self._loop.start, self._loop.stop

    def order(self, order: WorkerOrder | PullOrder) -> None:
        self._do(partial(self._order, order))

    def probe(self) -> None:
        self._do(self._probe)

    def _do(self, act: Callable[[], None]) -> None:
        def acting() -> None:
            try:
                act()
            finally:
                self._room.release()

        self._room.acquire()
        self._loop.order(acting)

    def _order(self, order: WorkerOrder | PullOrder) -> None:
        template = "aios-worker" if isinstance(order, WorkerOrder) else "aios-pull"
        unit = f"{template}@{order.id}.service"
        try:
            if order.what == "start":
                check_room(template)
                if isinstance(order, WorkerOrder):
                    self._confine(unit, order.devices)
        except (AiosError, OSError, subprocess.SubprocessError) as error:
            self._failed(order, unit, in_words(error))
            return
        done = systemctl(*WORDS[order.what], unit)
        if done.returncode and order.what == "start":
            self._failed(
                order, unit, done.stderr.strip() or f"{unit} cannot be started; journalctl -u {unit}"
            )

    def _failed(self, order: WorkerOrder | PullOrder, unit: str, why: str) -> None:
        log.error("%s: %s", unit, why)
        failed = WorkerFailed if isinstance(order, WorkerOrder) else PullerFailed
        self._answer(failed(order.id, why))

    def _devices(self) -> list[devices.Device]:
        return devices.probe(self._administrator.devices_table())

    def _probe(self) -> None:
        try:
            found = self._devices()
        except AiosError as error:
            log.error("%s", error.explanation)
            found = [replace(devices.processor(), trouble=" ".join(error.explanation.split()))]
        self._answer(Found([asdict(device) for device in found]))

    def _confine(self, unit: str, uuids: list[str]) -> None:
        """Confine the unit to its devices, and to the processors and memory next to them.
        Raises Denied, OSError."""
        there = {device.uuid: device for device in self._devices()}
        if unknown := [uuid for uuid in uuids if uuid not in there]:
            raise Denied(f"there is no device {unknown[0]}", "cat /aios/devices")
        text = devices.drop_in([there[uuid] for uuid in uuids])
        file = DROP_INS / f"{unit}.d" / "device.conf"
        if text == (file.read_text() if file.exists() else ""):
            return
        if text:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        else:
            file.unlink()
        subprocess.run(["systemctl", "daemon-reload"], check=True, capture_output=True)


def check_room(template: str) -> None:
    """Raises Denied."""
    running, most = (
        systemctl("list-units", "--plain", "--no-legend", f"{template}@*.service"),
        RUNNING_MOST[template],
    )
    if len(running.stdout.splitlines()) >= most:
        raise Denied(f"{most} units {template}@ run already", "stop some of them")


def systemctl(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemctl", *words], capture_output=True, text=True, check=False)

"""The heartbeat: tell the service manager that the daemon is alive, and a line of status.

The daemon is alive if requests make progress: the scheduler's lock is free in time, a decision is made,
orders are sent, and the mounted tree answers. If one of these hangs, log it once and stay silent. Then the
watchdog ends the daemon, and the next one continues. Has its own thread, for nothing else.
"""

from __future__ import annotations

import logging
import subprocess
import threading
import time
from pathlib import Path

from aiosd.host.message_ids import Id, about
from aiosd.host.mount import is_mounted
from aiosd.host.notify import asked, notify, watchdog_s
from aiosd.kernel import Kernel

log = logging.getLogger(__name__)

STATUS_S = 2.0  # between two status lines
MODELS_SHOWN = 4


class Heartbeat:
    def __init__(self, kernel: Kernel, mount: Path) -> None:
        self._kernel, self._mount = kernel, mount
        limit_s = watchdog_s()
        self._every_s = limit_s / 2 if limit_s else None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._last_line = self._last_trouble = ""
        self._reader: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if asked():
            self._thread.start()

    def stop(self) -> None:
        """Stop soon. Do not wait for the thread, which may hang."""
        self._stopping.set()

    def _run(self) -> None:
        next_s = time.monotonic()
        while True:
            if self._every_s and time.monotonic() >= next_s:
                next_s = time.monotonic() + self._every_s
                self._feed(self._every_s)
            self._notify_status()
            until_s = next_s - time.monotonic() if self._every_s else STATUS_S
            if self._stopping.wait(max(0.01, min(STATUS_S, until_s))):
                return

    def _feed(self, patience_s: float) -> None:
        trouble = self._kernel.scheduler.beat(patience_s) or self._answers(patience_s)
        if not trouble:
            notify(WATCHDOG=1)
        elif trouble != self._last_trouble and not self._stopping.is_set():
            log.error("the watchdog is not fed: %s", trouble, extra=about(Id.HANGS))
        self._last_trouble = trouble

    def _answers(self, patience_s: float) -> str:
        """Asked by a process of its own: of this one a thread that waits for its own tree could not be
        killed, and so neither could the daemon."""
        file = self._mount / "version"
        try:
            if not is_mounted(self._mount):  # in another namespace, or not at all: main sees that by itself
                return ""
            self._reader = self._reader or subprocess.Popen(
                ["cat", file], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            status = self._reader.wait(patience_s)
            self._reader = None
            return f"{file} cannot be read" if status and is_mounted(self._mount) else ""
        except subprocess.TimeoutExpired:
            return f"{file} does not answer"
        except OSError:  # no process or descriptor to be had: not for us to end for
            return ""

    def _notify_status(self) -> None:
        line = status(self._kernel, self._mount)
        if line != self._last_line and not self._stopping.is_set():
            notify(STATUS=line)
            self._last_line = line


def status(kernel: Kernel, mount: Path) -> str:
    """`serving /aios: 3 running, 12 waiting, 2 agents, model tiny ready`"""
    running, waiting = kernel.scheduler.load
    models = kernel.models.all()
    shown = [f"model {model.name} {model.state}" for model in models[:MODELS_SHOWN]]
    more = [f"{len(models) - MODELS_SHOWN} more models"] if len(models) > MODELS_SHOWN else []
    agents = len(kernel.agents)
    facts = [f"{running} running", f"{waiting} waiting", f"{agents} agent" + "s" * (agents != 1)]
    refused = "; the last reload was refused" if kernel.reload_refused else ""
    return f"serving {mount}: {', '.join([*facts, *shown, *more])}{refused}"

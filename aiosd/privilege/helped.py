"""The daemon's side of aios-privileged. It has the functions of aiosd.privilege.system.Own.

One connection carries orders and questions down; the output of tools, their ends and answers come up. When
the connection breaks, the daemon ends, because all tools that it ordered have ended.
"""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from aiosd.cores import wire
from aiosd.cores.devices import Device, processor
from aiosd.cores.devices import received as received_device
from aiosd.cores.launch import Child, Launcher
from aiosd.errors import ConfigError, WireError, in_words
from aiosd.host import proc, processes
from aiosd.host.eventloop import EventLoop
from aiosd.host.usage import Spent
from aiosd.modelstore import launch
from aiosd.modelstore.launch import PullLauncher
from aiosd.privilege import orders
from aiosd.privilege.orders import Answered, Ended, Erred, Found, Mounted, PullerFailed, Said, WorkerFailed
from aiosd.privilege.worker_unit import PULLER, WORKER, Unit, workers_uid
from aiosd.tools.manifest import OWN_BYTES, PROGRAM
from aiosd.tools.run.runner import STDERR_BYTES, Places
from aiosd.tools.run.sandbox import Cage
from aiosd.tools.run.spawn import Call, End

log = logging.getLogger(__name__)

REMEDY = "systemctl status aios-privileged"
PATIENCE_S = 30.0
ANSWER_S = 5.0
REPLACE_S, LOOK_S = 5.0, 0.005
TOLD_S = 1800.0  # after that a user is reported again
TOLD_MOST = 1 << 16
SYSTEMD = Path("/run/systemd/system")  # sd_booted(3)


class Helped:
    def __init__(self, address: Path) -> None:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(PATIENCE_S)
        try:
            sock.connect(str(address))
            self._channel = wire.Channel(sock, orders.ANSWERS)
            first, self._fuse = self._channel.receive(), self._channel.take_file()
        except (OSError, WireError) as error:
            raise ConfigError(f"{address}: {in_words(error)}", REMEDY) from None
        if not isinstance(first, Mounted) or self._fuse is None:
            raise ConfigError(f"{address}: nothing was mounted", REMEDY)
        sock.settimeout(None)
        self._folder = Path(first.folder)
        self._units: dict[tuple[str, int], Unit] = {}
        self._found = queue.SimpleQueue[list[dict[str, Any]]]()
        self._probing = threading.Lock()
        self._asking = Asking(self._channel)
        processes.watch_by(self._asking)
        self.lost = False
        self.launch: Launcher = self._launch if SYSTEMD.exists() else Child
        self.pull: PullLauncher = self._pull if SYSTEMD.exists() else launch.child
        self.workers_uid = workers_uid() if SYSTEMD.exists() else os.geteuid()

    def mount(self, folder: Path) -> int:
        if folder != self._folder:
            raise ConfigError(f"aios-privileged has mounted {self._folder}, not {folder}", REMEDY)
        assert self._fuse is not None
        fd, self._fuse = self._fuse, None
        return fd

    def unmount(self, folder: Path) -> None:
        """The other process puts a new tree in place of this one, for the next daemon. Serve until it has."""
        if self._channel.closed:
            return
        with suppress(OSError):
            served, until_s = proc.device_of(folder), time.monotonic() + REPLACE_S
            self._channel.shut()
            while not self.lost and proc.device_of(folder) == served and time.monotonic() < until_s:
                time.sleep(LOOK_S)
        self._channel.shut()

    def tools(self, places: Places) -> Remote:
        del places  # it has its own configuration
        return Remote(self._channel, self._heed, self._lose)

    def reload(self) -> None:
        with suppress(OSError):
            self._channel.send(orders.Reload())

    def devices(self, table: str) -> list[Device]:
        """As the other process finds them: this one may not open what tells of GPUs. In doubt, none."""
        del table  # it has its own configuration
        with self._probing:
            try:
                self._channel.send(orders.Probe())
                return [received_device(facts) for facts in self._found.get(timeout=PATIENCE_S)]
            except (OSError, queue.Empty, TypeError, ValueError) as error:
                log.error(
                    "aios-privileged does not say which devices there are: %s; %s", in_words(error), REMEDY
                )
                return [replace(processor(), trouble=f"aios-privileged does not tell of GPUs; {REMEDY}")]

    def _launch(self, id: int, env: Mapping[str, str], devices: Sequence[str]) -> Unit:
        del env  # of the unit
        there = list(devices)
        return self._unit(WORKER, id, lambda what: orders.WorkerOrder(id, what, there))

    def _pull(self, id: int, credentials: str) -> Unit:
        del credentials  # of the unit
        return self._unit(PULLER, id, lambda what: orders.PullOrder(id, what))

    def _unit(self, kind: str, id: int, order: Callable[[str], Any]) -> Unit:
        def send(what: str) -> None:
            with suppress(OSError):  # it is gone: Remote ends the daemon
                self._channel.send(order(what))

        unit = self._units[kind, id] = Unit(kind, id, send)
        return unit

    def _lose(self) -> None:
        self._asking.end()
        log.critical("aios-privileged is gone, and this daemon cannot do without: %s", REMEDY)
        self.lost = True
        os.kill(os.getpid(), signal.SIGTERM)

    def _heed(self, message: Any) -> None:
        """Take the messages that are not about tools."""
        match message:
            case WorkerFailed() if unit := self._units.get((WORKER, message.id)):
                unit.fail(message.why)
            case PullerFailed() if unit := self._units.get((PULLER, message.id)):
                unit.fail(message.why)
            case Found():
                self._found.put(message.devices)
            case Answered():
                self._asking.answered(message)


class Asking:
    """The other process looks at processes. Threads of libfuse ask, and wait for the answer."""

    def __init__(self, channel: wire.Channel) -> None:
        self._channel = channel
        self._numbers = itertools.count(1)
        self._waiting: dict[int, queue.SimpleQueue[str]] = {}
        self._told: dict[tuple[int, frozenset[int]], float] = {}  # users that it has seen, and when
        self._ended = False

    def program(self, pid: int) -> str:
        return self._ask(lambda number: orders.Program(number, pid))

    def holds(self, pid: int, path: str) -> bool:
        return bool(self._ask(lambda number: orders.Holds(number, pid, path)))

    def writes(self, uid: int, groups: frozenset[int], pids: Sequence[int]) -> None:
        who, now = (uid, groups), time.monotonic()
        if self._told.get(who, -TOLD_S) > now - TOLD_S:
            return
        there = [pid for pid in dict.fromkeys(pids) if pid > 0]
        if there and self._ask(lambda number: orders.See(number, uid, there)):
            if len(self._told) >= TOLD_MOST:
                self._told.clear()
            self._told[who] = now

    def forget(self, uid: int) -> None:
        for who in [who for who in list(self._told) if who[0] == uid]:
            self._told.pop(who, None)

    def answered(self, message: Answered) -> None:
        if waiting := self._waiting.get(message.number):
            waiting.put(message.answer)

    def end(self) -> None:
        self._ended = True
        for waiting in list(self._waiting.values()):
            waiting.put("")

    def _ask(self, question: Callable[[int], Any]) -> str:
        """Return the answer; empty: none came."""
        number = next(self._numbers)
        waiting = self._waiting[number] = queue.SimpleQueue()
        try:
            if self._ended:
                return ""
            self._channel.send(question(number))
            return waiting.get(timeout=ANSWER_S)
        except (OSError, queue.Empty):
            return ""
        finally:
            del self._waiting[number]


class Remote(EventLoop):
    """As aiosd.tools.run.runner.Runner, elsewhere."""

    def __init__(
        self, channel: wire.Channel, others: Callable[[Any], None], lose: Callable[[], None]
    ) -> None:
        super().__init__("tools")
        self._channel, self._others, self._lose = channel, others, lose
        self._calls: dict[int, Call] = {}
        self._stderr: dict[int, tuple[int, bytes]] = {}  # of sessions: see stderr()

    def start(self) -> None:
        super().start()
        threading.Thread(target=self._listen, name="privileged", daemon=True).start()

    def run(self, call: Call) -> None:
        self.order(partial(self._start, call))

    def kill(self, id: int, why: str = "cancelled") -> None:
        self.order(partial(self._send, orders.Kill(id, why)))  # after Run, should that be on its way

    def tell(self, id: int, data: bytes) -> None:
        self._send(orders.Tell(id, data.decode("latin-1")))

    def shut(self, id: int) -> None:
        self._send(orders.Shut(id))

    def rest(self, id: int, resting: bool) -> None:
        self._send(orders.Rest(id, resting))

    def forget(self, agent: int) -> None:
        self._send(orders.Forget(agent))

    def forget_but(self, agents: Collection[int]) -> None:
        self._send(orders.ForgetBut(list(agents)))

    def disown(self, uid: int) -> None:
        """aios-privileged sees it by itself (aiosd.privilege.users)."""

    def notify(self, hook: str, facts: Mapping[str, str], uid: int, gid: int) -> None:
        del hook  # it is not for this process to say which
        id, tool, agent, group = (facts[f"AIOS_{key}"] for key in ("REQUEST", "TOOL", "AGENT", "GROUP"))
        self._send(orders.Notify(int(id), tool, agent, group, uid, [gid]))

    def stderr(self, id: int) -> tuple[int, bytes]:
        return self._stderr.get(id, (0, b""))

    def _start(self, call: Call) -> None:
        """Mark the call as started before sending it, so that a crash never runs it twice."""
        program = None
        try:
            program = sealed(call) if call.manifest.is_users_own else None
            order = ordered(call)
            orders.judge(order)
        except (OSError, ValueError, WireError) as error:
            if call.events.began():
                call.events.ended(End(-1, "", f"cannot be started: {in_words(error)}"))
        else:
            if call.events.began():
                self._calls[call.id] = call
                self._send(order, program)
        finally:
            if program is not None:
                os.close(program)

    def _send(self, message: Any, file: int | None = None) -> None:
        with suppress(OSError):  # it is gone: _listen ends the daemon
            self._channel.send(message, file)

    def _listen(self) -> None:
        try:
            while (message := self._channel.receive()) is not None:
                if isinstance(message, Answered):  # a thread waits in a system call
                    self._others(message)
                else:
                    self.order(partial(self._heed, message))
        except (OSError, WireError) as error:
            log.error("aios-privileged: %s", in_words(error))
        if not self._channel.closed:
            self._lose()

    def _heed(self, message: Any) -> None:
        match message:
            case Said() if call := self._calls.get(message.id):
                call.events.said(message.data.encode("latin-1"))
            case Erred():
                data = message.data.encode("latin-1")
                count, last = self.stderr(message.id)
                self._stderr[message.id] = count + len(data), (last + data)[-STDERR_BYTES:]
            case Ended() if call := self._calls.pop(message.id, None):
                spent = Spent(**message.spent) if message.spent else None
                call.events.ended(End(message.status, message.stderr, message.why, spent))
                self._stderr.pop(message.id, None)
            case _:
                self._others(message)


def ordered(call: Call) -> Any:
    """Return the order that makes aios-privileged run the call."""
    manifest, uid, groups = call.manifest, call.uid, list(call.groups)
    if call.given is None:
        return orders.RunServer(call.id, manifest.name, not call.sees_aios, uid, groups)
    agent = int(call.folder or 0)
    if not manifest.is_users_own:
        return orders.RunTool(call.id, manifest.name, call.given, uid, groups, agent)
    bounds = float(manifest.timeout_s), manifest.cpu_s, manifest.memory_bytes
    command, env = list(manifest.command), dict(manifest.env)
    return orders.RunOwn(call.id, manifest.name, command, env, *bounds, call.given, uid, groups, agent)


def sealed(call: Call) -> int | None:
    """Copy the program of a user's own tool to a file that nobody can change. Raises OSError, ValueError."""
    file = Cage(call.manifest, None).open_program()
    if file is None:
        return None
    with os.fdopen(file, "rb") as opened:
        data = opened.read(OWN_BYTES[PROGRAM])
    made = os.memfd_create(PROGRAM, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.truncate(made, len(data))
        os.pwrite(made, data, 0)
        fcntl.fcntl(made, fcntl.F_ADD_SEALS, orders.SEALS)
    except OSError:
        os.close(made)
        raise
    return made

"""What the daemon has aios-privileged do for it, where it runs as a user of its own (aiosd.privilege.helper).

One connection: orders go down it, what tools print and how they end comes up, as frames of aiosd.cores.wire.
With it the daemon has what aiosd.privilege.system has elsewhere. When it breaks the daemon ends: what it had
ordered is gone.
"""

from __future__ import annotations

import logging
import os
import pwd
import queue
import select
import signal
import socket
import struct
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from aiosd.cores import wire
from aiosd.cores.devices import Device, processor
from aiosd.cores.devices import received as received_device
from aiosd.cores.launch import Child, Launcher
from aiosd.errors import ConfigError, WireError, in_words
from aiosd.host.eventloop import Loop
from aiosd.host.usage import Spent
from aiosd.tools.manifest import Manifest
from aiosd.tools.run.runner import STDERR_BYTES, Places
from aiosd.tools.run.sandbox import Cage
from aiosd.tools.run.spawn import Bounds, Call, End, Events

log = logging.getLogger(__name__)

REMEDY = "systemctl status aios-privileged"
PATIENCE_S = 30.0
CONNECT_S = 60.0  # for a worker's process to be there
PEER = struct.Struct("iII")  # struct ucred: pid, uid, gid
SYSTEMD = Path("/run/systemd/system")  # sd_booted(3)
WORKER = "aios-worker"  # the user that workers run as


# down


@dataclass(frozen=True, slots=True)
class Run:
    """`with_program`: the open file beside the manifest comes with it."""

    id: int
    manifest: dict[str, Any]
    given: str
    piped: bool  # its standard input comes in Tell; else it is `given`
    uid: int
    groups: list[int]
    folder: str
    sees_aios: bool
    bounds: dict[str, Any]
    with_program: bool


@dataclass(frozen=True, slots=True)
class Kill:
    id: int
    why: str


@dataclass(frozen=True, slots=True)
class Tell:
    id: int
    data: str  # bytes, as Latin-1; so below


@dataclass(frozen=True, slots=True)
class Shut:
    id: int


@dataclass(frozen=True, slots=True)
class Rest:
    id: int
    resting: bool


@dataclass(frozen=True, slots=True)
class Forget:
    """Work folders of an agent."""

    agent: int


@dataclass(frozen=True, slots=True)
class ForgetBut:
    agents: list[int]


@dataclass(frozen=True, slots=True)
class Notify:
    """Of the program that `[tools] notify` names."""

    facts: dict[str, Any]
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Worker:
    """`what`: start, stop or kill. `devices`: by UUID, those that it may open."""

    id: int
    what: str
    devices: list[str]


@dataclass(frozen=True, slots=True)
class Probe:
    """For the devices that there are: answered by Found."""


# up


@dataclass(frozen=True, slots=True)
class Mounted:
    """The first message, with the descriptor to serve."""

    folder: str


@dataclass(frozen=True, slots=True)
class Said:
    id: int
    data: str


@dataclass(frozen=True, slots=True)
class Erred:
    id: int
    data: str


@dataclass(frozen=True, slots=True)
class Ended:
    id: int
    status: int
    stderr: str
    why: str
    spent: dict[str, Any]  # fields of Spent; empty: unknown


@dataclass(frozen=True, slots=True)
class WorkerFailed:
    id: int
    why: str


@dataclass(frozen=True, slots=True)
class Found:
    """Fields of aiosd.cores.devices.Device."""

    devices: list[dict[str, Any]]


ORDERS: tuple[type[Any], ...] = (Run, Kill, Tell, Shut, Rest, Forget, ForgetBut, Notify, Worker, Probe)
ANSWERS: tuple[type[Any], ...] = (Mounted, Said, Erred, Ended, WorkerFailed, Found)
JUDGED = ("description", "parameters", "judge")  # of a manifest: what the one who runs it has no use for


def sent(call: Call, program: bool) -> Run:
    facts = asdict(replace(call.manifest, parameters={}, judge=None))
    manifest = {k: str(v) if k == "folder" else v for k, v in facts.items() if k not in JUDGED}
    whose = call.uid, list(call.groups), call.folder, call.sees_aios
    bounds = asdict(call.bounds)
    return Run(call.id, manifest, call.given or "", call.given is None, *whose, bounds, program)


def received(run: Run, program: int | None, events: Events) -> Call:
    """Raises WireError."""
    try:
        raw: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in run.manifest.items()}
        facts: dict[str, Any] = {**raw, "folder": Path(raw["folder"]), "description": "", "parameters": {}}
        manifest, bounds = Manifest(**facts), Bounds(**run.bounds)
    except (TypeError, KeyError) as error:
        raise WireError(f"not a call: {error}") from None
    given = None if run.piped else run.given
    whose = run.uid, tuple(run.groups), run.folder, run.sees_aios
    return Call(run.id, manifest, given, *whose, bounds, events, program)


class Helped:
    """As aiosd.privilege.system.Own, by the process that listens at `address`."""

    def __init__(self, address: Path) -> None:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(PATIENCE_S)
        try:
            sock.connect(str(address))
            self._channel = wire.Channel(sock, ANSWERS)
            first, self._fuse = self._channel.receive(), self._channel.take_file()
        except (OSError, WireError) as error:
            raise ConfigError(f"{address}: {error}", REMEDY) from None
        if not isinstance(first, Mounted) or self._fuse is None:
            raise ConfigError(f"{address}: nothing was mounted", REMEDY)
        sock.settimeout(None)
        self._folder = Path(first.folder)
        self._units: dict[int, Unit] = {}
        self._found = queue.SimpleQueue[list[dict[str, Any]]]()
        self._probing = threading.Lock()
        self.lost = False
        self.launch: Launcher = self._launch if SYSTEMD.exists() else Child
        self.workers_uid = workers_uid() if SYSTEMD.exists() else os.geteuid()

    def mount(self, folder: Path) -> int:
        if folder != self._folder:
            raise ConfigError(f"aios-privileged has mounted {self._folder}, not {folder}", REMEDY)
        assert self._fuse is not None
        fd, self._fuse = self._fuse, None
        return fd

    def unmount(self, folder: Path) -> None:
        """It is mounted again, for the next daemon: who comes meanwhile waits for it."""
        del folder
        self._channel.shut()

    def tools(self, places: Places) -> Remote:
        del places  # it has its own configuration
        return Remote(self._channel, self._worker_failed, self._lose, self._found.put)

    def devices(self, table: str) -> list[Device]:
        """As the other process finds them: this one may not open what tells of GPUs. In doubt, none."""
        del table  # it has its own configuration
        with self._probing:
            try:
                self._channel.send(Probe())
                return [received_device(facts) for facts in self._found.get(timeout=PATIENCE_S)]
            except (OSError, queue.Empty, TypeError, ValueError) as error:
                log.error("aios-privileged does not say which devices there are: %r", error)
                return [replace(processor(), trouble=f"aios-privileged does not tell of GPUs; {REMEDY}")]

    def _launch(self, id: int, env: Mapping[str, str], devices: Sequence[str]) -> Unit:
        del env  # of the unit
        unit = self._units[id] = Unit(id, self._channel, devices)
        return unit

    def _lose(self) -> None:
        log.critical("aios-privileged is gone, and this daemon cannot do without: %s", REMEDY)
        self.lost = True
        os.kill(os.getpid(), signal.SIGTERM)

    def _worker_failed(self, id: int, why: str) -> None:
        if unit := self._units.get(id):
            unit.fail(why)


class Remote(Loop):
    """As aiosd.tools.run.runner.Runner, elsewhere."""

    def __init__(
        self,
        channel: wire.Channel,
        worker_failed: Callable[[int, str], None],
        lose: Callable[[], None],
        found: Callable[[list[dict[str, Any]]], None],
    ) -> None:
        super().__init__("tools")
        self._channel, self._worker_failed, self._lose, self._found = channel, worker_failed, lose, found
        self._calls: dict[int, Call] = {}
        self._stderr: dict[int, tuple[int, bytes]] = {}  # of sessions: see stderr()

    def start(self) -> None:
        super().start()
        threading.Thread(target=self._listen, name="privileged", daemon=True).start()

    def run(self, call: Call) -> None:
        self.order(partial(self._start, call))

    def kill(self, id: int, why: str = "cancelled") -> None:
        self.order(partial(self._send, Kill(id, why)))  # after Run, should that be on its way

    def tell(self, id: int, data: bytes) -> None:
        self._send(Tell(id, data.decode("latin-1")))

    def shut(self, id: int) -> None:
        self._send(Shut(id))

    def rest(self, id: int, resting: bool) -> None:
        self._send(Rest(id, resting))

    def forget(self, agent: int) -> None:
        self._send(Forget(agent))

    def forget_but(self, agents: Collection[int]) -> None:
        self._send(ForgetBut(list(agents)))

    def notify(self, hook: str, facts: Mapping[str, str], uid: int, gid: int) -> None:
        del hook  # it is not for this process to say which
        self._send(Notify(dict(facts), uid, gid))

    def stderr(self, id: int) -> tuple[int, bytes]:
        return self._stderr.get(id, (0, b""))

    def _start(self, call: Call) -> None:
        """What it may have begun is known before it is asked to."""
        try:
            program = Cage(call.manifest, None, None).open_program()
        except (OSError, ValueError) as error:
            if call.events.began():
                call.events.ended(End(-1, "", f"cannot be started: {in_words(error)}"))
            return
        try:
            if call.events.began():
                self._calls[call.id] = call
                self._send(sent(call, program is not None), program)
        finally:
            if program is not None:
                os.close(program)

    def _send(self, message: Any, file: int | None = None) -> None:
        with suppress(OSError):  # it is gone: _listen ends the daemon
            self._channel.send(message, file)

    def _listen(self) -> None:
        try:
            while (message := self._channel.receive()) is not None:
                self.order(partial(self._heed, message))
        except (OSError, WireError) as error:
            log.error("aios-privileged: %s", error)
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
            case WorkerFailed():
                self._worker_failed(message.id, message.why)
            case Found():
                self._found(message.devices)


class Unit:
    """A worker as aios-worker@ID.service, which connects to a socket of its number."""

    def __init__(self, id: int, channel: wire.Channel, devices: Sequence[str]) -> None:
        self._id, self._channel, self._devices = id, channel, list(devices)
        self.pid = 0
        self._pidfd = -1
        self._failed, self._news, self._closed = "", os.eventfd(0, os.EFD_CLOEXEC), False
        folder = Path(os.environ["RUNTIME_DIRECTORY"])
        self._address = folder / f"worker-{id}"
        self._address.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self._address))
        self._address.chmod(0o666)  # who connects is looked at
        self._listener.listen()
        self._order("start")

    def connect(self) -> wire.Channel:
        try:
            while True:
                self._await()
                sock, _ = self._listener.accept()
                peer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size)
                self.pid, uid, _ = PEER.unpack(peer)
                if uid in (workers_uid(), os.geteuid()):
                    break
                sock.close()
            self._pidfd = os.pidfd_open(self.pid)
            return wire.Channel(sock)
        except OSError as error:
            raise OSError(f"{error}; systemctl status aios-worker@{self._id}") from None
        finally:
            self._listener.close()
            self._address.unlink(missing_ok=True)

    def _await(self) -> None:
        poll = select.poll()
        for file in (self._listener.fileno(), self._news):
            poll.register(file, select.POLLIN)
        ready = dict(poll.poll(CONNECT_S * 1000))
        if self._listener.fileno() not in ready:
            raise OSError(self._failed or f"it did not connect within {CONNECT_S:g} s")

    def fail(self, why: str) -> None:
        """It will not connect."""
        self._failed = why
        if not self._closed:
            os.eventfd_write(self._news, 1)

    def terminate(self) -> None:
        self._order("stop")

    def kill(self) -> None:
        if self._pidfd >= 0:
            with suppress(TimeoutError):
                self.wait(0)
                return  # it is gone; its number may be another's soon
        if not self._closed:
            self._order("kill")

    def close(self) -> None:
        self._closed = True
        os.close(self._news)
        if self._pidfd >= 0:
            os.close(self._pidfd)
        self._pidfd = -1

    def wait(self, timeout_s: float | None = None) -> str:
        if self._pidfd >= 0:
            poll = select.poll()
            poll.register(self._pidfd, select.POLLIN)
            if not poll.poll(None if timeout_s is None else timeout_s * 1000):
                raise TimeoutError
        return f"systemctl status aios-worker@{self._id} says how"

    def _order(self, what: str) -> None:
        with suppress(OSError):
            self._channel.send(Worker(self._id, what, self._devices))


def workers_uid() -> int:
    try:
        return pwd.getpwnam(WORKER).pw_uid
    except KeyError:
        return os.geteuid()

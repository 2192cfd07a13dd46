"""Runs process trees in cages (aiosd.tools.run.sandbox): tool calls and MCP sessions, watched by one thread.

One thread because a sandbox dies with the thread that started it: so do all with the daemon, however it ends.
It waits for output, ends and orders in one poll; what a process printed and how it ended it tells `events`.
Any thread may order. Networks are made and taken down by short threads, as that takes a while.

Large: everything here belongs to the one thread and its poll.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from aiosd.errors import AiosError, in_words
from aiosd.host.eventloop import EventLoop
from aiosd.host.subuids import owner
from aiosd.host.usage import memory, reap
from aiosd.tools.run import credentials, network
from aiosd.tools.run.cgroups import Cgroups, Group
from aiosd.tools.run.measuring import Look, Survey
from aiosd.tools.run.network import Namespace
from aiosd.tools.run.sandbox import PROCESSES, Cage, OwnTree, ShownTree
from aiosd.tools.run.spawn import Call, End, popen, whose
from aiosd.tools.run.workfolder import Removal, Work

log = logging.getLogger(__name__)

CALLS_MOST = 256  # tool calls at once, of all tools and users
LOOK_S = 0.5  # how often what a call uses is looked at
REST_LOOK_S = 2.0  # and how often while nothing but idle sessions is there
STDERR_BYTES = 64 << 10  # that are kept, the last ones
STDERR_MOST = 256 << 20
READ_BYTES = 64 << 10
REMOVE_S = 0.2
NOTIFY_S = 10.0
BWRAP_PROCESSES = 2  # besides the tool's
UNSENT_BYTES = 64 << 20  # of standard input that a session has not read
NOTES_MOST = 32  # programs that tell somebody of a call, at once
DYING_S = 2.0  # that a killed process has to be gone
DYING_TRIES = 10  # after these a process in a group cannot be killed
UNDYING_MOST = 4  # such groups of one user, before he may start no more
UNDYING = "your earlier calls wait for a file system that does not answer: unmount it (fusermount -u)"


@dataclass(slots=True, eq=False)
class Running:
    call: Call
    work: Path | None
    process: subprocess.Popen[bytes]
    pidfd: int
    until_s: float
    namespace: Namespace | None
    group: Group | None
    streams: int = 3  # stdout, stderr and the pidfd: it is over when all are
    ended_s: float = 0.0  # 0: not yet
    out_bytes: int = 0
    stderr_bytes: int = 0
    stderr: bytearray = field(default_factory=bytearray)
    unsent: bytearray = field(default_factory=bytearray)  # of its standard input
    shut: bool = False  # nothing more is to come there
    resting: bool = False
    measured: bool = True  # nobody is looking into its work folder
    why: str = ""

    def kill(self, why: str) -> None:
        """bwrap's end is that of all in its pid namespace."""
        self.why = self.why or why
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class Places:
    work: Path  # what tools may write to is below
    credentials: Path
    mount: Path


class Runner(EventLoop):
    """Its end ends all that run, without a word: they are told as interrupted by the next daemon."""

    def __init__(self, places: Places, tree: ShownTree | None = None) -> None:
        super().__init__("tools")
        self._work, self._credentials = Work(places.work), places.credentials
        self._tree = tree or OwnTree(places.mount)
        self._running: dict[int, Running] = {}
        self._early: dict[int, bytearray] = {}  # standard input of those whose network is being made
        self._cgroups = Cgroups()
        self._look_s = 0.0  # when what they use was looked at
        self._notes = 0
        self._removal, self._survey = Removal(), Survey(self._surveyed)
        self._undying = Counter[int]()  # by user: groups of ended calls

    def start(self) -> None:
        self._cgroups.find()
        self._removal.start()
        self._survey.start()
        threading.Thread(target=network.clean, name="network", daemon=True).start()
        super().start()

    def run(self, call: Call) -> None:
        if call.manifest.network:
            self._early[call.id] = bytearray()
            threading.Thread(target=self._connect, args=(call,), name="network", daemon=True).start()
        else:
            self.order(partial(self._start, call, None))

    def _connect(self, call: Call) -> None:
        try:
            namespace = network.open(call.manifest.network)
        except AiosError as error:
            self.order(partial(self._refuse, call, error.explanation))
        else:
            self.order(partial(self._start, call, namespace))

    def kill(self, id: int, why: str = "cancelled") -> None:
        def kill() -> None:
            if running := self._running.get(id):
                running.kill(why)

        self.order(kill)

    def forget(self, agent: int) -> None:
        """Remove its work folders soon."""
        self._removal.add(self._work.of(agent))

    def forget_but(self, agents: Collection[int]) -> None:
        self._removal.add(self._work.of_others(agents))

    def disown(self, uid: int) -> None:
        self._work.set_aside(uid)

    def notify(self, hook: str, facts: Mapping[str, str], uid: int, gid: int) -> None:
        """Runs the administrator's program, not in a sandbox and for no long time, as that user."""
        self.order(partial(self._notify, hook, facts, uid, gid))

    # on the thread only

    def tell(self, id: int, data: bytes) -> None:
        """More of its standard input; who has ended hears nothing."""
        if id in self._early and len(self._early[id]) < UNSENT_BYTES:
            self._early[id] += data
        if running := self._running.get(id):
            running.unsent += data
            self._send(running)
            if len(running.unsent) > UNSENT_BYTES:
                running.unsent.clear()
                running.kill("it does not read what it is told")

    def shut(self, id: int) -> None:
        """Its standard input ends."""
        if running := self._running.get(id):
            running.shut = True
            self._send(running)

    def rest(self, id: int, resting: bool) -> None:
        """Whether it is idle, and need not be looked at often."""
        if running := self._running.get(id):
            running.resting = resting

    def stderr(self, id: int) -> tuple[int, bytes]:
        """How many bytes it has said there, and the last of them."""
        running = self._running.get(id)
        return (running.stderr_bytes, bytes(running.stderr)) if running else (0, b"")

    # the thread

    def _tick(self, now: float) -> None:
        if not self._running or now < self._look_s + self._between_s():
            return
        self._look_s = now
        used = memory({running.process.pid for running in self._running.values() if not running.group})
        for running in list(self._running.values()):
            if running.ended_s and now > running.ended_s + LOOK_S:  # its output is held open outside
                self._try(partial(self._end, running))
            else:
                self._try(partial(self._look, running, now, used[running.process.pid]))

    def _finish(self) -> None:
        for running in self._running.values():
            running.kill("the daemon stops")
        until_s = time.monotonic() + DYING_S
        for running in self._running.values():
            with suppress(subprocess.TimeoutExpired):
                running.process.wait(max(0.0, until_s - time.monotonic()))
            if running.namespace:
                running.namespace.close()
            if running.group:
                running.group.remove()

    def _patience_s(self) -> float | None:
        until_timer = super()._patience_s()
        if self._running:
            return self._between_s() if until_timer is None else min(self._between_s(), until_timer)
        return until_timer

    def _between_s(self) -> float:
        return REST_LOOK_S if all(running.resting for running in self._running.values()) else LOOK_S

    def _start(self, call: Call, namespace: Namespace | None) -> None:
        early = self._early.pop(call.id, b"")
        try:
            if not call.events.began():  # cancelled meanwhile
                call.discard()
                return
            if self._undying[owner(call.uid)] >= UNDYING_MOST:
                call.discard()
                call.events.ended(End(-1, "", UNDYING))
                return
            try:
                running = self._spawn(call, namespace)
            except AiosError as error:
                call.events.ended(End(-1, "", error.explanation))
                return
            except (OSError, ValueError, subprocess.SubprocessError) as error:  # a NUL in a manifest
                call.events.ended(End(-1, "", f"cannot be started: {in_words(error)}"))
                return
            namespace = None
        finally:
            disconnect(namespace)
        self._running[call.id] = running
        running.unsent += call.opening + early
        process = running.process
        assert process.stdout
        assert process.stderr
        if process.stdin:
            os.set_blocking(process.stdin.fileno(), False)
            self._send(running)
        for file, heed in ((process.stdout, self._said), (process.stderr, self._erred)):
            self._selector.register(
                file, selectors.EVENT_READ, partial(self._read, running, file.fileno(), heed)
            )
        self._selector.register(
            running.pidfd, selectors.EVENT_READ, partial(self._over, running, running.pidfd)
        )

    def _refuse(self, call: Call, why: str) -> None:
        self._early.pop(call.id, None)
        call.discard()
        if call.events.began():
            call.events.ended(End(-1, "", why))

    def _spawn(self, call: Call, namespace: Namespace | None) -> Running:
        manifest = call.manifest
        with ExitStack() as undo:
            undo.callback(call.discard)
            cage = self._cage(call)
            group = self._cgroups.make(PROCESSES + BWRAP_PROCESSES, manifest.memory_bytes)
            undo.pop_all()
            if group:
                undo.callback(self._remove, group, call.uid)
            process = popen(call, cage, namespace, group)
            undo.callback(process.wait)
            undo.callback(process.kill)
            pidfd = os.pidfd_open(process.pid)
            undo.pop_all()
        until_s = time.monotonic() + manifest.timeout_s
        return Running(call, cage.work, process, pidfd, until_s, namespace, group)

    def _cage(self, call: Call) -> Cage:
        work = self._work.make(call.folder, call.uid, call.groups[0]) if call.folder else None
        secrets = credentials.read(self._credentials, call.manifest.credentials)
        return Cage(call.manifest, work, self._tree.options() if call.sees_aios else (), secrets)

    def _notify(self, hook: str, facts: Mapping[str, str], uid: int, gid: int) -> None:
        if self._notes >= NOTES_MOST:
            log.warning("notify %s is not run: %d of it run already", hook, self._notes)
            return
        try:
            process = subprocess.Popen(
                [hook],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/",
                env={"PATH": "/usr/bin:/bin", **facts}, start_new_session=True, **whose(uid, (gid,)),
            )  # fmt: skip
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            log.error("notify %s cannot be run: %s", hook, error)
            return
        self._notes += 1
        self.later(NOTIFY_S, partial(self._end_note, process))

    def _end_note(self, process: subprocess.Popen[bytes]) -> None:
        self._notes -= 1
        end_group(process)

    def _remove(self, group: Group, uid: int, tries: int = 0) -> None:
        """When its last process is gone, which takes a moment, or for ever: nothing ends a process that waits
        for a file system that does not answer. A user may leave a few of those behind."""
        gone = group.remove()
        if tries == DYING_TRIES and not gone:
            self._undying[owner(uid)] += 1
        if gone and tries > DYING_TRIES:
            self._undying[owner(uid)] -= 1
        if not gone:
            self.later(REMOVE_S, partial(self._remove, group, uid, tries + 1))

    def _send(self, running: Running) -> None:
        """As much as its standard input takes now; the rest when it takes more."""
        file = running.process.stdin
        if file is None or file.closed:
            return
        watched = file.fileno() in self._selector.get_map()
        try:
            while running.unsent:
                del running.unsent[: os.write(file.fileno(), running.unsent[:READ_BYTES])]
        except BlockingIOError:
            if not watched:
                self._selector.register(file, selectors.EVENT_WRITE, partial(self._send, running))
            return
        except BrokenPipeError:  # it has ended, or wants no more
            running.unsent.clear()
        if watched:
            self._selector.unregister(file)
        if running.shut:
            file.close()

    def _read(self, running: Running, fd: int, heed: Callable[[Running, bytes], None]) -> None:
        if data := os.read(fd, READ_BYTES):
            heed(running, data)
        else:
            self._over(running, fd)

    def _said(self, running: Running, data: bytes) -> None:
        room = max(0, running.call.bounds.output_bytes - running.out_bytes)
        running.out_bytes += len(data)
        if data[:room]:
            running.call.events.said(data[:room])
        if len(data) > room:
            running.kill(f"it printed more than {running.call.bounds.output_bytes} bytes")

    @staticmethod
    def _erred(running: Running, data: bytes) -> None:
        running.call.events.erred(data)
        running.stderr_bytes += len(data)
        running.stderr += data
        del running.stderr[:-STDERR_BYTES]

    def _over(self, running: Running, fd: int) -> None:
        """One of its three descriptors has nothing more to say."""
        self._selector.unregister(fd)
        running.streams -= 1
        if fd == running.pidfd:
            running.ended_s = time.monotonic()
        if not running.streams:
            self._end(running)

    def _end(self, running: Running) -> None:
        del self._running[running.call.id]  # first: whatever fails below, it is not tried again
        spent = reap(running.process)
        os.close(running.pidfd)
        if running.group:
            with suppress(OSError):  # an empty one may have been removed by others
                if running.group.out_of_memory():
                    running.why = running.why or over_memory(running.call)
                spent = running.group.spent(spent)
            self._remove(running.group, running.call.uid)
        for file in (running.process.stdin, running.process.stdout, running.process.stderr):
            if file and not file.closed:
                if file.fileno() in self._selector.get_map():
                    self._selector.unregister(file)
                file.close()
        disconnect(running.namespace)
        stderr = running.stderr.decode("utf-8", "replace")
        running.call.events.ended(End(running.process.returncode, stderr, running.why, spent))

    def _look(self, running: Running, now: float, memory_bytes: int) -> None:
        """Ends what takes too long, or more memory or disk than it may: rlimits bound each process alone.

        A group bounds memory by itself, but the kernel kills one of its processes only.
        """
        manifest, bounds = running.call.manifest, running.call.bounds
        if now > running.until_s:
            running.kill(f"it took more than {manifest.timeout_s:g} s")
        elif memory_bytes > manifest.memory_bytes or (running.group and running.group.out_of_memory()):
            running.kill(over_memory(running.call))
        elif running.stderr_bytes > STDERR_MOST:
            running.kill(f"it said more than {STDERR_MOST} bytes on its standard error")
        elif (work := running.work) and running.measured:
            running.measured = False
            wanted = Look(str(work.parent), work.name, bounds.work_bytes, bounds.reserve_bytes)
            self._survey.ask(running.call.uid, running.call.id, wanted)

    def _surveyed(self, id: int, why: str) -> None:
        """On the thread of the survey."""

        def heed() -> None:
            if running := self._running.get(id):
                running.measured = True
                if why:
                    running.kill(why)

        self.order(heed)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """And all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(DYING_S)


def over_memory(call: Call) -> str:
    return f"it took more than {call.manifest.memory_bytes} bytes of memory"


def disconnect(namespace: Namespace | None) -> None:
    if namespace:
        threading.Thread(target=namespace.close, name="network").start()

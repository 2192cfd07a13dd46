"""Runs process trees in cages (aiosd.sandbox): tool calls and MCP sessions, watched by one thread.

One thread because a sandbox dies with the thread that started it: so do all with the daemon, however it ends.
It waits for output, ends and orders in one poll; what a process printed and how it ended it tells `events`.
Any thread may order. Networks are made and taken down by short threads, as that takes a while.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import selectors
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial

from aiosd import network
from aiosd.cgroups import Cgroups, Group
from aiosd.errors import AiosError
from aiosd.network import Namespace
from aiosd.sandbox import PROCESSES
from aiosd.spawn import Call, End, popen
from aiosd.usage import free_bytes, memory, size

log = logging.getLogger(__name__)

LOOK_S = 0.5  # how often what a call uses is looked at
REST_LOOK_S = 2.0  # and how often while nothing but idle sessions is there
STDERR_BYTES = 64 << 10  # that are kept, the last ones
STDERR_MOST = 256 << 20
READ_BYTES = 64 << 10
REMOVE_S = 0.2
BWRAP_PROCESSES = 2  # besides the tool's


@dataclass(slots=True, eq=False)
class Running:
    call: Call
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
    why: str = ""

    def kill(self, why: str) -> None:
        """bwrap's end is that of all in its pid namespace."""
        self.why = self.why or why
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)


class Runner:
    def __init__(self) -> None:
        self._orders: deque[Callable[[], None]] = deque()
        self._running: dict[int, Running] = {}
        self._early: dict[int, bytearray] = {}  # standard input of those whose network is being made
        self._selector = selectors.DefaultSelector()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector.register(self._wake, selectors.EVENT_READ, lambda: os.eventfd_read(self._wake))
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._ids = itertools.count()
        self._cgroups = Cgroups()
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="tools", daemon=True)

    def start(self) -> None:
        self._cgroups.find()
        threading.Thread(target=network.clean, name="network", daemon=True).start()
        self._thread.start()

    def stop(self) -> None:
        """Ends all that run, without a word: they are told as interrupted by the next daemon."""
        self.order(lambda: setattr(self, "_stopping", True))
        if self._thread.ident is not None:
            self._thread.join()

    def run(self, call: Call) -> None:
        if call.cage.manifest.network:
            self._early[call.id] = bytearray()
            threading.Thread(target=self._connect, args=(call,), name="network", daemon=True).start()
        else:
            self.order(partial(self._start, call, None))

    def _connect(self, call: Call) -> None:
        try:
            namespace = network.open(call.cage.manifest.network)
        except AiosError as error:
            self.order(partial(self._refuse, call, error.explanation))
        else:
            self.order(partial(self._start, call, namespace))

    def kill(self, id: int, why: str = "cancelled") -> None:
        def kill() -> None:
            if running := self._running.get(id):
                running.kill(why)

        self.order(kill)

    def later(self, after_s: float, order: Callable[[], None]) -> None:
        """Runs it on this thread, then."""
        self.order(lambda: heapq.heappush(self._timers, (time.monotonic() + after_s, next(self._ids), order)))

    def order(self, order: Callable[[], None]) -> None:
        """Runs it on this thread, soon, after what was ordered before."""
        self._orders.append(order)
        os.eventfd_write(self._wake, 1)

    # on the thread only

    def tell(self, id: int, data: bytes) -> None:
        """More of its standard input; who has ended hears nothing."""
        if id in self._early:
            self._early[id] += data
        if running := self._running.get(id):
            running.unsent += data
            self._send(running)

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

    def _loop(self) -> None:
        look_s = 0.0
        while not self._stopping:
            for key, _ in self._selector.select(self._patience_s()):
                self._try(key.data)
            while self._orders and not self._stopping:
                self._try(self._orders.popleft())
            now = time.monotonic()
            while self._timers and self._timers[0][0] <= now:
                self._try(heapq.heappop(self._timers)[2])
            if self._running and now >= look_s + self._look_s():
                look_s = now
                used = memory({call.process.pid for call in self._running.values() if not call.group})
                for running in list(self._running.values()):
                    if running.ended_s and now > running.ended_s + LOOK_S:  # its output is held open outside
                        self._try(partial(self._end, running))
                    else:
                        self._try(partial(self._look, running, now, used[running.process.pid]))
        for running in self._running.values():
            running.kill("the daemon stops")
            running.process.wait()
            if running.namespace:
                running.namespace.close()
            if running.group:
                running.group.remove()

    def _patience_s(self) -> float | None:
        until_timer = max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None
        if self._running:
            return self._look_s() if until_timer is None else min(self._look_s(), until_timer)
        return until_timer

    def _look_s(self) -> float:
        return REST_LOOK_S if all(running.resting for running in self._running.values()) else LOOK_S

    @staticmethod
    def _try(act: Callable[[], object]) -> None:
        try:
            act()
        except Exception:  # the broad handler of this thread: other calls run in it
            log.exception("a tool call")

    def _start(self, call: Call, namespace: Namespace | None) -> None:
        early = self._early.pop(call.id, b"")
        try:
            if not call.events.began():  # cancelled meanwhile
                return
            try:
                running = self._spawn(call, namespace)
            except (OSError, ValueError, subprocess.SubprocessError) as error:  # a NUL in a manifest
                call.events.ended(End(-1, "", f"cannot be started: {error}"))
                return
            namespace = None
        finally:
            disconnect(namespace)
        self._running[call.id] = running
        running.unsent += early
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
        if call.events.began():
            call.events.ended(End(-1, "", why))

    def _spawn(self, call: Call, namespace: Namespace | None) -> Running:
        manifest = call.cage.manifest
        group = self._cgroups.make(PROCESSES + BWRAP_PROCESSES, manifest.memory_bytes)
        with ExitStack() as undo:
            if group:
                undo.callback(self._remove, group)
            process = popen(call, namespace, group)
            undo.callback(process.wait)
            undo.callback(process.kill)
            pidfd = os.pidfd_open(process.pid)
            undo.pop_all()
        return Running(call, process, pidfd, time.monotonic() + manifest.timeout_s, namespace, group)

    def _remove(self, group: Group) -> None:
        """When its last process is gone, which may take a moment."""
        if not group.remove():
            self.later(REMOVE_S, partial(self._remove, group))

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
        room = max(0, running.call.cage.output_bytes - running.out_bytes)
        running.out_bytes += len(data)
        if data[:room]:
            running.call.events.said(data[:room])
        if len(data) > room:
            running.kill(f"it printed more than {running.call.cage.output_bytes} bytes")

    @staticmethod
    def _erred(running: Running, data: bytes) -> None:
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
        status = running.process.wait()
        os.close(running.pidfd)
        if running.group:
            if running.group.out_of_memory():
                running.why = running.why or over_memory(running.call)
            self._remove(running.group)
        for file in (running.process.stdin, running.process.stdout, running.process.stderr):
            if file and not file.closed:
                if file.fileno() in self._selector.get_map():
                    self._selector.unregister(file)
                file.close()
        disconnect(running.namespace)
        del self._running[running.call.id]
        stderr = running.stderr.decode("utf-8", "replace")
        running.call.events.ended(End(status, stderr, running.why))

    @staticmethod
    def _look(running: Running, now: float, memory_bytes: int) -> None:
        """Ends what takes too long, or more memory or disk than it may: rlimits bound each process alone.

        A group bounds memory by itself, but the kernel kills one of its processes only.
        """
        manifest = running.call.cage.manifest
        if now > running.until_s:
            running.kill(f"it took more than {manifest.timeout_s:g} s")
        elif memory_bytes > manifest.memory_bytes or (running.group and running.group.out_of_memory()):
            running.kill(over_memory(running.call))
        elif running.stderr_bytes > STDERR_MOST:
            running.kill(f"it said more than {STDERR_MOST} bytes on its standard error")
        elif (work := running.call.cage.work) and size(
            work, running.call.work_bytes
        ) > running.call.work_bytes:
            running.kill(f"its work folder has more than {running.call.work_bytes} bytes")
        elif work and free_bytes(work) < running.call.reserve_bytes:  # files that it removed and holds open
            running.kill("the disk is full")


def over_memory(call: Call) -> str:
    return f"it took more than {call.cage.manifest.memory_bytes} bytes of memory"


def disconnect(namespace: Namespace | None) -> None:
    if namespace:
        threading.Thread(target=namespace.close, name="network").start()

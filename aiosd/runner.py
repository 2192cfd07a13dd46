"""Runs tool calls: one process tree each, in its cage (aiosd.sandbox), started and watched by one thread.

One thread because a sandbox dies with the thread that started it: so do all with the daemon, however it ends.
It waits for output, ends and orders in one poll; what a call printed and how it ended it tells `events`. Any
thread may order. Networks are made and taken down by short threads, as that takes a while.
"""

from __future__ import annotations

import errno
import heapq
import itertools
import logging
import os
import selectors
import signal
import subprocess
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Protocol

import psutil

from aiosd import network
from aiosd.errors import AiosError
from aiosd.network import Namespace
from aiosd.request import Request
from aiosd.sandbox import Cage, seccomp_filter

log = logging.getLogger(__name__)

LOOK_S = 0.5  # how often what a call uses is looked at
STDERR_BYTES = 64 << 10
DEEPEST = 1000  # processes below each other
ENTRY_BYTES = 4096  # that any name in a work folder counts for
READ_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Call:
    request: Request
    cage: Cage
    arguments: str  # JSON, for its standard input
    uid: int
    groups: tuple[int, ...]  # gid first
    work_bytes: int
    reserve_bytes: int  # of the disk that its work folder is on


@dataclass(frozen=True, slots=True)
class End:
    """How a call ended. `why` it was ended from here, or could not begin; else its exit status says it."""

    status: int
    stderr: str
    why: str = ""


@dataclass(slots=True, eq=False)
class Running:
    call: Call
    process: subprocess.Popen[bytes]
    pidfd: int
    until_s: float
    namespace: Namespace | None
    streams: int = 3  # stdout, stderr and the pidfd: it is over when all are
    ended_s: float = 0.0  # 0: not yet
    out_bytes: int = 0
    stderr: bytearray = field(default_factory=bytearray)
    why: str = ""

    def kill(self, why: str) -> None:
        """bwrap's end is that of all in its pid namespace."""
        self.why = self.why or why
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)


class Events(Protocol):
    def tool_began(self, request: Request) -> bool: ...
    def tool_said(self, request: Request, data: bytes) -> None: ...
    def tool_ended(self, request: Request, end: End) -> None: ...


class Runner:
    def __init__(self, events: Events) -> None:
        self._events = events
        self._orders: deque[Callable[[], None]] = deque()
        self._running: dict[int, Running] = {}
        self._selector = selectors.DefaultSelector()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector.register(self._wake, selectors.EVENT_READ, lambda: os.eventfd_read(self._wake))
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._ids = itertools.count()
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="tools", daemon=True)

    def start(self) -> None:
        threading.Thread(target=network.clean, name="network", daemon=True).start()
        self._thread.start()

    def stop(self) -> None:
        """Ends all that run, without a word: they are told as interrupted by the next daemon."""
        self._order(lambda: setattr(self, "_stopping", True))
        if self._thread.ident is not None:
            self._thread.join()

    def run(self, call: Call) -> None:
        if call.cage.manifest.network:
            threading.Thread(target=self._connect, args=(call,), name="network", daemon=True).start()
        else:
            self._order(partial(self._start, call, None))

    def _connect(self, call: Call) -> None:
        try:
            namespace = network.open(call.cage.manifest.network)
        except AiosError as error:
            self._order(partial(self._refuse, call, error.explanation))
        else:
            self._order(partial(self._start, call, namespace))

    def kill(self, id: int) -> None:
        def kill() -> None:
            if running := self._running.get(id):
                running.kill("cancelled")

        self._order(kill)

    def later(self, after_s: float, order: Callable[[], None]) -> None:
        """Runs it on this thread, then."""
        self._order(
            lambda: heapq.heappush(self._timers, (time.monotonic() + after_s, next(self._ids), order))
        )

    def _order(self, order: Callable[[], None]) -> None:
        self._orders.append(order)
        os.eventfd_write(self._wake, 1)

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
            if self._running and now >= look_s:
                look_s = now + LOOK_S
                used = memory({running.process.pid for running in self._running.values()})
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

    def _patience_s(self) -> float | None:
        until_timer = max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None
        if self._running:
            return LOOK_S if until_timer is None else min(LOOK_S, until_timer)
        return until_timer

    @staticmethod
    def _try(act: Callable[[], object]) -> None:
        try:
            act()
        except Exception:  # the broad handler of this thread: other calls run in it
            log.exception("a tool call")

    def _start(self, call: Call, namespace: Namespace | None) -> None:
        try:
            if not self._events.tool_began(call.request):  # cancelled meanwhile
                return
            try:
                running = self._spawn(call, namespace)
            except (OSError, ValueError, subprocess.SubprocessError) as error:  # a NUL in a manifest
                self._events.tool_ended(call.request, End(-1, "", f"cannot be started: {error}"))
                return
            namespace = None
        finally:
            disconnect(namespace)
        self._running[call.request.id] = running
        process = running.process
        assert process.stdout
        assert process.stderr
        for file, heed in ((process.stdout, self._said), (process.stderr, self._erred)):
            self._selector.register(
                file, selectors.EVENT_READ, partial(self._read, running, file.fileno(), heed)
            )
        self._selector.register(
            running.pidfd, selectors.EVENT_READ, partial(self._over, running, running.pidfd)
        )

    def _refuse(self, call: Call, why: str) -> None:
        if self._events.tool_began(call.request):
            self._events.tool_ended(call.request, End(-1, "", why))

    @staticmethod
    def _spawn(call: Call, namespace: Namespace | None) -> Running:
        with ExitStack() as stack:
            given = stack.enter_context(memory_file(call.arguments.encode()))
            seccomp = stack.enter_context(memory_file(seccomp_filter())).fileno()
            program = call.cage.open_program()
            passed = [seccomp]
            if program is not None:
                stack.callback(os.close, program)
                passed.append(program)
            hosts = None
            if namespace:
                hosts = stack.enter_context(memory_file(namespace.hosts.encode())).fileno()
                passed.append(hosts)
                stack.enter_context(network.inside(namespace.fd))
            change = os.geteuid() == 0
            process = subprocess.Popen(
                call.cage.command(seccomp, program, hosts),
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                pass_fds=passed,
                cwd="/",
                env=call.cage.environment(),
                user=call.uid if change else None,
                group=call.groups[0] if change else None,
                extra_groups=call.groups[1:] if change else None,
            )
        try:
            pidfd = os.pidfd_open(process.pid)
        except OSError:
            process.kill()
            process.wait()
            raise
        return Running(call, process, pidfd, time.monotonic() + call.cage.manifest.timeout_s, namespace)

    def _read(self, running: Running, fd: int, heed: Callable[[Running, bytes], None]) -> None:
        if data := os.read(fd, READ_BYTES):
            heed(running, data)
        else:
            self._over(running, fd)

    def _said(self, running: Running, data: bytes) -> None:
        room = max(0, running.call.cage.output_bytes - running.out_bytes)
        running.out_bytes += len(data)
        if data[:room]:
            self._events.tool_said(running.call.request, data[:room])
        if len(data) > room:
            running.kill(f"it printed more than {running.call.cage.output_bytes} bytes")

    @staticmethod
    def _erred(running: Running, data: bytes) -> None:
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
        for file in (running.process.stdout, running.process.stderr):
            if file:
                if file.fileno() in self._selector.get_map():
                    self._selector.unregister(file)
                file.close()
        disconnect(running.namespace)
        request = running.call.request
        del self._running[request.id]
        stderr = running.stderr.decode("utf-8", "replace")
        self._events.tool_ended(request, End(status, stderr, running.why))

    @staticmethod
    def _look(running: Running, now: float, memory_bytes: int) -> None:
        """Ends what takes too long, or more memory or disk than it may: rlimits bound each process alone."""
        manifest = running.call.cage.manifest
        if now > running.until_s:
            running.kill(f"it took more than {manifest.timeout_s:g} s")
        elif memory_bytes > manifest.memory_bytes:
            running.kill(f"it took more than {manifest.memory_bytes} bytes of memory")
        elif (work := running.call.cage.work) and size(
            work, running.call.work_bytes
        ) > running.call.work_bytes:
            running.kill(f"its work folder has more than {running.call.work_bytes} bytes")
        elif work and free_bytes(work) < running.call.reserve_bytes:  # files that it removed and holds open
            running.kill("the disk is full")


def disconnect(namespace: Namespace | None) -> None:
    if namespace:
        threading.Thread(target=namespace.close, name="network").start()


def memory_file(data: bytes) -> FileIO:
    """An open file that holds so much and is at its beginning."""
    file = FileIO(os.memfd_create("aios"), "r+")
    file.write(data)
    file.seek(0)
    return file


def memory(tops: Collection[int]) -> Counter[int]:
    """Bytes that each of these processes and all below it hold."""
    found = {p.pid: p.info for p in psutil.process_iter(["ppid", "memory_info"])}
    total = Counter[int]()
    for pid, info in found.items():
        top = pid
        for _ in range(DEEPEST):  # no further, should pids come round while they are read
            if top not in found or top in tops:
                break
            top = found[top]["ppid"]
        if top in tops and info["memory_info"]:
            total[top] += info["memory_info"].rss
    return total


def free_bytes(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def size(folder: Path, enough: int) -> int:
    """Bytes below a folder; counts no further than `enough`. What is empty counts too, and what is so deep
    that it has no path as too much: else its owner could make this take for ever, or hide things."""
    total, folders = 0, [str(folder)]
    while folders and total <= enough:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    total += max(ENTRY_BYTES, entry.stat(follow_symlinks=False).st_blocks * 512)
                    if total > enough:
                        return total
        except OSError as error:  # most of all one that was removed meanwhile
            if error.errno == errno.ENAMETOOLONG:
                return enough + 1
    return total

"""End agents together with their process, whose end the kernel reports through pidfd_open(2).

One thread waits for all processes. A process is identified by its pid and its start time. So a reused pid is
never mistaken for it, even after a restart of the daemon or the machine.
"""

from __future__ import annotations

import logging
import os
import select
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from aiosd.access.caller import Caller, proc_status
from aiosd.agents.agents import Agent
from aiosd.errors import AiosError, BadValue, Denied, OverQuota
from aiosd.host import proc
from aiosd.host.message_ids import about
from aiosd.host.subuids import owner

log = logging.getLogger(__name__)

PROCESSES_MAX = 256  # per user, root excepted: each process takes a descriptor
AGAIN_S = 5.0
BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(slots=True, eq=False)
class Watched:
    descriptor: int
    uid: int
    agents: set[Agent] = field(default_factory=set)


class Lifetimes:
    def __init__(self, end: Callable[[Agent], None]) -> None:
        """`end` removes an agent. When it raises an AiosError, it is called again later."""
        self._end = end
        self._lock = threading.Lock()
        self._poll = select.epoll()
        self._watched: dict[tuple[int, str], Watched] = {}  # by process
        self._due: list[Agent] = []  # agents whose process ended
        self._wake = os.eventfd(0)
        self._poll.register(self._wake, select.EPOLLIN)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="lifetimes", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping = True
        os.eventfd_write(self._wake, 1)
        if self._thread.ident is not None:
            self._thread.join()

    def bind(self, agent: Agent, pid: int, started: str) -> None:
        """Let the agent end with this process, and no longer with another. Raises BadValue if the process has
        ended, and OverQuota.
        """
        with self._lock:
            watched = self._watched.get((pid, started)) or self._watch(pid, started)
            watched.agents.add(agent)
            self._forget(agent, but=watched)
        os.eventfd_write(self._wake, 1)  # the process may have ended in between

    def expire(self, agent: Agent) -> None:
        """End the agent: its process ended while no daemon watched."""
        with self._lock:
            self._due.append(agent)
        os.eventfd_write(self._wake, 1)

    def free(self, agent: Agent) -> None:
        with self._lock:
            self._forget(agent)

    def _forget(self, agent: Agent, but: Watched | None = None) -> None:
        for process, watched in list(self._watched.items()):
            if agent in watched.agents and watched is not but:
                watched.agents.remove(agent)
                if not watched.agents:
                    self._drop(process)

    def _watch(self, pid: int, started: str) -> Watched:
        try:
            uid = owner(os.stat(f"/proc/{pid}").st_uid)
            if uid != 0 and sum(w.uid == uid for w in self._watched.values()) >= PROCESSES_MAX:
                raise OverQuota(f"your agents end with {PROCESSES_MAX} processes already", "rmdir some first")
            descriptor = os.pidfd_open(pid)
        except OSError:
            raise BadValue(f"there is no process {pid}") from None
        if started_of(pid) != started:
            os.close(descriptor)
            raise BadValue(f"process {pid} has ended")
        self._poll.register(descriptor, select.EPOLLIN)
        self._watched[pid, started] = Watched(descriptor, uid)
        return self._watched[pid, started]

    def _drop(self, process: tuple[int, str]) -> None:
        os.close(self._watched.pop(process).descriptor)

    def _run(self) -> None:
        while not self._stopping:
            ready = {descriptor for descriptor, _ in self._poll.poll(AGAIN_S if self._due else None)}
            if self._wake in ready:
                os.eventfd_read(self._wake)
            with self._lock:
                for process, watched in list(self._watched.items()):
                    if watched.descriptor in ready and started_of(process[0]) != process[1]:
                        self._due += watched.agents
                        self._drop(process)
                due, self._due = self._due, []
            for agent in due:
                try:
                    self._end(agent)
                except AiosError as error:  # for example, the disk is full
                    words = agent.name, error.explanation
                    log.error("agent %s cannot be removed yet: %s", *words, extra=about(agent=agent.name))
                    with self._lock:
                        self._due.append(agent)


def started_of(pid: int) -> str:
    """Return boot id and start time, which identify a process. Empty: there is none, or it is a zombie."""
    try:
        stat = proc.stat(pid)
    except OSError:
        return ""
    return "" if stat[0] in "ZX" else f"{BOOT.read_text().strip()} {stat[19]}"


def check(caller: Caller, text: str) -> int:
    """Return the pid that a user names. Raises BadValue, or Denied if the process is another user's."""
    if not text.isdecimal() or len(text) > 9:
        raise BadValue(f"{text[:40]!r} is not a process id", "echo $$ > pid")
    if len(proc_status(caller.pid, "NSpid")) != 1:
        raise Denied("process ids differ in your pid namespace", "write the pid from outside the container")
    pid = int(text)
    if proc_status(pid, "Tgid") != [text.lstrip("0").encode()]:  # a thread id is refused too
        raise BadValue(f"there is no process {pid}")
    if caller.uid not in (0, os.stat(f"/proc/{pid}").st_uid):
        raise Denied(f"process {pid} is not yours")
    return pid

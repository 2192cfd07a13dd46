"""Agents that end with a process: the kernel tells of its end through a descriptor of it (pidfd_open(2)).

One thread waits for all of them. A process is known by its number and the time it started, so that a number
given again, also after a restart of the daemon, is nobody else's.
"""

from __future__ import annotations

import errno
import os
import select
import threading
from collections.abc import Callable

import psutil

from aiosd.access import Caller, proc_status
from aiosd.agents import Agent
from aiosd.errors import BadValue, Denied

SAME_START_S = 1.0  # the clock may have been set meanwhile, by less


class Lifetimes:
    def __init__(self, ended: Callable[[Agent], None]) -> None:
        self._ended = ended
        self._lock = threading.Lock()
        self._epoll = select.epoll()
        self._agents: dict[int, Agent] = {}  # by the descriptor of its process
        self._stop = os.eventfd(0)
        self._epoll.register(self._stop, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name="lifetimes", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        os.eventfd_write(self._stop, 1)
        if self._thread.ident is not None:
            self._thread.join()

    def bind(self, agent: Agent, pid: int, started_s: float) -> None:
        """Raises BadValue when that process is not there, or not any more."""
        try:
            process = os.pidfd_open(pid)
        except OSError as error:
            if error.errno not in (errno.ESRCH, errno.EINVAL):
                raise
            raise BadValue(f"there is no process {pid}") from None
        if abs(started(pid) - started_s) > SAME_START_S:
            os.close(process)
            raise BadValue(f"process {pid} has ended")
        with self._lock:
            self._agents[process] = agent
            self._epoll.register(process, select.EPOLLIN)

    def free(self, agent: Agent) -> None:
        with self._lock:
            for process in [fd for fd, bound in self._agents.items() if bound is agent]:
                del self._agents[process]
                os.close(process)

    def _run(self) -> None:
        while True:
            for process, _ in self._epoll.poll():
                if process == self._stop:
                    return
                with self._lock:
                    agent = self._agents.get(process)
                    if agent is None or not select.select([process], [], [], 0)[0]:
                        continue  # unbound meanwhile, and the number is of another descriptor
                    del self._agents[process]
                    os.close(process)
                self._ended(agent)


def started(pid: int) -> float:
    """Seconds since the epoch. Raises BadValue."""
    try:
        return float(psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:
        raise BadValue(f"there is no process {pid}") from None


def check(caller: Caller, text: str) -> int:
    """The process that a user names; it has to be one of his."""
    if not text.isdecimal() or len(text) > 9:
        raise BadValue(f"{text[:40]!r} is not the number of a process", "echo $$ > pid")
    if len(proc_status(caller.pid, "NSpid")) != 1:
        raise Denied("processes have other numbers where you are", "name one from outside of the container")
    pid = int(text)
    try:
        owner = os.stat(f"/proc/{pid}").st_uid
    except OSError:
        raise BadValue(f"there is no process {pid}") from None
    if caller.uid not in (0, owner):
        raise Denied(f"process {pid} is not yours")
    return pid

"""A worker as aios-worker@ID.service, or a puller as aios-pull@ID.service, which aios-privileged starts and
stops for the daemon.

The other way is a child of the daemon (aiosd.cores.launch.Child). Who uses them (aiosd.cores.pool,
aiosd.modelstore.pulls) knows no difference.
"""

from __future__ import annotations

import os
import pwd
import select
import socket
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from aiosd.cores import wire
from aiosd.errors import in_words
from aiosd.privilege.peer import peer_of

CONNECT_S = 60.0  # for the process to be there
WORKER, PULLER = "aios-worker", "aios-pull"  # names of the units, and of the users that they run as


class Unit:
    """The service connects to a socket of its number."""

    def __init__(self, kind: str, id: int, order: Callable[[str], None]) -> None:
        """`kind`: WORKER or PULLER. `order` sends aios-privileged a word of aiosd.privilege.orders.WHAT."""
        self._kind, self._name, self._order = kind, f"{kind}@{id}", order
        self.pid = 0
        self._pidfd = -1
        self._failed, self._news, self._closed = "", os.eventfd(0, os.EFD_CLOEXEC), False
        folder = Path(os.environ["RUNTIME_DIRECTORY"])
        self._address = folder / f"{kind.removeprefix('aios-')}-{id}"
        self._address.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self._address))
        self._address.chmod(0o666)  # who connects is looked at
        self._listener.listen()
        self._order("start")

    def connect(self, kinds: Collection[type[Any]] = wire.MESSAGES) -> wire.Channel:
        try:
            while True:
                self._await()
                sock, _ = self._listener.accept()
                self.pid, uid = peer_of(sock)
                if uid in (uid_of(self._kind), os.geteuid()):
                    break
                sock.close()
            self._pidfd = os.pidfd_open(self.pid)
            return wire.Channel(sock, kinds)
        except OSError as error:
            raise OSError(f"{in_words(error)}; systemctl status {self._name}") from None
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

    def alive(self) -> bool:
        return not self._failed

    def terminate(self) -> None:
        self._order("stop")

    def kill(self) -> None:
        if self._pidfd >= 0:
            with suppress(TimeoutError):
                self.wait(0)
                return  # it is gone; its number may be another's soon
        if not self._closed:
            self._order("kill")
        if self._pidfd < 0:
            self.fail("it was killed before it connected")

    def close(self) -> None:
        self._closed = True
        self._listener.close()
        self._address.unlink(missing_ok=True)
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
        return f"systemctl status {self._name} says how"


def workers_uid() -> int:
    return uid_of(WORKER)


def uid_of(user: str) -> int:
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        return os.geteuid()

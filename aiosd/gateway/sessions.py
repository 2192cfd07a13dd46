"""The front's side of sessions: one connection for each user with requests, many calls on it at once.

Everything runs on the event loop. What a session says is its user's word, and is held against nobody else.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
from collections import deque
from pathlib import Path

from aiosd.gateway import wire
from aiosd.gateway.refused import HttpRefused, of_errno
from aiosd.gateway.wire import Head

log = logging.getLogger(__name__)

IDLE_S = 60.0
LOOK_S = 10.0
USED_S = 240.0  # that new requests come to a session, which takes them for aiosd.gateway.session.LIFE_S

Whose = tuple[int, str]
Answered = tuple[Head, bytes, int | None]


class Gone(Exception):
    """The session has ended."""


class SessionLink:
    """One session. `begin` makes it a user's; then `call`."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock, self._loop = sock, asyncio.get_running_loop()
        self._messages, self._files = wire.Messages(), deque[int]()
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Answered]] = {}
        self._sending = asyncio.Lock()
        self.open = True
        self.began_s = self.used_s = self._loop.time()
        self._loop.add_reader(sock, self._readable)

    async def begin(self, key: str, connection: int | None) -> int:
        """Return the uid. Raises HttpRefused, Gone."""
        answer = self._waiting[0] = self._loop.create_future()
        message = wire.packed({"key": key} if connection is None else {})
        try:
            if connection is None:
                self._sock.send(message)
            else:
                socket.send_fds(self._sock, [message], [connection])
        except OSError:
            raise Gone from None
        head, _, _ = await answer
        return int(head["uid"])

    async def call(self, operation: str, path: str, body: bytes = b"") -> Answered:
        """Raises HttpRefused, Gone. A client who is cancelled leaves nothing open."""
        if not self.open:
            raise Gone
        number, self.used_s = next(self._numbers), self._loop.time()
        answer = self._waiting[number] = self._loop.create_future()
        message = wire.packed({"n": number, "op": operation, "path": path}, body)
        async with self._sending:
            await self._send(message)
        try:
            result: Answered = await answer
            return result
        except asyncio.CancelledError:
            if answer.done() and not answer.cancelled() and not answer.exception():  # it came in this moment
                close_file(answer.result())
            raise

    async def _send(self, message: bytes) -> None:
        try:
            await self._loop.sock_sendall(self._sock, message)
        except OSError:
            self.close()
        except asyncio.CancelledError:  # half a message may be on its way
            self.close()
            raise

    @property
    def fresh(self) -> bool:
        return self.open and self._loop.time() < self.began_s + USED_S

    @property
    def busy(self) -> bool:
        return bool(self._waiting)

    def close(self) -> None:
        if not self.open:
            return
        self.open = False
        self._loop.remove_reader(self._sock)
        self._sock.close()
        for file in self._files:
            os.close(file)
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(Gone())
        self._waiting.clear()

    def _readable(self) -> None:
        try:
            more = self._receive()
        except BlockingIOError:
            return
        except (OSError, wire.Malformed, IndexError, TypeError, ValueError) as error:
            log.warning("a session broke off: %s", error)
            more = False
        if not more:
            self.close()

    def _receive(self) -> bool:
        """Whether there is more to come. Raises OSError, Malformed, IndexError, TypeError, ValueError."""
        most = wire.RECEIVED, wire.FILES_MOST
        data, files, _, _ = socket.recv_fds(self._sock, *most, socket.MSG_CMSG_CLOEXEC)
        self._files.extend(files)
        for head, body in self._messages.add(data):
            self._answered(head, body)
        return bool(data)

    def _answered(self, head: Head, body: bytes) -> None:
        file = self._files.popleft() if head.get("file") else None
        answer = self._waiting.pop(head.get("n", 0), None)
        if answer is None or answer.done():  # its client has gone
            close_file((head, body, file))
        elif "errno" in head:
            answer.set_exception(of_errno(int(head["errno"]), str(head.get("reason", ""))))
        else:
            answer.set_result((head, body, file))


def close_file(answered: Answered) -> None:
    _, _, file = answered
    if file is not None:
        os.close(file)


class UserSessions:
    """The connections, by uid and by the only agent of the key."""

    def __init__(self, address: Path) -> None:
        self._address = address
        self._open: dict[Whose, SessionLink] = {}
        self._opening: dict[Whose, asyncio.Lock] = {}
        self._leaving = set[SessionLink]()  # they still answer calls that were made

    async def of(self, uid: int, agent: str, key: str, connection: int | None) -> SessionLink:
        """The user's session; a new one is shown his key, or his connection. Raises HttpRefused, Gone."""
        whose = uid, agent
        if (known := self._open.get(whose)) and known.fresh:
            return known
        async with self._opening.setdefault(whose, asyncio.Lock()):
            if (known := self._open.get(whose)) and known.fresh:
                return known
            made = await self._connect()
            try:
                became = await made.begin(key, connection)
            except BaseException:
                made.close()
                raise
            if became != uid:
                made.close()
                raise HttpRefused(401, "the key is of another user now")
            if known:
                self._leaving.add(known)
            self._open[whose] = made
            return made

    async def _connect(self) -> SessionLink:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            sock.connect(str(self._address))
        except OSError as error:
            sock.close()
            reason = f"no session can be started: {error}; systemctl start aios-session.socket"
            raise HttpRefused(503, reason) from None
        return SessionLink(sock)

    async def end_idle(self) -> None:
        """For ever: close the sessions that nobody uses."""
        while True:
            await asyncio.sleep(LOOK_S)
            before_s = asyncio.get_running_loop().time() - IDLE_S
            for whose, session in list(self._open.items()):
                if not session.open or (not session.busy and session.used_s < before_s):
                    session.close()
                    del self._open[whose]
            for whose, lock in list(self._opening.items()):
                if whose not in self._open and not lock.locked():
                    del self._opening[whose]
            for session in [one for one in self._leaving if not one.busy]:
                session.close()
                self._leaving.remove(session)

    def close(self) -> None:
        for session in (*self._open.values(), *self._leaving):
            session.close()

    def __len__(self) -> int:
        return len(self._open) + len(self._leaving)

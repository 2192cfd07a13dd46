"""HTTP on one connection, with bounds on what clients may hold open. The front gets the socket."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_S = 10.0  # that a client has to say what it wants
CONNECTIONS_MOST = 8192  # and the user of a Unix socket may have an eighth
FULL = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
UCRED = struct.Struct("iII")  # pid, uid, gid


def peer_of(connection: socket.socket) -> int | None:
    """The uid at the other end, from the kernel; None: it is not a Unix socket."""
    if connection.family != socket.AF_UNIX:
        return None
    _, uid, _ = UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))
    return int(uid)


class Protocol(H11Protocol):
    peer: int | None = None
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        connection: Any = transport.get_extra_info("socket")
        self.peer = peer_of(connection)
        self.app_state = {**self.app_state, "socket": connection, "peer": self.peer}
        if self._full():
            transport.write(FULL)
            transport.close()
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._in_time()
        super().connection_lost(exc)

    def _full(self) -> bool:
        if len(self.connections) > CONNECTIONS_MOST:
            return True
        mine = sum(getattr(other, "peer", None) == self.peer for other in self.connections)
        return self.peer is not None and mine > CONNECTIONS_MOST // 8

    def _watch(self) -> None:
        """The header of a request comes within a time, however slowly its bytes do."""
        if self.conn.their_state is not h11.IDLE:
            self._in_time()
        elif self._late is None:
            self._late = self.loop.call_later(HEADER_S, self.transport.close)

    def _in_time(self) -> None:
        if self._late:
            self._late.cancel()
            self._late = None

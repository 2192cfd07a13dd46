"""HTTP on one connection, with bounds on what clients may hold open. The front gets the socket."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections import Counter
from http import HTTPStatus
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from aiosd.gateway.openai_errors import shape
from aiosd.gateway.refused import HttpRefused

HEADER_S = 10.0  # that a client has to say what it wants
CONNECTIONS_MOST = 8192
UNIX_MOST = CONNECTIONS_MOST // 8  # of one user of the Unix socket
TCP_MOST = CONNECTIONS_MOST * 3 // 4  # of all who come there, so that they do not keep out the others
FULL = HttpRefused(503, "there are too many connections; try again", "too_many_connections")
UCRED = struct.Struct("iII")  # pid, uid, gid


def message(refused: HttpRefused) -> bytes:
    """A whole response, after which the connection ends."""
    body = json.dumps({"error": shape(refused)}).encode()
    status = HTTPStatus(refused.status)
    headers = refused.headers | {
        "Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close",
    }  # fmt: skip
    lines = [f"HTTP/1.1 {status.value} {status.phrase}", *(f"{name}: {headers[name]}" for name in headers)]
    return "\r\n".join([*lines, "", ""]).encode() + body


def peer_of(connection: socket.socket) -> int | None:
    """The uid at the other end, from the kernel; None: it is not a Unix socket."""
    if connection.family != socket.AF_UNIX:
        return None
    _, uid, _ = UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))
    return int(uid)


class Protocol(H11Protocol):
    peers: ClassVar[Counter[int | None]] = Counter()  # connections by uid; None: to loopback TCP
    peer: int | None = None
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        connection: Any = transport.get_extra_info("socket")
        self.peer = peer_of(connection)
        if self.peer is None:  # asyncio does it only for sockets that name their protocol
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.app_state = {**self.app_state, "socket": connection, "peer": self.peer}
        self.peers[self.peer] += 1
        if self._full():
            transport.write(message(FULL))
            transport.close()
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._in_time()
        self.peers[self.peer] -= 1
        if not self.peers[self.peer]:
            del self.peers[self.peer]
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # no other response has begun
            self.transport.write(message(HttpRefused(400, f"this is not HTTP: {msg}", "invalid_http")))
        self.transport.close()

    def _full(self) -> bool:
        most = TCP_MOST if self.peer is None else UNIX_MOST
        return len(self.connections) > CONNECTIONS_MOST or self.peers[self.peer] > most

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

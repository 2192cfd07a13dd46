"""The process at the other end of a socket, from the kernel (SO_PEERCRED of unix(7))."""

from __future__ import annotations

import socket
import struct

UCRED = struct.Struct("iII")  # pid, uid, gid


def peer_of(sock: socket.socket) -> tuple[int, int]:
    """(pid, uid) of the process that connected."""
    pid, uid, _ = UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))
    return pid, uid

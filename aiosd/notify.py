"""sd_notify(3): tells a service manager that asks (NOTIFY_SOCKET) how the daemon stands."""

from __future__ import annotations

import os
import socket


def notify(**state: str | int) -> None:
    """notify(READY=1, STATUS="…"); nothing happens where nobody asks."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address[0] == "@":
        address = "\0" + address[1:]  # abstract namespace
    message = "\n".join(f"{key}={value}" for key, value in state.items())
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.connect(address)
        sock.sendall(message.encode())

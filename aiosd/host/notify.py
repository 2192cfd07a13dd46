"""sd_notify(3): tells a service manager that asks (NOTIFY_SOCKET) how the daemon stands.

Of systemd's library this needs one datagram, so there is no dependency on it.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress


def notify(**state: str | int) -> None:
    """notify(READY=1, STATUS="…"); nothing happens where nobody asks, or hears."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address[0] == "@":
        address = "\0" + address[1:]  # abstract namespace
    lines = (f"{key}={value}".replace("\n", " ") for key, value in state.items())  # a path may hold one
    message = "\n".join(lines).encode("utf-8", "backslashreplace")
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.connect(address)
        sock.sendall(message)


def asked() -> bool:
    return bool(os.environ.get("NOTIFY_SOCKET"))


def watchdog_s() -> float | None:
    """Within what time it wants to hear WATCHDOG=1 again; None: not at all (sd_watchdog_enabled(3))."""
    microseconds, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not microseconds.isdecimal() or pid not in ("", str(os.getpid())):
        return None
    return int(microseconds) / 1e6 or None

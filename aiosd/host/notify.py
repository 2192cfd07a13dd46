"""sd_notify(3) by systemd-python: tells a service manager that asks (NOTIFY_SOCKET) how the daemon stands."""

from __future__ import annotations

import os
import select
import socket
from contextlib import suppress

try:
    from systemd import daemon
except ImportError:
    daemon = None

PATIENCE_S = 1.0


def notify(**state: str | int) -> None:
    """notify(READY=1, STATUS="…"); nothing happens where nobody asks, or hears."""
    lines = (f"{key}={value}".replace("\n", " ") for key, value in state.items())  # a path may hold one
    message = "\n".join(lines).encode(errors="backslashreplace").decode()
    if daemon is None or not asked():
        return
    with suppress(OSError):
        if has_room(os.environ["NOTIFY_SOCKET"]):
            daemon.notify(message)


def has_room(address: str) -> bool:
    """Whether the manager takes a message now. Raises OSError.

    While sd_notify(3) waits for a manager that stands still, systemd-python keeps Python's global lock, and
    no thread of the daemon would run.
    """
    if address[0] not in "/@":
        return True  # not a Unix socket
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
        probe.connect("\0" + address[1:] if address[0] == "@" else address)
        poll = select.poll()
        poll.register(probe, select.POLLOUT)
        return bool(poll.poll(PATIENCE_S * 1000))


def asked() -> bool:
    return bool(os.environ.get("NOTIFY_SOCKET"))


def watchdog_s() -> float | None:
    """Within what time it wants to hear WATCHDOG=1 again; None: not at all (sd_watchdog_enabled(3)).

    systemd-python has no function for this.
    """
    microseconds, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not microseconds.isdecimal() or pid not in ("", str(os.getpid())):
        return None
    return int(microseconds) / 1e6 or None

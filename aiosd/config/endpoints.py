"""Network grants of tools, `host:port` each, and the addresses of their hosts.

Pure, except for resolve(), which asks the machine's resolver and blocks. Any thread may call.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from queue import Empty, SimpleQueue

from aiosd.errors import BadValue, NoNetwork

RESOLVE_S = 5.0
ADDRESSES = 8  # per name
LOOPBACK = "127.0.0.1"
# the calls' own networks; reserved for benchmarks (RFC 2544), so no host has one
RANGE = IPv4Network("198.18.0.0/15")
GRANT = re.compile(r"([A-Za-z0-9_]|[A-Za-z0-9_][A-Za-z0-9_.-]{0,251}[A-Za-z0-9_]):([1-9][0-9]{0,4})")


@dataclass(frozen=True, slots=True)
class Grant:
    """Permission to reach one TCP port of one host, which is a name or an IPv4 address."""

    host: str
    port: int


def parse(text: str) -> Grant:
    """Parse host:port. Raises BadValue."""
    found = GRANT.fullmatch(text)
    if not found or int(found[2]) > 65535:
        raise BadValue(f"{text[:80]!r} is not a grant", "write host:port, with a name or an IPv4 address")
    host = found[1].lower()
    with suppress(ValueError):
        address = IPv4Address(host)
        if address in RANGE or address.is_multicast or address.is_unspecified:
            raise BadValue(f"{text}: this address cannot be granted", "name a host")
        if address.is_loopback and host != LOOPBACK:
            raise BadValue(f"{text}: {LOOPBACK} is the only loopback address that can be granted")
    return Grant(host, int(found[2]))


def resolve(hosts: Collection[str]) -> dict[str, list[str]]:
    """Return the addresses of the hosts that resolve within RESOLVE_S. Raises NoNetwork if none does."""
    answers: SimpleQueue[tuple[str, list[str] | OSError]] = SimpleQueue()

    def ask(host: str) -> None:
        try:
            answers.put((host, _lookup(host)))
        except (OSError, UnicodeError) as error:
            answers.put((host, OSError(str(error))))

    for host in hosts:
        threading.Thread(target=ask, args=(host,), name="resolve", daemon=True).start()
    until_s, found, reasons = time.monotonic() + RESOLVE_S, {}, []
    with suppress(Empty):
        for _ in hosts:
            host, answer = answers.get(timeout=max(0.0, until_s - time.monotonic()))
            if isinstance(answer, OSError):
                reasons.append(f"{host}: {answer}")
            else:
                found[host] = answer
    if not found:
        reason = "; ".join(reasons) or f"no answer within {RESOLVE_S:g} s"
        raise NoNetwork(
            f"the granted hosts do not resolve: {reason}", "check the grants and the machine's DNS"
        )
    return found


def _lookup(host: str) -> list[str]:
    if host == "localhost":
        return [LOOPBACK]
    found = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)
    return list(dict.fromkeys(str(where[0]) for *_, where in found))[:ADDRESSES]

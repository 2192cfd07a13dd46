"""Networks of tool calls: each a namespace of its own that reaches the granted addresses and nothing else.

A veth pair joins it to the host. The rules are in the namespace, over which its processes have no capability.
When no process and no descriptor holds it, the kernel removes it with rules and pair, however the daemon
ended. On the host there are, while such calls run, the nftables table `aios` and forwarding where grants lead
out; RECORD tells the next daemon what a killed one left of that. IPv4 alone. Knows no tools and no requests;
open() and close() block, so threads of their own call them. pyroute2 takes 0.2 s to import: at the first use.
"""

from __future__ import annotations

import ctypes
import fcntl
import ipaddress
import itertools
import logging
import os
import re
import socket
import sys
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aiosd.config.endpoints import LOOPBACK, RANGE, parse, resolve
from aiosd.errors import NoNetwork, in_words
from aiosd.tools.run import nftables

if TYPE_CHECKING:
    from pyroute2 import IPRoute

log = logging.getLogger(__name__)

RECORD = Path("/run/aios/network")  # lines: the table, then interfaces whose forwarding was turned on
LEAVE_S = 10.0
PAIRS = 1 << 16  # of addresses in RANGE
LINK = re.compile(r"aios[0-9]+")
CLONE_NEWNET = 0x40000000
UNICAST, LOCAL = 1, 2  # kinds of routes, rtnetlink(7)
OWN = "/proc/thread-self/ns/net"
SETTINGS = Path("/proc/sys/net")
LIBC = ctypes.CDLL(None, use_errno=True)
REMEDY = "it takes root with CAP_NET_ADMIN, and a kernel with veth and nf_tables: see aios-tool(5)"
_numbers = itertools.count(os.getpid())  # of pairs; another daemon begins elsewhere


@dataclass(frozen=True, slots=True)
class Namespace:
    fd: int
    link: str  # the host's end of the pair
    hosts: str  # its /etc/hosts

    def close(self) -> None:
        from pyroute2 import IPRoute
        from pyroute2.netlink.exceptions import NetlinkError

        try:
            with _locked() as record, IPRoute() as host:
                _remove_link(host, self.link)
                _settle(record)
        except (OSError, NetlinkError) as error:  # the pair goes with the namespace, the rest by clean()
            log.warning("the host's side of a call's network is left: %s", error)
        finally:
            os.close(self.fd)


def open(grants: Iterable[str]) -> Namespace:
    """Raises NoNetwork: it cannot be made here, or nothing of it can be reached."""
    wanted = [parse(text) for text in grants]
    if os.geteuid() != 0:
        raise NoNetwork("a tool with `network` needs the daemon of root", REMEDY)
    found = resolve({grant.host for grant in wanted})
    try:
        from pyroute2 import IPRoute
        from pyroute2.netlink.exceptions import NetlinkError
    except ImportError as error:
        raise NoNetwork(
            f"a tool with `network` needs pyroute2: {error}", f"{sys.executable} -m pip install pyroute2"
        ) from None
    try:
        with _locked() as record, IPRoute() as host:
            found, devices = _routed(host, found)
            targets = {(address, grant.port) for grant in wanted for address in found.get(grant.host, ())}
            try:
                _lead_out(record, devices)
                return _join(host, found, targets)
            except BaseException:
                _settle(record)
                raise
    except (OSError, NetlinkError) as error:
        raise NoNetwork(f"a network for the call cannot be made: {in_words(error)}", REMEDY) from None


def clean() -> None:
    """Takes back what a killed daemon left on the host, when its pairs have gone as they do by themselves."""
    until_s = time.monotonic() + LEAVE_S
    try:
        while os.geteuid() == 0 and RECORD.exists() and RECORD.stat().st_size and time.monotonic() < until_s:
            with _locked() as record:
                _settle(record)
            time.sleep(0.1)
    except (OSError, ImportError) as error:
        log.warning("what a killed daemon left of networks stays: %s; %s", error, REMEDY)


@contextmanager
def inside(fd: int) -> Iterator[None]:
    """The calling thread, and what it starts meanwhile, in that namespace."""
    home = os.open(OWN, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(LIBC.setns(fd, CLONE_NEWNET))
        try:
            yield
        finally:
            _check(LIBC.setns(home, CLONE_NEWNET))
    finally:
        os.close(home)


def _check(status: int) -> None:
    if status:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


# addresses


def _routed(host: IPRoute, found: dict[str, list[str]]) -> tuple[dict[str, list[str]], set[str]]:
    """What of it can be reached, and by which interfaces of the host.

    Who answers for a name is not the administrator: it never leads to this machine or to link-local
    addresses, where clouds keep their keys.
    """
    from pyroute2.netlink.exceptions import NetlinkError

    reached: dict[str, list[str]] = {}
    devices, reasons = set[str](), []
    for name, addresses in found.items():
        for address in addresses:
            try:
                kind, device = _route(host, address)
            except NetlinkError as error:
                reasons.append(f"{address}: {error.args[-1]}")
                continue
            named = address == name or name == "localhost"
            facts = ipaddress.IPv4Address(address)
            if kind not in (UNICAST, LOCAL) or facts in RANGE:
                reasons.append(f"{address} is no host")
            elif not named and (kind == LOCAL or facts.is_link_local):
                reasons.append(f"{name} leads to {address}, which has to be granted by its number")
            else:
                reached.setdefault(name, []).append(address)
                devices |= {device} if kind == UNICAST else set()
    if not reached:
        raise NoNetwork(f"the granted hosts cannot be reached: {'; '.join(reasons)}", "look at the grants")
    return reached, devices


def _route(host: IPRoute, address: str) -> tuple[int, str]:
    [route, *_] = host.route("get", dst=address)
    return route["type"], socket.if_indextoname(route.get_attr("RTA_OIF"))


# the host


@contextmanager
def _locked() -> Iterator[int]:
    """RECORD, held by nobody else: no other thread, and no other daemon of this machine."""
    RECORD.parent.mkdir(mode=0o755, exist_ok=True)
    fd = os.open(RECORD, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield fd
    finally:
        os.close(fd)


def _lead_out(record: int, devices: Collection[str]) -> None:
    """The table, and forwarding of what comes back by these: to the pairs alone, as it was not on before."""
    known = _recorded(record)
    new = [device for device in devices if _forwarding(device).read_text() == "0\n"]
    there = bool(known) and nftables.is_there()
    if there and not new:
        return
    lines = [*(known or [nftables.TABLE]), *new]
    os.pwrite(record, os.fsencode("".join(f"{line}\n" for line in lines)), 0)
    old = nftables.gone() if there else ()  # to replace a table takes 10 ms
    nftables.apply([*old, *nftables.of_host(tuple(lines[1:]))])
    for device in new:
        _forwarding(device).write_text("1")


def _settle(record: int) -> None:
    """Takes all back with the last pair."""
    if _links():
        return
    if _forwarding("all").read_text() == "0\n":  # else somebody wants it on everywhere by now
        for device in _recorded(record)[1:]:
            with suppress(FileNotFoundError):
                _forwarding(device).write_text("0")
    nftables.apply(nftables.gone())
    os.ftruncate(record, 0)


def _recorded(record: int) -> list[str]:
    """A name of an interface is any bytes but / and blanks."""
    return os.fsdecode(os.pread(record, 1 << 16, 0)).split("\n")[:-1]


def _forwarding(device: str) -> Path:
    return SETTINGS / "ipv4/conf" / device / "forwarding"


def _links() -> list[str]:
    """Of all daemons of this machine."""
    return [name for _, name in socket.if_nameindex() if LINK.fullmatch(name)]


def _remove_link(host: IPRoute, link: str) -> None:
    if link in _links():
        host.link("del", ifname=link)


# the namespace


def _join(host: IPRoute, found: dict[str, list[str]], targets: Collection[tuple[str, int]]) -> Namespace:
    with ExitStack() as undo:
        fd = _new()
        undo.callback(os.close, fd)
        taken = _links()
        number = next(number for n in _numbers if f"aios{(number := n % PAIRS)}" not in taken)
        link = f"aios{number}"
        gateway, own = (str(RANGE[2 * number + end]) for end in (0, 1))
        host.link("add", ifname=link, kind="veth", peer={"ifname": "eth0", "net_ns_fd": fd})
        undo.callback(_remove_link, host, link)
        settings = SETTINGS / "ipv4/conf" / link
        (settings / "forwarding").write_text("1")
        (settings / "rp_filter").write_text("1")
        if any(address == LOOPBACK for address, _ in targets):
            (settings / "route_localnet").write_text("1")
        index = socket.if_nametoindex(link)
        host.addr("add", index=index, address=gateway, prefixlen=31)
        host.link("set", index=index, state="up")
        with inside(fd):
            _furnish(gateway, own, targets)
        undo.pop_all()
    named = (f"{address} {name}\n" for name, there in found.items() for address in there if address != name)
    return Namespace(fd, link, f"{LOOPBACK} localhost aios\n{''.join(named)}")


def _new() -> int:
    home = os.open(OWN, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(LIBC.unshare(CLONE_NEWNET))
        try:
            return os.open(OWN, os.O_RDONLY | os.O_CLOEXEC)
        finally:
            _check(LIBC.setns(home, CLONE_NEWNET))
    finally:
        os.close(home)


def _furnish(gateway: str, own: str, targets: Collection[tuple[str, int]]) -> None:
    """The rules come before the way out; route_localnet is for what goes to the host's loopback."""
    from pyroute2 import IPRoute

    with suppress(FileNotFoundError):
        (SETTINGS / "ipv6/conf/all/disable_ipv6").write_text("1")
    nftables.apply(nftables.of_call(gateway, targets))
    (SETTINGS / "ipv4/conf/eth0/route_localnet").write_text("1")
    index = socket.if_nametoindex("eth0")
    with IPRoute() as inner:
        inner.addr("add", index=index, address=own, prefixlen=31)
        inner.link("set", index=socket.if_nametoindex("lo"), state="up")
        inner.link("set", index=index, state="up")
        inner.route("add", dst="default", gateway=gateway)

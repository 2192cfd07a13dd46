"""The nftables rules of aiosd.tools.run.network, as the kernel takes them: what may pass, in words of nft(8).

pyroute2 builds the messages; they are sent here, all or none, as its own sockets take longer than the kernel.
Decides nothing; knows no interfaces and no processes.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Collection
from functools import cache, lru_cache
from typing import Any

from aiosd.config.endpoints import LOOPBACK, RANGE

TABLE = "aios"
PREFIX = b"aios"  # of the names of the pairs
IPV4, INET = 2, 1  # families
NETWORK, TRANSPORT = 1, 2  # headers
EQUAL, OTHER = 0, 1
OIF, IIFNAME, OIFNAME, IIF, PROTOCOL = 5, 6, 7, 4, 16  # of meta
FILTER, BEFORE, AFTER = 0, -100, 100  # priorities
ESTABLISHED, RELATED, NEW = 2, 4, 8
DROP, ACCEPT = 0, 1
PER_S, BURST = 50, 256  # connections that one call may begin
NETLINK_NETFILTER, NFTABLES = 12, 10  # the protocol and the subsystem
PATIENCE_S = 10.0
NEWTABLE, GETTABLE, DELTABLE, NEWCHAIN, NEWRULE, BEGIN, END = 0, 1, 2, 3, 6, 0x10, 0x11
ERROR = 2  # of netlink(7)
REQUEST, ACK, CREATE, APPEND = 0x1, 0x4, 0x400, 0x800
Expressions = list[dict[str, Any]]


@cache
def of_host(opened: tuple[str, ...]) -> tuple[bytes, ...]:
    """Masquerading, the way to the loopback, and what may be forwarded from interfaces that did not before.

    A call's own rules say what it reaches; these are the same for all.
    """
    return (
        table(IPV4),
        chain(IPV4, "loopback", "prerouting", "nat", BEFORE),
        rule(IPV4, "loopback", meta(IIFNAME, PREFIX), in_range(16), dnat(LOOPBACK)),
        chain(IPV4, "source", "postrouting", "nat", AFTER),
        rule(IPV4, "source", in_range(12), expression("masq")),
        chain(IPV4, "forward", "forward", "filter", FILTER),
        *(rule(IPV4, "forward", meta(IIFNAME, os.fsencode(name).ljust(16, b"\0")),
               meta(OIFNAME, PREFIX, OTHER), verdict(DROP)) for name in opened),
    )  # fmt: skip


def gone() -> tuple[bytes, bytes]:
    return table(IPV4), message(DELTABLE, IPV4, name=TABLE)  # to delete what is not there is an error


def of_call(gateway: str, targets: Collection[tuple[str, int]]) -> list[bytes]:
    """In a call's namespace: out to the targets alone, in only answers; loopback by the gateway."""
    ports = sorted(port for address, port in targets if address == LOOPBACK)
    return [
        *_frame(),
        *(_allowed(*target) for target in sorted(targets) if target[0] != LOOPBACK),
        *(rule(INET, "output", to(gateway, port), verdict(ACCEPT)) for port in ports),
        rule(INET, "output", meta(PROTOCOL, TCP), expression("reject", type=1)),  # so that it fails at once
        *((chain(INET, "loopback", "output", "nat", BEFORE),) if ports else ()),
        *(rule(INET, "loopback", to(LOOPBACK, port), dnat(gateway)) for port in ports),
        *((chain(INET, "source", "postrouting", "nat", AFTER),) if ports else ()),
        *((rule(INET, "source", meta(OIF, LO, OTHER), expression("masq")),) if ports else ()),
    ]


@cache
def _frame() -> tuple[bytes, ...]:
    return (
        table(INET),
        chain(INET, "input", "input", "filter", FILTER, DROP),
        rule(INET, "input", meta(IIF, LO), verdict(ACCEPT)),
        rule(INET, "input", state(ESTABLISHED | RELATED), verdict(ACCEPT)),
        chain(INET, "forward", "forward", "filter", FILTER, DROP),
        chain(INET, "output", "output", "filter", FILTER, DROP),
        # first: what was turned from the loopback to the gateway still counts as going out by lo
        rule(INET, "output", state(NEW), abroad(), over(PER_S, BURST), verdict(DROP)),
        rule(INET, "output", meta(OIF, LO), verdict(ACCEPT)),
    )


@lru_cache(1000)
def _allowed(address: str, port: int) -> bytes:
    return rule(INET, "output", to(address, port), verdict(ACCEPT))


# messages


def apply(messages: Collection[bytes]) -> None:
    """In the namespace of the calling thread, all or none. Raises OSError."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as nft:
        nft.settimeout(PATIENCE_S)
        nft.send(b"".join((_edge(BEGIN), *messages, _edge(END))))
        for _ in messages:
            answer = nft.recv(65536)
            [error] = struct.unpack_from("=i", answer, 16)  # of struct nlmsgerr, netlink(7)
            if error:
                raise OSError(-error, f"nf_tables: {os.strerror(-error)}")


def is_there() -> bool:
    """The host's table: who loads his own rules may begin with `flush ruleset`."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as nft:
        nft.settimeout(PATIENCE_S)
        nft.send(_get())
        [kind] = struct.unpack_from("=H", nft.recv(65536), 4)  # of struct nlmsghdr
        return bool(kind != ERROR)


@cache
def _get() -> bytes:
    return message(GETTABLE, IPV4, name=TABLE)


def message(kind: int, family: int, **facts: Any) -> bytes:
    from pyroute2.netlink.nfnetlink import nftsocket

    kinds = {NEWTABLE: "table", GETTABLE: "table", DELTABLE: "table", NEWCHAIN: "chain", NEWRULE: "rule"}
    made = getattr(nftsocket, f"nft_{kinds[kind]}_msg")()
    made["header"]["type"] = NFTABLES << 8 | kind
    change = {GETTABLE: 0, DELTABLE: ACK}.get(kind, ACK | CREATE | APPEND)
    made["header"]["flags"] = REQUEST | change
    made["nfgen_family"] = family
    made["attrs"] = [[made.name2nla(key), value] for key, value in facts.items()]
    made.encode()
    return bytes(made.data)


@cache
def _edge(kind: int) -> bytes:
    from pyroute2.netlink.nfnetlink import nfgen_msg

    made = nfgen_msg()
    made["header"]["type"], made["header"]["flags"], made["res_id"] = kind, REQUEST, NFTABLES
    made.encode()
    return bytes(made.data)


def table(family: int) -> bytes:
    return message(NEWTABLE, family, name=TABLE)


def chain(family: int, name: str, hook: str, kind: str, priority: int, policy: int = ACCEPT) -> bytes:
    hooks = ("prerouting", "input", "forward", "output", "postrouting")
    at = [["NFTA_HOOK_HOOKNUM", hooks.index(hook)], ["NFTA_HOOK_PRIORITY", priority]]
    return message(NEWCHAIN, family, table=TABLE, name=name, hook={"attrs": at}, type=kind, policy=policy)


def rule(family: int, chain: str, *parts: Expressions) -> bytes:
    together = [one for part in parts for one in part]
    return message(NEWRULE, family, table=TABLE, chain=chain, expressions=together)


# expressions: each loads into register 1 what the next one compares

LO = (1).to_bytes(4, sys.byteorder)  # the index of the loopback interface


def expression(name: str, **facts: Any) -> Expressions:
    from pyroute2.nftables.expressions import genex

    return [genex(name, facts)]


def value(data: bytes) -> dict[str, Any]:
    return {"attrs": [("NFTA_DATA_VALUE", data)]}


def compare(data: bytes, operator: int = EQUAL) -> Expressions:
    return expression("cmp", sreg=1, op=operator, data=value(data))


def field(header: int, offset: int, data: bytes) -> Expressions:
    return expression("payload", dreg=1, base=header, offset=offset, len=len(data)) + compare(data)


def masked(mask: bytes) -> Expressions:
    return expression("bitwise", sreg=1, dreg=1, len=len(mask), mask=value(mask), xor=value(bytes(len(mask))))


def meta(key: int, data: bytes, operator: int = EQUAL) -> Expressions:
    return expression("meta", key=key, dreg=1) + compare(data, operator)


def in_range(offset: int) -> Expressions:
    """The source (12) or destination (16) address."""
    load = expression("payload", dreg=1, base=NETWORK, offset=offset, len=4)
    return load + masked(RANGE.netmask.packed) + compare(RANGE.network_address.packed)


def abroad() -> Expressions:
    load = expression("payload", dreg=1, base=NETWORK, offset=16, len=1)
    return load + compare(b"\x7f", OTHER)


def state(of: int) -> Expressions:
    return expression("ct", key=0, dreg=1) + masked(of.to_bytes(4, sys.byteorder)) + compare(bytes(4), OTHER)


def over(per_s: int, burst: int) -> Expressions:
    return expression("limit", rate=per_s, unit=1, burst=burst, type=0, flags=1)


TCP = bytes([socket.IPPROTO_TCP])


def to(address: str, port: int) -> Expressions:
    """TCP by IPv4, with a header of no options: they could route it elsewhere."""
    plain = field(NETWORK, 0, b"\x45") + field(NETWORK, 16, socket.inet_aton(address))
    return plain + meta(PROTOCOL, TCP) + field(TRANSPORT, 2, port.to_bytes(2, "big"))


def dnat(address: str) -> Expressions:
    load = expression("immediate", dreg=1, data=value(socket.inet_aton(address)))
    return load + expression("nat", type=1, family=IPV4, reg_addr_min=1)


def verdict(code: int) -> Expressions:
    from pyroute2.nftables.expressions import verdict

    made: Expressions = verdict(code)
    return made

"""The messages between the daemon and aios-privileged, and what each field may hold.

The daemon (aiosd.privilege.helped) sends orders and questions, aios-privileged (aiosd.privilege.helper) sends
answers, both as frames of aiosd.cores.wire. An order names things and never describes them: aios-privileged
reads manifests, servers, bounds and folders itself. Only `judge` checks the fields of an order.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from aiosd.config.config import NAME
from aiosd.errors import WireError

TEXT_CHARS = 64 << 10  # of one word of a command or an environment
WORDS_MOST = 1024  # of them
AGENTS_MOST = 1 << 20
GROUPS_MOST = 1 << 16  # NGROUPS_MAX of Linux
ID_MOST = 2**63 - 1
UID_MOST = 2**32 - 2  # chown(2) takes -1 for no change
GROUP = re.compile(r"[^\0\n/:]{0,256}")
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE  # of a program
WHAT = ("start", "stop", "kill")


# orders


@dataclass(frozen=True, slots=True)
class RunTool:
    """A call of the administrator's tool, a built-in one or a package's."""

    id: int
    name: str
    given: str  # its standard input
    uid: int
    groups: list[int]  # gid first
    agent: int  # whose work folder it gets; 0: an empty one


@dataclass(frozen=True, slots=True)
class RunOwn:
    """A call of a user's own tool. It has no grants. Its program comes with it as a sealed memfd."""

    id: int
    name: str
    command: list[str]
    env: dict[str, str]
    timeout_s: float
    cpu_s: int
    memory_bytes: int
    given: str
    uid: int
    groups: list[int]
    agent: int


@dataclass(frozen=True, slots=True)
class RunServer:
    """A session of an MCP server. Its standard input comes in Tell."""

    id: int  # less than 0
    name: str
    listing: bool  # as nobody, without a work folder and without the tree; uid and groups say nothing
    uid: int
    groups: list[int]


@dataclass(frozen=True, slots=True)
class Kill:
    id: int
    why: str


@dataclass(frozen=True, slots=True)
class Tell:
    id: int
    data: str  # bytes, as Latin-1; so below


@dataclass(frozen=True, slots=True)
class Shut:
    id: int


@dataclass(frozen=True, slots=True)
class Rest:
    id: int
    resting: bool


@dataclass(frozen=True, slots=True)
class Forget:
    """Remove the work folders of an agent."""

    agent: int


@dataclass(frozen=True, slots=True)
class ForgetBut:
    """Remove the work folders of all agents but these."""

    agents: list[int]


@dataclass(frozen=True, slots=True)
class Notify:
    """Run the program that `[tools] notify` names. With a group that decides it runs as nobody."""

    id: int
    tool: str
    agent_name: str
    group: str
    uid: int
    groups: list[int]


@dataclass(frozen=True, slots=True)
class WorkerOrder:
    """`devices`: by UUID, those that it may open."""

    id: int
    what: str
    devices: list[str]


@dataclass(frozen=True, slots=True)
class PullOrder:
    """For aios-pull@ID.service. It has no word of what is pulled: the puller judges the source itself."""

    id: int
    what: str


@dataclass(frozen=True, slots=True)
class Probe:
    """Which devices are there? Answered by Found."""


@dataclass(frozen=True, slots=True)
class Reload:
    """Read the configuration and the manifests again."""


# questions, each answered by Answered


@dataclass(frozen=True, slots=True)
class See:
    """A process of this user has a file of the tree open to write: look at it, and act for the user later."""

    number: int
    uid: int
    pids: list[int]


@dataclass(frozen=True, slots=True)
class Holds:
    """Has the process a file of the tree open whose path ends so?"""

    number: int
    pid: int
    path: str


@dataclass(frozen=True, slots=True)
class Program:
    """What program is the process?"""

    number: int
    pid: int


# answers


@dataclass(frozen=True, slots=True)
class Mounted:
    """The first message, with the descriptor to serve."""

    folder: str


@dataclass(frozen=True, slots=True)
class Said:
    id: int
    data: str


@dataclass(frozen=True, slots=True)
class Erred:
    id: int
    data: str


@dataclass(frozen=True, slots=True)
class Ended:
    id: int
    status: int
    stderr: str
    why: str
    spent: dict[str, Any]  # fields of Spent; empty: unknown


@dataclass(frozen=True, slots=True)
class WorkerFailed:
    id: int
    why: str


@dataclass(frozen=True, slots=True)
class PullerFailed:
    id: int
    why: str


@dataclass(frozen=True, slots=True)
class Found:
    """Fields of aiosd.cores.devices.Device."""

    devices: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Answered:
    number: int
    answer: str


QUESTIONS: tuple[type[Any], ...] = (See, Holds, Program)
# A daemon that is told to do these without end makes processes, threads or work on the disk: they are paced.
ACTS: tuple[type[Any], ...] = (
    RunTool, RunOwn, RunServer, Forget, ForgetBut, Notify, WorkerOrder, PullOrder, Probe, Reload,
)  # fmt: skip
ORDERS: tuple[type[Any], ...] = (*ACTS, Kill, Tell, Shut, Rest, *QUESTIONS)
ANSWERS: tuple[type[Any], ...] = (Mounted, Said, Erred, Ended, WorkerFailed, PullerFailed, Found, Answered)


# bounds


def between(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: low <= value <= high


def short(chars: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and len(value) <= chars and "\0" not in value


def is_name(value: Any) -> bool:
    """Whether the text can be the name of a file: half a surrogate pair cannot."""
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        return False
    return True


def listed(one: Callable[[Any], bool], most: int, least: int = 0) -> Callable[[Any], bool]:
    return lambda value: least <= len(value) <= most and all(map(one, value))


def number(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def named(value: Any) -> bool:
    return bool(NAME.fullmatch(value))


def environment(value: Any) -> bool:
    return len(value) <= WORDS_MOST and all(
        short(TEXT_CHARS)(word) and "=" not in key for key, to in value.items() for word in (key, to)
    )


WORD = short(TEXT_CHARS)
FIELDS: Mapping[str, Callable[[Any], bool]] = {
    "agent": number(0, ID_MOST),
    "agent_name": lambda value: not value or named(value),
    "agents": listed(number(0, ID_MOST), AGENTS_MOST),
    "command": listed(WORD, WORDS_MOST, least=1),
    "cpu_s": number(1, ID_MOST),
    "data": lambda value: True,  # the configuration bounds it: aiosd.privilege.helper
    "devices": listed(short(128), 64),
    "env": environment,
    "given": lambda value: True,  # likewise
    "group": lambda value: bool(GROUP.fullmatch(value)) and is_name(value),
    "groups": listed(number(0, UID_MOST), GROUPS_MOST, least=1),
    "id": number(-ID_MOST, ID_MOST),
    "listing": lambda value: True,
    "memory_bytes": number(1, ID_MOST),
    "name": named,
    "number": number(0, ID_MOST),
    "path": lambda value: short(4096)(value) and is_name(value),
    "pid": number(1, 1 << 22),  # PID_MAX_LIMIT
    "pids": listed(number(1, 1 << 22), 2, least=1),
    "resting": lambda value: True,
    "timeout_s": between(1e-6, 86400),
    "tool": named,
    "uid": number(0, UID_MOST),
    "what": WHAT.__contains__,
    "why": short(4096),
}


def judge(order: Any) -> None:
    """Raises WireError: no honest daemon sends this. The types of the fields are judged by the channel."""
    for field in fields(order):
        if not FIELDS[field.name](getattr(order, field.name)):
            raise WireError(f"{type(order).__name__}.{field.name} is out of its bounds")

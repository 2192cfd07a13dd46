"""Starts the process of a tool call or session: in its cage, network and control group, as its caller.

Called by the one thread of aiosd.tools.run.runner, whose network namespace it changes for a moment; a sandbox
dies with the thread that started it.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from io import FileIO
from typing import Any

from aiosd.host.usage import Spent
from aiosd.tools.manifest import Manifest
from aiosd.tools.run import network
from aiosd.tools.run.cgroups import Group
from aiosd.tools.run.network import Namespace
from aiosd.tools.run.sandbox import Cage, seccomp_filter


@dataclass(frozen=True, slots=True)
class End:
    """How a call ended. `why` it was ended from here, or could not begin; else its exit status says it."""

    status: int
    stderr: str
    why: str = ""
    spent: Spent | None = None  # None: it did not start, or shares a process


def ignore(_: bytes) -> None:
    """Nobody wants to hear it."""


@dataclass(frozen=True, slots=True)
class RunEvents:
    """Called on the runner's thread."""

    began: Callable[[], bool]  # it is about to start; False: it is not to
    said: Callable[[bytes], None]
    ended: Callable[[End], None]
    erred: Callable[[bytes], None] = ignore  # on its standard error, as it comes; the end has it whole


@dataclass(frozen=True, slots=True)
class Bounds:
    output_bytes: int
    work_bytes: int
    reserve_bytes: int  # of the disk that its work folder is on


@dataclass(frozen=True, slots=True)
class Call:
    id: int  # the request's; of a session less than 0
    manifest: Manifest
    given: str | None  # its standard input; None: what Runner.tell gives it, as it comes
    uid: int
    groups: tuple[int, ...]  # gid first
    folder: str  # of its caller's work folders; empty: one that is gone with the call
    sees_aios: bool
    bounds: Bounds
    events: RunEvents
    program: int | None = None  # the file beside the manifest, open; None: it is still to be opened
    opening: bytes = b""  # that its standard input begins with, before what Runner.tell gives it

    def discard(self) -> None:
        """It does not start."""
        if self.program is not None:
            os.close(self.program)


def popen(
    call: Call, cage: Cage, namespace: Namespace | None, group: Group | None
) -> subprocess.Popen[bytes]:
    """The program starts in its group. Closes call.program. Raises OSError, ValueError (a NUL)."""
    with ExitStack() as stack:
        program = cage.open_program() if call.program is None else call.program
        if program is not None:
            stack.callback(os.close, program)
        given: FileIO | int = subprocess.PIPE
        if call.given is not None:
            given = stack.enter_context(memory_file(call.given.encode()))
        environment = stack.enter_context(memory_file(cage.environment())).fileno()
        seccomp = stack.enter_context(memory_file(seccomp_filter())).fileno()
        hosts, gate = None, None
        if namespace:
            hosts = stack.enter_context(memory_file(namespace.hosts.encode())).fileno()
        secrets = {
            name: stack.enter_context(memory_file(secret)).fileno()
            for name, secret in cage.credentials.items()
        }
        gated = group if group and group.unified else None
        entrance, identity = list[str](), whose(call.uid, call.groups)
        if group and not gated:
            entrance, identity = entered(call, group), {}
        if gated:
            gate, opener = os.pipe()
            stack.callback(os.close, gate)
            stack.callback(os.close, opener)
        files = [environment, seccomp, program, hosts, gate, *secrets.values()]
        with network.inside(namespace.fd) if namespace else nullcontext():
            process = subprocess.Popen(
                [*entrance, *cage.command(environment, seccomp, program, hosts, gate, secrets)],
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                pass_fds=[fd for fd in files if fd is not None],
                cwd="/",
                env={},
                **identity,
            )
            stack.push(partial(_end_failed, process))
        if gated:
            gated.add(process.pid)
            os.write(opener, b"x")
    return process


def whose(uid: int, groups: tuple[int, ...]) -> dict[str, Any]:
    """Arguments of Popen: as whom, where this process may choose."""
    if os.geteuid() != 0:
        return {}
    return {"user": uid, "group": groups[0], "extra_groups": groups[1:]}


def entered(call: Call, group: Group) -> list[str]:
    """A command line that enters the group as this process's user, and then becomes the caller."""
    if os.geteuid() != 0:
        return group.entrance
    gid, *more = call.groups
    groups = [f"--groups={','.join(map(str, more))}"] if more else ["--clear-groups"]
    return [*group.entrance, "/usr/bin/setpriv", f"--reuid={call.uid}", f"--regid={gid}", *groups, "--"]


def _end_failed(process: subprocess.Popen[bytes], kind: type[BaseException] | None, *_: object) -> None:
    """It was started, but not all of it was done: nobody would watch it."""
    if kind:
        process.kill()
        process.wait()


def memory_file(data: bytes) -> FileIO:
    """An open file that holds so much and is at its beginning."""
    file = FileIO(os.memfd_create("aios"), "r+")
    file.write(data)
    file.seek(0)
    return file

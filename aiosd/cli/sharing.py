"""aiosctl share and unshare: let a group use an agent, and perhaps its conversation, by chgrp and chmod."""

from __future__ import annotations

import argparse
import grp
import os
import shlex
import stat
from contextlib import suppress

from aiosd.client import Failed, Files

USE = 0o060  # of a syscall file
PASS = 0o050  # of the agent's folder
CONTINUE = 0o070  # of the context's folder
GROUP = 0o070


def share(files: Files, options: argparse.Namespace) -> None:
    try:
        gid = grp.getgrnam(options.group).gr_gid
    except KeyError:
        raise Failed(f"no group {options.group}; getent group shows them") from None
    context = context_of(files, options.agent)
    if context and not options.with_context:
        raise Failed(
            f"agent {options.agent} continues the context {context}, which its users would see:"
            f" add --with-context, or detach it with: echo > {files.root}/agents/{options.agent}/context"
        )
    if options.with_context and not context:
        raise Failed(f"agent {options.agent} has no context; share it without --with-context")
    for path, bits in paths(options.agent, context):
        give(files, path, gid, bits)
    print(f"group {options.group} may use {files.root}/agents/{options.agent}", end="")
    print(f" and continue the context {context}" if context else "")


def unshare(files: Files, options: argparse.Namespace) -> None:
    context = context_of(files, options.agent)
    earlier = [f"contexts/{name}" for name in given(files, options.agent) if name != context]
    for path in [*earlier, *(path for path, _ in paths(options.agent, context))]:
        at = (files.root / path).stat()
        if at.st_mode & GROUP:
            change(files, path, stat.S_IMODE(at.st_mode) & ~GROUP)
    print(f"{files.root}/agents/{options.agent} is not shared with a group")


def given(files: Files, agent: str) -> set[str]:
    """The owner's contexts that the agent's group may use, for no other agent: those the agent had before."""
    at = (files.root / "agents" / agent).stat()
    found: dict[str, set[str]] = {"agents": set(), "contexts": set()}
    for kind, names in found.items():
        for name in os.listdir(files.root / kind):
            with suppress(FileNotFoundError):  # another user removes it meanwhile
                one = (files.root / kind / name).stat()
                if (one.st_uid, one.st_gid) == (at.st_uid, at.st_gid) and one.st_mode & GROUP:
                    names.add(name)
    return found["contexts"] - {context_of(files, other) for other in found["agents"] - {agent}}


def paths(agent: str, context: str) -> list[tuple[str, int]]:
    """What a group needs, with the rights. The folder is last: nobody passes it before the rest is set."""
    own = f"agents/{agent}"
    shared = [(f"{own}/syscall/llm", USE), (f"{own}/syscall/tool", USE)]
    return [*([(f"contexts/{context}", CONTINUE)] if context else []), *shared, (own, PASS)]


def context_of(files: Files, agent: str) -> str:
    if not (files.root / "agents" / agent).exists():
        raise Failed(f"no agent {agent}; aiosctl agents shows yours")
    return files.read(f"agents/{agent}/context").strip()


def give(files: Files, path: str, gid: int, bits: int) -> None:
    at = files.root / path
    files.show(f"chgrp {gid} {shlex.quote(str(at))}")
    os.chown(at, -1, gid)
    change(files, path, stat.S_IMODE(at.stat().st_mode) & ~GROUP | bits)


def change(files: Files, path: str, mode: int) -> None:
    at = files.root / path
    files.show(f"chmod {mode:o} {shlex.quote(str(at))}")
    os.chmod(at, mode)

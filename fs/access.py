"""access/: irreversible acts that wait for a decision."""

from __future__ import annotations

import json
from functools import partial

from aiosd.access import Caller
from aiosd.fs.files import Stored, Text, Value
from aiosd.fs.tree import Collection, Folder, Table
from aiosd.kernel import Kernel
from aiosd.request import Request
from aiosd.tools import QUEUE


def access_folder(kernel: Kernel) -> Folder:
    def names() -> list[str]:
        return list(map(str, kernel.pending.ids()))

    return Table(
        {
            "pending": lambda: Collection(names, partial(pending_folder, kernel)),
            "allowed": lambda: Collection(kernel.agents.names, partial(allowed_folder, kernel)),
            "audit.jsonl": lambda: Stored(0o400, kernel.scheduler.calls.audit.file),
        }
    )


def pending_folder(kernel: Kernel, name: str) -> Folder | None:
    """Its caller's alone: what is asked may be private."""
    id = int(name) if name.isdecimal() and len(name) < 19 else 0
    request = kernel.pending.find(id)
    if request is None:
        return None

    def decide(caller: Caller, text: str) -> None:
        kernel.pending.decide(caller, id, text)

    folder = Table(
        {
            "request.json": lambda: Text(0o400, render=partial(asked, request)),
            "decision": lambda: Value(0o600, get=lambda: "", set=decide),
            "expires": lambda: Text(0o400, render=lambda: f"{int(request.decide_by_s or 0)}\n"),
        },
        0o700,
        request.submitted_s,
    )
    folder.uid = request.uid
    return folder


def allowed_folder(kernel: Kernel, name: str) -> Folder | None:
    """Here and not with the agent: what its owner's tools see of the tree is not to have it."""
    agent = kernel.agents.find(name)
    if agent is None:
        return None

    def allow(caller: Caller, text: str) -> None:
        kernel.pending.allow_always(caller, agent, text.split())

    tools = Value(0o600, get=lambda: " ".join(agent.settings.allowed), set=allow)
    folder = Table({"tools": lambda: tools}, 0o700, agent.born_s)
    folder.uid = kernel.pending.owner(agent)
    return folder


def asked(request: Request) -> str:
    facts = {
        "request": request.id,
        "uid": request.uid,
        "agent": request.agent,
        "tool": request.spec.model.removeprefix(QUEUE),
    }
    said = json.loads(request.spec.messages[0]["content"])
    return json.dumps({**facts, "arguments": said}, ensure_ascii=False, indent=2) + "\n"

"""access/: calls that wait for a decision, the rules, the audit log, and what users have granted."""

from __future__ import annotations

import json
import pwd
from functools import partial

from aiosd.access.caller import Caller
from aiosd.access.rules import user_name
from aiosd.errors import BadValue
from aiosd.fs.files import File, Handle, Opening, Stored, Text, Value, ValueHandle
from aiosd.fs.tree import Collection, Folder, Table
from aiosd.kernel import Kernel
from aiosd.syscall.request import Request
from aiosd.syscall.toolcall import ToolCall, outcome


def access_folder(kernel: Kernel) -> Folder:
    def names() -> list[str]:
        return [str(id) for id in (*kernel.approvals.ids(), *kernel.questions.ids())]

    return Table(
        {
            "pending": lambda: Collection(names, partial(pending_folder, kernel)),
            "allowed": lambda: Collection(kernel.agents.names, partial(allowed_folder, kernel)),
            "owners": lambda: Owners(kernel=kernel),
            "groups": lambda: Collection(
                kernel.trust.groups,
                partial(group_folder, kernel),
                kernel.trust_objects.add_group,
                kernel.trust_objects.remove_group,
            ),
            "rules": lambda: Text(render=lambda: kernel.approvals.rules.text),
            "audit.jsonl": lambda: Stored(0o400, kernel.audit.file),
        }
    )


def pending_folder(kernel: Kernel, name: str) -> Folder | None:
    """access/pending/ID. Only the user or group that decides may read it: the arguments may be private."""
    id = int(name) if name.isdecimal() and len(name) < 19 else 0
    request = kernel.approvals.find(id)
    if request is None:
        return question_folder(kernel, id)

    def decide(caller: Caller, text: str) -> None:
        kernel.approvals.decide(caller, id, text)

    gid = kernel.approvals.decider(request)
    group = 0 if gid is None else 0o070
    folder = Table(
        {
            "request.json": lambda: Text(0o400 | group & 0o040, render=partial(asked, request)),
            "decision": lambda: Value(0o600 | group & 0o060, get=lambda: "", set=decide),
            "expires": lambda: Text(
                0o400 | group & 0o040, render=lambda: f"{int(request.decide_by_s or 0)}\n"
            ),
        },
        0o700 | group & 0o050,
        request.submitted_s,
    )
    folder.uid, folder.gid = request.uid if gid is None else 0, gid
    return folder


def question_folder(kernel: Kernel, id: int) -> Folder | None:
    """What an MCP server wants to know of who called its tool."""
    question = kernel.questions.find(id)
    if question is None:
        return None

    def decide(caller: Caller, text: str) -> None:
        kernel.questions.decide(caller, id, text)

    folder = Table(
        {
            "request.json": lambda: Text(0o400, render=question.shown),
            "decision": lambda: Value(0o600, get=lambda: "", set=decide),
            "expires": lambda: Text(0o400, render=lambda: f"{int(question.until_s)}\n"),
        },
        0o700,
        question.request.submitted_s,
    )
    folder.uid = question.request.uid
    return folder


class Owners(File):
    """access/owners: the users whose tools may run as the opener. Each user has a list of his own."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(0o666)
        self._kernel = kernel

    def open(self, opening: Opening) -> Handle:
        caller = opening.caller

        def get() -> str:
            return " ".join(map(user_name, sorted(self._kernel.trust.owners(caller.uid))))

        def set(_: Caller, text: str) -> None:
            owners = {uid_of(name) for name in text.split()}
            for owner in owners:
                self._kernel.accounts.check(owner)
            self._kernel.trust_objects.allow_owners(caller, owners)

        return ValueHandle(Value(get=get, set=set), opening)


def uid_of(name: str) -> int:
    """Look up a user by name or number. Raises BadValue."""
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        if name.isdecimal() and len(name) < 11:
            return int(name)
        raise BadValue(f"there is no user {name[:40]!r}", "name users, separated by blanks") from None


def group_folder(kernel: Kernel, name: str) -> Folder | None:
    """access/groups/NAME: a privilege group, a list of agents that rules can name."""
    if name not in kernel.trust.groups():
        return None

    def get() -> str:
        members = kernel.trust.members(name)
        return " ".join(agent.name for agent in kernel.agents.all() if agent.id in members)

    def set(caller: Caller, text: str) -> None:
        kernel.trust_objects.set_group(name, text.split(), caller)

    return Table({"agents": lambda: Value(get=get, set=set)}, 0o700)


def allowed_folder(kernel: Kernel, name: str) -> Folder | None:
    """access/allowed/NAME. It is not in agents/NAME, because tools see that folder and must not change
    this."""
    agent = kernel.agents.find(name)
    if agent is None:
        return None

    def allow(caller: Caller, text: str) -> None:
        kernel.approvals.allow_always(caller, agent, text.split())

    tools = Value(0o600, get=lambda: " ".join(agent.settings.allowed), set=allow)
    folder = Table({"tools": lambda: tools}, 0o700, agent.born_s)
    folder.uid = kernel.approvals.owner(agent)
    return folder


def asked(request: Request) -> str:
    call = request.spec
    assert isinstance(call, ToolCall)
    facts = {
        "request": request.id,
        "uid": request.uid,
        "agent": request.agent,
        "tool": call.tool,
        "why": outcome(request).why,
    }
    said = json.loads(call.arguments)
    return json.dumps({**facts, "arguments": said}, ensure_ascii=False, indent=2) + "\n"

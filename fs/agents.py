"""agents/NAME: its settings, its transactions, its requests."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache, partial

from aiosd.access.caller import Caller
from aiosd.agents import agents
from aiosd.agents.agents import Agent
from aiosd.config.config import STEPS_MAX
from aiosd.errors import BadValue
from aiosd.fs.files import Control, Text, Value
from aiosd.fs.reason import Reason
from aiosd.fs.requests import find, is_id, whole_folder
from aiosd.fs.text import table
from aiosd.fs.transaction import Transaction
from aiosd.fs.tree import Collection, Factory, Folder, Link, Node, Table
from aiosd.kernel import Kernel
from aiosd.scheduler.handler import Source
from aiosd.scheduler.names import check_nice
from aiosd.syscall.number import whole
from aiosd.syscall.request import State


def agent_folder(kernel: Kernel, name: str) -> Folder | None:
    agent = kernel.agents.find(name)
    return make_folder(kernel, agent) if agent else None


@lru_cache(maxsize=256)
def make_folder(kernel: Kernel, agent: Agent) -> Folder:
    change = partial(kernel.agents.change, agent)
    source = Source(f"/agents/{agent.name}/syscall/llm", agent)
    calls = Source(f"/agents/{agent.name}/syscall/tool", agent, kind="tool")

    def set_model(caller: Caller, text: str) -> None:
        if text and kernel.models.find(text) is None:
            raise BadValue(f"no model {text[:64]!r}", f"models are {', '.join(kernel.models.names())}")
        if text:
            kernel.names.check_model(caller, text)
        change(model=text)

    def set_context(caller: Caller, text: str) -> None:
        if text and kernel.contexts.find(text) is None:
            raise BadValue(f"no context {text[:64]!r}", "mkdir contexts/NAME makes one")
        if text:
            kernel.names.check_context(caller, text)
        change(context=text)

    def set_nice(caller: Caller, text: str) -> None:
        nice = agents.nice(text) if text else agents.DEFAULTS.nice
        if nice < agent.settings.nice:
            check_nice(caller, nice)
        change(nice=nice)

    def set_tools(caller: Caller, text: str) -> None:
        names = [kernel.tools.resolve(tool) for tool in text.split()]
        for tool in names:
            if kernel.tools.find(tool) is None:
                raise BadValue(f"no tool {tool[:64]!r}", "ls tools lists the tools")
            kernel.names.check_tool(caller, tool)
        change(tools=list(dict.fromkeys(names)))

    def set_steps(caller: Caller, text: str) -> None:
        change(max_steps=whole(text, 0, STEPS_MAX, "max_steps") if text else agents.DEFAULTS.max_steps)

    files: dict[str, Factory] = {
        "ctl": lambda: Control(run=partial(agent_command, kernel, agent)),
        "state": lambda: Text(render=partial(agent_state, kernel, agent)),
        "model": lambda: Value(get=lambda: agent.settings.model or kernel.models.default, set=set_model),
        "context": lambda: Value(get=lambda: agent.settings.context, set=set_context),
        "nice": lambda: Value(get=lambda: str(agent.settings.nice), set=set_nice),
        "system": lambda: Value(
            get=lambda: agent.settings.system,
            set=lambda _, text: change(system=agents.system(text)),
            prose=True,
        ),
        "params.json": lambda: Value(
            get=lambda: json.dumps(agent.settings.params),
            set=lambda _, text: change(params=agents.params(text)),
        ),
        "tools": lambda: Value(get=lambda: " ".join(agent.settings.tools), set=set_tools),
        "max_steps": lambda: Value(get=lambda: str(agent.settings.max_steps), set=set_steps),
        "pid": lambda: Value(
            get=lambda: str(agent.settings.pid or ""), set=partial(kernel.agent_objects.bind, agent)
        ),
        "usage": lambda: Text(render=lambda: table(requests=agent.requests, **asdict(agent.usage))),
        "log.jsonl": lambda: Text(0o400, render=lambda: "".join(agent.log)),
        "syscall": lambda: Table(
            {
                "llm": lambda: Transaction(0o600, kernel.admission, source),
                "tool": lambda: Transaction(0o600, kernel.admission, calls),
                "error": lambda: Reason(kernel, f"/agents/{agent.name}/syscall", [source, calls]),
            }
        ),
        "requests": lambda: requests_folder(kernel, agent),
    }
    return Table(files, 0o700, agent.born_s)


def agent_state(kernel: Kernel, agent: Agent) -> str:
    states = {r.state for r in kernel.scheduler.unfinished(agent)}
    if agent.settings.paused:
        return "paused\n"
    return "running\n" if State.RUNNING in states else "waiting\n" if states else "idle\n"


def agent_command(kernel: Kernel, agent: Agent, caller: Caller, verb: str, argument: str) -> None:
    plain: dict[str, Callable[[], None]] = {
        "pause": partial(kernel.agent_objects.pause, agent, True),
        "resume": partial(kernel.agent_objects.pause, agent, False),
        "reset": partial(kernel.agent_objects.reset, agent, caller),
    }
    kernel.agents.check(agent)
    if verb in plain and not argument:
        plain[verb]()
    elif verb == "cancel" and argument:
        kernel.agent_objects.cancel(agent, argument)
    else:
        raise BadValue(
            f"no command {f'{verb} {argument}'.strip()[:40]!r}", "pause, resume, reset, cancel ID, cancel all"
        )


# requests


def requests_folder(kernel: Kernel, agent: Agent) -> Folder:
    def ids() -> list[int]:
        known = {*kernel.store.request_ids(agent.id), *kernel.admission.drafts(agent.name)}
        return sorted(known)

    def latest() -> str:
        """A step of a loop is not what somebody asked."""
        return str(max([kernel.store.newest_asked(agent.id), *kernel.admission.drafts(agent.name)]))

    def child(name: str) -> Node | None:
        if name == "new":
            return Text(0o400, render=lambda: f"{kernel.admission.allocate(agent.name)}\n")
        if name == "latest":
            return Link(latest) if ids() else None
        return request_folder(kernel, agent, int(name)) if is_id(name) else None

    def names() -> list[str]:
        return ["new", *(["latest"] if ids() else []), *map(str, ids())]

    return Collection(names, child, mode=0o700)


def request_folder(kernel: Kernel, agent: Agent, id: int) -> Folder | None:
    if id in kernel.admission.drafts(agent.name):
        source = Source(f"/agents/{agent.name}/requests/{id}/request", agent)
        return Table(
            {
                "request": lambda: Transaction(0o600, kernel.admission, source, id),
                "state": lambda: Text(0o400, render=lambda: "new\n"),
            },
            0o700,
        )
    request = find(kernel, str(id))
    return whole_folder(kernel, request) if request and request.agent_id == agent.id else None

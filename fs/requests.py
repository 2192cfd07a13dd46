"""Requests as folders: requests/ with those of all users, and the files of a request there or in its agent.

requests/ lists the unfinished requests of all users. A request of an agent is a link to its folder there.
A request without an agent, or of a user who is not the agent's owner, has a folder of its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial

from aiosd.access.caller import Caller
from aiosd.errors import BadValue, NotAllowed, NotFound
from aiosd.fs.files import AnswerFile, Control, Text
from aiosd.fs.results import files_folder, files_of
from aiosd.fs.text import table
from aiosd.fs.tree import Collection, Factory, Folder, Link, Node, Table
from aiosd.handlers.loop.steps import place
from aiosd.kernel import Kernel
from aiosd.syscall import response
from aiosd.syscall.chat import Loop
from aiosd.syscall.request import Request


def requests_of_all(kernel: Kernel) -> Folder:
    def names() -> Iterable[str]:
        return [str(request.id) for request in kernel.scheduler.unfinished()]

    return Collection(names, partial(place_of, kernel))


def place_of(kernel: Kernel, name: str) -> Node | None:
    """requests/ID, also of an ended request that is kept."""
    request = find(kernel, name)
    if request is None:
        return None
    agent = kernel.agents.find(request.agent)
    if agent and agent.id == request.agent_id and kernel.approvals.owner(agent) == request.uid:
        return Link(lambda: f"../agents/{request.agent}/requests/{request.id}")
    folder = guest_folder(kernel, request) if request.agent_id else whole_folder(kernel, request)
    folder.uid = request.uid
    return folder


def is_id(name: str) -> bool:
    return name.isdecimal() and len(name) < 19


def find(kernel: Kernel, name: str) -> Request | None:
    try:
        return kernel.admission.get(int(name)) if is_id(name) else None
    except NotFound:
        return None


def whole_folder(kernel: Kernel, request: Request) -> Folder:
    linked: dict[str, Factory] = {}
    if request.parent:
        linked["parent"] = lambda: Text(0o400, render=lambda: f"{request.parent}\n")
    if files_of(request):
        linked["files"] = lambda: files_folder(request)
    if isinstance(request.spec, Loop):
        linked["steps"] = lambda: steps_folder(kernel, request)
    return made(
        request,
        {
            **linked,
            **common(kernel, request),
            "request": lambda: Text(0o400, render=request.spec.shown),
            "response": lambda: AnswerFile(0o400, request),
            "response.json": lambda: Text(0o400, render=lambda: response.document(request)),
            "usage": lambda: Text(0o400, render=lambda: request_usage(request)),
        },
    )


def guest_folder(kernel: Kernel, request: Request) -> Folder:
    """What a user sees of a request that he makes through the agent of another. That agent's folder has the
    rest, in which there may be the owner's system prompt.
    """
    return made(request, common(kernel, request))


def made(request: Request, files: dict[str, Factory]) -> Folder:
    return Table(files, 0o700, request.finished_s or request.submitted_s)


def common(kernel: Kernel, request: Request) -> dict[str, Factory]:
    def command(caller: Caller, verb: str, argument: str) -> None:
        if verb != "cancel" or argument:
            raise BadValue(f"no command {f'{verb} {argument}'.strip()[:40]!r}", "cancel")
        if not kernel.ending.cancel(request):
            raise NotAllowed(f"request {request.id} has ended already: it is {request.state}")

    return {
        "state": lambda: Text(0o400, render=partial(request_state, kernel, request)),
        "error": lambda: Text(0o400, render=lambda: f"{request.error}\n" if request.error else ""),
        "ctl": lambda: Control(run=command),
    }


def steps_folder(kernel: Kernel, request: Request) -> Folder:
    """requests/ID/steps: links to the requests that are the steps of a loop."""

    def made() -> dict[str, int]:
        return {place(child): child.id for child in kernel.store.children(request.id)}

    def child(name: str) -> Node | None:
        id = made().get(name)
        return None if id is None else Link(lambda: f"../../{id}")

    return Collection(lambda: list(made()), child, mode=0o700)


def request_state(kernel: Kernel, request: Request) -> str:
    """The state. A waiting request adds how many requests start earlier, and the expected seconds until it
    starts, or what its model waits for; a call adds the progress that its MCP server reports."""
    if progress := kernel.calls.progress.get(request.id):
        return f"{request.state} {progress}\n"
    place = kernel.scheduler.position(request)
    model = kernel.models.find(request.queue)
    if place and model and (why := kernel.demand.why(model)):
        return f"{request.state} {place[0]} - {why}\n"
    return f"{request.state}\n" if place is None else f"{request.state} {place[0]} {place[1]:.1f}\n"


def request_usage(request: Request) -> str:
    ended = request.finished_s or time.time()
    return table(
        **request.spec.measured(request),
        **asdict(request.usage),
        preemptions=request.preemptions,
        waited_s=round((request.started_s or ended) - request.submitted_s, 3),
        turnaround_s=round(ended - request.submitted_s, 3),
    )

"""The layout of /aios: which name is which file, over the kernel's objects. The ABI in one place.

A file is a line here; what kinds of file there are is in files.py, how paths are walked in tree.py.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import psutil

from aiosd import __version__, agents, metrics, trace
from aiosd.access import Caller
from aiosd.admission import Source, check_nice
from aiosd.agents import Agent
from aiosd.contexts import Context
from aiosd.errors import BadValue, NotAllowed, NotFound
from aiosd.fs.files import AnswerFile, Control, Lines, Stream, Text, Value
from aiosd.fs.kvfile import KvFile
from aiosd.fs.transaction import Transaction
from aiosd.fs.tree import Collection, Factory, Folder, Link, Node, Table, Tree
from aiosd.kernel import Kernel
from aiosd.models import Model, ModelState
from aiosd.pool import Worker
from aiosd.request import Request, State

README = (Path(__file__).parent / "README.txt").read_text()


def build(kernel: Kernel) -> Tree:
    private = (0o1777, None) if kernel.group is None else (0o1770, kernel.group)
    entries: dict[str, Factory] = {
        "README": lambda: Text(render=lambda: README),
        "version": lambda: Text(render=lambda: __version__ + "\n"),
        "status": lambda: Text(render=partial(status, kernel)),
        "metrics": lambda: Text(render=partial(metrics.exposition, kernel)),
        "events.jsonl": lambda: Stream(
            next=lambda: kernel.events.next, since=kernel.events.since, subscribe=kernel.events.watch
        ),
        "models": lambda: Collection(
            kernel.models.names, partial(model_folder, kernel), kernel.add_model, kernel.remove_model
        ),
        "workers": lambda: Collection(
            lambda: [str(w.id) for w in kernel.scheduler.pool.workers()], partial(worker_folder, kernel)
        ),
        "scheduler": lambda: Table(scheduler_files(kernel)),
        "agents": lambda: Collection(
            kernel.agents.names,
            partial(agent_folder, kernel),
            kernel.add_agent,
            kernel.remove_agent,
            *private,
        ),
        "contexts": lambda: Collection(
            kernel.contexts.names,
            partial(context_folder, kernel),
            kernel.add_context,
            kernel.remove_context,
            *private,
        ),
    }

    def space() -> tuple[int, int]:
        s = os.statvfs(kernel.config.daemon.state)
        return s.f_bavail * s.f_frsize, s.f_blocks * s.f_frsize

    return Tree(Table(entries), kernel.permissions, space, kernel.explain, lambda: kernel.scheduler.quotas)


def table(**rows: object) -> str:
    return "".join(f"{key} {value}\n" for key, value in rows.items())


def columns(header: list[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [header, *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() + "\n" for line in lines
    )


def status(kernel: Kernel) -> str:
    scheduler, pool = kernel.scheduler, kernel.scheduler.pool
    running, waiting = scheduler.load
    ready = [m.name for m in kernel.models.all() if m.state is ModelState.READY]
    loading = any(m.state is ModelState.LOADING for m in kernel.models.all())
    return table(
        state="running" if ready else "loading" if loading else "no-model",
        pid=os.getpid(),
        uptime_s=int(time.time() - kernel.started_s),
        models_ready=",".join(ready) or "-",
        workers=len(pool.workers()),
        worker_restarts=pool.restarts,
        agents=len(kernel.agents),
        contexts=len(kernel.contexts),
        policy=scheduler.chooser.name,
        running=running,
        waiting=waiting,
    )


# scheduler


def scheduler_files(kernel: Kernel) -> dict[str, Factory]:
    scheduler = kernel.scheduler

    def set_policy(caller: Caller, text: str) -> None:
        scheduler.chooser.switch(text)
        scheduler.stir()

    def set_quantum(caller: Caller, text: str) -> None:
        if not text.isdecimal() or not 1 <= int(text) <= 1 << 20:
            raise BadValue("quantum is a number of tokens, 1 to 1048576")
        scheduler.quantum_tokens = int(text)
        scheduler.stir()

    return {
        "policy": lambda: Value(get=lambda: scheduler.chooser.name, set=set_policy),
        "policies": lambda: Text(render=lambda: "".join(f"{name}\n" for name in scheduler.chooser.policies)),
        "quantum": lambda: Value(get=lambda: str(scheduler.quantum_tokens), set=set_quantum),
        "queue": lambda: Text(render=partial(queue, kernel)),
        "stats": lambda: Text(render=lambda: table(**scheduler.counters, busy_s=round(scheduler.busy_s, 3))),
        "trace.json": lambda: Text(render=lambda: trace.document(scheduler.spans())),
    }


def queue(kernel: Kernel) -> str:
    """Everybody may see how long the queue is; what is asked is seen by nobody here."""
    header = ["ID", "STATE", "UID", "AGENT", "MODEL", "WORKER", "TOKENS", "WAITED_S", "AHEAD", "STARTS_IN_S"]
    now = time.time()

    def forecast(request: Request) -> tuple[object, object]:
        place = kernel.scheduler.position(request)
        return (place[0], f"{place[1]:.1f}") if place else ("-", "-")

    rows = [
        [r.id, r.state, r.uid, r.agent or "-", r.spec.model, "-" if r.worker is None else r.worker,
         len(r.tokens), f"{(r.started_s or now) - r.submitted_s:.1f}", *forecast(r)]
        for r in kernel.scheduler.unfinished()
    ]  # fmt: skip
    return columns(header, rows)


# models and workers


def model_folder(kernel: Kernel, name: str) -> Folder | None:
    model = kernel.models.find(name)
    if model is None:
        return None
    pool = kernel.scheduler.pool

    def command(caller: Caller, verb: str, argument: str) -> None:
        if verb == "load":
            kernel.load_model(name, argument)
        elif verb == "unload" and not argument:
            pool.unload(model)
        elif verb == "replicas" and argument.isdecimal() and 1 <= int(argument) <= 64:
            pool.resize(model, int(argument))
        else:
            raise BadValue(f"unknown command {verb[:40]!r}", "load [PATH], unload, replicas N")

    def transaction(operation: str) -> Factory:
        source = Source(f"/models/{name}/{operation}", model=name, operation=operation)
        return lambda: Transaction(0o666, kernel.admission, source)

    return Table(
        {
            "info.json": lambda: Text(render=partial(model_info, model)),
            "state": lambda: Text(render=lambda: f"{model.state}\n"),
            "workers": lambda: Text(render=lambda: "".join(f"{w.id}\n" for w in pool.of(model))),
            "stats": lambda: Text(
                render=lambda: table(
                    requests=model.requests,
                    prompt_tokens=model.prompt_tokens,
                    completion_tokens=model.completion_tokens,
                )
            ),
            "ctl": lambda: Control(run=command),
            **{operation: transaction(operation) for operation in ("llm", "embed", "tokenize")},
        }
    )


def model_info(model: Model) -> str:
    facts = {"name": model.name, "path": str(model.path), "state": model.state, "replicas": model.replicas}
    if model.error:
        facts["error"] = model.error
    return json.dumps({**model.info, **facts}, indent=2, ensure_ascii=False) + "\n"


def worker_folder(kernel: Kernel, name: str) -> Folder | None:
    worker = next((w for w in kernel.scheduler.pool.workers() if str(w.id) == name), None)
    if worker is None:
        return None

    def command(caller: Caller, verb: str, argument: str) -> None:
        if verb != "restart" or argument:
            raise BadValue(f"unknown command {verb[:40]!r}", "restart")
        worker.process.kill()  # its listener starts another, and what it ran goes on there

    return Table(
        {
            "device": lambda: Text(render=lambda: f"{worker.model.info.get('device', 'cpu')}\n"),
            "model": lambda: Text(render=lambda: f"{worker.model.name}\n"),
            "pid": lambda: Text(render=lambda: f"{worker.process.pid}\n"),
            "state": lambda: Text(render=lambda: f"{worker.state}\n"),
            "memory": lambda: Text(render=partial(memory, worker)),
            "stats": lambda: Text(render=lambda: table(**worker.stats)),
            "ctl": lambda: Control(run=command),
        }
    )


def memory(worker: Worker) -> str:
    try:
        used = psutil.Process(worker.process.pid).memory_info()
    except psutil.NoSuchProcess:
        return table(rss_bytes=0, shared_bytes=0)
    return table(rss_bytes=used.rss, shared_bytes=used.shared)


# agents


def agent_folder(kernel: Kernel, name: str) -> Folder | None:
    agent = kernel.agents.find(name)
    if agent is None:
        return None
    change = partial(kernel.agents.change, agent)
    settings = agent.settings
    source = Source(f"/agents/{name}/syscall/llm", agent)

    def set_model(caller: Caller, text: str) -> None:
        if text and kernel.models.find(text) is None:
            raise BadValue(f"no model {text[:64]!r}", f"models are {', '.join(kernel.models.names())}")
        if text:
            kernel.admission.check_model(caller, text)
        change(model=text)

    def set_context(caller: Caller, text: str) -> None:
        if text and kernel.contexts.find(text) is None:
            raise BadValue(f"no context {text[:64]!r}", "mkdir contexts/NAME makes one")
        if text:
            kernel.admission.check_context(caller, text)
        change(context=text)

    def set_nice(caller: Caller, text: str) -> None:
        nice = agents.nice(text)
        if nice < settings.nice:
            check_nice(caller, nice)
        change(nice=nice)

    files: dict[str, Factory] = {
        "ctl": lambda: Control(run=partial(agent_command, kernel, agent)),
        "state": lambda: Text(render=partial(agent_state, kernel, agent)),
        "model": lambda: Value(get=lambda: settings.model or kernel.models.default, set=set_model),
        "context": lambda: Value(get=lambda: settings.context, set=set_context),
        "nice": lambda: Value(get=lambda: str(settings.nice), set=set_nice),
        "system": lambda: Value(
            get=lambda: settings.system, set=lambda _, text: change(system=agents.system(text)), prose=True
        ),
        "params.json": lambda: Value(
            get=lambda: json.dumps(settings.params), set=lambda _, text: change(params=agents.params(text))
        ),
        "pid": lambda: Value(get=lambda: str(settings.pid or ""), set=partial(kernel.bind_agent, agent)),
        "usage": lambda: Text(render=lambda: table(requests=agent.requests, **asdict(agent.usage))),
        "log.jsonl": lambda: Text(0o400, render=lambda: "".join(agent.log)),
        "syscall": lambda: Table({"llm": lambda: Transaction(0o600, kernel.admission, source)}),
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
        "pause": partial(kernel.pause, agent, True),
        "resume": partial(kernel.pause, agent, False),
        "reset": partial(kernel.reset, agent, caller),
    }
    kernel.agents.check(agent)
    if verb in plain and not argument:
        plain[verb]()
    elif verb == "cancel" and argument:
        kernel.cancel(agent, argument)
    else:
        raise BadValue(f"unknown command {verb[:40]!r}", "pause, resume, reset, cancel ID, cancel all")


# requests


def requests_folder(kernel: Kernel, agent: Agent) -> Folder:
    def ids() -> list[int]:
        known = {*kernel.store.request_ids(agent.id), *kernel.admission.drafts(agent.name)}
        return sorted(known)

    def latest() -> str:
        return str(ids()[-1])

    def child(name: str) -> Node | None:
        if name == "new":
            return Text(0o400, render=lambda: f"{kernel.admission.allocate(agent.name)}\n")
        if name == "latest":
            return Link(latest) if ids() else None
        return request_folder(kernel, agent, int(name)) if name.isdecimal() and len(name) < 19 else None

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
    try:
        request = kernel.admission.get(id)
    except NotFound:
        return None
    if request.agent_id != agent.id:
        return None

    def command(caller: Caller, verb: str, argument: str) -> None:
        if verb != "cancel" or argument:
            raise BadValue(f"unknown command {verb[:40]!r}", "cancel")
        if not kernel.scheduler.cancel(request):
            raise NotAllowed(f"request {id} is {request.state}")

    return Table(
        {
            "request": lambda: Text(0o400, render=lambda: asked(request)),
            "state": lambda: Text(0o400, render=partial(request_state, kernel, request)),
            "response": lambda: AnswerFile(0o400, request),
            "response.json": lambda: Text(0o400, render=lambda: request.document),
            "error": lambda: Text(0o400, render=lambda: f"{request.error}\n" if request.error else ""),
            "usage": lambda: Text(0o400, render=lambda: request_usage(request)),
            "ctl": lambda: Control(run=command),
        },
        0o700,
        request.finished_s or request.submitted_s,
    )


def asked(request: Request) -> str:
    if not request.spec.json:
        return "".join(m["content"] + "\n" for m in request.spec.messages)
    return json.dumps(asdict(request.spec), ensure_ascii=False) + "\n"


def request_state(kernel: Kernel, request: Request) -> str:
    """The state, and of one that waits how many start before it and in how many seconds it may start."""
    place = kernel.scheduler.position(request)
    return f"{request.state}\n" if place is None else f"{request.state} {place[0]} {place[1]:.1f}\n"


def request_usage(request: Request) -> str:
    ended = request.finished_s or time.time()
    return table(
        **asdict(request.usage),
        preemptions=request.preemptions,
        waited_s=round((request.started_s or ended) - request.submitted_s, 3),
        turnaround_s=round(ended - request.submitted_s, 3),
    )


# contexts


def context_folder(kernel: Kernel, name: str) -> Folder | None:
    context = kernel.contexts.find(name)
    return context_files(kernel, context) if context else None


def context_files(kernel: Kernel, context: Context) -> Folder:
    contexts = kernel.contexts

    def lines() -> str:
        contexts.check(context)
        return "".join(line + "\n" for line in kernel.store.message_lines(context.name))

    return Table(
        {
            "messages.jsonl": lambda: Lines(
                get=lines,
                bytes=partial(contexts.size, context),
                append=partial(contexts.append, context),
                clear=partial(contexts.truncate, context, 0),
            ),
            "tokens": lambda: Text(render=lambda: f"{context.tokens}\n"),
            "state": lambda: Text(render=lambda: f"{kernel.scheduler.residency.state(context)}\n"),
            "model": lambda: Text(render=lambda: f"{context.model}\n"),
            "ctl": lambda: Control(0o222, partial(kernel.command_context, context)),
            "kv": lambda: KvFile(kernel=kernel, context=context),
        },
        0o700,
    )

"""The layout of /aios: the names of all files and folders, bound to the kernel's objects. The ABI in one
place.

Each file is one line here. files.py has the kinds of files, tree.py walks paths.
"""

from __future__ import annotations

import json
import os
import time
from functools import partial
from pathlib import Path

from aiosd import __version__
from aiosd.access.caller import Caller
from aiosd.config import duration
from aiosd.cores.devices import CPU
from aiosd.cores.models import Model, ModelState
from aiosd.cores.pool import ANYWHERE, Worker
from aiosd.errors import BadValue
from aiosd.fs import metrics
from aiosd.fs.access import access_folder
from aiosd.fs.agents import agent_folder
from aiosd.fs.contexts import context_folder
from aiosd.fs.files import Control, Shared, Stream, Text, TextForUser, Value
from aiosd.fs.keys import KeysFolder
from aiosd.fs.reason import Reason
from aiosd.fs.requests import requests_of_all
from aiosd.fs.text import columns, table
from aiosd.fs.tools import tool_folder
from aiosd.fs.transaction import Transaction
from aiosd.fs.tree import Collection, Factory, Folder, Node, Table, Tree
from aiosd.host.memory import resident
from aiosd.kernel import Kernel
from aiosd.scheduler import trace
from aiosd.scheduler.handler import Source
from aiosd.syscall.number import whole
from aiosd.syscall.request import Request

README = (Path(__file__).parent / "README.txt").read_text()


def build(kernel: Kernel) -> Tree:
    private = (0o1777, None) if kernel.group is None else (0o1771, kernel.group)
    shared = (0o1777, None) if kernel.group is None else (0o1775, kernel.group)
    admins = kernel.admins
    administered_by = (0o755, None) if admins is None else (0o775, admins)
    entries: dict[str, Factory] = {
        "README": lambda: Text(render=lambda: README),
        "version": lambda: Text(render=lambda: __version__ + "\n"),
        "status": lambda: Text(render=partial(status, kernel)),
        "metrics": lambda: Shared(render=partial(metrics.exposition, kernel)),
        "events.jsonl": lambda: Stream(
            next=lambda: kernel.events.next, since=kernel.events.since, subscribe=kernel.events.watch
        ),
        "refused.jsonl": lambda: TextForUser(render=kernel.reasons.lines),
        "models": lambda: Collection(
            kernel.models.names,
            partial(model_folder, kernel),
            kernel.model_objects.add,
            kernel.model_objects.remove,
            *administered_by,
        ),
        "tools": lambda: Collection(
            kernel.tools.names,
            partial(tool_folder, kernel),
            kernel.tool_objects.add,
            kernel.tool_objects.remove,
            *shared,
        ),
        "access": lambda: access_folder(kernel),
        "keys": lambda: KeysFolder(kernel),
        "workers": lambda: Collection(
            lambda: [str(w.id) for w in kernel.pool.workers()], partial(worker_folder, kernel)
        ),
        "devices": lambda: Text(render=partial(devices, kernel)),
        "scheduler": lambda: Table(scheduler_files(kernel)),
        "agents": lambda: Collection(
            kernel.agents.names,
            partial(agent_folder, kernel),
            kernel.agent_objects.add,
            kernel.agent_objects.remove,
            *private,
        ),
        "requests": lambda: requests_of_all(kernel),
        "contexts": lambda: Collection(
            kernel.contexts.names,
            partial(context_folder, kernel),
            kernel.context_objects.add,
            kernel.context_objects.remove,
            *private,
        ),
    }

    def administered(factory: Factory) -> Factory:
        def made() -> Node:
            folder = factory()
            assert isinstance(folder, Folder)
            folder.admins = admins
            return folder

        return made

    for name in ("models", "workers", "scheduler", "access"):
        entries[name] = administered(entries[name])

    def space() -> tuple[int, int]:
        s = os.statvfs(kernel.config.daemon.state)
        return s.f_bavail * s.f_frsize, s.f_blocks * s.f_frsize

    return Tree(
        Table(entries), kernel.permissions, space, kernel.explain, lambda: kernel.limits.quotas,
        kernel.accounts.check,
    )  # fmt: skip


def status(kernel: Kernel) -> str:
    scheduler, pool = kernel.scheduler, kernel.pool
    running, waiting = scheduler.load
    ready = [m.name for m in kernel.models.all() if m.state is ModelState.READY]
    loading = any(m.state is ModelState.LOADING for m in kernel.models.all())
    usable = any(m.state is not ModelState.FAILED for m in kernel.models.all())  # others load on demand
    return table(
        state="running" if ready else "loading" if loading else "running" if usable else "no-model",
        pid=os.getpid(),
        uptime_s=int(time.time() - kernel.started_s),
        models_ready=",".join(ready) or "-",
        default_model=kernel.models.default or "-",
        workers=len(pool.workers()),
        worker_restarts=pool.restarts,
        agents=len(kernel.agents),
        contexts=len(kernel.contexts),
        policy=kernel.chooser.name,
        running=running,
        waiting=waiting,
        **warning(kernel),
    )


def warning(kernel: Kernel) -> dict[str, str]:
    warnings = kernel.pool.places.warnings
    return {"warning": "; ".join(f"{uuid}: {why}" for uuid, why in warnings.items())} if warnings else {}


# scheduler


def scheduler_files(kernel: Kernel) -> dict[str, Factory]:
    scheduler = kernel.scheduler

    def set_policy(caller: Caller, text: str) -> None:
        kernel.chooser.switch(text)
        scheduler.stir()

    def set_quantum(caller: Caller, text: str) -> None:
        scheduler.quantum_tokens = whole(text, 1, 1 << 20, "quantum")
        scheduler.stir()

    return {
        "policy": lambda: Value(get=lambda: kernel.chooser.name, set=set_policy),
        "policies": lambda: Text(render=lambda: "".join(f"{name}\n" for name in kernel.chooser.policies)),
        "quantum": lambda: Value(get=lambda: str(scheduler.quantum_tokens), set=set_quantum),
        "error": lambda: Reason(kernel, "/scheduler"),
        "queue": lambda: Shared(render=partial(queue, kernel)),
        "stats": lambda: Text(render=lambda: table(**scheduler.counters, busy_s=round(scheduler.busy_s, 3))),
        "trace.json": lambda: Shared(render=lambda: trace.document(scheduler.spans())),
    }


def queue(kernel: Kernel) -> str:
    """scheduler/queue, which all users may read. So it shows no text of requests."""
    header = ["ID", "STATE", "UID", "AGENT", "MODEL", "WORKER", "TOKENS", "WAITED_S", "AHEAD", "STARTS_IN_S"]
    now = time.time()

    def forecast(request: Request) -> tuple[object, object]:
        place = kernel.scheduler.position(request)
        return (place[0], f"{place[1]:.1f}") if place else ("-", "-")

    rows = [
        [r.id, r.state, r.uid, r.agent or "-", r.spec.target, "-" if r.worker is None else r.worker,
         len(r.tokens), f"{(r.started_s or now) - r.submitted_s:.1f}", *forecast(r)]
        for r in kernel.scheduler.unfinished()
    ]  # fmt: skip
    return columns(header, rows)


# models and workers


def model_folder(kernel: Kernel, name: str) -> Folder | None:
    model = kernel.models.find(name)
    if model is None:
        return None
    pool = kernel.pool

    sources = [
        Source(f"/models/{name}/{kind}", kind=kind, target=name) for kind in ("llm", "embed", "tokenize")
    ]

    def transaction(source: Source) -> Factory:
        mode = 0o666 if kernel.group is None else 0o660
        return lambda: Transaction(mode, kernel.admission, source, gid=kernel.group)

    return Table(
        {
            "info.json": lambda: Text(render=partial(model_info, kernel, model)),
            "state": lambda: Text(render=lambda: f"{model.state_in_words}\n"),
            "workers": lambda: Text(render=lambda: "".join(f"{w.id}\n" for w in pool.of(model))),
            "stats": lambda: Text(
                render=lambda: table(
                    requests=model.requests,
                    prompt_tokens=model.prompt_tokens,
                    completion_tokens=model.completion_tokens,
                )
            ),
            "ctl": lambda: Control(run=partial(kernel.model_objects.command, model)),
            "error": lambda: Reason(kernel, f"/models/{name}", sources),
            **{source.kind: transaction(source) for source in sources},
        }
    )


def model_info(kernel: Kernel, model: Model) -> str:
    facts = {"name": model.name, "path": str(model.path), "state": model.shown_state,
             "replicas": model.replicas,
             "pin": list(model.pins), "memory_fraction": model.fraction,
             **residence(kernel, model)}  # fmt: skip
    if model.error:
        facts["error"] = model.error
    if model.pulling is not None:
        facts["pulling"] = model.pulling
    whole = {**kernel.pull_objects.facts(model.name), **model.info, **facts}
    return json.dumps(whole, indent=2, ensure_ascii=False) + "\n"


def residence(kernel: Kernel, model: Model) -> dict[str, object]:
    """How long the model stays, what it takes, and what it has to do."""
    stay, workers = model.stay, kernel.pool.of(model)
    facts: dict[str, object] = {"keep_alive": duration.shown(stay.keep_alive_s)}
    running, waiting = kernel.scheduler.load_of(model.name)
    facts |= {"running": running, "waiting": waiting}
    if workers:
        used = [sum(resident(worker.process.pid)) for worker in workers]
        facts |= {"estimated_bytes": stay.bytes * len(workers), "rss_bytes": sum(used)}
        facts |= {"kv_bytes": stay.kv_bytes or kernel.config.engine.kv_bytes}
        facts |= {"devices": sorted({line for worker in workers for line in device(worker).split()})}
    if model.state is ModelState.READY and not stay.always and not running + waiting:
        facts["until"] = round(time.time() + stay.until_s - time.monotonic(), 1)
    return facts


def worker_folder(kernel: Kernel, name: str) -> Folder | None:
    worker = next((w for w in kernel.pool.workers() if str(w.id) == name), None)
    if worker is None:
        return None

    def command(caller: Caller, verb: str, argument: str) -> None:
        if verb != "restart" or argument:
            raise BadValue(f"no command {f'{verb} {argument}'.strip()[:40]!r}", "restart")
        worker.process.kill()  # the pool then starts another worker, where its requests continue

    return Table(
        {
            "device": lambda: Text(render=partial(device, worker)),
            "model": lambda: Text(render=lambda: f"{worker.model.name}\n"),
            "pid": lambda: Text(render=lambda: f"{worker.process.pid}\n"),
            "state": lambda: Text(render=lambda: f"{worker.state}\n"),
            "memory": lambda: Text(render=partial(memory, worker)),
            "stats": lambda: Text(render=lambda: table(**worker.stats)),
            "ctl": lambda: Control(run=command),
        }
    )


def device(worker: Worker) -> str:
    """The worker's devices, one on each line. PyTorch's name if only PyTorch knows the device."""
    found = [worker.model.info.get("device", CPU)] if worker.place == ANYWHERE else worker.place.devices
    return "".join(f"{one}\n" for one in found)


def devices(kernel: Kernel) -> str:
    places, workers = kernel.pool.places, kernel.pool.workers()
    header = ["UUID", "NAME", "STATE", "MEMORY_BYTES", "FREE", "NODE", "CPUS", "WORKERS", "MODEL"]
    rows = []
    for one in places.table:
        on = [worker for worker in workers if one.uuid in worker.place.devices]
        free = f"{places.free(one, (w.place for w in on)):.2f}" if one.divided else "-"
        rows.append([
            one.uuid, f"gpu{one.index}" if one.index >= 0 else "-", places.state(one), one.memory_bytes, free,
            one.numa if one.numa >= 0 else "-", one.cpus or "-",
            ",".join(f"{worker.id}" for worker in on) or "-", one.name.replace(" ", "-") or "-",
        ])  # fmt: skip
    notes = (f"# {uuid}: {why}\n" for uuid, why in places.warnings.items())
    return columns(header, rows) + "".join(notes)


def memory(worker: Worker) -> str:
    own, shared = resident(worker.process.pid)
    return table(rss_bytes=own + shared, shared_bytes=shared)

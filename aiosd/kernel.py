"""The daemon's parts, put together: what exists, and what happens to it as a whole.

Builds everything from a Config in the order it depends on each other, and takes it down in reverse. Knows no
FUSE; the tree (aiosd.fs.layout) shows what is here.
"""

from __future__ import annotations

import grp
import logging
import os
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from aiosd.access.approvals import Pending
from aiosd.access.caller import Caller
from aiosd.access.permissions import EXECUTE, READ, WRITE, Permission, Permissions, may, object_of
from aiosd.access.refusals import Refusals
from aiosd.access.rules import Rules
from aiosd.access.trust import Trust
from aiosd.agents import lifetime
from aiosd.agents.agents import Agent, Agents
from aiosd.agents.lifetime import Lifetimes
from aiosd.config.config import Config
from aiosd.context.contexts import Context, Contexts
from aiosd.cores import devices
from aiosd.cores.models import NAME, Models, ModelState
from aiosd.database import Store
from aiosd.errors import (
    AiosError,
    BadValue,
    Busy,
    Denied,
    Exists,
    NotEmpty,
    NotFound,
    OverQuota,
    StoreFailed,
    StoreFull,
)
from aiosd.events import ROOTS, Events
from aiosd.host import identity
from aiosd.host.message_ids import about
from aiosd.privilege.system import Own, System
from aiosd.scheduler import chooser
from aiosd.scheduler.admission import Admission
from aiosd.scheduler.scheduler import Scheduler
from aiosd.tools import catalog
from aiosd.tools.catalog import QUEUE, Tool, Tools
from aiosd.tools.manifest import FILE

log = logging.getLogger(__name__)

EVICT_S = 5.0
Made = TypeVar("Made", Agent, Context)
GRANTED_MAX = 500


class Kernel:
    def __init__(self, config: Config, model: Path | None = None, system: System | None = None) -> None:
        self.config = config
        self.started_s = time.time()
        self.store = Store(Path(config.daemon.state))
        self.permissions = Permissions(self.store)
        self.agents = Agents(self.store)
        self.contexts = Contexts(self.store, self.permissions, config.limits.context_bytes)
        self.models = Models(config, self.store, model)
        self.events = Events(self.permissions)
        self.tools = Tools(Path(config.tools.folder), self.store.folder / "tools", config.tools.network)
        self.scheduler = Scheduler(
            config, self.store, self.agents, self.contexts, self.models, self.tools, self.events,
            system or Own(),
        )  # fmt: skip
        self.scheduler.calls.listings.told = self._listed
        self.trust = Trust(self.store)
        rules = Rules(Path(config.scheduler.policies) / "access")
        self.pending = Pending(self.scheduler, self.agents, self.permissions, self.events, self.trust, rules)
        self.admission = Admission(self.scheduler, self.permissions, self.trust)
        self.lifetimes = Lifetimes(self._end_with_process)
        self.refusals = Refusals()
        self.reload_refused = False  # the last one
        self._forget_gone()

    def start(self) -> None:
        self.scheduler.start()
        for id in self.pending.ids():
            if request := self.pending.find(id):
                self.pending.ask(request)
        for name in self.agents.names():
            self._watch(self.agents.get(name))
        self.lifetimes.start()
        self.scheduler.pool.load(*self.models.all())

    def _forget_gone(self) -> None:
        """Owners and modes of objects that a killed daemon was about to make, or had just ended."""
        there = {
            "/agents": self.agents.names(),
            "/contexts": self.contexts.names(),
            "/tools": [tool.name for tool in self.tools.all() if tool.own],
            "/access/groups": self.trust.groups(),
        }
        known = {f"{folder}/{name}" for folder, names in there.items() for name in names}
        for path in self.permissions.paths():
            object = object_of(path)
            folder = object.rpartition("/")[0]
            at = self.permissions.get(path)
            if folder == "/tools" and at and at.uid in (0, identity.uid()):
                continue  # of a tool that the administrator may put back
            if folder in there and object not in known:
                self.permissions.forget(object)
        self._oust()
        self.scheduler.calls.forget_but({agent.id for agent in self.agents.all()})

    def _oust(self) -> None:
        """Users' own tools whose names the administrator has taken: nothing of them is to be in his."""
        for name in self.tools.ousted:
            log.warning("tool %s of a user is ended: the administrator has one of that name", name)
            with suppress(StoreFull, StoreFailed):  # then it is forgotten at the next start
                self.permissions.forget(f"/tools/{name}")
            for request in self.scheduler.unfinished():
                if request.spec.model == QUEUE + name:
                    self.scheduler.cancel(request, "its tool was removed")
        self.tools.discard_ousted()

    def reload(self, config: Config) -> None:
        """Takes over what can change while running. All is read and judged first: if it raises, nothing has
        changed. Raises BadValue, ConfigError, ModelError."""
        folder = Path(config.scheduler.policies)
        policies = chooser.judge(config.scheduler.policy, folder)
        rules = Rules(folder / "access")
        manifests = catalog.read_all(Path(config.tools.folder), config.tools.network, strict=True)
        self.models.judge(self.config, config)
        pool = self.scheduler.pool
        pool.places.look()
        for entry in self.models.changed(self.config, config).values():
            if entry.devices:
                devices.parse_pin(pool.places.table, entry.devices)
        # from here on nothing refuses
        old, self.config = self.config, config
        self.scheduler.reload(config)
        self.contexts.bytes_max = config.limits.context_bytes
        with self.permissions.making:
            self.scheduler.calls.reload(config, manifests)
            self._oust()
        self.pending.rules = rules
        self._cancel_gone()
        self.scheduler.chooser.take(policies)
        if old.scheduler.policy != config.scheduler.policy:
            self.scheduler.chooser.switch(config.scheduler.policy)
        if old.scheduler.quantum != config.scheduler.quantum:
            self.scheduler.quantum_tokens = config.scheduler.quantum
        for model, entry in self.models.reload(old, config):
            if model.path != Path(entry.path):
                model.path = Path(entry.path)
                pool.unload(model)  # what ran there goes on with the new one
            self.models.take(model, entry)
            pool.load(model)
        pool.places.retry()
        pool.arrange()
        self.scheduler.stir()

    def _listed(self, server: str, error: str) -> None:
        """An MCP server has told its tools, or has not."""
        facts: dict[str, Any] = {"error": error} if error else {}
        self.events.emit("mcp", server=server, state="failed" if error else "listed", **facts)
        self._cancel_gone()
        self.scheduler.stir()

    def _cancel_gone(self) -> None:
        for request in self.scheduler.unfinished():
            if request.spec.operation == "tool" and not self.tools.of(request.spec.model):
                self.scheduler.cancel(request, "its tool is gone")

    def stop(self, unmount: Callable[[], object] = lambda: None) -> None:
        """`unmount`: once every wait has ended, before the state is closed: what clients do last counts."""
        self.lifetimes.stop()
        self.scheduler.stop()
        unmount()
        self.scheduler.calls.audit.close()
        self.store.close()

    @property
    def group(self) -> int | None:
        """The group that may make agents and contexts; None: everybody may."""
        return gid_of(self.config.daemon.group)

    @property
    def admins(self) -> int | None:
        """The group that administers beside root; None: there is none."""
        return gid_of(self.config.daemon.admin_group)

    # objects that users make and end, one at a time

    def add_agent(self, name: str, caller: Caller, mode: int = 0o700) -> None:
        self._add("agent", self.agents, name, caller, mode, self.agents.add)

    def add_context(self, name: str, caller: Caller, mode: int = 0o700) -> None:
        self._add("context", self.contexts, name, caller, mode, self.contexts.add)

    def _add(
        self,
        kind: str,
        objects: Agents | Contexts,
        name: str,
        caller: Caller,
        mode: int,
        add: Callable[[str], Made],
    ) -> Made:
        path = f"/{kind}s/{name}"
        with self.permissions.making:
            self._check_new(objects.find(name), path, caller)
            self.events.forget(path)
            with self.permissions.made(path, caller, mode):
                made = add(name)
            self.events.emit(kind, path, caller.uid, **{kind: name}, state="made")
        return made

    def remove_agent(self, name: str) -> None:
        self._remove_agent(self.agents.get(name), "its agent was removed")

    def _remove_agent(self, agent: Agent, why: str) -> None:
        path = f"/agents/{agent.name}"
        with self.permissions.making:
            self.agents.remove(agent)  # from here on nothing more is admitted for it
            self.lifetimes.free(agent)
            self.cancel_all(agent, why)
            self._emit_removed("agent", path, agent=agent.name)
            self.admission.forget(agent)
            self.scheduler.calls.forget(agent.id)
            self.permissions.forget(path)

    def bind_agent(self, agent: Agent, caller: Caller, text: str) -> None:
        """The agent ends with that process; an empty text unbinds it."""
        pid = lifetime.check(caller, text) if text else 0
        started = lifetime.started_of(pid) if pid else ""
        with self.permissions.making:
            self.agents.check(agent)
            if pid:
                self.lifetimes.bind(agent, pid, started)
            else:
                self.lifetimes.free(agent)
            self.agents.change(agent, pid=pid, pid_started=started)

    def _watch(self, agent: Agent) -> None:
        """What an earlier daemon knew."""
        try:
            if agent.settings.pid:
                self.lifetimes.bind(agent, agent.settings.pid, agent.settings.pid_started)
        except BadValue:
            self.lifetimes.expire(agent)
        except OverQuota as error:
            log.error(
                "agent %s will not end with its process: %s",
                agent.name,
                error.explanation,
                extra=about(agent=agent.name),
            )

    def _end_with_process(self, agent: Agent) -> None:
        with self.permissions.making, suppress(NotFound):  # removed meanwhile
            self._remove_agent(agent, "its agent ended with its process")
            log.info(
                "agent %s ended with process %d",
                agent.name,
                agent.settings.pid,
                extra=about(agent=agent.name),
            )

    def remove_context(self, name: str) -> None:
        path = f"/contexts/{name}"
        with self.permissions.making:
            context = self.contexts.get(name)
            self.contexts.remove(name)  # from here on nothing more is admitted for it
            for request in self.scheduler.unfinished():
                if request.spec.context_id == context.id:
                    self.scheduler.cancel(request, "its context was removed")
            self.scheduler.residency.drop(context)
            self._emit_removed("context", path, context=name)
            self.permissions.forget(path)

    def _emit_removed(self, kind: str, path: str, **facts: object) -> None:
        last = self.permissions.get(path) or ROOTS
        self.events.emit(kind, path, last.uid, **facts, state="removed")
        self.events.forget(path, last)

    def fork_context(self, context: Context, name: str, caller: Caller) -> None:
        """mkdir, with the conversation of another; its KV is shared where both are the caller's."""
        if not NAME.fullmatch(name):
            raise BadValue(f"{name[:80]!r} is not a name", "fork NEW")
        folder = self.permissions.get("/contexts")
        if folder and not may(caller, folder, WRITE | EXECUTE):
            raise Denied("contexts/ is not yours to make one in")

        def fork(name: str) -> Context:
            self.scheduler.bounds.check_disk(self.contexts.size(context))
            return self.contexts.fork(context, name)

        new = self._add("context", self.contexts, name, caller, 0o700, fork)
        if self.contexts.owner(context) == (caller.uid, True) and not context.salt:
            self.scheduler.residency.fork(context, new)

    def add_model(self, name: str, caller: Caller, mode: int = 0o700) -> None:
        with self.permissions.making:
            if self.models.find(name):
                raise Exists(f"model {name} exists")
            with self.permissions.made(f"/models/{name}", caller, mode):
                self.models.add(name)

    def remove_model(self, name: str) -> None:
        model = self.models.get(name)
        if model.configured:
            raise NotEmpty(f"model {name} is in the configuration", "remove it there, then reload")
        self.scheduler.pool.unload(model)  # nothing more is admitted for it
        for request in self.scheduler.unfinished():
            if request.spec.model == name:
                self.scheduler.cancel(request, f"model {name} was removed")
        with self.permissions.making:
            self.models.remove(name)
            self.permissions.forget(f"/models/{name}")

    def add_group(self, name: str, caller: Caller, mode: int = 0o700) -> None:
        with self.permissions.making, self.permissions.made(f"/access/groups/{name}", caller, mode):
            self.trust.add_group(name)

    def remove_group(self, name: str) -> None:
        with self.permissions.making:
            self.trust.remove_group(name)
            self.permissions.forget(f"/access/groups/{name}")

    def set_group(self, name: str, agents: Sequence[str], caller: Caller) -> None:
        """Which agents are in a privilege group."""
        check_count(agents)
        ids = {self.agents.get(agent).id for agent in agents}
        self.scheduler.calls.audit.granted("group", caller, group=name, agents=sorted(set(agents)))
        self.trust.set_members(name, ids)

    def allow_owners(self, caller: Caller, owners: set[int]) -> None:
        """Whose tools the caller lets run as him."""
        check_count(owners)
        self.scheduler.calls.audit.granted("owners allowed", caller, owners=sorted(owners))
        self.trust.set_owners(caller.uid, owners)

    def add_tool(self, name: str, caller: Caller, mode: int = 0o700) -> None:
        """A user's own; it can be called once it has a manifest."""
        path = f"/tools/{name}"
        with self.permissions.making:
            self._check_new(self.tools.find(name), path, caller)
            self.scheduler.bounds.check_disk(0)
            with self.permissions.made(path, caller, mode):
                self.tools.make(name)

    def keep_tool(self, tool: Tool, file: str, data: bytes) -> None:
        manifest = tool.judge(data) if file == FILE else None
        with self.permissions.making:
            self.scheduler.bounds.check_disk(len(data))
            self.tools.keep(tool, file, data, manifest)

    def remove_tool(self, name: str) -> None:
        with self.permissions.making:
            tool = self.tools.find(name)
            if tool is None:
                raise NotFound(f"no tool {name}")
            self.tools.remove(tool)  # from here on nothing more is admitted for it
            for request in self.scheduler.unfinished():
                if request.spec.model == tool.queue:
                    self.scheduler.cancel(request, "its tool was removed")
            for agent in self.agents.all():  # the next of that name may be another's
                if name in agent.settings.allowed:
                    self.agents.change(agent, allowed=[n for n in agent.settings.allowed if n != name])
            self.permissions.forget(f"/tools/{name}")

    def _check_new(self, there: object, path: str, caller: Caller) -> None:
        """Raises Exists, OverQuota."""
        folder, name = path.rsplit("/", 1)
        if there:
            raise Exists(f"{name} exists")
        what = folder.strip("/")
        most: int = getattr(self.scheduler.bounds.quotas.of(caller.with_groups()), what)
        if self.permissions.count(folder, caller.uid) >= most:
            raise OverQuota(f"you have {most} {what}", "rmdir some first")

    # commands

    def cancel_all(self, agent: Agent, why: str) -> None:
        for request in self.scheduler.unfinished(agent):
            self.scheduler.cancel(request, why)

    def cancel(self, agent: Agent, id: str) -> None:
        if id == "all":
            self.cancel_all(agent, "cancelled")
            return
        request = self.scheduler.find(int(id)) if id.isdecimal() and len(id) < 19 else None
        if request is None or request.agent_id != agent.id:
            raise NotFound(f"no unfinished request {id[:20]} of agent {agent.name}")
        self.scheduler.cancel(request)

    def pause(self, agent: Agent, paused: bool) -> None:
        self.agents.change(agent, paused=paused)
        self.scheduler.hold(agent)

    def reset(self, agent: Agent, caller: Caller) -> None:
        """Cancels what waits and empties the conversation."""
        if agent.settings.context:
            self.admission.check_context(caller, agent.settings.context)
        self.cancel_all(agent, "its agent was reset")
        context = self.contexts.find(agent.settings.context)
        if context:
            self.contexts.truncate(context, 0)

    def command_context(self, context: Context, caller: Caller, verb: str, argument: str) -> None:
        """Forking takes r on the context's folder, everything else w."""
        self.contexts.check(context)
        at = self.permissions.get(f"/contexts/{context.name}") or Permission(0, 0, 0o700)
        if not may(caller, at, READ if verb == "fork" else WRITE):
            raise Denied(f"context {context.name} is not yours to {verb[:40]}", "ask its owner")
        if verb == "fork" and argument:
            self.fork_context(context, argument, caller)
        elif verb == "truncate" and argument.isdecimal() and len(argument) < 19:
            self.contexts.truncate(context, int(argument))
        elif verb in ("pin", "unpin") and not argument:
            self.contexts.set(context, pinned=verb == "pin")
            self.scheduler.residency.pin(context)
        elif verb == "evict" and argument in ("", "host", "disk", "cold"):
            self.evict(context, argument or "host")
        else:
            raise BadValue(
                f"unknown command {verb[:40]!r}", "fork NEW, truncate N, pin, unpin, evict [host|disk|cold]"
            )

    def evict(self, context: Context, tier: str) -> None:
        """Moves the KV down, and returns when it is there."""
        if self.scheduler.turn(context) is not None:
            raise Busy(f"context {context.name} has a turn going on", "try again when it is done")
        residency = self.scheduler.residency
        if tier == "cold":
            residency.drop(context)
            return
        try:
            kv = residency.save(context, self.scheduler.pool.find(context.worker), evict=True).result(EVICT_S)
            if kv is not None:  # the answer to somebody's question who did not want it evicted
                os.close(kv)
        except TimeoutError:
            raise Busy("the worker takes long to answer", "look at state later") from None
        context.worker = None
        if tier == "disk":
            residency.swap.sink(context.id)

    def load_model(self, name: str, path: str) -> None:
        model = self.models.get(name)
        if path:
            self.models.set_path(model, Path(path))
            self.scheduler.pool.unload(model)  # what ran there goes on with the new one
        if model.state in (ModelState.FAILED, ModelState.ABSENT):
            self.scheduler.pool.load(model)

    def pin_model(self, name: str, argument: str) -> None:
        """To devices, as aiosd.cores.devices.parse_pin has them, a worker on each; `auto`: as the daemon
        places it.
        Raises BadValue."""
        model, pool = self.models.get(name), self.scheduler.pool
        words = argument.split()
        if words != ["auto"]:
            pool.places.look()
            named = devices.parse_pin(pool.places.table, words)
            pool.places.retry(uuid for pin in named for uuid in pin)
            pins = tuple(",".join(pin) for pin in named)
            if gone := pool.places.failed.keys() & {uuid for pin in named for uuid in pin}:
                raise BadValue(f"{min(gone)}: {pool.places.failed[min(gone)]}", "cat devices shows all")
        else:
            pins = ()
        pool.judge(model, pins, len(pins) or model.replicas)
        self.models.set_pins(model, pins)
        if model.state is not ModelState.ABSENT:
            pool.load(model)

    def explain(self, path: str, error: AiosError, uid: int) -> None:
        """Why a call on this path was refused, to where its caller can read it."""
        parts = path.split("/")
        agent = self.agents.find(parts[2]) if path.startswith("/agents/") and len(parts) > 2 else None
        if agent:
            agent.note(error.explanation, file="/".join(parts[3:]))
        self.refusals.tell(path, error, uid)


def check_count(granted: Collection[object]) -> None:
    """Each grant is one line of the audit log."""
    if len(granted) > GRANTED_MAX:
        raise BadValue(f"more than {GRANTED_MAX} at once", "name fewer")


def gid_of(group: str) -> int | None:
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        return None

"""The daemon's parts, put together: what exists, and what happens to it as a whole.

Builds everything from a Config in the order it depends on each other, and takes it down in reverse. Knows no
FUSE; the tree (aiosd.fs.layout) shows what is here.
"""

from __future__ import annotations

import grp
import logging
import os
import time
from pathlib import Path

from aiosd import access
from aiosd.access import Caller, Permission, Permissions
from aiosd.admission import Admission
from aiosd.agents import Agent, Agents
from aiosd.config import Config
from aiosd.contexts import Context, Contexts
from aiosd.errors import AiosError, BadValue, Busy, Denied, NotEmpty, NotFound, OverQuota
from aiosd.events import Events
from aiosd.models import NAME, Models, ModelState
from aiosd.policy import Chooser
from aiosd.quota import Quotas
from aiosd.scheduler import Scheduler
from aiosd.store import Store

log = logging.getLogger(__name__)

EVICT_S = 5.0


class Kernel:
    def __init__(self, config: Config, model: Path | None = None) -> None:
        self.config = config
        self.started_s = time.time()
        self.store = Store(Path(config.daemon.state))
        self.permissions = Permissions(self.store)
        self.agents = Agents(self.store)
        self.contexts = Contexts(self.store, self.permissions, config.limits.context_bytes)
        self.models = Models(config, self.store, model)
        self.events = Events(self.permissions)
        self.scheduler = Scheduler(config, self.store, self.agents, self.contexts, self.models, self.events)
        self.admission = Admission(self.scheduler, self.permissions)

    def start(self) -> None:
        self.scheduler.start()
        for model in self.models.all():
            self.scheduler.pool.load(model)

    def reload(self, config: Config) -> None:
        """Takes over what can change while running; Models judges the new ones before anything else."""
        folder = Path(config.scheduler.policies)
        Chooser(config.scheduler.policy, folder)  # raises when there is no such policy
        added = self.models.reload(config)
        old, now = self.config, config
        if (old.daemon.mount, old.daemon.state) != (now.daemon.mount, now.daemon.state):
            log.warning("another mount or state folder takes a restart")
        if old.engine != now.engine:
            log.warning("[engine] applies to workers started from now on")
        self.config = self.scheduler.config = config
        self.scheduler.pool.engine = config.engine
        self.scheduler.quotas = Quotas(config)
        self.scheduler.chooser.load(folder)
        if old.scheduler.policy != now.scheduler.policy:
            self.scheduler.chooser.switch(now.scheduler.policy)
        if old.scheduler.quantum != now.scheduler.quantum:
            self.scheduler.quantum_tokens = now.scheduler.quantum
        for model in added:
            self.scheduler.pool.load(model)
        self.scheduler.stir()

    def stop(self) -> None:
        self.scheduler.stop()
        self.store.close()

    @property
    def group(self) -> int | None:
        """The group that may make agents and contexts; None: everybody may."""
        try:
            return grp.getgrnam(self.config.daemon.group).gr_gid
        except KeyError:
            return None

    # objects that users make and end

    def add_agent(self, name: str, caller: Caller) -> None:
        self._check_count("/agents/", caller, "agents")
        self.agents.add(name)
        self.events.emit("agent", f"/agents/{name}", caller.uid, agent=name, state="made")

    def remove_agent(self, name: str) -> None:
        agent = self.agents.get(name)
        self.agents.remove(name)  # from here on nothing more is admitted for it
        self.cancel_all(agent, "its agent was removed")
        self._emit_removed("agent", f"/agents/{name}", agent=name)
        self.admission.forget(agent)

    def add_context(self, name: str, caller: Caller) -> None:
        self._check_count("/contexts/", caller, "contexts")
        self.contexts.add(name)
        self.events.emit("context", f"/contexts/{name}", caller.uid, context=name, state="made")

    def remove_context(self, name: str) -> None:
        context = self.contexts.get(name)
        self.contexts.remove(name)  # from here on nothing more is admitted for it
        for request in self.scheduler.unfinished():
            if request.spec.context_id == context.id:
                self.scheduler.cancel(request, "its context was removed")
        self.scheduler.residency.drop(context)
        self._emit_removed("context", f"/contexts/{name}", context=name)

    def _emit_removed(self, kind: str, path: str, **facts: object) -> None:
        owner = self.permissions.get(path)
        self.events.emit(kind, path, owner.uid if owner else 0, **facts, state="removed")

    def fork_context(self, context: Context, name: str, caller: Caller) -> None:
        """mkdir, with the conversation of another; its KV is shared where both are the caller's."""
        if not NAME.fullmatch(name):
            raise BadValue(f"{name[:80]!r} is not a name", "fork NEW")
        folder = self.permissions.get("/contexts")
        if folder and not access.may(caller, folder, access.WRITE | access.EXECUTE):
            raise Denied("contexts/ is not yours to make one in")
        self._check_count("/contexts/", caller, "contexts")
        self.scheduler.check_disk(self.contexts.size(context))
        new = self.contexts.fork(context, name)
        self.permissions.set(f"/contexts/{name}", Permission(caller.uid, caller.gid, 0o700))
        if self.contexts.owner(context) == (caller.uid, True) and not context.salt:
            self.scheduler.residency.fork(context, new)

    def add_model(self, name: str, caller: Caller) -> None:
        self.models.add(name)

    def remove_model(self, name: str) -> None:
        model = self.models.get(name)
        if model.configured:
            raise NotEmpty(f"model {name} is in the configuration", "remove it there, then reload")
        for request in self.scheduler.unfinished():
            if request.spec.model == name:
                self.scheduler.cancel(request, f"model {name} was removed")
        self.scheduler.pool.unload(model)
        self.models.remove(name)

    def _check_count(self, below: str, caller: Caller, what: str) -> None:
        most: int = getattr(self.scheduler.quotas.of(caller.with_groups()), what)
        if self.permissions.count(below, caller.uid) >= most:
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
        if not access.may(caller, at, access.READ if verb == "fork" else access.WRITE):
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

    def explain(self, path: str, error: AiosError) -> None:
        """Why a call on this path was refused, to where its caller can read it."""
        parts = path.split("/")
        agent = self.agents.find(parts[2]) if path.startswith("/agents/") and len(parts) > 2 else None
        if agent:
            agent.note(error.explanation, file="/".join(parts[3:]))
        log.debug("%s: %s", path, error.explanation)

"""The kernel: build, start and stop the daemon's parts in the order of their dependencies.

Knows no FUSE: aiosd.fs.layout builds the tree from these parts. aiosd.reload changes them at a reload.
"""

from __future__ import annotations

import grp
import time
from collections.abc import Callable
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

from aiosd.access.audit import Audit
from aiosd.access.keys import Keys
from aiosd.access.permissions import Permissions, object_of
from aiosd.access.reasons import Reasons
from aiosd.access.refusals import Refusals
from aiosd.access.rules import Rules
from aiosd.access.trust import Trust
from aiosd.agents.agents import Agents
from aiosd.config.config import Config, DaemonConfig
from aiosd.context.contexts import Contexts
from aiosd.context.interception import Interception
from aiosd.context.kvfile import KvFiles
from aiosd.context.residency import Residency
from aiosd.context.swap import Swap
from aiosd.cores.models import Models
from aiosd.cores.pool import Pool
from aiosd.cores.rooms import Rooms
from aiosd.database.store import Store
from aiosd.errors import AiosError, RequestFailed, ShuttingDown
from aiosd.events import Events
from aiosd.handlers import table
from aiosd.handlers.parts import Parts
from aiosd.handlers.tool.approvals import Approvals
from aiosd.handlers.tool.handler import ToolHandler
from aiosd.handlers.tool.questions import Questions
from aiosd.handlers.tool.sampled import Sampled
from aiosd.host import identity
from aiosd.host.accounts import Accounts
from aiosd.modelstore.pulls import Pulls
from aiosd.modelstore.store import ModelStore
from aiosd.objects.agents import AgentObjects
from aiosd.objects.contexts import ContextObjects
from aiosd.objects.former import FormerAccounts
from aiosd.objects.keys import KeyObjects
from aiosd.objects.making import Making
from aiosd.objects.models import ModelObjects
from aiosd.objects.pulls import PullObjects
from aiosd.objects.tools import ToolObjects
from aiosd.objects.trusted import TrustObjects
from aiosd.privilege.system import Own, System
from aiosd.scheduler import parking
from aiosd.scheduler.admission import STOPPED, Admission
from aiosd.scheduler.chooser import Chooser
from aiosd.scheduler.delivery import Delivery
from aiosd.scheduler.demand import Demand
from aiosd.scheduler.dispatch import Dispatch
from aiosd.scheduler.ending import Ending, log_end
from aiosd.scheduler.handler import Handler
from aiosd.scheduler.kvbudget import KvBudget
from aiosd.scheduler.limits import Limits
from aiosd.scheduler.names import Names
from aiosd.scheduler.notices import Notices
from aiosd.scheduler.saving import Saving
from aiosd.scheduler.scheduler import Scheduler
from aiosd.tools.calls import Calls
from aiosd.tools.catalog import Tools
from aiosd.tools.mcp.listing import Listings
from aiosd.tools.mcp.sessions import Sessions
from aiosd.tools.run.runner import Places


class Kernel:
    def __init__(self, config: Config, model: Path | None = None, system: System | None = None) -> None:
        self.config = config
        self.started_s = time.time()
        self.reload_refused = False  # the last one
        system = system or Own()
        self._build_tables(config, model, system.workers_uid)
        self._build_cores(config, system)
        self._build_scheduler(config)
        self._build_handlers(config)
        self._build_objects()
        self._forget_gone()
        self.model_objects.adopt()

    def _build_tables(self, config: Config, model: Path | None, workers_uid: int) -> None:
        """What exists: read from the store, and written through to it."""
        self.store = Store(Path(config.daemon.state), {name: kind.spec for name, kind in table.KINDS.items()})
        self.permissions = Permissions(self.store)
        self.accounts = Accounts(self.store.accounts(), self.store.save_account, self)
        self.agents = Agents(self.store)
        self.contexts = Contexts(self.store, self.permissions, config.limits.context_bytes)
        self.model_store = ModelStore(self.store.folder / "models", workers_uid)
        self.models = Models(config, self.store, model, workers_uid, self.model_store.paths())
        self.tools = Tools(Path(config.tools.folder), self.store.folder / "tools", config.tools.network)
        self.trust = Trust(self.store)
        self.keys = Keys(self.store)
        self.audit = Audit(self.store.folder / "audit.jsonl", config.limits)
        self.events = Events(self.permissions)
        self.refusals, self.reasons = Refusals(), Reasons()

    def _build_cores(self, config: Config, system: System) -> None:
        """Build the parts that compute and act: workers and their KV, tools and their sandboxes."""
        engine, state = config.engine, self.store.folder
        self.pool = Pool(engine, system.launch, system.devices)
        self.pulls = Pulls(self.model_store, system.pull, config.tools.credentials, system.workers_uid)
        self.rooms = Rooms(self.pool)
        swap = Swap(
            state / "kv", engine.host_kv_bytes, engine.disk_kv_bytes, config.limits.disk_reserve_bytes
        )
        self.residency = Residency(self.pool, self.contexts, swap)
        self.interception = Interception(self.pool, self.residency, self.tools)
        places = Places(state / "work", Path(config.tools.credentials), Path(config.daemon.mount))
        self.runner = system.tools(places)
        self.sessions = Sessions(self.runner)
        self.listings = Listings(self.tools, self.runner, self.sessions, state / "mcp")
        self.calls = Calls(config, self.tools, self.runner, self.sessions, self.listings)

    def _build_scheduler(self, config: Config) -> None:
        self.handlers: dict[str, Handler] = {}
        self.chooser = Chooser(config.scheduler.policy, Path(config.scheduler.policies))
        self.dispatch = Dispatch(self.contexts, self.residency)
        self.scheduler = Scheduler(
            self.handlers, self.models, self.pool, self.dispatch, self.chooser,
            config.scheduler.quantum, config.engine.max_running,
        )  # fmt: skip
        self.demand = Demand(
            self.models, self.pool, self.rooms, self.scheduler, self.residency, self.permissions
        )
        self.notices = Notices(self.events, self.agents)
        self.saving = Saving(self.store, self.contexts, config.limits.keep_requests, log_end)
        self.ending = Ending(
            self.handlers, self.scheduler, self.saving, self.notices, self.agents, self.contexts,
            self.dispatch, self.residency, self.pool,
        )  # fmt: skip
        self.limits = Limits(config, self.store, self.scheduler.queue, self.scheduler.lock)
        self.admission = Admission(
            self.handlers, self.scheduler, self.ending, self.saving, self.limits, self.notices, self.store,
            self.agents, self.permissions,
        )  # fmt: skip
        self.delivery = Delivery(
            self.scheduler, self.ending, self.residency, self.interception, self.events, self.notices,
            self.limits, config.limits.worker_deaths_per_request,
        )  # fmt: skip
        self.pool.report_to(self.delivery)

    def _build_handlers(self, config: Config) -> None:
        self.names = Names(
            self.permissions, self.trust, self.models, self.contexts, self.tools, self.demand, self.group
        )
        self.kv_budget = KvBudget(self.limits, self.permissions, self.contexts, self.residency)
        self.kv_files = KvFiles(self.contexts, self.residency, self.pool, self.models, self.scheduler)
        self.approvals = Approvals(
            self.scheduler, self.ending, self.notices, self.agents, self.tools, self.runner, self.permissions,
            self.trust, self.audit, Rules(Path(config.scheduler.policies) / "access"), config.daemon.mount,
        )  # fmt: skip
        self.approvals.configure(config)
        sampled = Sampled(self.admission, self.ending, self.agents)
        self.questions = Questions(self.runner, self.notices, self.audit, sampled)
        self.questions.configure(config)
        parts = Parts(**{part.name: getattr(self, part.name) for part in fields(Parts)})
        self.handlers |= {name: kind.handler(parts) for name, kind in table.KINDS.items()}

    def _build_objects(self) -> None:
        self.making = Making(self.permissions, self.events, self.limits, self.scheduler, self.ending)
        self.key_objects = KeyObjects(self.making, self.keys, self.agents, self.audit, self.admins)
        self.agent_objects = AgentObjects(
            self.making, self.key_objects, self.agents, self.contexts, self.names, self.admission,
            self.scheduler, self.ending, self.runner,
        )  # fmt: skip
        self.context_objects = ContextObjects(
            self.making, self.contexts, self.residency, self.pool, self.scheduler
        )
        self.pull_objects = PullObjects(self.making, self.models, self.demand, self.pulls, self.admins)
        self.model_objects = ModelObjects(
            self.making, self.models, self.pool, self.demand, self.pull_objects, self.admins
        )
        self.tool_objects = ToolObjects(self.making, self.tools, self.agents)
        self.trust_objects = TrustObjects(self.making, self.trust, self.audit, self.agents)
        self.former_accounts = FormerAccounts(
            self.making, self.key_objects, self.agents, self.contexts, self.models, self.tools,
            self.scheduler, self.admission, self.limits, self.names, self.trust, self.reasons, self.sessions,
            self.runner,
        )  # fmt: skip

    def _forget_gone(self) -> None:
        """Forget owners and modes of objects that do not exist: a killed daemon was making or ending them."""
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
                continue  # the administrator may put this tool back
            if folder in there and object not in known:
                self.permissions.forget(object)
        self.tool_objects.oust()
        if self.store.had_agents():  # else no folder of theirs can be one that a killed daemon left
            self.runner.forget_but({agent.id for agent in self.agents.all()})

    # life

    def start(self) -> None:
        """Take up an earlier daemon's unfinished requests, then start all parts."""
        for uid in filter(self.accounts.unknown, self.store.users()):  # an earlier version remembered none
            self.accounts.check(uid)
        self.admission.take_up()
        self.residency.swap.start(context.id for context in self.contexts.all())
        self.listings.report_to(self)
        tool = self.handlers["tool"]
        assert isinstance(tool, ToolHandler)
        tool.complete_audit()
        self.calls.start(tool)
        self.saving.start()
        self.scheduler.start(self.ending)
        self.approvals.start()
        self.agent_objects.start()
        self.demand.start()
        self.pull_objects.start()

    def listed(self, server: str, error: str) -> None:
        """Implements aiosd.tools.mcp.listing.ListingEvents: cancel the calls of tools that are gone."""
        facts: dict[str, Any] = {"error": error} if error else {}
        self.events.emit("mcp", server=server, state="failed" if error else "listed", **facts)
        self.tool_objects.cancel_gone()
        self.scheduler.stir()

    def replaced(self, uid: int, before: str, now: str) -> None:
        """Implements aiosd.host.accounts.AccountEvents."""
        self.former_accounts.replaced(uid, before, now)

    def drain(self) -> None:
        """Refuse and start nothing more. Running requests go on."""
        self.limits.draining = True
        self.scheduler.drain()
        self.demand.stop()

    def stop(self, unmount: Callable[[], object] = lambda: None) -> None:
        """End every wait, then `unmount`, then close the state. So clients' last writes are still stored.

        Unfinished requests stay in the store and go on after the next start.
        """
        self.agent_objects.stop()
        self.drain()
        self.pulls.stop()
        left = self.scheduler.stop()
        self.runner.stop()
        self.pool.stop()
        self.saving.stop()
        parking.park(self.store, self.models, left)
        for request in left:
            request.answer.end(error=ShuttingDown(STOPPED))
        self.residency.swap.stop()
        unmount()
        self.audit.close()
        self.store.close()

    # groups of administrators

    @cached_property
    def group(self) -> int | None:
        """The group that uses the models and tools, and makes agents and contexts; None: everybody may.

        A machine may lack the default group. Another name that does not exist is a mistake, and must not let
        everybody in: root's group stands for it.
        """
        name = self.config.daemon.group
        found = gid_of(name)
        return 0 if found is None and name not in ("", DaemonConfig.group) else found

    @cached_property
    def admins(self) -> int | None:
        """The group that administers beside root; None: there is none."""
        return gid_of(self.config.daemon.admin_group)

    def explain(self, path: str, error: AiosError, uid: int) -> None:
        """Tell why a call of this user on this path was refused, where the user can read it."""
        self.reasons.note(uid, path, error)
        if isinstance(error, RequestFailed):  # the end of a request is noted when it ends
            return
        parts = path.split("/")
        agent = self.agents.find(parts[2]) if path.startswith("/agents/") and len(parts) > 2 else None
        if agent:
            agent.note(error.explanation, file="/".join(parts[3:]))
        self.refusals.log(path, error)


def gid_of(group: str) -> int | None:
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        return None

"""The end of an account (aiosd.host.accounts): what its user had goes to root, and his rights end.

His uid belongs to another person already, who must find nothing. After a kill in between, the next call of
that uid begins again, so each step may be done twice.
"""

from __future__ import annotations

import logging

from aiosd.access.reasons import Reasons
from aiosd.access.trust import Trust
from aiosd.agents.agents import Agents
from aiosd.context.contexts import Contexts
from aiosd.cores.models import Models
from aiosd.host import identity, processes
from aiosd.host.message_ids import NOTICE, about
from aiosd.objects.keys import KeyObjects
from aiosd.objects.making import Making
from aiosd.scheduler.admission import Admission
from aiosd.scheduler.limits import Limits
from aiosd.scheduler.names import Names
from aiosd.scheduler.scheduler import Scheduler
from aiosd.tools.catalog import Tools
from aiosd.tools.mcp.sessions import Sessions
from aiosd.tools.run.toolrunner import ToolRunner

log = logging.getLogger(__name__)

PRIVATE, NOT_CALLABLE = 0o700, 0o600


class FormerAccounts:
    def __init__(
        self,
        making: Making,
        keys: KeyObjects,
        agents: Agents,
        contexts: Contexts,
        models: Models,
        tools: Tools,
        scheduler: Scheduler,
        admission: Admission,
        limits: Limits,
        names: Names,
        trust: Trust,
        reasons: Reasons,
        sessions: Sessions,
        runner: ToolRunner,
    ) -> None:
        self._making, self._keys, self._agents, self._contexts = making, keys, agents, contexts
        self._models, self._tools, self._scheduler, self._admission = models, tools, scheduler, admission
        self._limits, self._names, self._trust, self._reasons = limits, names, trust, reasons
        self._sessions, self._runner = sessions, runner

    def replaced(self, uid: int, before: str, now: str) -> None:
        why = f"its user {before} was removed: user {uid} is {now} by now"
        with self._making.lock:
            given = {path: self._mode(path) for path in self._making.permissions.of_user(uid)}
            agents = {path.rpartition("/")[2] for path in given if path.rpartition("/")[0] == "/agents"}
            for name in agents:
                self._pause(name)
            self._making.permissions.give(given, identity.uid(), identity.gid())
            self._making.cancel(lambda request: request.uid == uid or request.agent in agents, why)
        self._keys.account_ended(uid)
        self._sessions.end_of(uid)
        self._runner.disown(uid)
        processes.forget(uid)
        self._admission.disown(uid, identity.uid())
        self._trust.forget(uid)
        self._limits.forget(uid)
        self._names.forget(uid)
        self._reasons.forget(uid)
        self._contexts.disown(uid)
        events, path = self._making.events, f"/accounts/{uid}"  # only root sees that path
        events.emit("account", path, account=uid, name=now, before=before, state="replaced")
        words = "user %d is %s and was %s, whose %d objects are root's now"
        log.log(NOTICE, words, uid, now, before, len(given), extra=about(uid=uid))

    def _mode(self, path: str) -> int | None:
        """The mode in which root gets an object. None: as it is, because root made it and gave it away.

        A tool cannot be called until root changes its mode: tools of root run for root without a grant.
        """
        folder, _, name = path.rpartition("/")
        tool, model = self._tools.find(name), self._models.find(name)
        if folder == "/tools" and tool and tool.own:
            return NOT_CALLABLE
        mine = folder in ("/agents", "/contexts", "/access/groups")
        return PRIVATE if mine or (folder == "/models" and model and not model.configured) else None

    def _pause(self, name: str) -> None:
        """Hold the agent until root resumes it: through root's agent its guests would have root's rights."""
        if agent := self._agents.find(name):
            self._agents.change(agent, paused=True, allowed=[])
            self._scheduler.hold(agent)

"""Agents: mkdir, rmdir, the commands of agents/NAME/ctl, and the process that an agent ends with."""

from __future__ import annotations

import logging
from contextlib import suppress

from aiosd.access.caller import Caller
from aiosd.agents import lifetime
from aiosd.agents.agents import Agent, Agents
from aiosd.agents.lifetime import Lifetimes
from aiosd.context.contexts import Contexts
from aiosd.errors import BadValue, NotFound, OverQuota
from aiosd.host.message_ids import about
from aiosd.objects.keys import KeyObjects
from aiosd.objects.making import Making
from aiosd.scheduler.admission import Admission
from aiosd.scheduler.ending import Ending
from aiosd.scheduler.names import Names
from aiosd.scheduler.scheduler import Scheduler
from aiosd.tools.run.toolrunner import ToolRunner

log = logging.getLogger(__name__)


class AgentObjects:
    def __init__(
        self,
        making: Making,
        keys: KeyObjects,
        agents: Agents,
        contexts: Contexts,
        names: Names,
        admission: Admission,
        scheduler: Scheduler,
        ending: Ending,
        runner: ToolRunner,
    ) -> None:
        self._making, self._keys = making, keys
        self._agents, self._contexts, self._names = agents, contexts, names
        self._admission, self._scheduler, self._ending = admission, scheduler, ending
        self._runner = runner
        self._lifetimes = Lifetimes(self._end_with_process)

    def start(self) -> None:
        for agent in self._agents.all():
            self._scheduler.hold(agent)
            self._watch(agent)
        self._lifetimes.start()
        self._agents.sweeping.start()

    def stop(self) -> None:
        self._lifetimes.stop()
        self._agents.sweeping.stop()

    # making and ending

    def add(self, name: str, caller: Caller, mode: int = 0o700) -> None:
        self._making.make("agent", name, caller, mode, self._agents.find(name), self._agents.add)

    def remove(self, name: str) -> None:
        self._remove(self._agents.get(name), "its agent was removed")

    def _remove(self, agent: Agent, why: str) -> None:
        path = f"/agents/{agent.name}"
        with self._making.lock:
            self._agents.remove(agent)  # from here on no request is admitted for it
            self._keys.agent_ended(agent.id)
            self._lifetimes.free(agent)
            self.cancel_all(agent, why)
            self._making.emit_removed("agent", path, agent=agent.name)
            self._admission.forget(agent)
            self._runner.forget(agent.id)
            self._making.permissions.forget(path)

    # the agent's process

    def bind(self, agent: Agent, caller: Caller, text: str) -> None:
        """Let the agent end with a process. An empty text lets it outlive all processes."""
        pid = lifetime.check(caller, text) if text else 0
        started = lifetime.started_of(pid) if pid else ""
        with self._making.lock:
            self._agents.check(agent)
            if pid:
                self._lifetimes.bind(agent, pid, started)
            else:
                self._lifetimes.free(agent)
            self._agents.change(agent, pid=pid, pid_started=started)

    def _watch(self, agent: Agent) -> None:
        """Watch the process that the agent was bound to before the daemon's start."""
        try:
            if agent.settings.pid:
                self._lifetimes.bind(agent, agent.settings.pid, agent.settings.pid_started)
        except BadValue:
            self._lifetimes.expire(agent)
        except OverQuota as error:
            words = agent.name, error.explanation
            log.error("agent %s will not end with its process: %s", *words, extra=about(agent=agent.name))

    def _end_with_process(self, agent: Agent) -> None:
        with self._making.lock, suppress(NotFound):  # removed meanwhile
            self._remove(agent, "its agent ended with its process")
            words = agent.name, agent.settings.pid
            log.info("agent %s ended with process %d", *words, extra=about(agent=agent.name))

    # commands

    def cancel_all(self, agent: Agent, why: str = "cancelled") -> None:
        for request in self._scheduler.unfinished(agent):
            self._ending.cancel(request, why)

    def cancel(self, agent: Agent, id: str) -> None:
        """Cancel one request, or `all`. Raises NotFound."""
        if id == "all":
            self.cancel_all(agent)
            return
        request = self._scheduler.find(int(id)) if id.isdecimal() and len(id) < 19 else None
        if request is None or request.agent_id != agent.id:
            raise NotFound(
                f"agent {agent.name} has no unfinished request {id[:20]}", "cat scheduler/queue lists them"
            )
        self._ending.cancel(request)

    def pause(self, agent: Agent, paused: bool) -> None:
        self._agents.change(agent, paused=paused)
        self._scheduler.hold(agent)

    def reset(self, agent: Agent, caller: Caller) -> None:
        """Cancel the agent's unfinished requests, and empty its conversation."""
        if agent.settings.context:
            self._names.check_context(caller, agent.settings.context)
        self.cancel_all(agent, "its agent was reset")
        if context := self._contexts.find(agent.settings.context):
            self._contexts.truncate(context, 0)

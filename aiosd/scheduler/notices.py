"""events.jsonl lines about requests: which object's readers see them."""

from __future__ import annotations

from aiosd.agents.agents import Agents
from aiosd.events import Events
from aiosd.syscall.request import Request


class Notices:
    def __init__(self, events: Events, agents: Agents) -> None:
        self._events, self._agents = events, agents

    def place(self, request: Request) -> str:
        """The request's agent, whose readers see its events; or "/", which is root's, when the agent is
        gone.
        """
        agent = self._agents.find(request.agent)
        gone = agent and agent.id != request.agent_id
        return "/" if gone or not request.agent else f"/agents/{request.agent}"

    def changed(self, request: Request) -> None:
        """Tell that the request is in another state."""
        facts = {"id": request.id, "agent": request.agent, "state": request.state}
        self._events.emit("request", self.place(request), request.uid, **facts)

    def decided(self, request: Request, state: str) -> None:
        """Tell that the request waits for a person, or that a person has decided."""
        facts = {"id": request.id, "agent": request.agent, "tool": request.spec.target, "state": state}
        self._events.emit("access", self.place(request), request.uid, **facts)

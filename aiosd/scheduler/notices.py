"""Emit events about requests to events.jsonl. Readers of the request's agent see them."""

from __future__ import annotations

from aiosd.agents.agents import Agents
from aiosd.events import Events
from aiosd.syscall.request import Request


class Notices:
    def __init__(self, events: Events, agents: Agents) -> None:
        self._events, self._agents = events, agents

    def place(self, request: Request) -> str:
        """Return the path of the request's agent, whose readers see its events. Without an agent, or with one
        that is gone, return "/": root sees the event, and the request's user.
        """
        agent = self._agents.find(request.agent)
        gone = agent and agent.id != request.agent_id
        return "/" if gone or not request.agent else f"/agents/{request.agent}"

    def changed(self, request: Request) -> None:
        """Emit the request's new state."""
        facts = {"id": request.id, "agent": request.agent, "state": request.state}
        self._events.emit("request", self.place(request), request.uid, **facts)

    def decided(self, request: Request, state: str) -> None:
        """Emit that the request waits for a person, or what a person has decided."""
        facts = {"id": request.id, "agent": request.agent, "tool": request.spec.target, "state": state}
        self._events.emit("access", self.place(request), request.uid, **facts)

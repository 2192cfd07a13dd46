"""Users' own tools: mkdir, rmdir, manifest and program. Also ends tools that the administrator or an MCP
server took away.
"""

from __future__ import annotations

import logging
from contextlib import suppress

from aiosd.access.caller import Caller
from aiosd.agents.agents import Agents
from aiosd.errors import NotFound, StoreFailed, StoreFull
from aiosd.objects.making import Making
from aiosd.syscall.request import Request
from aiosd.syscall.toolcall import QUEUE, ToolCall
from aiosd.tools.catalog import Tool, Tools
from aiosd.tools.manifest import FILE

log = logging.getLogger(__name__)


class ToolObjects:
    def __init__(self, making: Making, tools: Tools, agents: Agents) -> None:
        self._making, self._tools, self._agents = making, tools, agents

    def add(self, name: str, caller: Caller, mode: int = 0o700) -> None:
        """Make a user's own tool. It can be called once it has a manifest."""
        path = f"/tools/{name}"
        with self._making.lock:
            self._making.check_new(self._tools.find(name), path, caller)
            self._making.limits.check_disk(0)
            with self._making.permissions.made(path, caller, mode):
                self._tools.make(name)

    def keep(self, tool: Tool, file: str, data: bytes) -> None:
        """Store the manifest or the program of a user's own tool."""
        manifest = tool.judge(data) if file == FILE else None
        with self._making.lock:
            self._making.limits.check_disk(len(data))
            self._tools.keep(tool, file, data, manifest)

    def remove(self, name: str) -> None:
        with self._making.lock:
            tool = self._tools.find(name)
            if tool is None:
                raise NotFound(f"no tool {name}")
            self._tools.remove(tool)  # from here on no request is admitted for it
            self._cancel(tool.queue)
            for agent in self._agents.all():  # the next tool of that name may be another user's
                if name in agent.settings.allowed:
                    self._agents.change(agent, allowed=[n for n in agent.settings.allowed if n != name])
            self._making.permissions.forget(f"/tools/{name}")

    def _cancel(self, queue: str) -> None:
        self._making.cancel(lambda request: request.queue == queue, "its tool was removed")

    def oust(self) -> None:
        """End users' own tools whose names the administrator has taken. Nothing of theirs reaches
        his tools.
        """
        for name in self._tools.ousted:
            log.warning("a user's tool %s was removed: the administrator made one of that name", name)
            with suppress(StoreFull, StoreFailed):  # the next start forgets it
                self._making.permissions.forget(f"/tools/{name}")
            self._cancel(QUEUE + name)
        self._tools.discard_ousted()

    def cancel_gone(self) -> None:
        """Cancel the calls of tools that do not exist any more."""

        def gone(request: Request) -> bool:
            return isinstance(request.spec, ToolCall) and not self._tools.find(request.spec.tool)

        self._making.cancel(gone, "its tool was removed")

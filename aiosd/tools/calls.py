"""Tool calls between the queue and the runner: which may start now, in what cage as whom, and how they went.

The scheduler asks `free` with its lock held, and `run` and `kill` without. The runner's thread tells how
calls go.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Protocol

from aiosd.config.config import Config
from aiosd.errors import NotFound
from aiosd.syscall.request import Request
from aiosd.syscall.toolcall import ToolCall, outcome
from aiosd.tools.catalog import Tool, Tools, shorten
from aiosd.tools.manifest import Manifest, Served
from aiosd.tools.mcp.calling import Asked, Attached, News, Progress, Question, User, Withdrawn, work_folder
from aiosd.tools.mcp.listing import Listings
from aiosd.tools.mcp.sessions import Sessions
from aiosd.tools.run.spawn import Bounds, Call, End, Events
from aiosd.tools.run.toolrunner import ToolRunner


class CallEvents(Protocol):
    def call_began(self, request: Request) -> bool:
        """The call is about to act. False: it must not."""
        ...

    def call_ended(self, request: Request, error: str) -> None:
        """Nothing of the call runs any more."""

    def call_left(self, request: Request) -> None:
        """There is room for another call."""

    def call_asked(self, request: Request, news: Question | Withdrawn) -> None:
        """The MCP server asks something while the call runs, or waits no more for the answer."""


class Calls:
    def __init__(
        self, config: Config, tools: Tools, runner: ToolRunner, sessions: Sessions, listings: Listings
    ) -> None:
        self._config, self._tools, self._runner = config, tools, runner
        self._sessions, self._listings = sessions, listings
        self._events: CallEvents
        self.cpu_s = 0.0  # that tools took
        self.progress: dict[int, str] = {}  # by request: how far its MCP server says that it is
        self._live: dict[int, Tool] = {}  # a cancelled call is one until its processes are gone
        self._configure(config)

    def start(self, events: CallEvents) -> None:
        self._events = events
        self._runner.start()
        self._listings.start()

    def reload(self, config: Config, manifests: Sequence[Manifest]) -> None:
        self._config = config
        self._tools.install(manifests)
        self._configure(config)
        self._listings.start()

    def _configure(self, config: Config) -> None:
        sessions = self._sessions
        sessions.output_bytes, sessions.work_bytes = config.tools.output_bytes, config.tools.work_bytes
        sessions.reserve_bytes = config.limits.disk_reserve_bytes
        sessions.keep(set(config.mcp.values()))
        self._listings.configure(config.mcp)

    def kill(self, id: int) -> None:
        self._runner.kill(id)
        self._sessions.cancel(id)

    def free(self, tool: Tool, running: Iterable[Request]) -> bool:
        """Whether one more call of a tool may run beside those."""
        ids = {request.id: self._tools.of(request.queue) for request in running}
        others = [other for other in {**ids, **self._live}.values() if other]
        word = tool.manifest.exclusive
        if word and any(other.manifest.exclusive == word for other in others):
            return False
        return others.count(tool) < tool.limit

    def run(self, request: Request) -> None:
        """Raises AiosError."""
        try:
            self._run(request)
        except BaseException:
            self._live.pop(request.id, None)
            raise

    def _run(self, request: Request) -> None:
        spec, config = request.spec, self._config
        assert isinstance(spec, ToolCall)
        tool = self._tools.find(spec.tool)
        if tool is None or tool.manifest.server not in ("", *config.mcp):
            raise NotFound("its tool is gone")
        self._live[request.id] = tool
        events = Events(partial(self._began, request), request.answer.append, partial(self._ended, request))
        if (server := config.mcp.get(tool.manifest.server)) and (served := tool.manifest.served):
            user = User(request.uid, spec.groups, work_folder(server), True)
            news, given = partial(self._heard, request, tool), params(served, spec.arguments)
            asked = Asked(request.id, served.method, given, events, output(served), news)
            self._sessions.call(server, user, asked)
            return
        bounds = Bounds(config.tools.output_bytes, config.tools.work_bytes, config.limits.disk_reserve_bytes)
        folder = str(request.agent_id) if request.agent_id else ""
        who = request.uid, spec.groups, folder, True
        self._runner.run(Call(request.id, tool.manifest, spec.arguments, *who, bounds, events))

    # the runner's thread tells

    def _began(self, request: Request) -> bool:
        if self._events.call_began(request):
            return True
        self._left(request)
        self._events.call_left(request)
        return False

    def _heard(self, request: Request, tool: Tool, news: News) -> None:
        """Take what an MCP server says beside the text of its result."""
        match news:
            case Progress():
                self.progress[request.id] = news.text
            case Attached():
                how, tool.note = outcome(request), news.quarrel
                how.files, how.structured = news.files, news.structured
            case _:
                self._events.call_asked(request, news)

    def _ended(self, request: Request, end: End) -> None:
        self._left(request)
        how = outcome(request)
        how.exit_status, how.stderr, how.spent = end.status, end.stderr, end.spent
        self.cpu_s += end.spent.cpu_s if end.spent else 0.0
        last = shorten(end.stderr.strip().rpartition("\n")[2])
        error = end.why or (f"exit status {end.status}" + (f": {last}" if last else "") if end.status else "")
        self._events.call_ended(request, error)

    def _left(self, request: Request) -> None:
        """Forget the call: nothing of it runs any more."""
        self._live.pop(request.id, None)
        self.progress.pop(request.id, None)


def params(served: Served, arguments: str) -> dict[str, Any]:
    """The parameters of the MCP method that serves the tool."""
    given: dict[str, Any] = json.loads(arguments)
    return given if served.method == "resources/read" else {"name": served.name, "arguments": given}


def output(served: Served) -> dict[str, Any] | None:
    return None if served.output is None else dict(served.output)

"""Tool calls between the scheduler's queue and the runner: check the limits, start, kill, account.

The scheduler calls `free` with its lock held, `run` and `kill` without the lock. The runner's thread calls
`_began` and `_ended`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Protocol

from aiosd.config.config import Config
from aiosd.errors import NotFound
from aiosd.host import identity
from aiosd.host.subuids import owner
from aiosd.syscall.request import Request
from aiosd.syscall.toolcall import ToolCall, outcome
from aiosd.tools.catalog import Tool, Tools, shorten
from aiosd.tools.manifest import Manifest, Served
from aiosd.tools.mcp.calling import Asked, Attached, News, Progress, Question, User, Withdrawn, work_folder
from aiosd.tools.mcp.listing import Listings
from aiosd.tools.mcp.sessions import Sessions
from aiosd.tools.run.runner import CALLS_MOST
from aiosd.tools.run.spawn import Bounds, Call, End, RunEvents
from aiosd.tools.run.toolrunner import ToolRunner


class CallEvents(Protocol):
    def call_began(self, request: Request) -> bool:
        """The call is about to act. Return False to stop it."""
        ...

    def call_ended(self, request: Request, error: str) -> None:
        """All processes of the call have ended."""

    def call_left(self, request: Request) -> None:
        """A call left without running, so another one may start."""

    def call_asked(self, request: Request, news: Question | Withdrawn) -> None:
        """The MCP server asks something while the call runs, or waits no more for the answer."""


class Calls:
    def __init__(
        self, config: Config, tools: Tools, runner: ToolRunner, sessions: Sessions, listings: Listings
    ) -> None:
        self._config, self._tools, self._runner = config, tools, runner
        self._sessions, self._listings = sessions, listings
        self._events: CallEvents
        self.cpu_s = 0.0  # CPU time of all calls so far
        self.progress: dict[int, str] = {}  # the progress that an MCP server reports, by request
        self._live: dict[int, Tool] = {}  # calls with processes, also cancelled ones; by request
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
        """Whether one more call of this tool may run beside the running ones."""
        ids = {request.id: self._tools.of(request.queue) for request in running}
        others = [other for other in {**ids, **self._live}.values() if other]
        if len(others) >= CALLS_MOST:
            return False
        word = tool.manifest.exclusive
        if word and any(other.manifest.exclusive == word for other in others):
            return False
        return others.count(tool) < tool.limit

    def crowding(self, tool: Tool, running: Iterable[Request]) -> set[int]:
        """Return the users who may have no more places. One user, with all lent uids, gets half of the places
        that others leave, and of a tool that is not a user's own all places but one.
        """
        of_all, of_tool = Counter[int](), Counter[int]()
        for request in running:
            if other := self._tools.of(request.queue):
                of_all[owner(request.uid)] += 1
                of_tool[owner(request.uid)] += other is tool
        total = of_all.total()
        crowd = {user for user, mine in of_all.items() if mine >= (CALLS_MOST - (total - mine)) // 2}
        if not tool.own and tool.limit > 1:
            crowd |= {user for user, mine in of_tool.items() if mine >= tool.limit - 1}
        return crowd - {0, identity.uid()}

    def run(self, request: Request) -> None:
        """Start a call. Raises AiosError."""
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
            raise NotFound(f"tool {spec.tool} was removed", "ls tools lists the tools")
        self._live[request.id] = tool
        events = RunEvents(
            partial(self._began, request), request.answer.append, partial(self._ended, request)
        )
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

    # on the runner's thread

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

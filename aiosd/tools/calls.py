"""Tool calls between the queue and the runner: whether one may start now, in what cage as whom, how it went.

The scheduler asks `free` with its lock held, and orders without; the runner tells on its own thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from aiosd.access.audit import Audit
from aiosd.config.config import Config
from aiosd.database import Store
from aiosd.errors import AiosError, NotFound
from aiosd.privilege.system import System
from aiosd.syscall.request import Request, State
from aiosd.tools.catalog import Tool, Tools, shorten
from aiosd.tools.manifest import Manifest
from aiosd.tools.mcp.listing import Listings
from aiosd.tools.mcp.sessions import Asked, Sessions, User
from aiosd.tools.run.runner import CALLS_MOST, Places
from aiosd.tools.run.spawn import Bounds, Call, End, Events

log = logging.getLogger(__name__)


class Calls:
    def __init__(
        self,
        config: Config,
        tools: Tools,
        store: Store,
        begin: Callable[[Request], bool],
        finish: Callable[[Request, State, str], bool],
        stir: Callable[[], None],
        system: System,
    ) -> None:
        """The scheduler's: `begin` is False when the request has ended, `stir` tells that there is room."""
        self.tools = tools
        self._config, self._store = config, store
        self._begin, self._finish, self._stir = begin, finish, stir
        self.pending_s = config.tools.pending_s
        self.cpu_s = 0.0  # that tools took
        self._live: dict[int, Tool] = {}  # a cancelled call is one until its processes are gone
        places = Places(store.folder / "work", Path(config.tools.credentials), Path(config.daemon.mount))
        runner = self._runner = system.tools(places)
        self.audit = Audit(store.folder / "audit.jsonl")
        self.stop, self.later, self.notify = runner.stop, runner.later, runner.notify
        self.forget, self.forget_but = runner.forget, runner.forget_but  # what tools of agents have written
        self._sessions = Sessions(runner)
        self.listings = Listings(tools, runner, self._sessions, store.folder / "mcp")
        self._sessions.changed = self.listings.changed
        self._configure(config)

    def start(self) -> None:
        self._runner.start()
        self.listings.start()

    def reload(self, config: Config, manifests: Sequence[Manifest]) -> None:
        self._config = config
        self.pending_s = config.tools.pending_s
        self.tools.install(manifests)
        self._configure(config)
        self.listings.start()

    def _configure(self, config: Config) -> None:
        sessions = self._sessions
        sessions.output_bytes, sessions.work_bytes = config.tools.output_bytes, config.tools.work_bytes
        sessions.reserve_bytes = config.limits.disk_reserve_bytes
        sessions.keep(set(config.mcp.values()))
        self.listings.configure(config.mcp)

    def kill(self, id: int) -> None:
        self._runner.kill(id)
        self._sessions.cancel(id)

    def free(self, tool: Tool, running: Iterable[Request]) -> bool:
        """Whether one more call of it may run beside those."""
        ids = {request.id: self.tools.of(request.spec.model) for request in running}
        others = [other for other in {**ids, **self._live}.values() if other]
        if len(others) >= CALLS_MOST:
            return False
        word = tool.manifest.exclusive
        if word and any(other.manifest.exclusive == word for other in others):
            return False
        return others.count(tool) < tool.limit

    def run(self, request: Request) -> None:
        try:
            self._run(request)
        except AiosError as error:
            self._left(request)
            self._finish(request, State.FAILED, error.explanation)

    def _run(self, request: Request) -> None:
        tool, config = self.tools.of(request.spec.model), self._config
        if tool is None or tool.manifest.server not in ("", *config.mcp):
            raise NotFound("its tool is gone")
        self._live[request.id] = tool
        arguments, groups = request.spec.messages[0]["content"], request.spec.groups
        events = Events(
            partial(self.tool_began, request),
            partial(self.tool_said, request),
            partial(self.tool_ended, request),
        )
        if server := config.mcp.get(tool.manifest.server):
            user = User(request.uid, groups, f"mcp-{server.name}", True)
            name = tool.name.removeprefix(f"{server.name}.")
            self._sessions.call(server, user, Asked(request.id, name, arguments, events))
            return
        bounds = Bounds(config.tools.output_bytes, config.tools.work_bytes, config.limits.disk_reserve_bytes)
        folder = str(request.agent_id) if request.agent_id else ""
        self._runner.run(
            Call(request.id, tool.manifest, arguments, request.uid, groups, folder, True, bounds, events)
        )

    # the runner's thread tells

    def tool_began(self, request: Request) -> bool:
        """It is about to act; False: it has ended meanwhile, or that cannot be stored."""
        try:
            if self._begin(request):
                self._store.start_request(request)
                return True
        except AiosError as error:
            self._finish(request, State.FAILED, error.explanation)
        self._left(request)
        self._stir()
        return False

    def tool_said(self, request: Request, data: bytes) -> None:
        request.answer.append(data)

    def tool_ended(self, request: Request, end: End) -> None:
        self._left(request)
        request.exit_status, request.stderr, request.took = end.status, end.stderr, end.spent
        self.cpu_s += end.spent.cpu_s if end.spent else 0.0
        last = shorten(end.stderr.strip().rpartition("\n")[2])
        error = end.why or (f"exit status {end.status}" + (f": {last}" if last else "") if end.status else "")
        if not self._finish(request, State.FAILED if error else State.DONE, error):
            self._stir()  # it was cancelled before, and only now there is room for another

    def _left(self, request: Request) -> None:
        """Nothing of it runs any more."""
        self._live.pop(request.id, None)

"""Tool calls between the queue and the runner: whether one may start now, in what cage as whom, how it went.

The scheduler asks `free` with its lock held, and orders without; the runner tells on its own thread.
"""

from __future__ import annotations

import logging
import os
import subprocess
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from pathlib import Path

from aiosd.agents import Agent
from aiosd.audit import Audit
from aiosd.config import Config
from aiosd.errors import AiosError, NotFound, StoreFull
from aiosd.fs.mount import is_mounted  # by /proc: a stat() would wait for this daemon, which starts
from aiosd.listing import Listings
from aiosd.manifest import Manifest
from aiosd.policy import check_owner
from aiosd.request import Request, State
from aiosd.runner import Runner
from aiosd.sandbox import Cage
from aiosd.sessions import Asked, Sessions, User
from aiosd.spawn import Call, End, Events
from aiosd.store import Store
from aiosd.tools import Tool, Tools, shorten

log = logging.getLogger(__name__)
CREDENTIAL_BYTES = 64 << 10  # at most, of each


class Calls:
    def __init__(
        self,
        config: Config,
        tools: Tools,
        store: Store,
        begin: Callable[[Request], bool],
        finish: Callable[[Request, State, str], bool],
        stir: Callable[[], None],
    ) -> None:
        """The scheduler's: `begin` is False when the request has ended, `stir` tells that there is room."""
        self.tools = tools
        self._config, self._store = config, store
        self._begin, self._finish, self._stir = begin, finish, stir
        self.pending_s = config.tools.pending_s
        self._live: dict[int, Tool] = {}  # a cancelled call is one until its processes are gone
        self._runner = Runner()
        self.audit = Audit(store.folder / "audit.jsonl")
        self._work = store.folder / "work"
        self.stop, self.later = self._runner.stop, self._runner.later
        self._sessions = Sessions(self._runner)
        self.listings = Listings(tools, self._runner, self._sessions, store.folder / "mcp")
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
        mount = Path(config.daemon.mount)
        shown = mount if is_mounted(mount) else None
        arguments, groups = request.spec.messages[0]["content"], request.spec.groups
        events = Events(
            partial(self.tool_began, request),
            partial(self.tool_said, request),
            partial(self.tool_ended, request),
        )
        if server := config.mcp.get(tool.manifest.server):
            user = User(request.uid, groups, self._folder(request, f"mcp-{server.name}"), shown)
            name = tool.name.removeprefix(f"{server.name}.")
            self._sessions.call(server, user, Asked(request.id, name, arguments, events))
            return
        work = self._folder(request, str(request.agent_id)) if request.agent_id else None
        secrets = credentials(Path(config.tools.credentials), tool.manifest.credentials)
        cage = Cage(tool.manifest, work, shown, config.tools.output_bytes, secrets)
        bounds = config.tools.work_bytes, config.limits.disk_reserve_bytes
        self._runner.run(Call(request.id, cage, arguments, request.uid, groups, *bounds, events))

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
        request.exit_status, request.stderr = end.status, end.stderr
        last = shorten(end.stderr.strip().rpartition("\n")[2])
        error = end.why or (f"exit status {end.status}" + (f": {last}" if last else "") if end.status else "")
        if not self._finish(request, State.FAILED if error else State.DONE, error):
            self._stir()  # it was cancelled before, and only now there is room for another

    def _left(self, request: Request) -> None:
        """Nothing of it runs any more."""
        self._live.pop(request.id, None)

    # work folders

    def _folder(self, request: Request, name: str) -> Path:
        """Where an agent's tools or an MCP server work, of each user who calls them his own.

        The folders above are the daemon's: who could put a link in the place of one would be given what
        it leads to. Only his group passes the one of his uid, so that a tool opens /work to nobody else.
        """
        own = self._work / str(request.uid)
        folder = own / name
        try:
            if not folder.is_dir():
                self._work.mkdir(0o711, exist_ok=True)
                own.mkdir(0o710, exist_ok=True)
                folder.mkdir(0o700)
            if os.geteuid() == 0:
                gid = request.spec.groups[0]
                os.chown(own, 0, gid, follow_symlinks=False)
                os.chown(folder, request.uid, gid, follow_symlinks=False)
        except OSError as error:
            raise StoreFull(f"{folder}: {error.strerror}", "free some space there") from None
        return folder

    def forget(self, agent: Agent) -> None:
        """In a thread of its own: there may be very much, and others wait for the lock that is held here."""
        if folders := list(self._work.glob(f"*/{agent.id}")):
            threading.Thread(target=remove, args=(folders,), name="rm", daemon=True).start()

    def forget_gone(self, agents: Collection[int]) -> None:
        """Folders of agents that a killed daemon was about to end."""
        remove(f for f in self._work.glob("*/*") if f.name.isdecimal() and int(f.name) not in agents)


def remove(folders: Iterable[Path]) -> None:
    """By rm(1): shutil's recursion ends at a thousand folders in each other, which a tool may make."""
    if names := list(folders):
        subprocess.run(["/bin/rm", "-rf", "--one-file-system", "--", *names], stderr=subprocess.DEVNULL)


def credentials(folder: Path, names: Iterable[str]) -> dict[str, bytes]:
    """Secrets by name: of the service manager (systemd.exec(5)), else of the folder. Raises NotFound."""
    given = os.environ.get("CREDENTIALS_DIRECTORY")
    found = {}
    for name in names:
        file = Path(given, name) if given and Path(given, name).exists() else folder / name
        try:
            with file.open("rb") as opened:
                status = os.fstat(opened.fileno())
                check_owner(file, status)
                if status.st_mode & 0o077:
                    raise ValueError(f"{file} may be read by others; chmod 600 it")
                found[name] = opened.read(CREDENTIAL_BYTES)
        except (OSError, ValueError) as error:
            log.error("credential %s: %s", name, error)
            raise NotFound(
                f"its credential {name} cannot be used; the log says why", f"see {folder}"
            ) from None
    return found

"""The tools of MCP servers: asked for at start, at reload and when a server says that they changed.

Only what a server tells the daemon's stand-in, an account that owns nothing, becomes everybody's tools: a
session of a user says what its user likes. What was told is kept in the state folder, so that after a restart
the tools, and calls of them that wait, are there before their servers are.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from aiosd.config.mcp import Server
from aiosd.errors import AiosError
from aiosd.host import identity
from aiosd.syscall.foreign import read_json
from aiosd.tools.catalog import Tools
from aiosd.tools.manifest import Manifest
from aiosd.tools.mcp.calling import User, work_folder
from aiosd.tools.mcp.offered import manifests
from aiosd.tools.mcp.sessions import Sessions
from aiosd.tools.run.toolrunner import ToolRunner

log = logging.getLogger(__name__)

NOBODY = 65534
RETRY_S, RETRY_MOST_S = 2.0, 300.0  # after a failure, doubled each time
# Between two listings of a server that says that it changed; doubled each time that nothing had.
RELIST_S, RELIST_MOST_S = 5.0, 3600.0
COMPLAINTS = 10  # of one listing that are logged


@dataclass(slots=True, eq=False)
class Listing:
    server: Server
    due: bool = False  # it is being asked, or will be
    again: bool = False
    failures: int = 0
    asked_s: float = field(default=-RELIST_S)
    between_s: float = RELIST_S
    told: Any = None  # the last list

    def heard(self, found: Any) -> None:
        """A server that says with every session that it changed, and did not, is asked ever more seldom."""
        same = self.told is not None and found == self.told
        self.between_s = min(RELIST_MOST_S, 2 * self.between_s) if same else RELIST_S
        self.told, self.failures = found, 0


class ListingEvents(Protocol):
    def listed(self, server: str, error: str) -> None:
        """A server has told its tools; `error` says why it has not, or is empty. On the runner's thread."""


class Listings:
    def __init__(self, tools: Tools, runner: ToolRunner, sessions: Sessions, folder: Path) -> None:
        self._tools, self._runner, self._sessions, self._folder = tools, runner, sessions, folder
        self._by_name: dict[str, Listing] = {}
        self._events: ListingEvents
        sessions.report_to(self)
        uid, gid = (NOBODY, NOBODY) if identity.is_root() else (identity.uid(), identity.gid())
        self._stand_in = partial(User, uid, (gid,))

    def configure(self, servers: Mapping[str, Server]) -> None:
        """As of now these. What is known of each is offered at once."""
        before, self._by_name = self._by_name, {}
        for name, server in servers.items():
            known = before.get(name)
            self._by_name[name] = known if known and known.server == server else Listing(server)
            self._tools.offer(name, manifests(server, self._kept(name))[0])
        for name in before.keys() - servers.keys():
            self._tools.offer(name, ())

    def report_to(self, events: ListingEvents) -> None:
        self._events = events

    def start(self) -> None:
        """Ask those that were not asked yet, and those that failed, at once."""
        for listing in self._by_name.values():
            self._runner.order(partial(self._soon, listing, 0))

    # the runner's thread

    def changed(self, server: Server) -> None:
        if (listing := self._by_name.get(server.name)) and listing.server == server:
            self._soon(listing, max(0.0, listing.asked_s + listing.between_s - time.monotonic()))

    def _soon(self, listing: Listing, after_s: float) -> None:
        if listing.due:
            listing.again = True
            return
        listing.due = True
        self._runner.later(after_s, partial(self._ask, listing))

    def _ask(self, listing: Listing) -> None:
        listing.asked_s, listing.again = time.monotonic(), False
        if self._is_wanted(listing):
            # a folder that stays: what npx and uvx fetch is there the next time
            user = self._stand_in(work_folder(listing.server), False)
            self._sessions.list(listing.server, user, partial(self._heard, listing))

    def _is_wanted(self, listing: Listing) -> bool:
        return self._by_name.get(listing.server.name) is listing

    def _heard(self, listing: Listing, found: Any, error: str) -> None:
        """Judging may take a while: not on this thread."""
        if error:
            self._judged(listing, None, None, error)
        else:
            threading.Thread(target=self._judge, args=(listing, found), name="listing", daemon=True).start()

    def _judge(self, listing: Listing, found: Any) -> None:
        try:
            made, wrong = manifests(listing.server, found)
        except Exception:  # the broad handler of this thread: what a server says is foreign
            log.exception("MCP server %s", listing.server.name)
            self._runner.order(partial(self._judged, listing, None, None, "its tools cannot be understood"))
            return
        for complaint in wrong[:COMPLAINTS]:
            log.warning("MCP server %s: %s", listing.server.name, complaint)
        self._keep(listing.server.name, found)
        self._runner.order(partial(self._judged, listing, found, made, ""))

    def _judged(self, listing: Listing, found: Any, made: list[Manifest] | None, error: str) -> None:
        name, listing.due = listing.server.name, False
        if not self._is_wanted(listing):
            return
        if made is None:
            after_s = min(RETRY_MOST_S, RETRY_S * 2**listing.failures)
            listing.failures = min(listing.failures + 1, 10)
            hint = f"see [mcp.{name}]; asked again in {after_s:g} s"
            log.warning("MCP server %s does not tell its tools: %s; %s", name, error, hint)
            self._soon(listing, after_s)
        else:
            listing.heard(found)
            self._tools.offer(name, made)
            log.info("MCP server %s has %d tools", name, len(made))
            if listing.again:
                self._soon(listing, listing.between_s)
        self._events.listed(name, error)

    # what is kept

    def _kept(self, name: str) -> Any:
        try:
            return read_json((self._folder / f"{name}.json").read_text())
        except (OSError, ValueError, AiosError):
            return []

    def _keep(self, name: str, found: object) -> None:
        file = self._folder / f"{name}.json"
        try:
            self._folder.mkdir(0o700, exist_ok=True)
            file.with_suffix(".new").write_text(json.dumps(found))
            os.replace(file.with_suffix(".new"), file)
        except OSError as error:
            log.warning("the tools of MCP server %s are not kept: %s", name, error)

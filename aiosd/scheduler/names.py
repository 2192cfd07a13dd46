"""Check whether a caller may use a model, context or tool that a request only names in its text.

The kernel checks paths. This module checks names, against the same uid, groups and modes. Who shares an
agent shares what he may use: the models and tools that its owner may use are open to all its users. A tool
still runs as its caller. Any thread may call.
"""

from __future__ import annotations

import grp
import time
from collections.abc import Iterable

from aiosd.access import permissions
from aiosd.access.caller import Caller
from aiosd.access.permissions import EXECUTE, WRITE, Permission, Permissions
from aiosd.access.rules import user_name
from aiosd.access.trust import Trust
from aiosd.context.contexts import Contexts
from aiosd.cores.models import Models, ModelState
from aiosd.errors import Denied, NotFound
from aiosd.host import identity
from aiosd.host.readable import Reader
from aiosd.scheduler.demand import Demand
from aiosd.tools.catalog import Tool, Tools

EVERYBODY = Permission(0, 0, 0o755)
OWNERS_MAX = 10_000  # whose groups are kept
GROUPS_S = 60.0  # how long the groups of an agent's owner are taken as known
REGROUPED = ("your groups decide now, but were not read when you opened the file", "open it again")


class Names:
    def __init__(
        self,
        permissions: Permissions,
        trust: Trust,
        models: Models,
        contexts: Contexts,
        tools: Tools,
        demand: Demand,
        users: int | None,
    ) -> None:
        """`users`: the group that may use the daemon's models and tools; None: everybody may."""
        self._users = users
        self._owners: dict[int, tuple[float, Caller]] = {}
        self._permissions, self._trust = permissions, trust
        self._models, self._contexts, self._tools, self._demand = models, contexts, tools, demand

    def asks_groups(self, agent: str) -> bool:
        """Whether the caller's groups may decide which models and tools the agent uses."""
        owner = self._owner(agent)
        return bool(owner and owner.uid and self._users is not None and self._users not in owner.all_groups)

    def _owner(self, agent: str) -> Caller | None:
        """Return the agent's owner, with his groups in the user database, which may have changed lately."""
        at = self._permissions.get(f"/agents/{agent}")
        if at is None:
            return None
        read_s, owner = self._owners.get(at.uid, (0.0, None))
        if owner is None or time.monotonic() - read_s > GROUPS_S:
            owner = Caller(at.uid, at.gid, 0, Reader.of(at.uid).groups)
            if len(self._owners) >= OWNERS_MAX:
                self._owners.clear()
            self._owners[at.uid] = time.monotonic(), owner
        return owner

    def forget(self, uid: int) -> None:
        """The uid is another account now, with other groups."""
        self._owners.pop(uid, None)

    def _may(self, caller: Caller, agent: str, *asked: tuple[str, Permission, int]) -> bool:
        """Whether the agent's owner or the caller has these rights: path, default and rights of each."""
        now = [(self._permissions.get(path) or default, want) for path, default, want in asked]
        owner = self._owner(agent) if agent else None
        if owner and all(permissions.may(owner, at, want) for at, want in now):
            return True
        return all(may(caller, at, want) for at, want in now)

    def check_model(self, caller: Caller, name: str, agent: str = "") -> None:
        """`agent`: the one through which the caller asks. Raises NotFound, Denied, NoRoom."""
        if not name:
            raise NotFound("no model is configured", "aiosctl model add PATH")
        model = self._models.get(name)
        own, path = (identity.uid(), identity.gid()), f"/models/{name}"
        at = Permission(*own, 0o666) if self._users is None else Permission(own[0], self._users, 0o660)
        if not self._may(caller, agent, (path, EVERYBODY, EXECUTE), (f"{path}/llm", at, WRITE)):
            raise Denied(f"you may not use model {name}", self._remedy("w on its llm"))
        if model.leaving:
            why = f"model {name} left the configuration and takes no more requests"
            raise NotFound(why, "use another one; aiosctl models shows them")
        if model.state is ModelState.FAILED:
            again = "load" if model.path.name else "pull"
            raise NotFound(f"model {name} is not loaded: {model.error}", f"echo {again} > models/{name}/ctl")
        if not model.path.name and model.pulling is not None:
            raise NotFound(f"model {name} is being pulled: {model.pulling}", "try again when that has ended")
        if not model.path.name:
            raise NotFound(f"model {name} has no folder yet", f"echo load PATH > models/{name}/ctl")
        self._demand.check(model)

    def check_context(self, caller: Caller, name: str) -> None:
        """Raises NotFound, Denied."""
        self._contexts.get(name)
        at = self._permissions.get(f"/contexts/{name}")
        if at is None or not may(caller, at, WRITE | EXECUTE):
            raise Denied(f"you may not continue context {name}", "ask its owner for wx on its folder")

    def check_tools(self, caller: Caller, names: Iterable[str], agent: str) -> None:
        for name in names:
            self.check_tool(caller, name, agent)

    def check_tool(self, caller: Caller, name: str, agent: str = "") -> Tool:
        """`agent`: the one through which the caller calls. Raises NotFound, Denied."""
        tool = self._tools.get(name)
        name = tool.name  # the caller may have given its alias
        own = identity.uid(), identity.gid()
        owner = self._permissions.get(f"/tools/{name}")
        if tool.own and owner is None:
            raise NotFound(f"tool {name} is being removed")
        at = Permission(*own, 0o777)
        if self._users is not None and not tool.own:
            at = Permission(own[0], self._users, 0o770)
        path = f"/tools/{name}"
        if not self._may(caller, agent, (path, EVERYBODY, EXECUTE), (f"{path}/call", at, EXECUTE)):
            raise Denied(f"you may not call tool {name}", self._remedy("x on its folder and call"))
        if owner and owner.uid not in (0, own[0], caller.uid, *self._trust.owners(caller.uid)):
            who = user_name(owner.uid)
            raise Denied(f"tool {name} belongs to {who} and would run as you", f"echo {who} >> access/owners")
        return tool

    def _remedy(self, right: str) -> str:
        if self._users is None:
            return f"ask its owner for {right}"
        return f"ask its owner for {right}, or the administrator for the group {group_name(self._users)}"


def group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def may(caller: Caller, permission: Permission, want: int) -> bool:
    """As permissions.may, but raise Denied if the caller's groups decide and were not read."""
    if permissions.asks_groups(caller, permission, want):
        raise Denied(*REGROUPED)
    return permissions.may(caller, permission, want)


def acting(caller: Caller) -> tuple[int, ...]:
    """Return the groups that the caller's tools run with, his gid first. Raises Denied."""
    if not caller.grouped:
        raise Denied(*REGROUPED)
    return caller.gid, *sorted(caller.groups)


def check_nice(caller: Caller, nice: int) -> None:
    """As nice(2): only root and the daemon's user may take a negative nice. Raises Denied."""
    if nice < 0 and caller.uid not in (0, identity.uid()):
        raise Denied(f"only root may use nice {nice}", "use 0 to 19")

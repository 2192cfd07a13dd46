"""Check whether a caller may use a model, context or tool that a request only names in its text.

The kernel checks paths. This module checks names, against the same uid, groups and modes. Any thread may
call.
"""

from __future__ import annotations

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
from aiosd.tools.catalog import Tool, Tools

EVERYBODY = Permission(0, 0, 0o755)
REGROUPED = ("your groups decide now, but were not read when you opened the file", "open it again")


class Names:
    def __init__(
        self, permissions: Permissions, trust: Trust, models: Models, contexts: Contexts, tools: Tools
    ) -> None:
        self._permissions, self._trust = permissions, trust
        self._models, self._contexts, self._tools = models, contexts, tools

    def check_model(self, caller: Caller, name: str) -> None:
        """Raises NotFound, Denied."""
        if not name:
            raise NotFound("no model is configured", "aiosctl model add PATH")
        model = self._models.get(name)
        at = self._permissions.get(f"/models/{name}") or EVERYBODY
        if not may(caller, at, EXECUTE):
            raise Denied(f"you may not use model {name}", "ask its owner for x on its folder")
        if model.leaving:
            why = f"model {name} left the configuration and takes no more requests"
            raise NotFound(why, "use another one; aiosctl models shows them")
        if model.state is ModelState.FAILED:
            raise NotFound(f"model {name} is not loaded: {model.error}", f"echo load > models/{name}/ctl")
        if model.state is ModelState.ABSENT:
            raise NotFound(f"model {name} is not loaded", f"echo load > models/{name}/ctl")

    def check_context(self, caller: Caller, name: str) -> None:
        """Raises NotFound, Denied."""
        self._contexts.get(name)
        at = self._permissions.get(f"/contexts/{name}")
        if at is None or not may(caller, at, WRITE | EXECUTE):
            raise Denied(f"you may not continue context {name}", "ask its owner for wx on its folder")

    def check_tools(self, caller: Caller, names: Iterable[str]) -> None:
        for name in names:
            self.check_tool(caller, name)

    def check_tool(self, caller: Caller, name: str) -> Tool:
        """Raises NotFound, Denied."""
        tool = self._tools.get(name)
        name = tool.name  # the caller may have given its alias
        own = identity.uid(), identity.gid()
        owner = self._permissions.get(f"/tools/{name}")
        if tool.own and owner is None:
            raise NotFound(f"tool {name} is being removed")
        for path, mode in ((f"/tools/{name}", 0o755), (f"/tools/{name}/call", 0o777)):
            if not may(caller, self._permissions.get(path) or Permission(*own, mode), EXECUTE):
                raise Denied(f"you may not call tool {name}", "ask its owner for x on its folder and call")
        if owner and owner.uid not in (0, own[0], caller.uid, *self._trust.owners(caller.uid)):
            who = user_name(owner.uid)
            raise Denied(f"tool {name} belongs to {who} and would run as you", f"echo {who} >> access/owners")
        return tool


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

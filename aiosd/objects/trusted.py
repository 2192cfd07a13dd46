"""People's grants: privilege groups of agents, and the owners whose tools a user lets run as himself."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from aiosd.access.audit import Audit
from aiosd.access.caller import Caller
from aiosd.access.trust import Trust
from aiosd.agents.agents import Agents
from aiosd.errors import BadValue
from aiosd.objects.making import Making

GRANTED_MAX = 500


class TrustObjects:
    def __init__(self, making: Making, trust: Trust, audit: Audit, agents: Agents) -> None:
        self._making, self._trust, self._audit, self._agents = making, trust, audit, agents

    def add_group(self, name: str, caller: Caller, mode: int = 0o700) -> None:
        path = f"/access/groups/{name}"
        with self._making.lock, self._making.permissions.made(path, caller, mode):
            self._trust.add_group(name)

    def remove_group(self, name: str) -> None:
        with self._making.lock:
            self._trust.remove_group(name)
            self._making.permissions.forget(f"/access/groups/{name}")

    def set_group(self, name: str, agents: Sequence[str], caller: Caller) -> None:
        """Replace the agents of a privilege group."""
        check_count(agents)
        ids = {self._agents.get(agent).id for agent in agents}
        self._audit.granted("group", caller, group=name, agents=sorted(set(agents)))
        self._trust.set_members(name, ids)

    def allow_owners(self, caller: Caller, owners: set[int]) -> None:
        """Replace the set of users whose tools run as the caller when he calls them."""
        check_count(owners)
        self._audit.granted("owners allowed", caller, owners=sorted(owners))
        self._trust.set_owners(caller.uid, owners)


def check_count(granted: Collection[object]) -> None:
    """Bound a grant, which is one line of the audit log. Raises BadValue."""
    if len(granted) > GRANTED_MAX:
        raise BadValue(f"more than {GRANTED_MAX} at once", "name fewer of them")

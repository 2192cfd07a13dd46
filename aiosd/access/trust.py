"""Grants of people: whose tools a user lets run as himself, and which agents are in a privilege group.

A privilege group is a set of agents, of any owners, that rules can name (aiosd.access.rules). Any thread may
call.
"""

from __future__ import annotations

import threading

from aiosd.database.store import Store
from aiosd.errors import Exists, NotFound

OWNERS, GROUP = "owners", "group"


class Trust:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._ids = {(kind, name): ids for kind, name, ids in store.grants()}

    def owners(self, uid: int) -> set[int]:
        """Return the users whose tools this user lets run as himself."""
        return self._ids.get((OWNERS, str(uid)), set())

    def set_owners(self, uid: int, owners: set[int]) -> None:
        self._set(OWNERS, str(uid), owners)

    def forget(self, uid: int) -> None:
        """Take back what this user granted, and what others granted to him."""
        with self._lock:
            self._store.remove_grant(OWNERS, str(uid))
            self._ids.pop((OWNERS, str(uid)), None)
            granted = [(key, ids) for key, ids in self._ids.items() if key[0] == OWNERS and uid in ids]
        for key, ids in granted:
            self._set(*key, ids - {uid})

    def groups(self) -> list[str]:
        return [name for kind, name in list(self._ids) if kind == GROUP]

    def add_group(self, name: str) -> None:
        if (GROUP, name) in self._ids:
            raise Exists(f"group {name} exists")
        self._set(GROUP, name, set())

    def remove_group(self, name: str) -> None:
        with self._lock:
            self._store.remove_grant(GROUP, name)
            self._ids.pop((GROUP, name), None)

    def members(self, name: str) -> set[int]:
        """Return the ids of a group's agents. Raises NotFound."""
        try:
            return self._ids[GROUP, name]
        except KeyError:
            raise NotFound(f"no privilege group {name}") from None

    def set_members(self, name: str, agents: set[int]) -> None:
        self.members(name)
        self._set(GROUP, name, agents)

    def groups_of(self, agent: int) -> list[str]:
        """Return the groups of an agent, by its id, which no later agent of its name has."""
        return [name for (kind, name), ids in list(self._ids.items()) if kind == GROUP and agent in ids]

    def _set(self, kind: str, name: str, ids: set[int]) -> None:
        with self._lock:
            self._store.save_grant(kind, name, ids)
            self._ids[kind, name] = ids

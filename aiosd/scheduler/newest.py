"""What a fresh open of a transaction file reads: the newest request, or why a later one was refused.

The newest request of an agent's file is the same for all its users. A model's or tool's file has one for each
user. A refusal is told to the user who was refused, until that file has a newer request. Any thread may call.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any, NamedTuple

from aiosd.agents.agents import Agent
from aiosd.database.store import Store
from aiosd.errors import AiosError
from aiosd.scheduler.handler import Source

FILES, USERS = 32, 1000  # refusals that are kept: files of each user, and users

Key = tuple[int, str, int | None]  # id of the agent or 0, path, uid or None


class RefusedWrite(NamedTuple):
    error: AiosError
    newest: int | None  # the newest request of the file at that time


class Newest:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._ids: dict[Key, int] = {}
        self._refused = OrderedDict[int, OrderedDict[Key, RefusedWrite]]()  # by user

    def came(self, source: Source, uid: int, id: int) -> None:
        """Note a request that entered the queue."""
        key = _key(source, uid)
        with self._lock:
            self._ids[key] = max(id, self._ids.get(key, 0))

    def refuse(self, source: Source, uid: int, error: AiosError) -> None:
        """Note that what the user wrote became no request."""
        refused = RefusedWrite(error.again(), self.of(source, uid))
        with self._lock:
            files = self._refused.setdefault(uid, OrderedDict())
            files[_key(source, uid)] = refused
            _bound(files, _key(source, uid), FILES)
            _bound(self._refused, uid, USERS)

    def of(self, source: Source, uid: int) -> int | None:
        key = _key(source, uid)
        with self._lock:
            known = self._ids.get(key)
        return known if known is not None else self._store.newest(*key)

    def refusal(self, source: Source, uid: int) -> AiosError | None:
        """Return why this user's last request was refused, if the file has no newer one."""
        with self._lock:
            files = self._refused.get(uid)
            found = files.get(_key(source, uid)) if files else None
        return found.error.again() if found and found.newest == self.of(source, uid) else None

    def forget(self, agent: Agent) -> None:
        with self._lock:
            self._ids = {key: id for key, id in self._ids.items() if key[0] != agent.id}

    def disown(self, uid: int) -> None:
        with self._lock:
            self._ids = {key: id for key, id in self._ids.items() if key[2] != uid}
            self._refused.pop(uid, None)


def _key(source: Source, uid: int) -> Key:
    return (source.agent.id, source.file, None) if source.agent else (0, source.file, uid)


def _bound(kept: OrderedDict[Any, Any], latest: object, most: int) -> None:
    kept.move_to_end(latest)
    if len(kept) > most:
        kept.popitem(last=False)

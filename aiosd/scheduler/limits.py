"""What users and agents may have, and the refusal of more, at the call that asks for it.

[quota] and its tables give the bounds: a user's own table decides, else the most generous of the tables of
his groups, else [quota] itself. An agent's table bounds the agent besides. Any thread may ask; Buckets are
guarded by the scheduler's lock.
"""

from __future__ import annotations

import grp
import math
import pwd
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from typing import Any

from aiosd.access.caller import Caller
from aiosd.config.config import UNBOUNDED, Config, Quota
from aiosd.database.store import Store
from aiosd.errors import Busy, ShuttingDown, StoreFull
from aiosd.scheduler.queue import Queue, add

RATES = ("running_requests", "tokens_per_minute")  # 0 means that there is no bound
LATER = "try again when some are done"


class Limits:
    def __init__(self, config: Config, store: Store, queue: Queue, lock: threading.RLock) -> None:
        """`lock` guards the queue."""
        self._store, self._queue, self._lock = store, queue, lock
        self.draining = False  # the daemon is about to stop
        self.reload(config)

    def reload(self, config: Config) -> None:
        self._limits, self.quotas = config.limits, Quotas(config)

    @property
    def request_bytes(self) -> int:
        return self._limits.request_bytes

    def check_open(self) -> None:
        """Of a request that is begun now; one whose first write was taken is stored, and runs after the next
        start. Raises ShuttingDown."""
        if self.draining:
            raise ShuttingDown("the daemon is stopping", "write it again when it is back")

    def check_room(self, caller: Caller, agent: str, size: int = 0) -> None:
        """Whether a user may enqueue one more, of so many bytes on disk; in memory they are reserved. Raises
        Busy, StoreFull."""
        limits, quota, own = self._limits, self.quotas.of(caller), self.quotas.of_agent(agent)
        if len(self._queue) >= limits.queued_requests:
            raise Busy(f"{len(self._queue)} requests wait", LATER)
        if (waiting := self._queue.per_user.get(caller.uid, 0)) >= quota.queued_requests:
            raise Busy(f"{waiting} requests of yours wait", LATER)
        if (waiting := self._queue.per_agent.get(agent, 0)) >= own.get("queued_requests", UNBOUNDED):
            raise Busy(f"{waiting} requests of agent {agent} wait", LATER)
        self._check_rate(caller.uid, quota.tokens_per_minute, "you have")
        self._check_rate(agent, own.get("tokens_per_minute", UNBOUNDED), f"agent {agent} has")
        self.check_disk(size)

    def check_disk(self, size: int) -> None:
        """Raises StoreFull when so many bytes more would leave less than the reserve."""
        if self._store.free_bytes() < self._limits.disk_reserve_bytes + size:
            raise StoreFull(f"{self._store.folder}: the disk is full", "free some space there")

    def _check_rate(self, who: int | str, per_minute: int, said: str) -> None:
        buckets = self._queue.ledger.buckets
        if per_minute >= UNBOUNDED:
            buckets.forget(who)
            return
        with self._lock:
            left = buckets.left(who, per_minute, time.monotonic())
        if left <= 0:
            wait_s = math.ceil((1 - left) * 60 / per_minute) if per_minute else 60
            raise Busy(f"{said} used the {per_minute} tokens of this minute", f"try again in {wait_s} s")

    def reserve(self, caller: Caller, size: int) -> None:
        """Bytes of a request being written; negative gives them back. Raises Busy."""
        most = self.quotas.of(caller).pending_bytes
        with self._lock:
            if size > 0 and self._queue.pending_bytes.get(caller.uid, 0) + size > most:
                raise Busy("the requests you write or have waiting take too many bytes", LATER)
            add(self._queue.pending_bytes, caller.uid, size)


class Quotas:
    def __init__(self, config: Config) -> None:
        self._default = config.quota
        self._by_uid = self._numbers(config, "user", lambda name: pwd.getpwnam(name).pw_uid)
        self._by_gid = self._numbers(config, "group", lambda name: grp.getgrnam(name).gr_gid)
        self._of = lru_cache(1024)(self._made)  # asked several times a request
        self._by_agent = {
            name: {key: bound(key, value) for key, value in table.items()}
            for (kind, name), table in config.quotas.items()
            if kind == "agent"
        }
        self.asks_groups = bool(self._by_gid)

    @staticmethod
    def _numbers(config: Config, wanted: str, number: Callable[[str], int]) -> dict[int, Any]:
        """Names of users and groups as ids, once: asking for a name may take a network."""
        found = {}
        for (kind, name), table in config.quotas.items():
            if kind == wanted:
                with suppress(KeyError):  # nobody of that name here
                    found[int(name) if name.isdecimal() else number(name)] = table
        return found

    def of(self, caller: Caller) -> Quota:
        """Zeros that mean no bound are a large number here."""
        return self._of(caller.uid, caller.groups | {caller.gid} if self._by_gid else frozenset())

    def _made(self, uid: int, groups: frozenset[int]) -> Quota:
        tables = [self._by_gid[g] for g in groups if g in self._by_gid]
        chosen: dict[str, int] = {}
        for table in tables:
            for key, value in table.items():
                chosen[key] = max(chosen.get(key, 0), bound(key, value))
        chosen |= self._by_uid.get(uid, {})
        quota = replace(self._default, **chosen)
        return replace(quota, **{key: bound(key, getattr(quota, key)) for key in RATES})

    def running(self, caller: Caller, agent: str) -> tuple[int, int]:
        """How many requests of the user, and of the agent, may run at once."""
        return self.of(caller).running_requests, self.of_agent(agent).get("running_requests", UNBOUNDED)

    def of_agent(self, name: str) -> dict[str, int]:
        return self._by_agent.get(name, {})


def bound(key: str, value: int) -> int:
    return UNBOUNDED if key in RATES and value == 0 else value

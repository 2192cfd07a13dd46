"""Limits of users and agents: refuse a system call that asks for more.

[quota] and its tables give the bounds. A user is one with all lent uids (aiosd.host.subuids). A user's own
table decides; without one the most generous table of his groups; without these [quota] itself. An agent's
table limits the agent in addition. Any thread may call; the scheduler's lock guards the buckets.
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
from aiosd.access.rules import user_name
from aiosd.config.config import UNBOUNDED, Config, Quota
from aiosd.database.store import Store
from aiosd.errors import Busy, ShuttingDown, StoreFull
from aiosd.host import identity
from aiosd.host.readable import Reader
from aiosd.host.subuids import owner
from aiosd.scheduler.queue import Queue, add

RATES = ("running_requests", "tokens_per_minute", "writing_ms_per_minute")  # 0 means no bound
LATER = "try again when some have ended"


class Limits:
    def __init__(self, config: Config, store: Store, queue: Queue, lock: threading.RLock) -> None:
        """`lock` guards the queue."""
        self._store, self._queue, self._lock = store, queue, lock
        self.draining = False  # the daemon is about to stop
        self.reload(config)

    def reload(self, config: Config) -> None:
        self._config, self._limits, self.quotas = config, config.limits, Quotas(config)

    def forget(self, uid: int) -> None:
        """The uid is another account now: it has used nothing, and quotas by name may be another's."""
        with self._lock:
            self._queue.ledger.forget(uid)
        self.quotas = Quotas(self._config)

    @property
    def request_bytes(self) -> int:
        return self._limits.request_bytes

    def check_open(self) -> None:
        """Refuse a new request while the daemon drains: raises ShuttingDown.

        A request whose first write was accepted is stored, and runs after the restart.
        """
        if self.draining:
            raise ShuttingDown("the daemon is stopping", "write the request again after the restart")

    def check_room(self, caller: Caller, agent: str, size: int = 0) -> None:
        """Refuse a request if the queue, or the disk with `size` bytes more, is full. Raises Busy, StoreFull.

        `reserve` counts the bytes in memory.
        """
        limits, quota, own = self._limits, self.quotas.of(caller), self.quotas.of_agent(agent)
        if len(self._queue) >= limits.queued_requests:
            raise Busy(f"{len(self._queue)} requests wait", LATER)
        self._check_share(caller)
        if (waiting := self._queue.per_user.get(owner(caller.uid), 0)) >= quota.queued_requests:
            raise Busy(f"{waiting} requests of yours wait", LATER)
        if (waiting := self._queue.per_agent.get(agent, 0)) >= own.get("queued_requests", UNBOUNDED):
            raise Busy(f"{waiting} requests of agent {agent} wait", LATER)
        self._check_rate(owner(caller.uid), quota.tokens_per_minute, "you have")
        self._check_rate(agent, own.get("tokens_per_minute", UNBOUNDED), f"agent {agent} has")
        self.check_disk(size)

    def bar(self, uid: int, agent: str) -> str:
        """Say whose quota of requests is 0: such a user or agent may have none. Empty: neither's."""
        groups = Reader.of(uid).groups if self.quotas.asks_groups else frozenset[int]()
        if self.quotas.of(Caller(uid, -1, 0, groups)).queued_requests == 0:
            return f"user {user_name(uid)}"
        return f"agent {agent}" if self.quotas.of_agent(agent).get("queued_requests") == 0 else ""

    def _check_share(self, caller: Caller) -> None:
        """Keep places of the queue for others: one person, with all uids that are lent to him, gets half of
        what others leave. So there is a place for each user who comes. Raises Busy."""
        mine = self._queue.per_user.get(owner(caller.uid), 0)
        left = self._limits.queued_requests - (len(self._queue) - mine)
        if mine >= math.ceil(left / 2) and caller.uid not in (0, identity.uid()):
            words = f"you have {mine} of the {self._limits.queued_requests} places in the queue"
            raise Busy(f"{words}, and the others are kept for other users", LATER)

    def check_disk(self, size: int) -> None:
        """Raise StoreFull if `size` more bytes would leave less than the reserve."""
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
        """Count bytes of a request that is being written; a negative size gives them back. Raises Busy."""
        most = self.quotas.of(caller).pending_bytes
        with self._lock:
            person, pending = owner(caller.uid), self._queue.pending_bytes
            mine = pending.get(person, 0)
            if size > 0:
                left = self._limits.pending_bytes - (pending.total() - mine)
                if mine + size > min(most, left // 2):
                    raise Busy("your waiting and half-written requests take too many bytes", LATER)
            add(pending, person, size)

    def overdrawn(self, uid: int) -> bool:
        """Whether a user's unfinished requests, with their answers so far, take more bytes than they may."""
        groups = Reader.of(uid).groups if self.quotas.asks_groups else frozenset[int]()
        most = self.quotas.of(Caller(uid, -1, 0, groups)).pending_bytes
        with self._lock:
            return self._queue.pending_bytes.get(owner(uid), 0) > most


class Quotas:
    def __init__(self, config: Config) -> None:
        self._default = config.quota
        self._by_uid = self._numbers(config, "user", lambda name: pwd.getpwnam(name).pw_uid)
        self._by_gid = self._numbers(config, "group", lambda name: grp.getgrnam(name).gr_gid)
        self._of = lru_cache(1024)(self._made)  # each request asks several times
        self._by_agent = {
            name: {key: bound(key, value) for key, value in table.items()}
            for (kind, name), table in config.quotas.items()
            if kind == "agent"
        }
        self.asks_groups = bool(self._by_gid)

    @staticmethod
    def _numbers(config: Config, wanted: str, number: Callable[[str], int]) -> dict[int, Any]:
        """Look up the ids of users and groups once: a name service may be across a network."""
        found = {}
        for (kind, name), table in config.quotas.items():
            if kind == wanted:
                with suppress(KeyError):  # this machine has nobody of that name
                    found[int(name) if name.isdecimal() else number(name)] = table
        return found

    def of(self, caller: Caller) -> Quota:
        """Return the caller's quota. Where 0 means no bound, it holds UNBOUNDED instead."""
        return self._of(caller.uid, caller.groups | {caller.gid} if self._by_gid else frozenset())

    def _made(self, uid: int, groups: frozenset[int]) -> Quota:
        tables = [self._by_gid[g] for g in groups if g in self._by_gid]
        chosen: dict[str, int] = {}
        for table in tables:
            for key, value in table.items():
                chosen[key] = max(chosen.get(key, 0), bound(key, value))
        chosen |= self._by_uid.get(uid) or self._by_uid.get(owner(uid), {})
        quota = replace(self._default, **chosen)
        return replace(quota, **{key: bound(key, getattr(quota, key)) for key in RATES})

    def running(self, caller: Caller, agent: str) -> tuple[int, int]:
        """Return how many requests of the user, and of the agent, may run at once."""
        return self.of(caller).running_requests, self.of_agent(agent).get("running_requests", UNBOUNDED)

    def of_agent(self, name: str) -> dict[str, int]:
        return self._by_agent.get(name, {})


def bound(key: str, value: int) -> int:
    return UNBOUNDED if key in RATES and value == 0 else value

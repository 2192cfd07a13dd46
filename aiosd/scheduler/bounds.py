"""What is too much, refused at the call that asks for it. Any thread may ask."""

from __future__ import annotations

import math
import threading
import time

from aiosd.access.caller import Caller
from aiosd.config.config import Config
from aiosd.database import Store
from aiosd.errors import Busy, ShuttingDown, StoreFull
from aiosd.scheduler.queue import Queue, add
from aiosd.scheduler.quota import UNBOUNDED, Quotas

LATER = "try again when some are done"


class Bounds:
    def __init__(self, config: Config, store: Store, queue: Queue, lock: threading.RLock) -> None:
        """`lock` guards the queue."""
        self._store, self._queue, self._lock = store, queue, lock
        self.draining = False  # the daemon is about to stop
        self.reload(config)

    def reload(self, config: Config) -> None:
        self._limits, self.quotas = config.limits, Quotas(config)

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

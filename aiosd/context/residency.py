"""Move each conversation's KV between the workers and Swap, and know where it is.

Mechanism only: the eviction policy chooses the victims, in the worker and in Swap. Lost KV is recomputed, so
a lost message costs time and never a token. Any thread may call.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable
from concurrent.futures import Future, wait

from aiosd.context.contexts import Context, Contexts
from aiosd.context.swap import Swap
from aiosd.cores import wire
from aiosd.cores.pool import Pool, Worker

log = logging.getLogger(__name__)

LEAVE_S = 5.0  # for the KV of all conversations of a worker that ends


class Residency:
    def __init__(self, pool: Pool, contexts: Contexts, swap: Swap) -> None:
        self._pool, self._contexts, self.swap = pool, contexts, swap
        self._lock = threading.Lock()
        self._asked: dict[tuple[int, int], list[Future[int | None]]] = {}  # by worker and context

    def state(self, context: Context) -> str:
        return self.swap.tier(context.id) if context.worker is None else "resident"

    def bytes(self, context: Context) -> int:
        worker = self._pool.find(context.worker)
        resident = context.tokens * int(worker.model.info.get("kv_bytes_per_token", 0)) if worker else 0
        return resident + self.swap.bytes(context.id)

    def prepare(self, context: Context, worker: Worker, owner: str) -> None:
        """Bring the KV from Swap to a worker before a turn starts there, and drop it on any other worker."""
        if context.worker == worker.id:
            return
        self._order(context, wire.Keep(context.id, "drop"))
        context.worker = None
        if taken := self.swap.take(context.id):
            file, checked = taken
            self._pool.send(worker, wire.Restore(context.id, owner, not checked), file)
            os.close(file)

    def came(self, context: Context, worker: Worker) -> None:
        """Note that the worker holds the KV now."""
        context.worker = worker.id
        if context.pinned:
            self._pool.send(worker, wire.Keep(context.id, "pin"))

    def pin(self, context: Context) -> None:
        """Tell the worker that the context was pinned or unpinned."""
        self._order(context, wire.Keep(context.id, "pin" if context.pinned else "unpin"))

    def fork(self, context: Context, to: Context) -> None:
        """Let a forked context share the KV, without a copy."""
        if self._pool.find(context.worker):
            self._order(context, wire.Fork(context.id, to.id))
            to.worker = context.worker
        else:
            self.swap.share(context.id, to.id)

    def drop(self, context: Context) -> None:
        """Drop the KV everywhere."""
        self._order(context, wire.Keep(context.id, "drop"))
        context.worker = None
        self.swap.drop(context.id)

    def save(self, context: Context, worker: Worker | None, evict: bool = False) -> Future[int | None]:
        """Ask the worker for the KV. The result is a file for the caller to close, or None if there is no KV.

        With `evict` the KV moves to Swap, and the result is None.
        """
        done: Future[int | None] = Future()
        if worker is None:
            done.set_result(None)
            return done
        with self._lock:
            self._asked.setdefault((worker.id, context.id), []).append(done)
        self._pool.send(worker, wire.Save(context.id, evict))
        if self._pool.find(worker.id) is not worker:  # it died before it got the message
            self._answered(worker, context.id)
        return done

    def leave(self, workers: Iterable[Worker]) -> None:
        """Move the KV of all conversations to Swap, from workers that end soon."""
        by_id: dict[int | None, Worker] = {worker.id: worker for worker in workers}
        there = [(context, by_id.get(context.worker)) for context in self._contexts.with_loops()]
        wait([self.save(context, worker, evict=True) for context, worker in there if worker], LEAVE_S)

    def said(self, worker: Worker, message: wire.Saved | wire.NotSaved | wire.Restored) -> None:
        context = self._contexts.by_id(message.context)
        match message:
            case wire.Saved():
                file = worker.channel.take_file() if worker.channel else None
                if message.evicted:
                    self._evicted(worker, context, file)
                    file = None
                self._answered(worker, message.context, file)
                if file is not None:
                    os.close(file)
            case wire.NotSaved():
                if context is not None and context.worker == worker.id:
                    context.worker = None
                self._answered(worker, message.context)
            case wire.Restored(error=error) if error:
                log.warning("KV of context %d was not restored: %s", message.context, error)
                self.swap.drop(message.context)
            case wire.Restored():
                if context is not None:
                    self.came(context, worker)
                self.swap.release(message.context)

    def worker_died(self, worker: Worker) -> None:
        for context in self._contexts.with_loops():
            if context.worker == worker.id:
                context.worker = None
        with self._lock:
            lost = [id for asked, id in self._asked if asked == worker.id]
        for id in lost:
            self._answered(worker, id)

    def _evicted(self, worker: Worker, context: Context | None, file: int | None) -> None:
        if context is not None and context.worker == worker.id:
            context.worker = None
        if context is not None and file is not None:
            self.swap.put(context.id, file, checked=not context.salt)
            if self._contexts.by_id(context.id) is None:  # removed meanwhile
                self.swap.drop(context.id)
        elif file is not None:
            os.close(file)

    def _answered(self, worker: Worker, context: int, file: int | None = None) -> None:
        with self._lock:
            waiting = self._asked.pop((worker.id, context), [])
        for done in waiting:
            done.set_result(None if file is None else os.dup(file))

    def _order(self, context: Context, message: wire.Message) -> None:
        if worker := self._pool.find(context.worker):
            self._pool.send(worker, message)

"""The queue: which accepted requests wait, which of them may start, which run. No policy, no I/O.

Requests of one context are turns of one conversation: only the oldest unfinished one may start. Every
method is called with the scheduler's lock held.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator
from itertools import chain

from aiosd.ledger import Ledger
from aiosd.policies import Job
from aiosd.request import Request, State


class Queue:
    def __init__(self) -> None:
        self.waiting: dict[int, Request] = {}
        self.running: dict[int, Request] = {}
        self.per_user: Counter[int] = Counter()  # unfinished requests
        self.pending_bytes: Counter[int] = Counter()  # by user: requests being written or unfinished
        self.ledger = Ledger()
        self._ready: dict[str, dict[int, Job]] = {}  # by model: those that may start now
        self._turns: dict[str, deque[Request]] = {}  # by context: unfinished requests, oldest first
        self._held: set[int] = set()  # paused agents, by id

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    def __iter__(self) -> Iterator[Request]:
        return chain(self.running.values(), self.waiting.values())

    def get(self, id: int) -> Request | None:
        return self.running.get(id) or self.waiting.get(id)

    def ready(self, model: str) -> dict[int, Job]:
        return self._ready.setdefault(model, {})

    def add(self, request: Request, startable: bool = True) -> None:
        self.ledger.arrive(request, self.per_user, time.monotonic())
        self.per_user[request.uid] += 1
        self.waiting[request.id] = request
        if request.spec.context:
            self._turns.setdefault(request.spec.context, deque()).append(request)
        if startable:
            self._refresh(request)

    def wait(self, request: Request) -> None:
        """Preempted, or its worker died: it queues again with the tokens it has."""
        del self.running[request.id]
        request.queued_s = time.monotonic()
        self.waiting[request.id] = request
        self._refresh(request)

    def start(self, request: Request, worker: int) -> None:
        del self.waiting[request.id]
        self.ready(request.spec.model).pop(request.id)
        self.running[request.id] = request
        request.worker, request.slice_start = worker, len(request.tokens)
        request.state = State.RUNNING
        request.worker_visits += 1
        request.computing = False

    def remove(self, request: Request) -> bool:
        """False when it had ended before: every request ends once. `end_turn` is to follow."""
        known = self.running.pop(request.id, None) or self.waiting.pop(request.id, None)
        if known is None:
            return False
        self.ready(request.spec.model).pop(request.id, None)
        self.ledger.leave(request, time.monotonic())
        self.per_user[request.uid] -= 1
        if not self.per_user[request.uid]:
            del self.per_user[request.uid]
        self.pending_bytes[request.uid] -= request.size_bytes
        if self.pending_bytes[request.uid] <= 0:
            del self.pending_bytes[request.uid]
        return True

    def hold(self, agent_id: int, held: bool) -> None:
        """A held agent's requests wait; those that run go on to their end."""
        (self._held.add if held else self._held.discard)(agent_id)
        for request in self.waiting.values():
            if request.agent_id == agent_id:
                self._refresh(request)

    def end_turn(self, request: Request) -> None:
        """Lets the next request of the same context start."""
        turns = self._turns.get(request.spec.context)
        if turns is None:
            return
        turns.remove(request)
        if not turns:
            del self._turns[request.spec.context]
        elif turns[0].id in self.waiting:
            self._refresh(turns[0])

    def turn(self, context: str) -> Request | None:
        turns = self._turns.get(context)
        return turns[0] if turns else None

    def _refresh(self, request: Request) -> None:
        turns = self._turns.get(request.spec.context)
        first = turns is None or turns[0] is request
        if first and request.agent_id not in self._held:
            self.ready(request.spec.model)[request.id] = view(request)
        else:
            self.ready(request.spec.model).pop(request.id, None)


def view(request: Request) -> Job:
    return Job(
        id=request.id,
        uid=request.uid,
        agent=request.agent,
        nice=request.spec.nice,
        queued_s=request.queued_s,
        served_tokens=len(request.tokens),
        slice_tokens=request.slice_tokens,
        deadline_s=request.deadline,
    )

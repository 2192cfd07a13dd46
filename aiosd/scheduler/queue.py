"""The queue: which accepted requests wait, which may start, which run. No policy, no I/O.

Requests of one context are turns of one conversation: only the oldest unfinished one may start. The caller
holds the scheduler's lock.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Set
from itertools import chain, islice
from typing import TypeVar

from aiosd.host.subuids import owner
from aiosd.policies import Job
from aiosd.scheduler.ledger import Ledger
from aiosd.syscall.request import Request, State

Order = Callable[[list[Job], int], list[Job]]
RANKED = 512  # of a long queue, the best jobs are kept in the policy's order
SHOWN = 32  # a decision looks at so many of the ranked and of the newest jobs
OLD_S = 0.1  # how long a ranking is used at least


class ReadyJobs:
    """The jobs of one model or tool that may start now, and the subset that the policy looks at.

    Ranking 10,000 jobs takes milliseconds. So the best jobs of a recent ranking compete with the jobs that
    came since. The ranking is made again when it is used up or old.
    """

    def __init__(self) -> None:
        self.jobs: dict[int, Job] = {}
        self._best: dict[int, Job] = {}
        self._new: dict[int, Job] = {}
        self._old_s = 0.0

    def add(self, job: Job) -> None:
        self.jobs[job.id] = self._new[job.id] = job
        self._best.pop(job.id, None)

    def pop(self, id: int) -> None:
        for jobs in (self.jobs, self._best, self._new):
            jobs.pop(id, None)

    def shown(self, now: float, held: Set[int | str], order: Order) -> list[Job]:
        """Return the jobs that the policy looks at. `order` ranks them, as the policy says.

        `held`: users and agents that have as many running requests as allowed.
        """
        if len(self.jobs) <= 2 * SHOWN:
            return free(self.jobs.values(), held)
        if now > self._old_s or len(self._new) > SHOWN or not (self._best or self._new):
            began = time.monotonic()
            jobs = free(self.jobs.values(), held)
            self._best, self._new = {job.id: job for job in order(jobs, RANKED)}, {}
            self._old_s = now + max(OLD_S, 20 * (time.monotonic() - began))
        best = islice((job for job in self._best.values() if not {job.uid, job.agent} & held), SHOWN)
        return free(chain(best, self._new.values()), held)


def free(jobs: Iterable[Job], held: Collection[int | str]) -> list[Job]:
    if not held:
        return list(jobs)
    return [job for job in jobs if job.uid not in held and job.agent not in held]


class Queue:
    def __init__(self) -> None:
        self.waiting: dict[int, Request] = {}
        self.running: dict[int, Request] = {}
        # a user is one with all uids that are lent to him
        self.per_user: Counter[int] = Counter()  # unfinished requests
        self.pending_bytes: Counter[int] = Counter()  # by user: of half-written and unfinished requests
        self.ledger = Ledger()
        self.per_agent: Counter[str] = Counter()
        self.running_of: Counter[int | str] = Counter()  # running requests, by user and by agent
        self.held_back: set[int | str] = set()  # users and agents with as many as allowed
        self._ready: dict[str, ReadyJobs] = {}  # by model or tool
        self._of_agents: dict[int, dict[int, Request]] = {}  # unfinished requests, by agent
        self._turns: dict[int, deque[Request]] = {}  # by context: unfinished requests, oldest first
        self._held: set[int] = set()  # paused agents, by id

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    def __iter__(self) -> Iterator[Request]:
        return chain(self.running.values(), self.waiting.values())

    def get(self, id: int) -> Request | None:
        return self.running.get(id) or self.waiting.get(id)

    def of_agent(self, agent_id: int) -> list[Request]:
        return list(self._of_agents.get(agent_id, {}).values())

    def ready(self, model: str) -> ReadyJobs:
        ready = self._ready.get(model)
        if ready is None:
            ready = self._ready[model] = ReadyJobs()
        return ready

    def add(self, request: Request, startable: bool = True) -> None:
        self.ledger.arrive(request, time.monotonic())
        self.per_user[owner(request.uid)] += 1
        self.per_agent[request.agent] += 1
        self._of_agents.setdefault(request.agent_id, {})[request.id] = request
        self.waiting[request.id] = request
        if request.spec.turn_of:
            self._turns.setdefault(request.spec.turn_of, deque()).append(request)
        if startable:
            self.refresh(request)

    def wait(self, request: Request) -> None:
        """Let a running request wait again, with its tokens: it was preempted, or its worker died."""
        del self.running[request.id]
        self._count_running(request, -1)
        request.queued_s = time.monotonic()
        self.waiting[request.id] = request
        self.refresh(request)

    def queues(self) -> list[str]:
        """Return the models and tools that have a request which may start."""
        return [name for name, ready in self._ready.items() if ready.jobs]

    def start(self, request: Request, worker: int | None) -> None:
        del self.waiting[request.id]
        self.ready(request.queue).pop(request.id)
        self.running[request.id] = request
        self._count_running(request, 1)
        request.worker, request.slice_start = worker, len(request.tokens)
        request.state = State.RUNNING
        request.worker_visits += 1
        request.computing = False

    def remove(self, request: Request) -> bool:
        """Remove a request that ends. False: it had ended already. The caller calls `end_turn` later."""
        if self.running.pop(request.id, None):
            self._count_running(request, -1)
        elif self.waiting.pop(request.id, None) is None:
            return False
        self.ready(request.queue).pop(request.id)
        self.ledger.leave(request, time.monotonic())
        add(self.per_user, owner(request.uid), -1)
        add(self.per_agent, request.agent, -1)
        same = self._of_agents[request.agent_id]
        del same[request.id]
        if not same:
            del self._of_agents[request.agent_id]
        add(self.pending_bytes, owner(request.uid), -request.size_bytes)
        return True

    def _count_running(self, request: Request, change: int) -> None:
        if not request.spec.computes:  # a loop: only its steps count
            return
        both: tuple[int | str, int | str] = (owner(request.uid), request.agent)
        for who, most in zip(both, request.running_most, strict=True):
            full = add(self.running_of, who, change) >= most and who != ""
            (self.held_back.add if full else self.held_back.discard)(who)

    def hold(self, agent_id: int, held: bool) -> None:
        """Hold or release an agent: its waiting requests do not start; its running ones go on."""
        (self._held.add if held else self._held.discard)(agent_id)
        for request in self.of_agent(agent_id):
            if request.id in self.waiting:
                self.refresh(request)

    def end_turn(self, request: Request) -> None:
        """Let the next request of the same context start."""
        turns = self._turns.get(request.spec.turn_of)
        if turns is None:
            return
        turns.remove(request)
        if not turns:
            del self._turns[request.spec.turn_of]
        elif turns[0].id in self.waiting:
            self.refresh(turns[0])

    def turn(self, context: int) -> Request | None:
        turns = self._turns.get(context)
        return turns[0] if turns else None

    def refresh(self, request: Request) -> None:
        turns = self._turns.get(request.spec.turn_of)
        first = turns is None or turns[0] is request
        if first and request.agent_id not in self._held and request.decide_by_s is None:
            self.ready(request.queue).add(view(request))
        else:
            self.ready(request.queue).pop(request.id)


Key = TypeVar("Key")


def add(counts: Counter[Key], key: Key, change: int) -> int:
    """Change a count and return it. A count of zero or less is removed."""
    now = counts.get(key, 0) + change
    if now > 0:
        counts[key] = now
    else:
        counts.pop(key, None)
    return now


def view(request: Request) -> Job:
    return Job(
        id=request.id,
        uid=owner(request.uid),
        agent=request.agent,
        nice=request.spec.nice,
        queued_s=request.queued_s,
        served_tokens=len(request.tokens),
        slice_tokens=request.slice_tokens,
        deadline_s=request.deadline,
    )

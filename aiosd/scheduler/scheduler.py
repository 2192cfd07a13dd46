"""The scheduler: give waiting requests to workers and tools, in the order of the policy.

Mechanism only. One lock guards the queue. A thread changes the queue inside `deciding()`, which then decides
what starts and sends the orders. No thread uses the store or a socket with the lock held.

Large: the questions about the queue need its lock, and so they stand beside the decisions.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Protocol

from aiosd.agents.agents import Agent
from aiosd.cores import wire
from aiosd.cores.models import Model, Models, ModelState
from aiosd.cores.pool import Pool, Worker
from aiosd.host.message_ids import about
from aiosd.policies import Job, View
from aiosd.policies.placement import Seat, place
from aiosd.scheduler.chooser import Chooser
from aiosd.scheduler.dispatch import Dispatch
from aiosd.scheduler.forecast import Forecast
from aiosd.scheduler.handler import Handler
from aiosd.scheduler.orders import Orders
from aiosd.scheduler.queue import Queue, view
from aiosd.scheduler.trace import Span, Trace
from aiosd.syscall.request import Request, State
from aiosd.syscall.toolcall import QUEUE

log = logging.getLogger(__name__)


class Finisher(Protocol):
    def finish(self, request: Request, state: State, error: str = "", code: str = "") -> bool: ...


class Scheduler:
    def __init__(
        self,
        handlers: Mapping[str, Handler],
        models: Models,
        pool: Pool,
        dispatch: Dispatch,
        chooser: Chooser,
        quantum_tokens: int,
        max_running: int,
    ) -> None:
        """`handlers`: by kind; `max_running`: how many requests one worker runs at once."""
        self._handlers, self._models, self._pool = handlers, models, pool
        self._dispatch, self.chooser = dispatch, chooser
        self.quantum_tokens, self.max_running = quantum_tokens, max_running
        self.lock = threading.RLock()  # guards the queue and every Request's changes
        self.queue = Queue()
        self.orders = Orders()
        self.trace = Trace()
        self.counters = {"admitted": 0, "done": 0, "failed": 0, "cancelled": 0, "preemptions": 0, "tokens": 0}
        self.busy_s = 0.0  # spent on decisions
        self.stopped = False
        self.wanting = threading.Event()  # set: a model has to be loaded, or one may leave
        self._forecast = Forecast()
        self._running = False  # False before `start`, and while the daemon drains or stops
        self._finisher: Finisher

    # life

    def start(self, finisher: Finisher) -> None:
        """Begin to decide. `finisher` ends requests that cannot be started."""
        self._finisher, self._running = finisher, True
        self.stir()

    def drain(self) -> None:
        """Start no more requests. The running ones go on."""
        with self.lock:
            self._running = False

    def stop(self) -> list[Request]:
        """Return the unfinished requests. They stay in the store and go on after the next start."""
        with self.lock:
            self._running, self.stopped = False, True
            return list(self.queue)

    def beat(self, patience_s: float) -> str:
        """For the watchdog: make one decision. Return what hangs; empty: nothing."""
        if not self.lock.acquire(timeout=patience_s):
            return f"the scheduler's lock was held for {patience_s:g} s"
        try:
            self.decide()
        finally:
            self.lock.release()
        self.orders.send()
        if self.orders.stuck(patience_s):
            return f"an order to a worker or a tool did not get out for {patience_s:g} s"
        return ""

    # changes of the queue

    @contextmanager
    def deciding(self) -> Iterator[None]:
        """Hold the lock while the caller changes the queue. Then decide what starts, and send the orders
        without the lock.
        """
        with self.lock:
            yield
            self.decide()
        self.orders.send()

    def stir(self) -> None:
        """Decide again, because the policy, the quantum, a worker or a tool changed."""
        with self.deciding():
            pass

    def hold(self, agent: Agent) -> None:
        """Hold or release the requests of an agent that was paused or resumed."""
        with self.deciding():
            self.queue.hold(agent.id, agent.settings.paused)

    def allow(self, request: Request) -> bool:
        """Let a call start that waited for a person. False: it has ended, or did not wait for a person."""
        with self.deciding():
            if request.decide_by_s is None or request.id not in self.queue.waiting:
                return False
            request.decide_by_s = None
            self.queue.refresh(request)
        return True

    def requeue(self, request: Request, state: State, span: str) -> bool:
        """Let a running request wait again, with its tokens. False: it does not run any more."""
        with self.deciding():
            if request.id not in self.queue.running:
                return False
            if state is State.PREEMPTED:
                request.preemptions += 1
                self.counters["preemptions"] += 1
            request.leaving, request.state = False, state
            self.queue.wait(request)
            self.trace.enter(request, span)
        return True

    def order(self, worker: int | None, message: wire.Message) -> None:
        """Queue an order to a worker if it lives. The caller holds the lock, and sends the orders later."""
        found = self._pool.find(worker)
        if found is not None:
            self.orders.add(lambda: self._pool.send(found, message))

    def step_said(self, child: Request) -> None:
        """Pass on that a step has more text: its parent may show some of it."""
        if parent := self.queue.get(child.parent):
            self._handlers[parent.spec.kind].child_said(parent, child)

    def step_ended(self, child: Request) -> None:
        if parent := self.queue.get(child.parent):
            self._handlers[parent.spec.kind].child_ended(parent, child)

    # questions

    def find(self, id: int) -> Request | None:
        """Return a request that has not ended."""
        with self.lock:
            return self.queue.get(id)

    def unfinished(self, agent: Agent | None = None) -> list[Request]:
        """Return all unfinished requests, or those of an agent, in the order they came."""
        with self.lock:
            found = list(self.queue) if agent is None else self.queue.of_agent(agent.id)
        return sorted(found, key=lambda r: r.id)

    @property
    def load(self) -> tuple[int, int]:
        """Count the running and the waiting requests."""
        return len(self.queue.running), len(self.queue.waiting)

    def load_of(self, queue: str) -> tuple[int, int]:
        """Count the running and the waiting requests of a model."""
        with self.lock:
            waiting = sum(request.queue == queue for request in self.queue.waiting.values())
            return len(self._running_in(queue)), waiting

    @property
    def computing(self) -> int:
        """Count the running requests that use a worker or a tool. An agent's loop only waits for
        its steps.
        """
        with self.lock:
            return sum(request.spec.computes for request in self.queue.running.values())

    def running_on(self, worker: int | None) -> list[Request]:
        with self.lock:
            return [r for r in self.queue.running.values() if r.worker == worker]

    def mine(self, worker: Worker, id: int) -> Request | None:
        """Return the request of that id if this worker runs it. A late message about another one is
        dropped.
        """
        with self.lock:
            request = self.queue.running.get(id)
        return request if request and request.worker == worker.id else None

    def turn(self, context: int) -> Request | None:
        """Return the conversation's oldest unfinished request."""
        with self.lock:
            return self.queue.turn(context)

    def progress(self, request: Request) -> tuple[list[int], str]:
        """Return the tokens so far, and the text of exactly these tokens."""
        with self.lock:
            return list(request.tokens), request.text

    def spans(self) -> list[Span]:
        with self.lock:
            return self.trace.spans()

    def position(self, request: Request) -> tuple[int, float] | None:
        """Return how many requests start before this one, and in how many seconds it may start. None: it
        runs, or cannot start yet.
        """
        with self.lock:
            if request.id not in self.queue.waiting:
                return None
            return self._forecast.position(request.id, self._orders)

    def _orders(self) -> Iterator[list[Job]]:
        for queue in self.queue.queues():
            yield list(self.chooser.order(self._view(queue, (), None), len(self.queue)))

    # deciding

    def decide(self) -> None:
        """Start every request that may start. The caller holds the lock, and calls `orders.send` after it."""
        if not self._running or not self.queue.waiting:
            return
        began = time.perf_counter()
        for model in self._models.all():
            self._fill(model)
            for _ in range(len(self.queue.running)):
                if not self._preempt(model):
                    break
                self._fill(model)
        for queue in self.queue.queues():
            self._fill_queue(queue)
        self.busy_s += time.perf_counter() - began

    def _fill(self, model: Model) -> None:
        """Give the free places of a model's workers to the requests that the policy picks."""
        if model.state is ModelState.ABSENT and self.queue.ready(model.name).jobs:
            self.wanting.set()
        while self.queue.ready(model.name).jobs and (seats := self._seats(model)):
            id = self._next(model.name, self.queue.held_back)
            if id is None:
                return
            request = self.queue.waiting[id]
            worker = self._pool.find(place(seats, self._dispatch.last_worker(request)))
            if worker is None:  # it just died; worker_died or worker_ready decides again
                return
            self._forecast.started()
            self._start(request, worker)

    def _fill_queue(self, queue: str) -> None:
        """Start requests that need no worker, while their handler has room. Nothing preempts them."""
        while jobs := self.queue.ready(queue).jobs:
            oldest = next(iter(jobs))
            handler = self._handlers[self.queue.waiting[oldest].spec.kind]
            if handler.on_worker or not handler.free(queue, self.queue.running.values()):
                return
            held = self.queue.held_back | handler.crowding(queue, self.queue.running.values())
            id = self._next(queue, held) if handler.ranked else oldest
            if id is None:
                return
            self._start(self.queue.waiting[id], None)

    def _start(self, request: Request, worker: Worker | None) -> None:
        handler = self._handlers[request.spec.kind]
        self.queue.start(request, worker.id if worker else None)
        self.trace.enter(request, handler.span)
        self.orders.add(partial(self._obey, handler, request, worker))

    def _obey(self, handler: Handler, request: Request, worker: Worker | None) -> None:
        """Start a request. An error ends only this request: the thread may serve another user's call."""
        try:
            handler.start(request, worker)
        except Exception:
            log.exception("request %d", request.id, extra=about(request=request.id, agent=request.agent))
            self._finisher.finish(request, State.FAILED, "the daemon could not start it; the log says why")

    def _next(self, queue: str, held: Set[int | str]) -> int | None:
        """Return the policy's choice. `held`: users and agents with as many places as they may have. None:
        all that wait are held.
        """
        jobs = self.queue.ready(queue).jobs
        if len(jobs) == 1 and not held:
            return next(iter(jobs))
        seen = self._view(queue, self._running_in(queue), held)
        return self.chooser.order(seen, 1)[0].id if seen.waiting else None

    def _view(self, queue: str, running: Iterable[Request], held: Set[int | str] | None) -> View:
        """`held`: users and agents that are not shown; None: show every waiting job."""
        ledger, ready, now = self.queue.ledger, self.queue.ready(queue), time.monotonic()
        calls = queue.startswith(QUEUE)
        users = ledger.users_of_calls(running) if calls else ledger.tokens.users
        agents = ledger.seconds.agents if calls else ledger.tokens.agents

        def seen(waiting: Iterable[Job]) -> View:
            return View(
                waiting=tuple(waiting),
                running=tuple(map(view, running)),
                now=now,
                quantum_tokens=self.quantum_tokens,
                users=MappingProxyType(users),
                agents=MappingProxyType(agents),
            )

        if held is None:
            return seen(ready.jobs.values())
        return seen(ready.shown(now, held, lambda jobs, n: self.chooser.order(seen(jobs), n)))

    def _preempt(self, model: Model) -> bool:
        """Ask the policy whether a running request should yield. True: a request leaves its place.

        The worker gets this order together with the start of the next request, so the place is never empty.
        """
        if not self.queue.ready(model.name).jobs or model.stay.yields or self._seats(model):
            return False
        staying = [r for r in self._running_in(model.name) if not r.leaving]
        seen = self._view(model.name, staying, self.queue.held_back)
        id = self.chooser.preempt(seen) if seen.waiting else None
        if id is None:
            return False
        request = self.queue.running[id]
        request.leaving = True
        self.order(request.worker, wire.Remove(id, keep=True))
        return True

    def _seats(self, model: Model) -> list[Seat]:
        if model.stay.yields:
            return []
        load = {worker.id: 0 for worker in self._pool.ready(model)}
        for request in self.queue.running.values():
            if request.worker in load and not request.leaving:
                load[request.worker] += 1
        return [Seat(worker, n) for worker, n in load.items() if n < self.max_running]

    def _running_in(self, queue: str) -> list[Request]:
        return [r for r in self.queue.running.values() if r.queue == queue]

"""The scheduler: admits requests, gives them to workers as the policy says, delivers what comes back.

Mechanism only. One lock guards the queue. The thread that changes it decides at once what that means, and
one at a time sends, so that a worker gets its orders in the order they were made. Store and sockets are never
used with the lock held. FUSE threads call admit and cancel; the pool's listening threads call worker_*.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from types import MappingProxyType

from aiosd.access.caller import Caller
from aiosd.agents.agents import Agent, Agents
from aiosd.agents.steps import Loops
from aiosd.config.config import Config
from aiosd.context.contexts import Context, Contexts
from aiosd.context.interception import Interception
from aiosd.context.residency import Residency
from aiosd.context.swap import Swap
from aiosd.cores import wire
from aiosd.cores.models import Model, Models
from aiosd.cores.pool import Pool, Worker
from aiosd.database import Store
from aiosd.errors import AiosError, Denied, ShuttingDown
from aiosd.events import Events
from aiosd.host.message_ids import NOTICE, Id, about
from aiosd.policies import Job, View
from aiosd.policies.placement import Seat, place
from aiosd.privilege.system import System
from aiosd.scheduler import parking
from aiosd.scheduler.bounds import Bounds
from aiosd.scheduler.chooser import Chooser
from aiosd.scheduler.forecast import Forecast
from aiosd.scheduler.queue import Queue, view
from aiosd.scheduler.saving import Saving
from aiosd.scheduler.trace import Span, Trace
from aiosd.syscall import response
from aiosd.syscall.request import LOOPS, Request, State
from aiosd.tools.calls import Calls
from aiosd.tools.catalog import Tool, Tools

log = logging.getLogger(__name__)

STOPPED = "the daemon stopped; the request goes on when it starts again"
LEVELS = {State.DONE: logging.INFO, State.CANCELLED: logging.INFO, State.FAILED: NOTICE}  # of ends


class Scheduler:
    def __init__(
        self,
        config: Config,
        store: Store,
        agents: Agents,
        contexts: Contexts,
        models: Models,
        tools: Tools,
        events: Events,
        system: System,
    ) -> None:
        self.config, self.store, self.agents, self.contexts, self.models, self.events = (
            config, store, agents, contexts, models, events,
        )  # fmt: skip
        self.calls = Calls(config, tools, store, self._began, self._finish, self.stir, system)
        self.chooser = Chooser(config.scheduler.policy, Path(config.scheduler.policies))
        self.quantum_tokens = config.scheduler.quantum
        self.pool = Pool(config.engine, self, system.launch, system.devices)
        engine = config.engine
        swap = Swap(
            store.folder / "kv", engine.host_kv_bytes, engine.disk_kv_bytes, config.limits.disk_reserve_bytes
        )
        self.residency = Residency(self.pool, contexts, swap)
        self.interception = Interception(self.pool, self.residency, self.calls)
        self._lock = threading.RLock()  # guards the queue and every Request's changes
        self._queue = Queue()
        self.rule: Callable[[Request], None]  # of aiosd.access.approvals, as the next
        self.ask: Callable[[Request], None]
        self.loops = Loops(self.admit, self._finish, self.new_id, self._away)
        self.bounds = Bounds(config, store, self._queue, self._lock)
        self._outbox: deque[Callable[[], None]] = deque()  # orders to workers, sent without the lock
        self._sending = threading.Lock()
        self._order_s: float | None = None  # since when the order is being sent that is
        self._ids = itertools.count(store.last_request_id() + 1)
        self._saving = Saving(store, contexts, config.limits.keep_requests, self._log_end)
        self.trace = Trace()
        self._forecast = Forecast()
        self._deciding = False  # not before it has started, nor while it stops
        self._stopped = False
        self.counters = {"admitted": 0, "done": 0, "failed": 0, "cancelled": 0, "preemptions": 0, "tokens": 0}
        self.busy_s = 0.0

    # life

    def start(self) -> None:
        """Takes up what an earlier daemon accepted and did not end, then runs."""
        for request in self.store.unfinished():
            request.state = State.QUEUED
            request.running_most = self.bounds.quotas.running(Caller(request.uid, -1, 0), request.agent)
            wrong = self._left(request)
            self._queue.add(request, startable=not wrong)
            if wrong:
                self._finish(request, State.FAILED, wrong)
        for name in self.agents.names():
            self.hold(self.agents.get(name))
        self.residency.swap.start(context.id for context in self.contexts.all())
        self.calls.start()
        self._saving.start()
        self._deciding = True
        self.stir()

    def reload(self, config: Config) -> None:
        self.config, engine = config, config.engine
        self.pool.places.engine = engine
        self.residency.swap.resize(
            engine.host_kv_bytes, engine.disk_kv_bytes, config.limits.disk_reserve_bytes
        )
        self.bounds.reload(config)
        self._saving.keep = config.limits.keep_requests

    def drain(self) -> None:
        """From here on nothing new is let in, and nothing starts; what runs goes on."""
        with self._lock:
            self._deciding, self.bounds.draining = False, True

    def stop(self) -> None:
        """Ends every wait. Unfinished requests stay in the store and go on after the next start."""
        self.drain()
        with self._lock:
            self._stopped = True
            left = list(self._queue)
        self.calls.stop()
        self.pool.stop()
        self._saving.stop()
        self._park(left)
        for request in left:
            request.answer.end(error=ShuttingDown(STOPPED))
        self.residency.swap.stop()

    def _park(self, left: list[Request]) -> None:
        made = {r.id: parking.pack(r, self.models.find(r.spec.model)) for r in left}
        try:
            self.store.park({id: text for id, text in made.items() if text})
        except AiosError as error:
            log.error("unfinished requests will run from their beginning: %s", error.explanation)

    def beat(self, patience_s: float) -> str:
        """For the watchdog: makes a decision as any other; gives what hangs, or nothing."""
        if not self._lock.acquire(timeout=patience_s):
            return f"the scheduler's lock was held for {patience_s:g} s"
        try:
            self._decide()
        finally:
            self._lock.release()
        self._send()
        since_s = self._order_s
        if since_s is not None and time.monotonic() - since_s > patience_s:
            return f"an order to a worker or a tool did not get out for {patience_s:g} s"
        return ""

    # admission

    def admit(self, request: Request, hopeless: str = "") -> None:
        """Accepts a request that check_room let in: after this it ends exactly once. Raises StoreFull.

        A `hopeless` one is known to be wrong: it ends as failed, with that reason.
        """
        hopeless = hopeless or self._ruled(request)
        if request.spec.operation == "tool":
            self.calls.audit.called(request)
        self._tell(request)
        with self._lock:
            self._queue.add(request, startable=not hopeless)
            self.trace.enter(request, "queued")
            self.counters["admitted"] += 1
            self._decide()
        self._send()
        try:
            self.store.add_request(request)  # its worker may be at it already: nobody knows of it yet
        except Exception as error:
            why = error.explanation if isinstance(error, AiosError) else repr(error)
            self._finish(request, State.CANCELLED, why)
            raise
        if hopeless:
            self._finish(request, State.FAILED, hopeless)
        elif request.decide_by_s is not None:
            self.ask(request)
        if self._stopped:  # begun before, and stored in time
            request.answer.end(error=ShuttingDown(STOPPED))

    def _left(self, request: Request) -> str:
        """Why what an earlier daemon accepted cannot go on; empty: it can."""
        spec = request.spec
        if spec.operation == "tool" and request.started_s is not None:
            return "interrupted: the daemon ended while it ran"
        if not self.models.find(spec.model) and not self.calls.tools.of(spec.model):
            return f"{spec.model} is gone"
        if spec.refused or (spec.operation == "tool" and not spec.groups):
            return "the request could not be understood"  # known before, and the daemon ended before it did
        return self._ruled(request)  # it is asked for again, also if it was allowed

    def _ruled(self, request: Request) -> str:
        """Why the rules deny it; empty: they do not."""
        try:
            if request.spec.operation == "tool":
                self.rule(request)
        except Denied as error:
            return error.explanation
        return ""

    def new_id(self) -> int:
        return next(self._ids)

    def find(self, id: int) -> Request | None:
        """A request the store does not have finished."""
        with self._lock:
            return self._saving.find(id) or self._queue.get(id)

    def unfinished(self, agent: Agent | None = None) -> list[Request]:
        """In the order they came."""
        with self._lock:
            found = list(self._queue) if agent is None else self._queue.of_agent(agent.id)
        return sorted(found, key=lambda r: r.id)

    @property
    def load(self) -> tuple[int, int]:
        """How many requests run, and how many wait."""
        return len(self._queue.running), len(self._queue.waiting)

    @property
    def computing(self) -> int:
        """How many have a worker or a tool at work: an agent's loop has not, it waits for its steps."""
        with self._lock:
            return sum(not request.spec.steps for request in self._queue.running.values())

    def cancel(self, request: Request, why: str = "cancelled") -> bool:
        """False when it had ended already."""
        return self.end(request, State.CANCELLED, why)

    def allow(self, request: Request) -> bool:
        """An irreversible call may start; False: it has ended, or was allowed before."""
        with self._lock:
            if request.decide_by_s is None or request.id not in self._queue.waiting:
                return False
            request.decide_by_s = None
            self._queue.refresh(request)
            self._decide()
        self._send()
        return True

    def end(self, request: Request, state: State, why: str) -> bool:
        """False when it had ended already."""
        return self._finish(request, state, why)

    def hold(self, agent: Agent) -> None:
        """Heeds that an agent was paused or resumed."""
        with self._lock:
            self._queue.hold(agent.id, agent.settings.paused)
        self.stir()

    def stir(self) -> None:
        """Something a decision depends on changed: policy, quantum, a worker."""
        with self._lock:
            self._decide()
        self._send()

    def turn(self, context: Context) -> Request | None:
        """The request that has the conversation now: the oldest unfinished one."""
        with self._lock:
            return self._queue.turn(context.id)

    def spans(self) -> list[Span]:
        with self._lock:
            return self.trace.spans()

    def progress(self, request: Request) -> tuple[list[int], str]:
        """Its tokens so far, and the text of exactly those."""
        with self._lock:
            return list(request.tokens), request.text

    # deciding

    def _decide(self) -> None:
        """What is next, of each model; called with the lock held, and to be followed by `_send`."""
        if not self._deciding or not self._queue.waiting:
            return
        began = time.perf_counter()
        for model in self.models.all():
            self._fill(model)
            for _ in range(len(self._queue.running)):
                if not self._preempt(model):
                    break
                self._fill(model)
        for tool in map(self.calls.tools.of, self._queue.queues()):
            if tool:
                self._fill_tool(tool)
        for id in list(self._queue.ready(LOOPS).jobs):
            self._start(id, None, "loop", self._begin)
        self.busy_s += time.perf_counter() - began

    def _send(self) -> None:
        """Sends what was decided. Who finds another thread at it leaves it to that one."""
        while self._outbox and self._sending.acquire(blocking=False):
            try:
                while self._outbox:
                    self._order_s = time.monotonic()
                    self._outbox.popleft()()
            finally:
                self._order_s = None
                self._sending.release()

    def _fill(self, model: Model) -> None:
        """Gives free places to whom the policy picks."""
        while self._queue.ready(model.name).jobs and (seats := self._seats(model)):
            id = self._next(model.name)
            if id is None:
                return
            request = self._queue.waiting[id]
            chosen = place(seats, self._last_worker(request))
            worker = self.pool.find(chosen)
            if worker is None:  # it just died; worker_died or worker_ready will decide again
                return
            self._forecast.started()
            self._start(id, worker.id, "prefill", partial(self._submit, worker))

    def _fill_tool(self, tool: Tool) -> None:
        """As _fill; a call that runs is not preempted."""
        while self._queue.ready(tool.queue).jobs and self.calls.free(tool, self._queue.running.values()):
            id = self._next(tool.queue)
            if id is None:
                return
            self._start(id, None, "tool", self.calls.run)

    def _start(self, id: int, worker: int | None, span: str, order: Callable[[Request], None]) -> None:
        request = self._queue.waiting[id]
        self._queue.start(request, worker)
        self.trace.enter(request, span)
        self._outbox.append(partial(self._obey, order, request))

    def _obey(self, order: Callable[[Request], None], request: Request) -> None:
        """What one request breaks is its own trouble: the thread may be another user's."""
        try:
            order(request)
        except Exception:
            log.exception("request %d", request.id, extra=about(request=request.id, agent=request.agent))
            self._finish(request, State.FAILED, "the daemon could not start it; the log says why")

    def _next(self, queue: str) -> int | None:
        """Whom the policy picks; None: all who wait have as many running as they may."""
        jobs = self._queue.ready(queue).jobs
        if len(jobs) == 1 and not self._queue.held_back:
            return next(iter(jobs))
        view = self._view(queue, self._running(queue))
        return self.chooser.order(view, 1)[0].id if view.waiting else None

    def _view(self, queue: str, running: Iterable[Request], every: bool = False) -> View:
        ledger, ready, now = self._queue.ledger, self._queue.ready(queue), time.monotonic()

        def seen(waiting: Iterable[Job]) -> View:
            return View(
                waiting=tuple(waiting),
                running=tuple(map(view, running)),
                now=now,
                quantum_tokens=self.quantum_tokens,
                users=MappingProxyType(ledger.users),
                agents=MappingProxyType(ledger.agents),
            )

        if every:
            return seen(ready.jobs.values())
        held = self._queue.held_back
        return seen(ready.shown(now, held, lambda jobs, n: self.chooser.order(seen(jobs), n)))

    def position(self, request: Request) -> tuple[int, float] | None:
        """How many start before it, and in how many seconds it may; None: it cannot start yet, or runs."""
        with self._lock:
            if request.id not in self._queue.waiting:
                return None
            return self._forecast.position(request.id, self._orders)

    def _orders(self) -> Iterator[list[Job]]:
        for queue in self._queue.queues():
            yield list(self.chooser.order(self._view(queue, (), True), len(self._queue)))

    def _last_worker(self, request: Request) -> int | None:
        """Where KV of this request may still be: its own, or its conversation's."""
        context = self._conversation(request)
        return request.worker if request.worker is not None or context is None else context.worker

    def _conversation(self, request: Request) -> Context | None:
        """Whose KV it goes on with: of a step that of its loop."""
        return self.contexts.loop(request.parent) if request.parent else self.contexts.of(request.spec)

    def _away(self, request: Request, calls: list[Request]) -> None:
        """The model of a loop has made these calls."""
        if context := self.contexts.loop(request.id):
            with self._lock:
                running = [r for r in self._queue.running.values() if r.worker == context.worker]
            self.interception.away(context, calls, running)

    def _preempt(self, model: Model) -> bool:
        """Asks the policy whether a waiting request should have a place; True: one is being vacated.

        Its worker hears of both in one go, so that the place is not empty in between.
        """
        if not self._queue.ready(model.name).jobs or self._seats(model):
            return False
        staying = [r for r in self._running(model.name) if not r.leaving]
        seen = self._view(model.name, staying)
        id = self.chooser.preempt(seen) if seen.waiting else None
        if id is None:
            return False
        request = self._queue.running[id]
        request.leaving = True
        self._order(request.worker, wire.Remove(id, keep=True))
        return True

    def _seats(self, model: Model) -> list[Seat]:
        load = {worker.id: 0 for worker in self.pool.ready(model)}
        for request in self._queue.running.values():
            if request.worker in load and not request.leaving:
                load[request.worker] += 1
        most = self.config.engine.max_running
        return [Seat(worker, n) for worker, n in load.items() if n < most]

    def _running(self, queue: str) -> list[Request]:
        return [r for r in self._queue.running.values() if r.spec.model == queue]

    # down: to a worker

    def _submit(self, worker: Worker, request: Request) -> None:
        spec = request.spec
        context = self._conversation(request)
        if spec.context and context is None:
            self._finish(request, State.FAILED, "its context was removed")
            return
        owner, held = str(request.uid), 0
        if context is not None:
            owner = self.contexts.kv_owner(context, request.uid)
            self.residency.prepare(context, worker, owner)
            held = context.id if self.contexts.owns(request.uid, context) else 0
        if request.parked:
            self._unpark(request, worker.model)
        try:
            self.pool.send(
                worker,
                wire.Submit(
                    id=request.id,
                    messages=self.contexts.whole(spec),
                    tools=list(spec.tools),
                    decoded=list(spec.decoded),
                    sampling=wire.plain(spec.sampling),
                    owner=owner,
                    resume=list(request.tokens),
                    context=held,
                    operation=spec.operation,
                    schema=spec.schema,
                    tool_choice=spec.tool_choice,
                ),
            )
        except AiosError as error:  # the conversation is too large for a message, or cannot be read
            self._finish(request, State.FAILED, error.explanation)

    def _unpark(self, request: Request, model: Model) -> None:
        with self._lock:
            goes_on = parking.unpack(request, model)
        if goes_on:
            response.grow(request, request.text, request.logprobs)
            if request.parent:
                self.loops.said(request)

    def _began(self, request: Request) -> bool:
        """A tool call acts from now on; False: it has ended."""
        with self._lock:
            if request.id not in self._queue.running:
                return False
            request.started_s = time.time()
        self._tell(request)
        return True

    def _begin(self, request: Request) -> None:
        """An agent's loop, perhaps one that an earlier daemon began."""
        if request.spec.context and self.contexts.of(request.spec) is None:
            self._finish(request, State.FAILED, "its context was removed")
            return
        request.started_s = request.started_s or time.time()
        self._tell(request)
        try:
            stored = self.store.children(request.id)
            known = [self.find(child.id) or ended(child) for child in stored]
            self.contexts.begin_loop(request.id)
            self.loops.begin(request, self.contexts.whole(request.spec), known)
        except AiosError as error:
            self._finish(request, State.FAILED, error.explanation)

    def _order(self, worker: int | None, message: wire.Message) -> None:
        """To be sent by `_send`; called with the lock held."""
        found = next((w for w in self.pool.workers() if w.id == worker), None)
        if found is not None:
            self._outbox.append(lambda: self.pool.send(found, message))

    # up: from a worker

    def worker_ready(self, worker: Worker) -> None:
        self.events.emit("worker", worker=worker.id, model=worker.model.name, state="ready")
        self.stir()

    def place(self, request: Request) -> str:
        """Its agent, whose readers see what happens to it; or "/", which is root's: another has the name."""
        agent = self.agents.find(request.agent)
        gone = agent and agent.id != request.agent_id
        return "/" if gone or not request.agent else f"/agents/{request.agent}"

    def _tell(self, request: Request) -> None:
        self.events.emit(
            "request",
            self.place(request),
            request.uid,
            id=request.id,
            agent=request.agent,
            state=request.state,
        )

    def worker_said(self, worker: Worker, message: wire.Message | wire.Tokens) -> None:
        """What one message breaks is its request's trouble: others run in this process."""
        try:
            self._heed(worker, message)
        except Exception:
            log.exception("worker %d: %s", worker.id, type(message).__name__, extra=about(worker=worker.id))
            if request := self._mine(worker, getattr(message, "id", -1)):
                self._finish(
                    request, State.FAILED, "the daemon could not handle its answer; the log says why"
                )

    def _heed(self, worker: Worker, message: wire.Message | wire.Tokens) -> None:
        match message:
            case wire.Step():
                for tokens in message.outputs:
                    self.worker_said(worker, tokens)
                if self._queue.waiting:
                    self.stir()
            case wire.Tokens():
                if request := self._mine(worker, message.id):
                    self._deliver(request, message)
            case wire.Started():
                if request := self._mine(worker, message.id):
                    self._started(request, message.prompt_tokens)
            case wire.Refused():
                if request := self._mine(worker, message.id):
                    reason = f"{message.reason}; {message.hint}" if message.hint else message.reason
                    self._finish(request, State.FAILED, reason)
            case wire.Saved() | wire.NotSaved() | wire.Restored():
                self.residency.said(worker, message)
            case wire.Removed():
                if request := self._mine(worker, message.id):
                    self._requeue(request, State.PREEMPTED)
            case _:
                words = worker.id, type(message).__name__
                log.error("worker %d sent a %s", *words, extra=about(worker=worker.id))

    def _started(self, request: Request, prompt_tokens: int) -> None:
        with self._lock:
            if request.started_s is None:
                request.started_s = time.time()
                self._queue.ledger.charge(request, input_tokens=prompt_tokens)
            request.usage.prompt_tokens = prompt_tokens
            request.computing = True
        self._tell(request)

    def worker_died(self, worker: Worker) -> None:
        """What ran there runs again from its tokens; what has killed too many workers is failed."""
        self.residency.worker_died(worker)
        self.events.emit("worker", worker=worker.id, model=worker.model.name, state="ended")
        with self._lock:
            orphans = [r for r in self._queue.running.values() if r.worker == worker.id]
            if self._stopped:  # of our own doing: they are parked
                return
        # one that its worker had not begun with is the likelier cause, and clears the others
        suspects = [r for r in orphans if not r.computing] or orphans
        for request in orphans:
            request.worker_deaths += request in suspects
            if request.worker_deaths > self.config.limits.worker_deaths_per_request:
                self._finish(request, State.FAILED, f"{request.worker_deaths} workers died while running it")
            else:
                request.worker = None
                self._requeue(request, State.QUEUED, "queued")

    def model_failed(self, model: Model) -> None:
        with self._lock:
            lost = [r for r in self._queue if r.spec.model == model.name]
        self.events.emit("model", model=model.name, state="failed")
        for request in lost:
            self._finish(request, State.FAILED, f"model {model.name}: {model.error}")

    def model_waits(self, model: Model) -> None:
        self.events.emit("model", model=model.name, state="waiting", error=model.error)

    def device_failed(self, uuid: str, why: str) -> None:
        self.events.emit("device", device=uuid, state="failed", error=why)

    def _mine(self, worker: Worker, id: int) -> Request | None:
        """A request this worker runs; late words about one that ended or moved are dropped."""
        with self._lock:
            request = self._queue.running.get(id)
        return request if request and request.worker == worker.id else None

    def _requeue(self, request: Request, state: State, span: str = "preempted") -> None:
        with self._lock:
            if request.id not in self._queue.running:
                return
            if state is State.PREEMPTED:
                request.preemptions += 1
                self.counters["preemptions"] += 1
            request.leaving, request.state = False, state
            self._queue.wait(request)
            self.trace.enter(request, span)
            self._decide()
        self._send()
        self._tell(request)

    def _deliver(self, request: Request, made: wire.Tokens) -> None:
        request.logprobs += made.logprobs
        if request.worker_visits == 1:  # later ones find what this request itself computed
            request.usage.cached_tokens = made.cached_tokens
            if not request.tokens:
                self.interception.read(request, request.usage.prompt_tokens - made.cached_tokens)
        with self._lock:
            self.trace.decodes(request)
            request.tokens += made.tokens
            request.text += made.text
            request.usage.completion_tokens = len(request.tokens)
            self.counters["tokens"] += len(made.tokens)
            self._queue.ledger.charge(request, output_tokens=len(made.tokens))
        over = made.finish not in ("", "preempted")
        response.grow(request, made.text, made.logprobs, over)
        if over:
            request.finish_reason = made.finish
            self._finish(request, State.DONE)
            return
        if request.parent:
            self.loops.said(request)
        if made.finish:
            self._requeue(request, State.PREEMPTED, "swapped")

    # the end

    def _finish(self, request: Request, state: State, error: str = "") -> bool:
        """The one way a request ends. Stored first, told after: what a reader saw as done stays done. But an
        answer by itself can be made again, and nothing follows from it: its reader does not wait."""
        with self._lock:
            if not self._queue.remove(request):
                return False
            if request.worker is not None and state is not State.DONE:
                self._order(request.worker, wire.Remove(request.id, keep=False))
            if request.spec.operation == "tool":
                self._outbox.append(partial(self.calls.kill, request.id))
                request.text = request.answer.text
            request.state, request.error, request.finished_s = state, error, time.time()
            self.trace.leave(request)
            self.counters[state] += 1
            self._account(request)
            self._saving.add(request)
        if state is not State.DONE or not by_itself(request):
            self._keep(request)
        with self._lock:  # only now: the next turn of the conversation reads what this one stored
            self._queue.end_turn(request)
            self._decide()
        if request.spec.operation == "tool":
            self.calls.audit.ended(request)
        response.end(request)
        self._send()
        self._tell(request)
        self._saving.soon()
        for child in self.loops.ended(request) if request.spec.steps else ():
            self.cancel(child, "its request ended")
        if request.parent:
            self.loops.child_ended(request)
        return True

    def _keep(self, request: Request) -> None:
        """In the store, and of its conversation the KV."""
        self._saving.save()
        context, worker = self._conversation(request), self.pool.find(request.worker)
        done = request.state is State.DONE
        if context and worker and done and self.contexts.owns(request.uid, context):
            self.residency.came(context, worker)
        if request.spec.steps and (own := self.contexts.end_loop(request.id)):
            self.residency.drop(own)

    @staticmethod
    def _log_end(request: Request) -> None:
        if request.spec.operation == "tool":  # the audit log's line is in the log as well
            return
        state, why = request.state, f": {request.error}" if request.error else ""
        extra = about(
            Id.REQUEST_FAILED if state is State.FAILED else None,
            request=request.id,
            agent=request.agent,
            uid=request.uid,
            model=request.spec.model,
            worker=request.worker,
            state=state,
        )
        words = request.id, request.agent or "-", state, why
        log.log(LEVELS[state], "request %d of agent %s %s%s", *words, extra=extra)

    def _account(self, request: Request) -> None:
        if model := self.models.find(request.spec.model):
            model.account(request.spent)
        if tool := self.calls.tools.of(request.spec.model):
            tool.account(request)
        if agent := self.agents.find(request.agent):
            agent.account(request)
        context = self._conversation(request)
        if context and request.spec.operation == "llm" and request.state is State.DONE:
            context.tokens = request.spent.prompt_tokens + request.spent.completion_tokens
            context.model, context.unfinished = request.spec.model, ""


def by_itself(request: Request) -> bool:
    """No turn of a conversation, no step of a loop, and no act."""
    spec = request.spec
    return not (spec.context or spec.steps or request.parent or spec.operation == "tool")


def ended(request: Request) -> Request:
    """One that the store has finished, with what its readers get."""
    response.grow(request, request.text, [])
    response.end(request)
    return request

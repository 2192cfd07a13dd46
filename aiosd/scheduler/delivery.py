"""The way up: pass each message of a worker to the request that it is about.

The pool's listening threads call. A message about a request that has ended or moved is dropped.
"""

from __future__ import annotations

import logging
import threading
import time

from aiosd.context.interception import Interception
from aiosd.context.residency import Residency
from aiosd.cores import wire
from aiosd.cores.models import Model
from aiosd.cores.pool import Worker
from aiosd.errors import ModelError
from aiosd.events import Events
from aiosd.host.message_ids import about
from aiosd.host.subuids import owner
from aiosd.scheduler.ending import Ending
from aiosd.scheduler.limits import Limits
from aiosd.scheduler.notices import Notices
from aiosd.scheduler.queue import add
from aiosd.scheduler.scheduler import Scheduler
from aiosd.syscall import judging, response
from aiosd.syscall.request import Request, State

log = logging.getLogger(__name__)

LOGPROB_BYTES = 500  # of memory, for each token that is named
LARGE_BYTES = 1 << 20  # a request with its answer is looked at from here on


class Delivery:
    """Implements aiosd.cores.pool.PoolEvents."""

    def __init__(
        self,
        scheduler: Scheduler,
        ending: Ending,
        residency: Residency,
        interception: Interception,
        events: Events,
        notices: Notices,
        limits: Limits,
        deaths_max: int,
    ) -> None:
        """`deaths_max`: how many workers may die while they run one request."""
        self._scheduler, self._ending = scheduler, ending
        self._residency, self._interception = residency, interception
        self._events, self._notices, self._limits = events, notices, limits
        self.deaths_max = deaths_max

    # requests

    def worker_said(self, worker: Worker, message: wire.Message | wire.Tokens) -> None:
        """Handle a message. An error ends only its request, because other requests run on this worker."""
        try:
            self._heed(worker, message)
        except Exception:
            log.exception("worker %d: %s", worker.id, type(message).__name__, extra=about(worker=worker.id))
            if request := self._scheduler.mine(worker, getattr(message, "id", -1)):
                why = "the daemon could not handle its answer; the log says why"
                self._ending.finish(request, State.FAILED, why)

    def _heed(self, worker: Worker, message: wire.Message | wire.Tokens) -> None:
        mine = self._scheduler.mine
        match message:
            case wire.Step():
                for tokens in message.outputs:
                    self.worker_said(worker, tokens)
                if self._scheduler.queue.waiting:
                    self._scheduler.stir()
            case wire.Tokens():
                request = mine(worker, message.id)
                if request and not request.finish_reason:  # else its whole answer is judged now
                    self._deliver(request, message)
            case wire.Started():
                if request := mine(worker, message.id):
                    self._started(request, message)
            case wire.Refused():
                if request := mine(worker, message.id):
                    reason = f"{message.reason}; {message.hint}" if message.hint else message.reason
                    self._ending.finish(request, State.FAILED, reason, message.code)
            case wire.Saved() | wire.NotSaved() | wire.Restored():
                self._residency.said(worker, message)
            case wire.Removed():
                if request := mine(worker, message.id):
                    self._requeue(request, State.PREEMPTED, "preempted")
            case _:
                words = worker.id, type(message).__name__
                log.error("worker %d sent a %s", *words, extra=about(worker=worker.id))

    def _started(self, request: Request, begun: wire.Started) -> None:
        prompt_tokens = begun.prompt_tokens
        with self._scheduler.lock:
            if not request.tokens:
                request.text = begun.opened
            if request.started_s is None:
                request.started_s = time.time()
                self._scheduler.queue.ledger.charge(request, input_tokens=prompt_tokens)
            request.usage.prompt_tokens = prompt_tokens
            request.computing = True
        self._notices.changed(request)

    def _deliver(self, request: Request, made: wire.Tokens) -> None:
        request.logprobs += made.logprobs
        if request.worker_visits == 1:  # on a later visit the cache holds this request's own KV
            request.usage.cached_tokens = made.cached_tokens
            if not request.tokens:
                self._interception.read(request, request.usage.prompt_tokens - made.cached_tokens)
        scheduler = self._scheduler
        size = len(made.text) + LOGPROB_BYTES * sum(1 + len(one["top_logprobs"]) for one in made.logprobs)
        with scheduler.lock:
            scheduler.trace.decodes(request)
            request.size_bytes += size
            add(scheduler.queue.pending_bytes, owner(request.uid), size)
            request.tokens += made.tokens
            request.text += made.text
            request.usage.completion_tokens = len(request.tokens)
            scheduler.counters["tokens"] += len(made.tokens)
            scheduler.queue.ledger.charge(request, output_tokens=len(made.tokens))
        over = made.finish not in ("", "preempted")
        response.grow(request, made.logprobs, over)
        if over:
            request.finish_reason, request.stopped = made.finish, made.stopped
            if request.spec.judged:
                threading.Thread(target=self._judge, args=(request,), name="judge", daemon=True).start()
            else:
                self._ending.finish(request, State.DONE)
            return
        if request.size_bytes > LARGE_BYTES and self._limits.overdrawn(request.uid):
            why = "your requests and their answers take too many bytes: ask for fewer logprobs at once"
            self._ending.finish(request, State.FAILED, why)
            return
        if request.parent:
            scheduler.step_said(request)
        if made.finish:
            self._requeue(request, State.PREEMPTED, "swapped")

    def _judge(self, request: Request) -> None:
        """In a thread of its own, because it may take seconds."""
        try:
            with judging.of(request.uid):
                request.spec.judge(request)
        except Exception:
            log.exception("request %d: its answer was not judged", request.id)
        self._ending.finish(request, State.DONE)

    def _requeue(self, request: Request, state: State, span: str) -> None:
        if self._scheduler.requeue(request, state, span):
            self._notices.changed(request)

    # workers, models, devices

    def worker_ready(self, worker: Worker) -> None:
        self._events.emit("worker", worker=worker.id, model=worker.model.name, state="ready")
        self._scheduler.wanting.set()
        self._scheduler.stir()

    def worker_died(self, worker: Worker) -> None:
        """Queue the worker's requests again, with their tokens. A request that killed too many
        workers fails.
        """
        self._residency.worker_died(worker)
        self._events.emit("worker", worker=worker.id, model=worker.model.name, state="ended")
        self._scheduler.wanting.set()
        orphans = self._scheduler.running_on(worker.id)
        if self._scheduler.stopped:  # the daemon itself ended the workers; it parks the requests
            return
        # If the worker had not begun some of its requests, only those are suspects.
        suspects = [r for r in orphans if not r.computing] or orphans
        for request in orphans:
            request.worker_deaths += request in suspects
            if request.worker_deaths > self.deaths_max:
                why = f"{request.worker_deaths} workers died while running it"
                self._ending.finish(request, State.FAILED, why)
            else:
                request.worker = None
                self._requeue(request, State.QUEUED, "queued")

    def model_failed(self, model: Model) -> None:
        self._events.emit("model", model=model.name, state="failed")
        for request in self._scheduler.unfinished():
            if request.queue == model.name:
                why = f"model {model.name}: {model.error}"
                self._ending.finish(request, State.FAILED, why, ModelError.code)

    def model_waits(self, model: Model) -> None:
        self._events.emit("model", model=model.name, state="waiting", error=model.error)

    def device_failed(self, uuid: str, why: str) -> None:
        self._events.emit("device", device=uuid, state="failed", error=why)

"""End requests: each one once, and in the store before its readers see the end. Any thread may call."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from aiosd.agents.agents import Agents
from aiosd.context.contexts import Contexts
from aiosd.context.residency import Residency
from aiosd.cores import wire
from aiosd.cores.pool import Pool
from aiosd.host.message_ids import NOTICE, Id, about
from aiosd.scheduler.dispatch import Dispatch
from aiosd.scheduler.handler import Handler
from aiosd.scheduler.notices import Notices
from aiosd.scheduler.saving import Saving
from aiosd.scheduler.scheduler import Scheduler
from aiosd.syscall import response
from aiosd.syscall.request import Request, State

log = logging.getLogger(__name__)


LEVELS = {State.DONE: logging.INFO, State.CANCELLED: logging.INFO, State.FAILED: NOTICE}


class Ending:
    def __init__(
        self,
        handlers: Mapping[str, Handler],
        scheduler: Scheduler,
        saving: Saving,
        notices: Notices,
        agents: Agents,
        contexts: Contexts,
        dispatch: Dispatch,
        residency: Residency,
        pool: Pool,
    ) -> None:
        self._handlers, self._scheduler, self._saving, self._notices = handlers, scheduler, saving, notices
        self._agents, self._contexts = agents, contexts
        self._dispatch, self._residency, self._pool = dispatch, residency, pool

    def cancel(self, request: Request, why: str = "cancelled") -> bool:
        """Cancel a request. False: it had ended already."""
        return self.finish(request, State.CANCELLED, why)

    def finish(self, request: Request, state: State, error: str = "", code: str = "") -> bool:
        """End a request exactly once; False: it had ended already. `code` is that of an AiosError.

        Store it before readers see the end. A standalone answer is stored shortly after instead, so that its
        reader does not wait for the disk: it can be recomputed.
        """
        scheduler, handler = self._scheduler, self._handlers[request.spec.kind]
        with scheduler.lock:
            if not scheduler.queue.remove(request):
                return False
            if request.worker is not None and state is not State.DONE:
                scheduler.order(request.worker, wire.Remove(request.id, keep=False))
            handler.closing(request)
            request.state, request.error, request.finished_s = state, error, time.time()
            request.error_code = code
            scheduler.trace.leave(request)
            scheduler.counters[state] += 1
            handler.account(request)
            if agent := self._agents.find(request.agent):
                agent.account(request)
            self._saving.add(request)
        if state is not State.DONE or not request.alone:
            self._save(request)
        with scheduler.lock:  # not earlier: the next turn of the conversation reads what this one stored
            scheduler.queue.end_turn(request)
            scheduler.decide()
        handler.ended(request)
        response.end(request)
        scheduler.orders.send()
        self._notices.changed(request)
        self._saving.soon()
        handler.told(request)
        if request.parent:
            scheduler.step_ended(request)
        return True

    def _save(self, request: Request) -> None:
        """Store the request, and note which worker holds the KV of its conversation."""
        self._saving.save()
        context, worker = self._dispatch.conversation(request), self._pool.find(request.worker)
        done = request.state is State.DONE
        if context and worker and done and self._contexts.owns(request.uid, context):
            self._residency.came(context, worker)


def log_end(request: Request) -> None:
    if request.spec.acts:  # aiosd.access.audit logs the end of a tool call
        return
    state, why = request.state, f": {request.error}" if request.error else ""
    extra = about(
        Id.REQUEST_FAILED if state is State.FAILED else None,
        request=request.id,
        agent=request.agent,
        uid=request.uid,
        model=request.spec.target,
        worker=request.worker,
        state=state,
    )
    words = request.id, request.agent or "-", state, why
    log.log(LEVELS[state], "request %d of agent %s %s%s", *words, extra=extra)

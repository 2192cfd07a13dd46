"""Where a request's conversation is, and how its KV gets to the worker that the request starts on.

`bring` is called without the scheduler's lock, by the thread that sends orders.
"""

from __future__ import annotations

from aiosd.context.contexts import Context, Contexts
from aiosd.context.residency import Residency
from aiosd.cores.pool import Worker
from aiosd.syscall.request import Request


class Dispatch:
    def __init__(self, contexts: Contexts, residency: Residency) -> None:
        self._contexts, self._residency = contexts, residency

    def conversation(self, request: Request) -> Context | None:
        """The context whose KV the request continues; a step of a loop continues that of its loop."""
        if request.parent:
            return self._contexts.loop(request.parent)
        return self._contexts.of(request.spec)

    def last_worker(self, request: Request) -> int | None:
        """The worker that may still hold KV of the request or of its conversation."""
        context = self.conversation(request)
        return request.worker if request.worker is not None or context is None else context.worker

    def bring(self, request: Request, worker: Worker) -> tuple[str, int]:
        """Bring the conversation's KV to the worker. Return the owner of the KV, and the context that keeps
        it.
        """
        context = self.conversation(request)
        if context is None:
            return str(request.uid), 0
        owner = self._contexts.kv_owner(context, request.uid)
        self._residency.prepare(context, worker, owner)
        return owner, context.id if self._contexts.owns(request.uid, context) else 0

"""Find a request's conversation, and bring its KV to the worker that the request starts on.

The thread that sends orders calls `bring`, without the scheduler's lock.
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
        """Return the context whose KV the request continues. The steps of a loop share the loop's context."""
        if request.parent:
            return self._contexts.loop(request.parent)
        return self._contexts.of(request.spec)

    def last_worker(self, request: Request) -> int | None:
        """Return the worker that may still hold KV of the request or of its conversation."""
        context = self.conversation(request)
        return request.worker if request.worker is not None or context is None else context.worker

    def bring(self, request: Request, worker: Worker) -> tuple[str, int]:
        """Bring the conversation's KV to the worker.

        Return the owner of the KV, and the id of the context that keeps it after the turn (0: none).
        """
        context = self.conversation(request)
        if context is None:
            return str(request.uid), 0
        owner = self._contexts.kv_owner(context, request.uid)
        self._residency.prepare(context, worker, owner)
        return owner, context.id if self._contexts.owns(request.uid, context) else 0

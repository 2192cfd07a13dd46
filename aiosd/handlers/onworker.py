"""The common part of the kinds whose requests run on a worker of a model."""

from __future__ import annotations

from typing import ClassVar

from aiosd.access.caller import Caller
from aiosd.cores import wire
from aiosd.cores.pool import Worker
from aiosd.errors import AiosError
from aiosd.handlers.parts import Parts
from aiosd.scheduler.handler import Handler, Source
from aiosd.syscall.request import Request, State


class OnWorker(Handler):
    on_worker: ClassVar[bool] = True
    span: ClassVar[str] = "prefill"

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def check(self, caller: Caller, source: Source) -> None:
        self._parts.names.check_model(caller, source.target)

    def lost(self, request: Request) -> str:
        return "" if self._parts.models.find(request.spec.target) else f"{request.spec.target} was removed"

    def account(self, request: Request) -> None:
        if model := self._parts.models.find(request.spec.target):
            model.account(request.spent)
            self._parts.demand.ended(request, model)

    def queued(self, request: Request) -> None:
        self._parts.demand.came(request)

    def start(self, request: Request, worker: Worker | None) -> None:
        assert worker is not None
        owner, context = self._parts.dispatch.bring(request, worker)
        try:
            self._parts.pool.send(worker, self.message(request, owner, context))
        except AiosError as error:  # the conversation is too large for one message, or unreadable
            self._parts.ending.finish(request, State.FAILED, error.explanation, error.code)

    def message(self, request: Request, owner: str, context: int) -> wire.Submit:
        """Return the order to the worker."""
        raise NotImplementedError

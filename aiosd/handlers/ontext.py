"""The common part of the handlers of embed and tokenize."""

from __future__ import annotations

from typing import ClassVar

from aiosd.access.caller import Caller
from aiosd.cores import wire
from aiosd.handlers.onworker import OnWorker
from aiosd.handlers.textspec import TextSpec
from aiosd.scheduler.handler import Source
from aiosd.syscall.chat import GREEDY
from aiosd.syscall.request import Request
from aiosd.syscall.spec import Message, Spec


class OnText(OnWorker):
    """A kind whose input is one text."""

    spec: ClassVar[type[TextSpec]]

    def judge(self, caller: Caller, source: Source, body: bytes) -> TextSpec:
        asked = self.spec.parse(body, source.target)
        self.check_names(caller, source, asked)
        return asked

    def check_names(self, caller: Caller, source: Source, spec: Spec) -> None:
        self._parts.names.check_model(caller, spec.target)

    def misunderstood(self, source: Source, body: bytes) -> TextSpec:
        return self.spec("", source.target, json=True)

    def message(self, request: Request, owner: str, context: int) -> wire.Submit:
        assert isinstance(request.spec, TextSpec)
        said: Message = {"role": "user", "content": request.spec.input}
        return wire.Submit(
            id=request.id, messages=[said], tools=[], decoded=[], sampling=wire.plain(GREEDY), owner=owner,
            resume=[], context=0, operation=request.spec.kind,
        )  # fmt: skip

"""The handler of models/NAME/embed."""

from __future__ import annotations

from aiosd.access.caller import Caller
from aiosd.cores import wire
from aiosd.handlers.embed.spec import Embed
from aiosd.handlers.onworker import OnWorker, text_input
from aiosd.scheduler.handler import Source
from aiosd.syscall.request import Request


class EmbedHandler(OnWorker):
    def judge(self, caller: Caller, source: Source, body: bytes) -> Embed:
        asked = Embed.parse(body, source.target)
        self._parts.names.check_model(caller, asked.model)
        return asked

    def misunderstood(self, source: Source, body: bytes) -> Embed:
        return Embed("", source.target, json=True)

    def message(self, request: Request, owner: str, context: int) -> wire.Submit:
        assert isinstance(request.spec, Embed)
        return text_input(request, request.spec.input, owner)

"""The handler of models/NAME/tokenize."""

from __future__ import annotations

from dataclasses import replace

from aiosd.cores import wire
from aiosd.handlers.ontext import OnText
from aiosd.handlers.tokenize.spec import Tokenize
from aiosd.syscall.request import Request


class TokenizeHandler(OnText):
    spec = Tokenize

    def message(self, request: Request, owner: str, context: int) -> wire.Submit:
        order, asked = super().message(request, owner, context), request.spec
        assert isinstance(asked, Tokenize)
        if not asked.messages:
            return order
        said, offered = list(asked.messages), list(asked.tools)
        return replace(order, messages=said, tools=offered, template=asked.template, operation="prompt")

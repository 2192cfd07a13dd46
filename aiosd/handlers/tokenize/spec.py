"""A request for the tokens of a text, and its answer. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from aiosd.handlers.textspec import TextSpec
from aiosd.syscall.response import line

if TYPE_CHECKING:
    from aiosd.syscall.request import Request


@dataclass(frozen=True, slots=True)
class Tokenize(TextSpec):
    kind: ClassVar[str] = "tokenize"

    def document(self, request: Request) -> str:
        tokens = json.loads(request.text)
        return line({"count": len(tokens), "tokens": tokens, "model": self.model})

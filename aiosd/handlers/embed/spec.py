"""A request for an embedding, and its answer in the shape of /v1/embeddings. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from aiosd.handlers.textspec import TextSpec
from aiosd.syscall.response import line

if TYPE_CHECKING:
    from aiosd.syscall.request import Request


@dataclass(frozen=True, slots=True)
class Embed(TextSpec):
    kind: ClassVar[str] = "embed"

    def document(self, request: Request) -> str:
        """A list with one embedding, a unit vector."""
        data = [{"object": "embedding", "index": 0, "embedding": json.loads(request.text)}]
        used = dict.fromkeys(("prompt_tokens", "total_tokens"), request.usage.prompt_tokens)
        return line({"object": "list", "data": data, "model": self.model, "usage": used})

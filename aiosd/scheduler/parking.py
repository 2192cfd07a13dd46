"""What a request has of its answer when the daemon stops: kept, so that the next one goes on from there.

A shortcut only: without it, or with another model, the request runs from its beginning to the same end.
"""

from __future__ import annotations

import json

from aiosd.cores.models import Model
from aiosd.syscall.request import Request


def pack(request: Request, model: Model | None) -> str:
    """Empty: nothing worth keeping."""
    if model is None or not request.tokens:
        return request.parked  # it has not begun since the stop before
    kept = {"model": model.info.get("identity"), "tokens": request.tokens, "text": request.text}
    return json.dumps({**kept, "logprobs": request.logprobs, "preemptions": request.preemptions})


def unpack(request: Request, model: Model) -> bool:
    """Whether it goes on from what it had; called with the scheduler's lock held."""
    kept, request.parked = json.loads(request.parked), ""
    if kept["model"] != model.info.get("identity"):
        return False
    request.tokens, request.text, request.logprobs = kept["tokens"], kept["text"], kept["logprobs"]
    request.preemptions, request.slice_start = kept["preemptions"], len(request.tokens)
    return True

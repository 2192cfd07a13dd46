"""What a request has of its answer when the daemon stops: kept, so that the next one goes on from there.

A shortcut only: without it, or with another model, the request runs from its beginning to the same end.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable

from aiosd.cores.models import Model, Models
from aiosd.database.store import Store
from aiosd.errors import AiosError
from aiosd.syscall.request import Request

log = logging.getLogger(__name__)


def park(store: Store, models: Models, left: Iterable[Request]) -> None:
    """Store the partial answers of requests that have not ended, for the next daemon to go on from."""
    made = {request.id: pack(request, models.find(request.spec.target)) for request in left}
    try:
        store.park({id: text for id, text in made.items() if text})
    except AiosError as error:
        log.error("unfinished requests will run from their beginning: %s", error.explanation)


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

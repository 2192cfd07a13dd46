"""Parking: keep the partial answers when the daemon stops, so that the next daemon continues from there.

Only a shortcut: without its parked answer, or with another model, a request starts over.
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
    """Store the partial answers of unfinished requests."""
    made = {request.id: pack(request, models.find(request.spec.target)) for request in left}
    try:
        store.park({id: text for id, text in made.items() if text})
    except AiosError as error:
        log.error("unfinished requests will run from their beginning: %s", error.explanation)


def pack(request: Request, model: Model | None) -> str:
    """Return a request's partial answer as JSON; empty: there is none."""
    if request.finish_reason:  # whole: only its end is missing
        return ""
    if model is None or not request.tokens:
        return request.parked  # parked by the last stop, and not started since
    kept = {"model": model.info.get("identity"), "tokens": request.tokens, "text": request.text}
    return json.dumps({**kept, "logprobs": request.logprobs, "preemptions": request.preemptions})


def unpack(request: Request, model: Model) -> bool:
    """Restore the partial answer. False: another model made it. The scheduler's lock is held."""
    kept, request.parked = json.loads(request.parked), ""
    if kept["model"] != model.info.get("identity"):
        return False
    request.tokens, request.text, request.logprobs = kept["tokens"], kept["text"], kept["logprobs"]
    request.preemptions, request.slice_start = kept["preemptions"], len(request.tokens)
    return True

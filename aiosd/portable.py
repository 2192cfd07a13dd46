"""A context as one file, contexts/NAME/kv: what reading it gives and writing it does.

The file (aiosd.snapshot) holds the messages, the KV that exists, and the turn that is being answered, if any.
Everything in a file that is written came from a user, and is judged before anything of it is believed.
"""

from __future__ import annotations

import json
import os
import secrets
from concurrent.futures import Future
from typing import Any

from aiosd import snapshot
from aiosd.contexts import Context
from aiosd.errors import BadRequest, BadSnapshot, Busy
from aiosd.scheduler import Scheduler
from aiosd.spec import Defaults, as_asked, message, parse, read_json

TOKENS_MAX = 1 << 24


class Export:
    """Reading: asks for the KV, and when it came puts the file together."""

    def __init__(self, scheduler: Scheduler, context: Context) -> None:
        scheduler.contexts.check(context)
        self._scheduler, self._context = scheduler, context
        request = scheduler.turn(context)
        self._about = about(scheduler, context)  # before the KV, which then has all of its tokens
        on = context.worker if request is None or request.worker is None else request.worker
        self.came: Future[None] = scheduler.residency.save(context, scheduler.pool.find(on))

    def file(self) -> int:
        """A descriptor for the caller to close; `came` is done."""
        taken = self._scheduler.residency.swap.take(self._context.id)
        file = os.memfd_create("aios-kv")
        if taken is None:
            meta = snapshot.Meta(model="", layout="", prompt=0, about=self._about)
            first, _ = snapshot.layout(meta, {"tokens": snapshot.Tensor("I32", (0,))})
            os.pwrite(file, first, 0)
            snapshot.seal(file)
            return file
        try:
            snapshot.copy(taken[0], file, self._about)
        finally:
            os.close(taken[0])
        return file


def about(scheduler: Scheduler, context: Context) -> str:
    request = scheduler.turn(context)
    unfinished = None
    if request is not None:
        tokens, text = scheduler.progress(request)
        unfinished = {"request": as_asked(request.spec), "tokens": tokens, "text": text}
    elif context.unfinished:
        unfinished = json.loads(context.unfinished)
    return json.dumps({"messages": scheduler.contexts.messages(context), "unfinished": unfinished})


def restore(scheduler: Scheduler, context: Context, file: int) -> None:
    """The context becomes what a whole file says, or nothing changes and an error is raised."""
    header = snapshot.read(file)
    snapshot.verify(file, header)
    if header.kv:
        check_model(scheduler, header.meta)
    messages, unfinished = judged(header.meta.about)
    if scheduler.turn(context) is not None:
        raise Busy(f"context {context.name} has a turn going on", "cancel it first")
    salt = secrets.token_hex(16)  # nobody else's requests may meet this KV
    facts = {
        "tokens": header.tokens,
        "salt": salt,
        "unfinished": json.dumps(unfinished) if unfinished else "",
    }
    scheduler.contexts.replace(context, messages, **facts)
    scheduler.residency.drop(context)
    if header.kv:
        scheduler.residency.swap.put(context.id, os.dup(file), checked=False)


def check_model(scheduler: Scheduler, meta: snapshot.Meta) -> None:
    infos = {model.name: model.info for model in scheduler.models.all() if model.info}
    fitting = {name: info for name, info in infos.items() if info.get("identity") == meta.model}
    if not fitting:
        raise BadSnapshot(
            f"the file's KV is of model {meta.model[:40]!r}, which is not loaded here",
            "load that model first",
        )
    if all(info.get("kv_layout") != meta.layout for info in fitting.values()):
        raise BadSnapshot(
            f"the file's KV is laid out as {meta.layout[:60]!r} and model {min(fitting)} runs otherwise here"
        )


def judged(text: str) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Messages and the unfinished answer of `about`. Raises BadSnapshot."""
    try:
        raw = read_json(text)
        messages = [message(one, f"messages[{i}]") for i, one in enumerate(raw["messages"])]
        unfinished = raw["unfinished"]
        if unfinished is None:
            return messages, None
        asked = parse(json.dumps(unfinished["request"]).encode(), Defaults("any"))
        tokens, said = unfinished["tokens"], unfinished["text"]
        if not isinstance(said, str) or len(tokens) > TOKENS_MAX or any(type(t) is not int for t in tokens):
            raise BadSnapshot("the file's unfinished answer makes no sense")
        return messages, {"request": as_asked(asked), "tokens": tokens, "text": said}
    except BadRequest as error:
        raise BadSnapshot(f"the file's conversation: {error}") from None
    except (KeyError, TypeError, AttributeError):
        raise BadSnapshot("the file's conversation makes no sense") from None

"""A context as one file, contexts/NAME/kv: what reading it gives and writing it does.

The file (aiosd.cores.snapshot) holds the messages, the KV that exists, and the turn that is being answered,
if any. Everything in a file that is written came from a user, and is judged before anything of it is
believed.
"""

from __future__ import annotations

import json
import os
import secrets
from concurrent.futures import Future
from typing import Any

from aiosd.context.contexts import Context
from aiosd.cores import snapshot
from aiosd.errors import BadRequest, BadSnapshot, Busy
from aiosd.scheduler.scheduler import Scheduler
from aiosd.syscall.request import Request
from aiosd.syscall.spec import Defaults, as_asked, message, parse, read_json

TOKENS_MAX = 1 << 20
BLOCK = 16  # tokens of a KV block (aiosd.cores.engine.kv)
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class Export:
    """Reading: asks for the KV, and when it came puts the file together."""

    def __init__(self, scheduler: Scheduler, context: Context) -> None:
        scheduler.contexts.check(context)
        self._scheduler, self._context = scheduler, context
        request = scheduler.turn(context)
        self._about = about(scheduler, context, request)  # before the KV, which then has all of its tokens
        on = context.worker if request is None or request.worker is None else request.worker
        self.came = scheduler.residency.save(context, scheduler.pool.find(on))

    def file(self) -> int:
        """A descriptor for the caller to close; `came` is done."""
        kv = self.came.result()
        if kv is None and (taken := self._scheduler.residency.swap.take(self._context.id)):
            kv, _ = taken
        self.came = Future()  # its file is ours now
        self.came.set_result(None)
        file = os.memfd_create("aios-kv")
        try:
            if kv is None:
                nothing = {"tokens": snapshot.Tensor("I32", (0,))}
                beginning, _ = snapshot.layout(snapshot.Meta("", "", 0), self._about, nothing)
                os.pwrite(file, beginning, 0)
                snapshot.seal(file)
            else:
                snapshot.copy(kv, file, self._about)
        except BaseException:
            os.close(file)
            raise
        finally:
            if kv is not None:
                os.close(kv)
        return file

    def close(self) -> None:
        """Nobody will ask for the file any more."""

        def close(came: Future[int | None]) -> None:
            kv = came.result()
            if kv is not None:
                os.close(kv)

        self.came.add_done_callback(close)


def about(scheduler: Scheduler, context: Context, request: Request | None) -> bytes:
    """The messages, and of a turn by the context's own user what was asked and answered so far."""
    unfinished = None
    if request is not None and scheduler.contexts.owns(request.uid, context):
        tokens, text = scheduler.progress(request)
        model = scheduler.models.find(request.spec.model)
        unfinished = {
            "request": as_asked(request.spec), "system": request.spec.system, "tokens": tokens, "text": text,
            "model": str(model.info.get("identity", "")) if model else "",
        }  # fmt: skip
    elif request is None and context.unfinished:
        unfinished = json.loads(context.unfinished)
    messages = scheduler.contexts.messages(context)
    return json.dumps({"messages": messages, "unfinished": unfinished}, ensure_ascii=False).encode()


def restore(scheduler: Scheduler, context: Context, file: int) -> None:
    """The context becomes what a whole file says, or nothing changes and an error is raised."""
    header = snapshot.read(file)
    snapshot.verify(file, header)
    if header.kv:
        check_model(scheduler, header)
    messages, unfinished = judged(snapshot.about(file, header))
    if scheduler.turn(context) is not None:
        raise Busy(f"context {context.name} has a turn going on", "cancel it first")
    salt = secrets.token_hex(16)  # nobody else's requests may meet this KV
    facts = {
        "tokens": header.tokens,
        "salt": salt,
        "unfinished": json.dumps(unfinished) if unfinished else "",
    }
    scheduler.residency.drop(context)
    scheduler.contexts.replace(context, messages, **facts)
    if header.kv:
        scheduler.residency.swap.put(context.id, os.dup(file), checked=False)
        if scheduler.contexts.by_id(context.id) is None:  # removed meanwhile
            scheduler.residency.swap.drop(context.id)


def check_model(scheduler: Scheduler, header: snapshot.Header) -> None:
    """Whether a model here has made such KV, as large as its tokens and no larger than its context."""
    meta = header.meta
    infos = [model.info for model in scheduler.models.all() if model.info.get("identity") == meta.model]
    if not infos:
        raise BadSnapshot(
            f"the KV is of model {meta.model[:40]!r}, which is not loaded here",
            "load that model first",
        )
    fitting = next((info for info in infos if info.get("kv_layout") == meta.layout), None)
    if fitting is None:
        raise BadSnapshot(f"the KV is laid out as {meta.layout[:60]!r}, and that model runs otherwise here")
    blocks: set[int] = set()
    wanted = fitting["kv_shapes"]
    for (dtype, shape), tensor in zip(wanted, header.kv, strict=False):
        at = shape.index(-1)
        same = [*tensor.shape[:at], -1, *tensor.shape[at + 1 :]] == list(shape)
        blocks.add(tensor.shape[at] if same and tensor.dtype == DTYPES.get(dtype) else -1)
    count = blocks.pop() if len(blocks) == 1 else -1
    if len(header.kv) != len(wanted) or not 0 <= count * BLOCK <= header.tokens <= fitting["context_length"]:
        raise BadSnapshot("the KV in the file has not the shape of this model's")


def judged(about: bytes) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Messages and the unfinished answer of `about`. Raises BadSnapshot."""
    try:
        raw = read_json(about.decode())
        messages = [message(one, f"messages[{i}]") for i, one in enumerate(raw["messages"])]
        unfinished = raw["unfinished"]
        if unfinished is None:
            return messages, None
        asked = parse(json.dumps(unfinished["request"]).encode(), Defaults("any"))
        tokens = unfinished["tokens"]
        texts = {key: unfinished[key] for key in ("system", "text", "model")}
        numbers = isinstance(tokens, list) and all(type(token) is int for token in tokens)
        if not numbers or len(tokens) > TOKENS_MAX or not all(isinstance(t, str) for t in texts.values()):
            raise BadSnapshot("the file's unfinished answer makes no sense")
        return messages, {"request": as_asked(asked), "tokens": tokens, **texts}
    except BadRequest as error:
        raise BadSnapshot(f"the file's conversation: {error}") from None
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError):
        raise BadSnapshot("the file's conversation makes no sense") from None

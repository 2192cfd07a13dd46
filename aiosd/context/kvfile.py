"""Contexts as files: reading contexts/NAME/kv exports a context, writing restores one.

The file (aiosd.cores.snapshot) holds the messages, the KV that exists, and the running turn, if any. A
written file comes from a user: everything in it is checked before it is used.
"""

from __future__ import annotations

import json
import os
import secrets
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from aiosd.context.contexts import Context, Contexts
from aiosd.context.residency import Residency
from aiosd.cores import snapshot
from aiosd.cores.models import Models
from aiosd.cores.pool import Pool
from aiosd.errors import BadRequest, BadSnapshot, Busy
from aiosd.syscall.chat import Chat, Defaults, as_asked, parse
from aiosd.syscall.foreign import VALUES_MAX, read_json
from aiosd.syscall.messages import message
from aiosd.syscall.request import Request

TOKENS_MAX = 1 << 20
BLOCK = 16  # tokens per KV block (aiosd.cores.engine.kv)
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class RunningTurns(Protocol):
    """The running turns of conversations (aiosd.scheduler.scheduler)."""

    def turn(self, context: int) -> Request | None: ...
    def progress(self, request: Request) -> tuple[list[int], str]: ...


@dataclass(frozen=True, slots=True)
class KvFiles:
    contexts: Contexts
    residency: Residency
    pool: Pool
    models: Models
    turns: RunningTurns

    def about(self, context: Context, request: Request | None) -> bytes:
        """Return the JSON part of a kv file: the messages and, for the owner's running turn, its request and
        partial answer.
        """
        unfinished = None
        if request is not None and self.contexts.owns(request.uid, context):
            assert isinstance(request.spec, Chat)
            tokens, text = self.turns.progress(request)
            model = self.models.find(request.spec.model)
            identity = str(model.info.get("identity", "")) if model else ""
            asked = {"request": as_asked(request.spec), "system": request.spec.system, "model": identity}
            unfinished = {**asked, "tokens": tokens, "text": text}
        elif request is None and context.unfinished:
            unfinished = json.loads(context.unfinished)
        messages = self.contexts.messages(context)
        return json.dumps({"messages": messages, "unfinished": unfinished}, ensure_ascii=False).encode()

    def restore(self, context: Context, file: int) -> None:
        """Replace the context by a complete kv file. If this raises, nothing has changed."""
        header = snapshot.read(file)
        snapshot.verify(file, header)
        if header.kv:
            check_model(self.models, header)
        messages, unfinished = judged(snapshot.about(file, header))
        if self.turns.turn(context.id) is not None:
            raise Busy(f"context {context.name} has a turn going on", "cancel it first")
        salt = secrets.token_hex(16)  # keeps other contexts' requests from using this KV
        facts = {
            "tokens": header.tokens,
            "salt": salt,
            "unfinished": json.dumps(unfinished) if unfinished else "",
        }
        self.residency.drop(context)
        self.contexts.replace(context, messages, **facts)
        if header.kv:
            self.residency.swap.put(context.id, os.dup(file), checked=False)
            if self.contexts.by_id(context.id) is None:  # removed meanwhile
                self.residency.swap.drop(context.id)


class Export:
    """One reading of a kv file: ask the worker for the KV, and build the file when the KV is here."""

    def __init__(self, files: KvFiles, context: Context) -> None:
        files.contexts.check(context)
        self._files, self._context = files, context
        request = files.turns.turn(context.id)
        # read before the KV, so that the KV covers all its tokens
        self._about = files.about(context, request)
        on = context.worker if request is None or request.worker is None else request.worker
        self.came = files.residency.save(context, files.pool.find(on))

    def file(self) -> int:
        """Build the file after `came` is done. The caller closes the descriptor."""
        kv = self.came.result()
        if kv is None and (taken := self._files.residency.swap.take(self._context.id)):
            kv, _ = taken
        self.came = Future()  # `close` must not close `kv` again
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
        """Release the KV: nobody calls `file` any more."""

        def close(came: Future[int | None]) -> None:
            kv = came.result()
            if kv is not None:
                os.close(kv)

        self.came.add_done_callback(close)


def check_model(models: Models, header: snapshot.Header) -> None:
    """Check that a loaded model makes KV of this shape, that it covers no more tokens than the file has, and
    that these fit into the model's context. Raises BadSnapshot.
    """
    meta = header.meta
    infos = [model.info for model in models.all() if model.info.get("identity") == meta.model]
    if not infos:
        raise BadSnapshot(
            f"the KV is of model {meta.model[:40]!r}, which is not loaded here",
            "load that model first",
        )
    fitting = next((info for info in infos if info.get("kv_layout") == meta.layout), None)
    if fitting is None:
        raise BadSnapshot(f"the KV has layout {meta.layout[:60]!r}; the model uses another layout here")
    blocks: set[int] = set()
    wanted = fitting["kv_shapes"]
    for (dtype, shape), tensor in zip(wanted, header.kv, strict=False):
        at = shape.index(-1)
        same = [*tensor.shape[:at], -1, *tensor.shape[at + 1 :]] == list(shape)
        blocks.add(tensor.shape[at] if same and tensor.dtype == DTYPES.get(dtype) else -1)
    count = blocks.pop() if len(blocks) == 1 else -1
    if len(header.kv) != len(wanted) or not 0 <= count * BLOCK <= header.tokens <= fitting["context_length"]:
        raise BadSnapshot("the KV in the file does not have the shape of this model's KV")


def judged(about: bytes) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Return the checked messages and unfinished answer of a file's JSON part. Raises BadSnapshot."""
    try:
        raw = read_json(about.decode(), VALUES_MAX + TOKENS_MAX)
        messages = [message(one, f"messages[{i}]") for i, one in enumerate(raw["messages"])]
        unfinished = raw["unfinished"]
        if unfinished is None:
            return messages, None
        asked = parse(json.dumps(unfinished["request"]).encode(), Defaults("any"))
        tokens = unfinished["tokens"]
        texts = {key: unfinished[key] for key in ("system", "text", "model")}
        numbers = isinstance(tokens, list) and all(type(token) is int for token in tokens)
        if not numbers or len(tokens) > TOKENS_MAX or not all(isinstance(t, str) for t in texts.values()):
            raise BadSnapshot("the file's unfinished answer is malformed")
        return messages, {"request": as_asked(asked), "tokens": tokens, **texts}
    except BadRequest as error:
        raise BadSnapshot(f"the file's conversation: {error}") from None
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError):
        raise BadSnapshot("the file's conversation is malformed") from None

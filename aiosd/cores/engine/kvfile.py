"""Write the KV of a conversation to a file in memory (aiosd.cores.snapshot), and read such a file."""

from __future__ import annotations

import mmap
import os
from contextlib import suppress

import torch

from aiosd.cores import snapshot
from aiosd.cores.engine.core import KV
from aiosd.cores.engine.engine import Engine
from aiosd.cores.engine.model import LoadedModel
from aiosd.errors import BadSnapshot

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32"}
BY_NAME = {name: dtype for dtype, name in DTYPES.items()}


def write(engine: Engine, context: int) -> tuple[int, int] | None:
    """Return (descriptor, tokens). The caller closes the descriptor. None: the engine has no KV of it."""
    shot = engine.snapshot(context)
    if shot is None:
        return None
    tensors = {"tokens": snapshot.Tensor("I32", (len(shot.tokens),))}
    for i, (shape, dtype) in enumerate(zip(shot.shapes, shot.dtypes, strict=True)):
        tensors[f"kv.{i}"] = snapshot.Tensor(DTYPES[dtype], shape)
    meta = snapshot.Meta(engine.model.identity, engine.model.kv_layout, shot.prompt)
    first, header = snapshot.layout(meta, b"", tensors)
    file = os.memfd_create("aios-kv")
    try:
        os.ftruncate(file, header.size)
        memory = mmap.mmap(file, header.size)
        memory[: len(first)] = first
        tokens, *kv = _tensors(memory, header)
        tokens.copy_(torch.tensor(shot.tokens, dtype=torch.int32))
        engine.conversations.copy(shot, kv)
    except BaseException:
        os.close(file)
        raise
    return file, len(shot.tokens)


def read(file: int, model: LoadedModel, check: bool) -> tuple[list[int], int, KV]:
    """Return tokens, length of the prompt, and KV. Raises BadSnapshot, also for a file of another model."""
    header = snapshot.read(file)
    if check:
        snapshot.verify(file, header)
    if header.meta.model != model.identity or header.meta.layout != model.kv_layout:
        raise BadSnapshot("the file belongs to another model or another way to run it")
    with suppress(ValueError):
        memory = mmap.mmap(file, header.size, access=mmap.ACCESS_COPY)
        tokens, *kv = _tensors(memory, header)
        if check and not all(bool(torch.isfinite(tensor).all()) for tensor in kv):
            raise BadSnapshot("the KV in the file holds inf or nan")
        return tokens.tolist(), header.meta.prompt, kv
    raise BadSnapshot("the file is shorter than its header says")


def _tensors(memory: mmap.mmap, header: snapshot.Header) -> list[torch.Tensor]:
    return [
        torch.frombuffer(
            memory, dtype=BY_NAME[t.dtype], offset=t.start, count=t.bytes // BY_NAME[t.dtype].itemsize
        ).view(t.shape)
        if t.bytes
        else torch.empty(t.shape, dtype=BY_NAME[t.dtype])
        for t in (header.tensors["tokens"], *header.kv)
    ]

"""Hold the KV of conversations between two turns: keep it in the pool, fork it, copy it out, restore it.

A conversation holds whole blocks that the pool finds by content. So a turn finds its conversation's KV like
any prefix, and forks share blocks until they differ. Knows no requests, files or daemon.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch

from aiosd.cores.engine.core import KV, Core
from aiosd.cores.engine.kv import BLOCK, BlockPool, block_keys, root
from aiosd.cores.eviction import victim
from aiosd.errors import BadSnapshot
from aiosd.policies.eviction import Kept


@dataclass(slots=True)
class Held:
    tokens: list[int]
    prompt: int
    keys: list[bytes]
    blocks: list[int]
    used: int
    pinned: bool = False


@dataclass(slots=True)
class KvCopy:
    """Tokens and the blocks with the KV of the first tokens. Shapes as from a core's `reserve`, for so many
    blocks."""

    tokens: list[int]
    prompt: int
    blocks: torch.Tensor  # block numbers, for `copy`
    shapes: list[tuple[int, ...]]
    dtypes: list[torch.dtype]


class Conversations:
    def __init__(self, core: Core, kv: KV, pool: BlockPool) -> None:
        self._core, self._kv, self._pool = core, kv, pool
        self._held: dict[int, Held] = {}
        self._clock = itertools.count()
        self.spill: Callable[[int], None] = lambda context: None  # called before make_room drops KV

    def __len__(self) -> int:
        return len(self._held)

    def keep(self, context: int, tokens: list[int], prompt: int, keys: list[bytes]) -> None:
        """Hold the blocks of these keys for the conversation, in place of its former blocks."""
        blocks = self._pool.find(keys)
        before = self._held.get(context)
        self.drop(context)
        pinned = before is not None and before.pinned
        self._held[context] = Held(
            list(tokens), prompt, keys[: len(blocks)], blocks, next(self._clock), pinned
        )

    def drop(self, context: int) -> None:
        if held := self._held.pop(context, None):
            self._pool.release(held.blocks)

    def pin(self, context: int, pinned: bool) -> None:
        if held := self._held.get(context):
            held.pinned = pinned

    def fork(self, context: int, to: int) -> bool:
        """Let `to` share the blocks of `context`. Return False when `context` has no KV."""
        held = self._held.get(context)
        if held:
            self.keep(to, held.tokens, held.prompt, held.keys)
        return held is not None

    def make_room(self, blocks: int, busy: Collection[int]) -> None:
        """Drop conversations until so many blocks are available, but none in `busy`."""
        free = {id: held for id, held in self._held.items() if id not in busy and held.blocks}
        if self._pool.available + sum(len(held.blocks) for held in free.values()) < blocks:
            return  # dropping all would not be enough
        while free and self._pool.available < blocks:
            chosen = victim([Kept(id, len(h.blocks), h.used, h.pinned) for id, h in free.items()])
            self.spill(chosen)
            self.drop(chosen)
            del free[chosen]

    def snapshot(self, context: int) -> KvCopy | None:
        held = self._held.get(context)
        if held is None:
            return None
        dim = self._core.kv_block_dim
        shapes = [(*t.shape[:dim], len(held.blocks), *t.shape[dim + 1 :]) for t in self._kv]
        blocks = torch.tensor(held.blocks, dtype=torch.long)
        return KvCopy(held.tokens, held.prompt, blocks, shapes, [t.dtype for t in self._kv])

    def copy(self, snapshot: KvCopy, into: list[torch.Tensor]) -> None:
        """Copy the snapshot's KV into tensors of its shapes and dtypes. Call it before the next step: the
        blocks may change then."""
        for tensor, out in zip(self._kv, into, strict=True):
            chosen = snapshot.blocks.to(tensor.device)
            if tensor.device.type == "cpu":
                torch.index_select(tensor, self._core.kv_block_dim, chosen, out=out)
            else:
                out.copy_(tensor.index_select(self._core.kv_block_dim, chosen))

    def restore(self, context: int, owner: str, tokens: list[int], prompt: int, kv: KV) -> int:
        """Take KV back as far as there is room, and return the number of its tokens. Raises BadSnapshot."""
        dim = self._core.kv_block_dim
        self._check(tokens, kv)
        keys = list(block_keys(root(owner), tokens, prompt, self._core.chunk))[: kv[0].shape[dim]]
        blocks = self._pool.find(keys)
        known = len(blocks)
        while len(blocks) < len(keys) and (block := self._pool.allocate()) is not None:
            blocks.append(block)
        fresh = torch.tensor(blocks[known:], dtype=torch.long)
        for tensor, source in zip(self._kv, kv, strict=True):
            part = source.narrow(dim, known, len(fresh))
            tensor.index_copy_(dim, fresh.to(tensor.device), part.to(tensor.device))
        for block, key in zip(blocks[known:], keys[known:], strict=False):
            self._pool.publish(block, key)
        self.keep(context, tokens, prompt, keys[: len(blocks)])
        self._pool.release(blocks)
        return len(blocks) * BLOCK

    def _check(self, tokens: list[int], kv: KV) -> None:
        dim = self._core.kv_block_dim
        blocks = {t.shape[dim] for t in kv if t.dim() > dim}
        same = len(kv) == len(self._kv) and all(
            a.dtype == b.dtype and a.shape[:dim] + a.shape[dim + 1 :] == b.shape[:dim] + b.shape[dim + 1 :]
            for a, b in zip(kv, self._kv, strict=True)
        )
        if not same or len(blocks) != 1 or blocks.pop() * BLOCK > len(tokens):
            raise BadSnapshot("the KV in the file does not have the shape of this model's KV")

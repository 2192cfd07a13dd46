"""The interface between engine and model: one forward pass over a batch of segments, with paged KV.

Three modules implement it: llama.py (plain torch), fused.py (C++, CPU), foreign.py (transformers' modules).
"""

from __future__ import annotations

import math
import mmap
from array import array
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

CHUNK = 64  # tokens; an exact torch core computes prefill in pieces of this size
KV = list[torch.Tensor]  # each core has its own layout; belongs to one engine


@dataclass(slots=True)
class Segment:
    """`length` consecutive tokens of one sequence. The block table says where their KV goes."""

    blocks: array[int]  # block table, int32, long enough for start + length tokens
    start: int  # position of the first token
    length: int
    prompt: int  # tokens of the prompt; each token after the prompt counts as a decode step

    @property
    def end(self) -> int:
        return self.start + self.length

    def units(self, chunk: int) -> list[tuple[int, int]]:
        """Cut attention into (start, end), so that a row's arithmetic never depends on the batch.

        The torch path cuts at multiples of the chunk inside the prompt, and after every token behind it. A
        core with a chunk of 1 needs no cuts.
        """
        if chunk == 1:
            return [(self.start, self.end)]
        cuts = [
            at for at in range(self.start, min(self.end, self.prompt)) if at % chunk == 0 or at == self.start
        ]
        cuts += range(max(self.start, self.prompt), self.end)
        return list(zip(cuts, [*cuts[1:], self.end], strict=True))


@dataclass(slots=True)
class Batch:
    tokens: list[int]  # the tokens of all segments, concatenated
    segments: list[Segment]
    rows: list[int]  # indices of the tokens whose logits are wanted; `states` likewise
    states: list[int] = field(default_factory=list)  # tokens whose final hidden state is wanted


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeroed memory. On the CPU a page takes memory only when it is first used, so unused KV costs
    nothing."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


class Core(Protocol):
    chunk: int  # prefill may stop at multiples of `chunk` and at the prompt's end; 1: anywhere
    kv_bytes_per_token: int
    kv_block_dim: int  # the dimension of a KV tensor that counts blocks
    info: dict[str, Any]

    def reserve(self, blocks: int) -> KV:
        """Zeroed KV memory for so many blocks."""

    def forward(self, batch: Batch, kv: KV) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the batch and add its KV. Returns a row of logits for each of batch.rows, and a normalised
        final hidden state for each of batch.states; both float32 on the CPU."""

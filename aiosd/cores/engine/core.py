"""What the engine asks of a model: one forward pass over a batch of segments, with paged KV.

Three cores do it: llama.py (plain torch), fused.py (C++, CPU) and foreign.py (transformers' own modules).
"""

from __future__ import annotations

import math
import mmap
from array import array
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

CHUNK = 64  # tokens of prefill that are computed in one way, where that matters
KV = list[torch.Tensor]  # laid out as the core likes; belongs to one engine


@dataclass(slots=True)
class Segment:
    """`length` consecutive tokens of one sequence; their KV goes where the block table says."""

    blocks: array[int]  # block table, int32, long enough for start + length tokens
    start: int  # position of the first token
    length: int
    prompt: int  # tokens of the prompt: behind it every token was, or would have been, a decode step

    @property
    def end(self) -> int:
        return self.start + self.length

    def units(self, chunk: int) -> list[tuple[int, int]]:
        """Where attention has to be cut so that a row's arithmetic never depends on the batch.

        Multiples of the chunk inside the prompt, single tokens behind it (the rule of the torch path).
        With a chunk of 1 nobody asks for that, and it is done at once.
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
    tokens: list[int]  # of all segments, one after the other
    segments: list[Segment]
    rows: list[int]  # indices into tokens whose logits are wanted
    states: list[int] = field(default_factory=list)  # those whose final hidden states are


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On the CPU pages come into being when they are first used: a budget of KV is no memory yet."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


class Core(Protocol):
    chunk: int  # prefill must end at multiples of it (or at the prompt's end); 1: anywhere
    kv_bytes_per_token: int
    kv_block_dim: int  # which dimension of a KV tensor counts blocks
    info: dict[str, Any]

    def reserve(self, blocks: int) -> KV:
        """KV memory of so many blocks, zeroed."""

    def forward(self, batch: Batch, kv: KV) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits, one row for each of batch.rows, and normalised final hidden states, one for each of
        batch.states; float32 on the CPU. Reads and extends the KV."""

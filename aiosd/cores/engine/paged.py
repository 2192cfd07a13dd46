"""The attention function that replaces the one of transformers' modules: paged, sequence by sequence.

Registered once under NAME. The modules do not pass the batch on to it, so a forward pass sets its PagedPass
with `running()`. Only one forward pass runs at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from transformers import AttentionInterface

from aiosd.cores.engine.core import KV, Segment, zeros
from aiosd.cores.engine.kv import BLOCK
from aiosd.cores.engine.llama import Masks, attend
from aiosd.errors import ModelError

NAME = "aiosd_paged"
UNKNOWN = "its attention is of a kind that aiosd cannot page; use another model, aiosd(8) names the families"
TRIED_BLOCKS = 48  # size of the KV while foreign.py tests a model; the engine later reserves its own


@dataclass(frozen=True)
class Layer:
    """Shape of one layer's KV: keys [blocks, 16, heads, key_dim], values likewise."""

    heads: int
    key_dim: int
    value_dim: int
    window: int | None
    device: torch.device
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        return self.heads * (self.key_dim + self.value_dim) * self.dtype.itemsize

    def reserve(self, blocks: int) -> list[torch.Tensor]:
        shapes = ((blocks, BLOCK, self.heads, dim) for dim in (self.key_dim, self.value_dim))
        return [zeros(shape, self.dtype, self.device) for shape in shapes]


@dataclass
class PagedPass:
    """One forward pass. The first forward pass of a model fills `layers`."""

    layers: dict[int, Layer]
    kv: KV  # kv[2 * i] are the keys of layer i, kv[2 * i + 1] its values
    segments: list[Segment]
    slots: torch.Tensor
    units: list[list[tuple[int, int]]]
    masks: Masks = field(default_factory=Masks)

    def attention(
        self, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, **options: Any
    ) -> torch.Tensor:
        """q: [rows, heads, dim]; k, v: [rows, kv_heads, dim]. Returns [rows, heads, value_dim]."""
        keys, values = self.kv[2 * index], self.kv[2 * index + 1]
        slots = self.slots.to(k.device)
        keys.flatten(0, 1).index_copy_(0, slots, k)
        values.flatten(0, 1).index_copy_(0, slots, v)
        out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
        window: int | None = options["window"]
        row = 0
        for segment, units in zip(self.segments, self.units, strict=True):
            table = torch.tensor(segment.blocks[: -(-segment.end // BLOCK)], device=k.device)
            own_k, own_v = (t[table].flatten(0, 1).transpose(0, 1) for t in (keys, values))
            for start, end in units:
                rows = slice(row, row + end - start)
                first = max(0, start - window + 1) if window else 0
                out[rows] = attend(
                    q[rows], own_k[:, first:end], own_v[:, first:end], scale, self.masks, **options
                )
                row += end - start
        return out


_steps: list[PagedPass] = []


@contextmanager
def running(step: PagedPass) -> Iterator[None]:
    _steps.append(step)
    try:
        yield
    finally:
        _steps.pop()


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Takes and returns transformers' shapes: [1, heads, rows, dim] in, [1, rows, heads, dim] out."""
    step = _steps[-1]
    if is_causal is False or attention_mask is not None or others.get("position_bias") is not None:
        raise ModelError(f"{type(module).__name__} is not causal attention over a KV cache", UNKNOWN)
    layer = cast(int, module.layer_idx)
    if layer not in step.layers:
        step.layers[layer] = Layer(
            key.shape[1], key.shape[3], value.shape[3], sliding_window, key.device, key.dtype
        )
        step.kv += step.layers[layer].reserve(TRIED_BLOCKS)
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    index = list(step.layers).index(layer)
    out = step.attention(index, q, k, v, scale, window=sliding_window, softcap=softcap, sinks=s_aux)
    return out[None], None


AttentionInterface.register(NAME, _attention)

"""The Llama family in plain torch: Llama, Mistral, Qwen2, Qwen3. Runs on every device; fused.py is the fast
one.

A row has the same bits in every batch on the CPU, because linears do not depend on the other rows
(linear.py), attention runs for each sequence alone, in units that depend only on the sequence
(Segment.units), and all else works row by row. Knows segments and block tables, no requests.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention, silu

from aiosd.cores.engine.core import CHUNK, KV, Batch, Segment, zeros
from aiosd.cores.engine.family import DecoderSpec, Weights
from aiosd.cores.engine.kv import BLOCK
from aiosd.cores.engine.linear import Linear

ROPE_PAGE = 1024
LANES = 32  # elements of the widest vector loop in torch's elementwise kernels


def lanewise_silu(x: torch.Tensor) -> torch.Tensor:
    """silu with the same bits for every shape.

    torch computes the tail of each thread's share with scalar code, whose exp rounds differently. Padding
    keeps all elements out of the tails.
    """
    if x.device.type != "cpu":
        return silu(x)
    flat = pad(x.reshape(-1), (0, -x.numel() % (LANES * torch.get_num_threads())))
    return silu(flat)[: x.numel()].view(x.shape)


class TorchLlama:
    kv_block_dim = 1

    def __init__(self, spec: DecoderSpec, weights: Weights, deterministic: bool) -> None:
        self.spec = spec
        self.embedding = weights.embedding
        self.norm = weights.norm
        self.head = Linear(weights.head)
        self.device, self.dtype = self.embedding.device, self.embedding.dtype
        self.layers = [_Layer(spec, layer) for layer in weights.layers]
        self.kv_bytes_per_token = spec.layers * 2 * spec.kv_heads * spec.head_dim * self.dtype.itemsize
        exact = deterministic and self.device.type == "cpu" and self.dtype == torch.float32
        self.chunk = CHUNK if exact else 1
        self.info: dict[str, Any] = {
            "path": "torch",
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "exact": exact,
        }
        self._cos = self._sin = torch.empty(0, spec.head_dim, device=self.device)

    def reserve(self, blocks: int) -> KV:
        s = self.spec
        shape = (2, blocks, BLOCK, s.kv_heads, s.head_dim)
        return [zeros(shape, self.dtype, self.device) for _ in range(s.layers)]

    @torch.inference_mode()
    def forward(self, batch: Batch, kv: KV) -> tuple[torch.Tensor, torch.Tensor]:
        s = self.spec
        slots, positions = _places(batch.segments)
        cos, sin = self._rope(positions)
        slot = torch.tensor(slots, device=self.device)
        tables = [
            torch.tensor(seg.blocks[: -(-seg.end // BLOCK)], device=self.device) for seg in batch.segments
        ]
        units = [segment.units(self.chunk) for segment in batch.segments]
        masks = Masks()
        x = self.embedding[torch.tensor(batch.tokens, device=self.device)]
        for layer, cache in zip(self.layers, kv, strict=True):
            q, k, v = layer.project(x, cos, sin)
            cache.view(2, -1, s.kv_heads, s.head_dim).index_copy_(1, slot, torch.stack((k, v)))
            out = torch.empty_like(q)
            row = 0
            for table, cuts in zip(tables, units, strict=True):
                keys, values = cache[:, table].flatten(1, 2).transpose(1, 2)
                for start, end in cuts:
                    rows = slice(row, row + end - start)
                    out[rows] = attend(q[rows], keys[:, :end], values[:, :end], s.head_dim**-0.5, masks)
                    row += end - start
            x = layer.finish(x, out.flatten(1))
        wanted = torch.tensor(batch.rows + batch.states, dtype=torch.long, device=self.device)
        x = _rms(x[wanted], self.norm, s.eps)
        heads, states = x[: len(batch.rows)], x[len(batch.rows) :]
        logits = self.head(heads) if batch.rows else torch.empty(0, s.vocab)
        return logits.float().cpu(), states.float().cpu()

    def _rope(self, positions: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of each position, [rows, 1, head_dim]. Whole pages are computed, so that a position
        always gets the same bits."""
        while max(positions) >= self._cos.shape[0]:
            start = self._cos.shape[0]
            angle = torch.outer(torch.arange(start, start + ROPE_PAGE).float(), self.spec.inv_freq).repeat(
                1, 2
            )
            scale = self.spec.rope_scale
            self._cos = torch.cat((self._cos, (angle.cos() * scale).to(self.device, self._cos.dtype)))
            self._sin = torch.cat((self._sin, (angle.sin() * scale).to(self.device, self._sin.dtype)))
        at = torch.tensor(positions, device=self.device)
        return self._cos[at].unsqueeze(1).to(self.dtype), self._sin[at].unsqueeze(1).to(self.dtype)


class _Layer:
    def __init__(self, spec: DecoderSpec, weights: dict[str, torch.Tensor | None]) -> None:
        w: Any = weights
        self.spec = spec
        self.qkv = Linear(w["qkv"], w["qkv_bias"])
        self.out = Linear(w["out"], w["out_bias"])
        self.gate_up = Linear(w["gate_up"], w["gate_up_bias"])
        self.down = Linear(w["down"], w["down_bias"])
        self.norm1, self.norm2, self.q_norm, self.k_norm = w["norm1"], w["norm2"], w["q_norm"], w["k_norm"]

    def project(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Rotated queries [rows, heads, head_dim], rotated keys and values [rows, kv_heads, head_dim]."""
        s = self.spec
        qkv = self.qkv(_rms(x, self.norm1, s.eps)).view(x.shape[0], -1, s.head_dim)
        q, k, v = torch.split(qkv, [s.heads, s.kv_heads, s.kv_heads], 1)
        if self.q_norm is not None:
            q, k = _rms(q, self.q_norm, s.eps), _rms(k, self.k_norm, s.eps)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def finish(self, x: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        x = x + self.out(attention)
        gate, up = self.gate_up(_rms(x, self.norm2, self.spec.eps)).chunk(2, 1)
        return x + self.down(lanewise_silu(gate) * up)


class Masks:
    """Causal masks of one forward pass, shared by its layers."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, int, int | None], torch.Tensor] = {}

    def get(self, rows: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
        """Mask for the last `rows` of the sequence. A row sees its own key and the `window` - 1 keys before
        it; None: all keys before it."""
        mask = self._made.get((rows, keys, window))
        if mask is None:
            mask = torch.ones(rows, keys, dtype=torch.bool, device=device).tril(keys - rows)
            mask = mask if window is None else mask.triu(keys - rows - window + 1)
            self._made[rows, keys, window] = mask
        return mask.to(device)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    masks: Masks,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """q: [rows, heads, dim], the last rows of the sequence; k, v: [kv_heads, keys, dim].

    Returns [rows, heads, value dim]. With a window, k and v begin at the first key that some row sees.
    """
    rows, heads, dim = q.shape
    if rows == 1 and softcap is None and sinks is None:
        # Make the heads of a group the rows of one small product, so that K and V are read once.
        out = scaled_dot_product_attention(q.reshape(1, k.shape[0], -1, dim), k[None], v[None], scale=scale)
        return out.reshape(1, heads, -1)
    group = heads // k.shape[0]
    k, v = (t.repeat_interleave(group, 0) if group > 1 else t for t in (k, v))
    q = q.transpose(0, 1).contiguous()
    mask = masks.get(rows, k.shape[1], window, q.device)
    if softcap is None and sinks is None:
        out = scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=scale)[0]
    else:
        out = _eager(q, k, v, scale, mask, softcap, sinks)
    return out.transpose(0, 1)


def _eager(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    mask: torch.Tensor,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    scores = torch.matmul(q, k.transpose(1, 2)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:  # a learned score in the softmax, without a value
        scores = torch.cat((scores, sinks.view(-1, 1, 1).expand(-1, q.shape[1], 1)), -1)
    weights = torch.softmax(scores.float(), -1).to(q.dtype)
    return torch.matmul(weights[..., : k.shape[1]], v)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def _rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def _places(segments: list[Segment]) -> tuple[list[int], list[int]]:
    """KV slot and position of every row."""
    slots, positions = [], []
    for segment in segments:
        for at in range(segment.start, segment.end):
            slots.append(segment.blocks[at // BLOCK] * BLOCK + at % BLOCK)
            positions.append(at)
    return slots, positions

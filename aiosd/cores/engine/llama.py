"""The Llama family and its relatives (family.py) in plain torch. Runs on every device; fused.py is the fast
one.

A row has the same bits in every batch on the CPU, because linears do not depend on the other rows
(linear.py), attention runs for each sequence alone, in units that depend only on the sequence
(Segment.units), and all else works row by row. Knows segments and block tables, no requests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import gelu, pad, scaled_dot_product_attention, silu, softmax

from aiosd.cores.engine.core import CHUNK, KV, Batch, Segment, zeros
from aiosd.cores.engine.family import DecoderSpec
from aiosd.cores.engine.kv import BLOCK
from aiosd.cores.engine.linear import Linear
from aiosd.cores.engine.weights import Weights, linears

Turn = tuple[torch.Tensor, torch.Tensor]  # cos and sin
ROPE_PAGE = 1024
LANES = 32  # elements of the widest vector loop in torch's elementwise kernels


def lanewise(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """An elementwise function with the same bits for every shape.

    torch computes the tail of each thread's share with scalar code, whose exp rounds differently. Padding
    keeps all elements out of the tails.
    """
    if x.device.type != "cpu":
        return function(x)
    flat = pad(x.reshape(-1), (0, -x.numel() % (LANES * torch.get_num_threads())))
    return function(flat)[: x.numel()].view(x.shape)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return gelu(x, approximate="tanh")


class TorchLlama:
    kv_block_dim = 1

    def __init__(self, spec: DecoderSpec, weights: Weights, deterministic: bool) -> None:
        self.spec = spec
        self.embedding = weights.embedding
        self.norm = weights.norm
        self.head = Linear(weights.head)
        self.device, self.dtype = self.embedding.device, self.embedding.dtype
        self.layers = [_Layer(spec, i, layer) for i, layer in enumerate(weights.layers)]
        self.kv_bytes_per_token = len(spec.layers) * 2 * spec.kv_heads * spec.head_dim * self.dtype.itemsize
        exact = deterministic and self.device.type == "cpu" and self.dtype == torch.float32
        self.chunk = CHUNK if exact else 1
        self.info: dict[str, Any] = {
            "core": "torch",
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "exact": exact,
        }
        self._cos = self._sin = torch.empty(len(spec.ropes), 0, spec.turned, device=self.device)

    def reserve(self, blocks: int) -> KV:
        s = self.spec
        shape = (2, blocks, BLOCK, s.kv_heads, s.head_dim)
        return [zeros(shape, self.dtype, self.device) for _ in s.layers]

    @torch.inference_mode()
    def forward(self, batch: Batch, kv: KV) -> tuple[torch.Tensor, torch.Tensor]:
        s = self.spec
        slots, positions = _places(batch.segments)
        turns = self._turns(positions)
        slot = torch.tensor(slots, device=self.device)
        tables = [
            torch.tensor(seg.blocks[: -(-seg.end // BLOCK)], device=self.device) for seg in batch.segments
        ]
        units = [segment.units(self.chunk) for segment in batch.segments]
        masks = Masks()
        x = self.embedding[torch.tensor(batch.tokens, device=self.device)]
        if s.embedding_scale != 1:
            x = x * torch.tensor(s.embedding_scale, dtype=self.dtype, device=self.device)
        for layer, cache in zip(self.layers, kv, strict=True):
            q, k, v = layer.project(x, turns)
            window, cap = layer.own.window or None, s.attention_cap or None
            cache.view(2, -1, s.kv_heads, s.head_dim).index_copy_(1, slot, torch.stack((k, v)))
            out = torch.empty_like(q)
            row = 0
            for table, cuts in zip(tables, units, strict=True):
                keys, values = cache[:, table].flatten(1, 2).transpose(1, 2)
                for start, end in cuts:
                    rows = slice(row, row + end - start)
                    seen = slice(max(0, start - window + 1) if window else 0, end)
                    out[rows] = attend(
                        q[rows],
                        keys[:, seen],
                        values[:, seen],
                        s.attention_scale,
                        masks,
                        window=window,
                        softcap=cap,
                    )
                    row += end - start
            x = layer.finish(x, out.flatten(1))
        wanted = torch.tensor(batch.rows + batch.states, dtype=torch.long, device=self.device)
        x = _rms(x[wanted], self.norm, s.eps)
        heads, states = x[: len(batch.rows)], x[len(batch.rows) :]
        logits = self.head(heads) * s.logit_scale if batch.rows else torch.empty(0, s.vocab)
        if s.logit_cap:
            logits = lanewise(torch.tanh, logits / s.logit_cap) * s.logit_cap
        return logits.float().cpu(), states.float().cpu()

    def _turns(self, positions: list[int]) -> list[Turn]:
        """cos and sin of each position for each of the ropes, [rows, 1, rotated numbers]. Whole pages are
        computed, so that a position always gets the same bits."""
        while max(positions) >= self._cos.shape[1]:
            at = torch.arange(self._cos.shape[1], self._cos.shape[1] + ROPE_PAGE).float()
            angles = [torch.outer(at, rope.inv_freq).repeat(1, 2) for rope in self.spec.ropes]
            scales = [rope.scale for rope in self.spec.ropes]
            cos = torch.stack([a.cos() * scale for a, scale in zip(angles, scales, strict=True)])
            sin = torch.stack([a.sin() * scale for a, scale in zip(angles, scales, strict=True)])
            self._cos = torch.cat((self._cos, cos.to(self.device)), 1)
            self._sin = torch.cat((self._sin, sin.to(self.device)), 1)
        rows = torch.tensor(positions, device=self.device)
        cos, sin = (t[:, rows].unsqueeze(2).to(self.dtype) for t in (self._cos, self._sin))
        return list(zip(cos, sin, strict=True))


class _Layer:
    def __init__(self, spec: DecoderSpec, i: int, weights: dict[str, torch.Tensor | None]) -> None:
        self.spec, self.own = spec, spec.layers[i]
        w: dict[str, Any] = weights
        self.linears = {name: Linear(w.pop(name), w.pop(f"{name}_bias")) for name in linears(spec, i)}
        self.norms: dict[str, torch.Tensor] = w

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """x itself where the family has no such norm."""
        return _rms(x, self.norms[name], self.spec.eps) if name in self.norms else x

    def project(self, x: torch.Tensor, turns: list[Turn]) -> tuple[torch.Tensor, ...]:
        """Rotated queries [rows, heads, head_dim], rotated keys and values [rows, kv_heads, head_dim]."""
        s, rows = self.spec, x.shape[0]
        widths = [heads * s.head_dim for heads in (s.heads, s.kv_heads, s.kv_heads)]
        q, k, v = torch.split(self.linears["qkv"](self.norm("norm1", x)), widths, 1)
        if s.family.qk_norm == "all":
            q, k = self.norm("q_norm", q), self.norm("k_norm", k)
        q, k, v = (t.reshape(rows, -1, s.head_dim) for t in (q, k, v))
        if s.family.qk_norm == "head":
            q, k = self.norm("q_norm", q), self.norm("k_norm", k)
        if self.own.rope < 0:
            return q, k, v
        cos, sin = turns[self.own.rope]
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def finish(self, x: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        scale = self.spec.residual_scale
        x = x + self.norm("after1", self.linears["out"](attention)) * scale
        h = self.norm("norm2", x)
        added = self._mlp(h) if self.own.inner else torch.zeros_like(h)
        if self.own.experts:
            added = self._experts(h) + (
                added * lanewise(torch.sigmoid, self.linears["shared"](h)) if self.own.inner else 0
            )
        return x + self.norm("after2", added) * scale

    def _mlp(self, h: torch.Tensor, slot: str = "") -> torch.Tensor:
        gate, up = self.linears[f"{slot}gate_up"](h).chunk(2, 1)
        return self.linears[f"{slot}down"](lanewise(gelu_tanh if self.spec.gelu else silu, gate) * up)

    def _experts(self, h: torch.Tensor) -> torch.Tensor:
        """Each row adds its experts in the order of their numbers, whatever the other rows choose."""
        shares, chosen = softmax(self.linears["router"](h).float(), -1).topk(self.spec.chosen)
        if self.spec.renormalise:
            shares = shares / shares.sum(-1, keepdim=True)
        added = torch.zeros_like(h)
        for expert in sorted(set(chosen.flatten().tolist())):
            rows, place = (chosen == expert).nonzero(as_tuple=True)
            share = shares[rows, place, None].to(h.dtype)
            added[rows] += self._mlp(h[rows], f"expert.{expert}.") * share
        return added


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
    """The first numbers of each head, as many as cos has."""
    turned = cos.shape[-1]
    y, half = x[..., :turned], turned // 2
    y = y * cos + torch.cat((-y[..., half:], y[..., :half]), -1) * sin
    return y if turned == x.shape[-1] else torch.cat((y, x[..., turned:]), -1)


def _rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * wide.to(weight.dtype)).to(x.dtype)


def _places(segments: list[Segment]) -> tuple[list[int], list[int]]:
    """KV slot and position of every row."""
    slots, positions = [], []
    for segment in segments:
        for at in range(segment.start, segment.end):
            slots.append(segment.blocks[at // BLOCK] * BLOCK + at % BLOCK)
            positions.append(at)
    return slots, positions

"""The Llama family and its relatives with the compiled forward pass (ops.cpp): CPU, float32, one call for
each step.

A row has the same bits wherever prefill is cut (chunk = 1), so a recomputed prefix has the same bits too.
Knows segments and block tables, no requests.
"""

from __future__ import annotations

import ctypes
import weakref
from array import array
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from aiosd.cores.engine.core import KV, Batch, zeros
from aiosd.cores.engine.family import DecoderSpec
from aiosd.cores.engine.gguf import TYPES, plain
from aiosd.cores.engine.kv import BLOCK
from aiosd.cores.engine.stored import OURS, StoredTensor
from aiosd.cores.engine.weights import StoredWeights, Weights, linears

LINEARS = ("qkv", "out", "gate_up", "down", "router", "shared")  # as ops.cpp counts them
NORMS = ("norm1", "norm2", "q_norm", "k_norm", "after1", "after2")

# Kinds of weights that are read as they are stored (quantised.h): values in a block.
STAY = {
    "F32": 8, "Q4_0": 32, "Q4_1": 32, "Q5_0": 32, "Q5_1": 32, "Q8_0": 32,
    "Q4_K": 256, "Q5_K": 256, "Q6_K": 256, **dict.fromkeys(OURS, 32),
}  # fmt: skip
NUMBERS = {name: number for number, (name, _, _) in TYPES.items()} | OURS
OUTPUTS = 16  # of a panel


class FusedLlama:
    chunk = 1
    kv_block_dim = 0  # all layers of a block side by side: the first tokens take little memory

    def __init__(
        self,
        spec: DecoderSpec,
        weights: Weights | StoredWeights,
        lib: ctypes.CDLL,
        threads: int,
        quantization: str,
    ) -> None:
        self._lib = lib
        self.spec = spec
        self._stride = -(-spec.vocab // 16) * 16
        self.vocab = spec.vocab
        shape = [
            len(spec.layers),
            spec.hidden,
            spec.heads,
            spec.kv_heads,
            spec.head_dim,
            spec.vocab,
            spec.turned,
        ]
        shape += [len(spec.ropes), spec.experts, spec.chosen, spec.renormalise, spec.gelu]
        dims = array("q", [*shape, spec.family.qk_norm == "all"])
        scales = [
            spec.eps,
            spec.embedding_scale,
            spec.residual_scale,
            spec.attention_scale,
            spec.attention_cap,
        ]
        reals = array("f", [*scales, spec.logit_scale, spec.logit_cap])
        ends = [torch.cat([rope.inv_freq for rope in spec.ropes])]
        ends += [torch.tensor([rope.scale for rope in spec.ropes]), weights.norm]
        ends += [weights.embedding, weights.head] if isinstance(weights, Weights) else []
        held = [t.contiguous() for t in ends]
        inv_freq, rope_scale, norm, embedding, head = [*(t.data_ptr() for t in held), None, None][:5]
        self._model = ctypes.c_void_p(
            lib.aiosd_new(
                _at(dims), _at(reals), inv_freq, rope_scale, embedding, norm, head, threads,
                quantization == "int8",
            )
        )  # fmt: skip
        for i, own in enumerate(spec.layers):
            lib.aiosd_layer(self._model, i, own.window, own.rope)
        self._free = weakref.finalize(self, lib.aiosd_free, self._model)
        self._kept: list[Any] = []  # stored weights, which C++ reads while the model lives
        self.kept_bytes: dict[str, int] = {}  # of each of their types
        if isinstance(weights, StoredWeights):
            self._give_stored(weights)
        else:
            for i, layer in enumerate(weights.layers):
                self._give(i, layer)
        self.kv_bytes_per_token = lib.aiosd_kv_floats(self._model) * 4 // BLOCK
        self.info: dict[str, Any] = {
            "core": "fused",
            "dtype": "float32",
            "device": "cpu",
            "exact": True,
            "threads": threads,
            "quantization": quantization,
        }

    def _give(self, i: int, layer: dict[str, torch.Tensor | None]) -> None:
        for name in linears(self.spec, i):
            weight, bias = layer.pop(name), layer.pop(f"{name}_bias")
            assert weight is not None
            weight = weight.contiguous()
            self._lib.aiosd_linear(
                self._model,
                i,
                number(name),
                weight.data_ptr(),
                None if bias is None else bias.data_ptr(),
                *weight.shape,
            )
        self._give_norms(i, layer)

    def _give_norms(self, i: int, layer: Mapping[str, Any]) -> None:
        for which, name in enumerate(NORMS):
            norm = layer.get(name)
            if norm is not None:
                self._lib.aiosd_norm(self._model, i, which, norm.contiguous().data_ptr(), norm.numel())

    def _give_stored(self, weights: StoredWeights) -> None:
        embedding = _readable(weights.embedding)
        self._lib.aiosd_stored_embedding(self._model, NUMBERS[embedding.type], self._keep(embedding))
        self._give_parts(-1, 0, [embedding if weights.head is weights.embedding else weights.head])
        for i, layer in enumerate(weights.layers):
            for name in linears(self.spec, i):
                parts, bias = layer[name], layer[f"{name}_bias"]
                assert isinstance(parts, list)
                self._give_parts(i, number(name), parts)
                if isinstance(bias, torch.Tensor):
                    bias = bias.contiguous()
                    self._lib.aiosd_bias(self._model, i, number(name), bias.data_ptr(), bias.numel())
            self._give_norms(i, layer)

    def _give_parts(self, i: int, which: int, parts: list[StoredTensor]) -> None:
        first, outputs = 0, sum(part.shape[0] for part in parts)
        # a panel would hold two parts, or part of a group
        if any(part.shape[0] % OUTPUTS for part in parts[:-1]) or (i >= 0 and parts[0].shape[1] % 8):
            whole = np.concatenate([plain(part) for part in parts])
            self._lib.aiosd_linear(self._model, i, which, whole.ctypes.data, None, *whole.shape)
            return
        for part in map(_readable, parts):
            at, size = self._keep(part), part.row_bytes
            for row, stride, count in _runs(part):
                self._lib.aiosd_stored(
                    self._model, i, which, NUMBERS[part.type], at + row * size, stride * size,
                    first, count, outputs, part.shape[1],
                )  # fmt: skip
                first += count

    def _keep(self, part: StoredTensor) -> int:
        """Keep a part's memory as long as the model, and return its address."""
        rows = np.frombuffer(part.data, np.uint8)
        self._kept.append(rows)
        self.kept_bytes[part.type] = self.kept_bytes.get(part.type, 0) + len(rows)
        return int(rows.ctypes.data)

    def reserve(self, blocks: int) -> KV:
        # Attention multiplies the unused slots of a block by zero. Zeroed memory has no NaN there.
        shape = (blocks, self._lib.aiosd_kv_floats(self._model))
        return [zeros(shape, torch.float32, torch.device("cpu"))]

    def forward(self, batch: Batch, kv: KV) -> tuple[torch.Tensor, torch.Tensor]:
        """Releases the GIL while it runs."""
        segments = batch.segments
        tokens, rows = array("i", batch.tokens), array("i", batch.rows + batch.states)
        tables = array("q", [s.blocks.buffer_info()[0] for s in segments])
        starts, lengths = array("i", [s.start for s in segments]), array("i", [s.length for s in segments])
        logits = torch.empty(len(batch.rows), self._stride)
        states = torch.empty(len(batch.states), self.spec.hidden)
        self._lib.aiosd_forward(
            self._model,
            kv[0].data_ptr(),
            len(tokens),
            _at(tokens),
            len(segments),
            _at(tables),
            _at(starts),
            _at(lengths),
            len(rows),
            _at(rows),
            len(batch.rows),
            logits.data_ptr(),
            states.data_ptr(),
        )
        return logits[:, : self.vocab], states


def number(linear: str) -> int:
    """As ops.cpp counts the linears of a layer: the experts' follow the others, two of each."""
    if not linear.startswith("expert."):
        return LINEARS.index(linear)
    _, expert, part = linear.split(".")
    return len(LINEARS) + 2 * int(expert) + (part == "down")


def _readable(part: StoredTensor) -> StoredTensor:
    """Return the part, in float32 if it cannot stay as it is stored."""
    if part.type not in STAY or part.shape[1] % STAY[part.type]:
        return _floats(plain(part))
    return part.ordered() if part.heads and part.shape[0] // part.heads // 2 % OUTPUTS else part


def _floats(values: Any) -> StoredTensor:
    """Return float32 rows, filled up with zeros to whole blocks."""
    whole = np.ascontiguousarray(np.pad(values, ((0, 0), (0, -values.shape[1] % STAY["F32"]))))
    return StoredTensor("F32", whole.shape, whole.data.cast("B"))


def _runs(part: StoredTensor) -> list[tuple[int, int, int]]:
    """Return the runs of rows that make the part: first row, rows from one to the next, count."""
    if not part.heads:
        return [(0, 1, part.shape[0])]
    dim = part.shape[0] // part.heads
    return [(head * dim + half, 2, dim // 2) for head in range(part.heads) for half in (0, 1)]


def _at(values: array[Any]) -> int:
    return values.buffer_info()[0]

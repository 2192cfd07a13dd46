"""The Llama family with the compiled forward pass (ops.cpp): CPU, float32, one call for each step.

A row has the same bits wherever prefill is cut (chunk = 1), so a recomputed prefix has the same bits too.
Knows segments and block tables, no requests.
"""

from __future__ import annotations

import ctypes
import weakref
from array import array
from typing import Any

import torch

from aiosd.cores.engine.core import KV, Batch, zeros
from aiosd.cores.engine.family import DecoderSpec, Weights
from aiosd.cores.engine.kv import BLOCK

LINEARS = ("qkv", "out", "gate_up", "down")
NORMS = ("norm1", "norm2", "q_norm", "k_norm")


class FusedLlama:
    chunk = 1
    kv_block_dim = 1

    def __init__(
        self, spec: DecoderSpec, weights: Weights, lib: ctypes.CDLL, threads: int, quantization: str
    ) -> None:
        self._lib = lib
        self.spec = spec
        self._stride = -(-spec.vocab // 16) * 16
        self.vocab = spec.vocab
        dims = array(
            "q",
            [
                spec.layers,
                spec.hidden,
                spec.heads,
                spec.kv_heads,
                spec.head_dim,
                spec.intermediate,
                spec.vocab,
            ],
        )
        reals = array("f", [spec.eps, spec.rope_scale])
        held = [t.contiguous() for t in (spec.inv_freq, weights.embedding, weights.norm, weights.head)]
        self._model = ctypes.c_void_p(
            lib.aiosd_new(
                _at(dims), _at(reals), *(t.data_ptr() for t in held), threads, quantization == "int8"
            )
        )
        self._free = weakref.finalize(self, lib.aiosd_free, self._model)
        for i, layer in enumerate(weights.layers):
            self._give(i, layer)
        self.kv_bytes_per_token = lib.aiosd_kv_floats(self._model) * 4 // BLOCK
        self.info: dict[str, Any] = {
            "path": "fused",
            "dtype": "float32",
            "device": "cpu",
            "exact": True,
            "threads": threads,
            "quantization": quantization,
        }

    def _give(self, i: int, layer: dict[str, torch.Tensor | None]) -> None:
        for which, name in enumerate(LINEARS):
            weight, bias = layer.pop(name), layer.pop(f"{name}_bias")
            assert weight is not None
            weight = weight.contiguous()
            self._lib.aiosd_linear(
                self._model,
                i,
                which,
                weight.data_ptr(),
                None if bias is None else bias.data_ptr(),
                *weight.shape,
            )
        for which, name in enumerate(NORMS):
            norm = layer.pop(name)
            if norm is not None:
                self._lib.aiosd_norm(self._model, i, which, norm.contiguous().data_ptr(), norm.numel())

    def reserve(self, blocks: int) -> KV:
        # Attention multiplies the unused slots of a block by zero. Zeroed memory has no NaN there.
        layers = self.spec.layers
        shape = (layers, blocks, self._lib.aiosd_kv_floats(self._model) // layers)
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
            kv[0].shape[1],
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


def _at(values: array[Any]) -> int:
    return values.buffer_info()[0]

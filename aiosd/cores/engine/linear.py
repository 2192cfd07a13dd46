"""Linear layers in which a row's bits do not depend on the other rows of the batch.

For CPU and float32, oneDNN computes with packed weights. On most CPUs its kernels add up a row in the same
order for every batch size. On some (AVX-512, deep layers) a single row takes another path. So each new layer
measures the smallest safe batch, and smaller batches are padded. Other devices and dtypes use F.linear,
without this promise.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear, pad

LIMIT = 512  # rows of one call; larger batches are split
PROBE = (1, 2, 3, 4, 5, 8, 15, 16, 17, 33, 64, 130, LIMIT)
MINIMA = (1, 2, 4, 8, 16)

_minimum: dict[tuple[int, int, bool, int], int] = {}  # (shape, bias, threads) → smallest safe batch; 0: none


class Linear:
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """weight: [outputs, inputs]."""
        self.bias = bias
        self.packed = (
            weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.enabled
        )
        self.weight = (
            torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), LIMIT) if self.packed else weight
        )
        self.minimum = 1
        if self.packed:
            key = (weight.shape[0], weight.shape[1], bias is None, torch.get_num_threads())
            if key not in _minimum:
                _minimum[key] = self._probe(weight.shape[1])
            self.minimum = _minimum[key]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [rows, inputs], contiguous."""
        if not self.packed:
            return linear(x, self.weight, self.bias)
        rows = x.shape[0]
        if self.minimum == 0:
            return self._blocks(x)
        if rows < self.minimum:
            return self._call(pad(x, (0, 0, 0, self.minimum - rows)))[:rows]
        if rows <= LIMIT:
            return self._call(x)
        # A remainder below the minimum is padded by the recursion.
        return torch.cat([self(part) for part in torch.split(x, LIMIT)])

    def _call(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out

    def _blocks(self, x: torch.Tensor) -> torch.Tensor:
        """The slow fallback: every call has the same number of rows."""
        size = MINIMA[-1]
        return torch.cat(
            [self._call(pad(p, (0, 0, 0, size - p.shape[0])))[: p.shape[0]] for p in torch.split(x, size)]
        )

    def _probe(self, inputs: int) -> int:
        """The smallest batch size from which on all sizes give the same bits. 0: there is none."""
        x = torch.randn(LIMIT, inputs, generator=torch.Generator().manual_seed(1))
        whole = self._call(x)
        agree = {n: torch.equal(self._call(x[:n].contiguous()), whole[:n]) for n in PROBE}
        return next((m for m in MINIMA if all(ok for n, ok in agree.items() if n >= m)), 0)

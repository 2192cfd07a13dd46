"""Change transformers' modules so that a row's bits do not depend on the other rows (CPU, float32).

Packs linears (linear.py). Pads activations and rotary tables, because torch computes the tail of each
thread's share with scalar code that rounds differently. foreign.py then tests whether this is enough for a
model.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import activations
from transformers.pytorch_utils import Conv1D

from aiosd.cores.engine.linear import Linear
from aiosd.cores.engine.llama import LANES

ACTIVATIONS = tuple(c for c in vars(activations).values() if isinstance(c, type) and issubclass(c, nn.Module))
ACTIVATIONS += (nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Mish)


class PackedLinear(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        weight, bias = cast(torch.Tensor, inner.weight), cast("torch.Tensor | None", inner.bias)
        self.linear = Linear(
            weight.detach().t() if isinstance(inner, Conv1D) else weight.detach(),
            None if bias is None else bias.detach(),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.reshape(-1, x.shape[-1]).contiguous()).view(*x.shape[:-1], -1)


class Lanewise(nn.Module):
    """An elementwise function on a padded size, at which no element is in a tail."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        missing = -x.numel() % (LANES * torch.get_num_threads())
        flat = pad(x.reshape(-1), (0, missing))
        return cast(torch.Tensor, self.inner(flat))[: x.numel()].view_as(x)


class PaddedRotary(nn.Module):
    """cos and sin, with the positions padded to whole vectors."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        n = position_ids.shape[-1]
        padded = pad(position_ids, (0, -n % (LANES * torch.get_num_threads())))
        cos, sin = self.inner(x, padded, *args, **kwargs)
        return cos[:, :n], sin[:, :n]


def make_rowwise(module: nn.Module) -> None:
    for name, child in module.named_children():
        if type(child) in (nn.Linear, Conv1D):
            setattr(module, name, PackedLinear(child))
        elif isinstance(child, ACTIVATIONS):
            setattr(module, name, Lanewise(child))
        elif type(child).__name__.endswith("RotaryEmbedding"):
            setattr(module, name, PaddedRotary(child))
        else:
            make_rowwise(child)

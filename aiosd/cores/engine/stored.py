"""Weights as they are stored: those of a GGUF file, and three formats of our own for other quantised weights.

Ours have blocks of 32 numbers of a row, which quantised.h reads: a word of 4 bytes, then the numbers. I4: 4
bits each, number k beside number k + 16; the word is the scale as a float, with the zero point instead of its
8 lowest bits. I8 and F8 (E4M3): a byte each; the word is the scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

BLOCK = 32
OURS = {"I4": 1004, "I8": 1008, "F8": 1009}  # as quantised.h numbers them


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as it lies in the file. `shape` is that of Hugging Face: outputs first."""

    type: str
    shape: tuple[int, ...]
    data: memoryview
    heads: int = 0  # whose rows lie in pairs: first and second half in turn. 0: the rows lie in their order

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        return len(self.data) // math.prod(self.shape[:-1])

    def ordered(self) -> StoredTensor:
        """Return the tensor with its rows in their order; a copy where they lie in pairs."""
        if not self.heads:
            return self
        rows = np.frombuffer(self.data, np.uint8).reshape(self.heads, -1, 2, self.row_bytes)
        return StoredTensor(self.type, self.shape, memoryview(rows.swapaxes(1, 2).tobytes()))


def four_bits(numbers: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> StoredTensor:
    """Pack (number - zero) * scale. numbers, zero: uint8; [outputs, inputs], and [outputs, inputs / 32] of
    the scale, whose 16 leading bits of fraction count, and of the zero point."""
    blocks = numbers.view(*scale.shape, BLOCK)
    word = scale.float().contiguous().view(torch.int32) + 128 & ~255 | zero.int()
    return _packed("I4", numbers.shape, word, blocks[..., :16] | blocks[..., 16:] << 4)


def eight_bits(numbers: torch.Tensor, scale: torch.Tensor) -> StoredTensor:
    """Pack number * scale. numbers: int8 or float8_e4m3fn [outputs, inputs]; scale [outputs, inputs / 32]."""
    kind = "I8" if numbers.dtype == torch.int8 else "F8"
    blocks = numbers.contiguous().view(torch.uint8).view(*scale.shape, BLOCK)
    return _packed(kind, numbers.shape, scale.float().contiguous().view(torch.int32), blocks)


def whole(values: torch.Tensor) -> StoredTensor:
    """Return a float tensor as it is."""
    numbers = values.float().contiguous().numpy()
    return StoredTensor("F32", tuple(values.shape), numbers.reshape(-1).data.cast("B"))


def _packed(kind: str, shape: torch.Size, word: torch.Tensor, numbers: torch.Tensor) -> StoredTensor:
    made = torch.cat([word.contiguous().unsqueeze(-1).view(torch.uint8), numbers], -1)
    return StoredTensor(kind, tuple(shape), made.reshape(-1).numpy().data)


def floats(stored: StoredTensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the values of a tensor in one of our formats, in float32."""
    rows = torch.frombuffer(stored.data, dtype=torch.uint8).view(
        *stored.shape[:-1], stored.shape[-1] // BLOCK, -1
    )
    word = rows[..., :4].contiguous().view(torch.int32)
    if stored.type == "I4":
        numbers = torch.cat([rows[..., 4:] & 15, rows[..., 4:] >> 4], -1).float() - (word & 255)
        word = word & ~255
    else:
        numbers = rows[..., 4:].contiguous().view(torch.int8 if stored.type == "I8" else torch.float8_e4m3fn)
    made: np.ndarray[Any, np.dtype[np.float32]] = (
        (numbers.float() * word.view(torch.float32)).reshape(stored.shape).numpy()
    )
    return made

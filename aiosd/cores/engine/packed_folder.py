"""A model folder with quantised weights: compressed-tensors, GPTQ, AWQ and FP8 checkpoints, repacked at load.

Their libraries wrap modules of torch, which the compiled core has not. So the published formats are read
here, and each weight keeps its value: 4-bit numbers stay 4 bits, others a byte. A weight whose groups do not
lie side by side (act-order), or are no multiples of 32, becomes float32. Activations stay float32, also where
a checkpoint would round them. Formats: compressed_tensors/compressors, AutoGPTQ, AutoAWQ, and transformers'
quantizer of FP8.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from aiosd.cores.engine import stored
from aiosd.cores.engine.folder import COPY_AGAIN, ModelFolder
from aiosd.cores.engine.gguf import plain
from aiosd.cores.engine.stored import BLOCK, StoredTensor
from aiosd.errors import ModelError

METHODS = ("compressed-tensors", "gptq", "awq", "fp8")
FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
ENDS = ("model.embed_tokens.weight", "lm_head.weight")
SMALL = (".gate.weight", "_gate.weight")  # they choose experts, and have few outputs
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where a word holds number i
# Numbers [outputs, inputs]; scale and zero point [outputs, groups]; the group of each input, if not in order.
Numbers = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]
INSTEAD = "use a GGUF file of the model, or a checkpoint in one of these formats: " + ", ".join(METHODS)


def is_packed(folder: ModelFolder) -> bool:
    how = folder.config.get("quantization_config")
    return isinstance(how, dict) and how.get("quant_method") in METHODS


class PackedFolder(ModelFolder):
    """`expanded_bytes` counts the float32 that quantised weights became."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.expanded_bytes = 0
        self.how: Mapping[str, Any] = self.config["quantization_config"]
        self.method = str(self.how.get("quant_method"))
        self._check_method()

    def _check_method(self) -> None:
        why = ""
        if self.method == "compressed-tensors" and self.how.get("format") not in FORMATS:
            why = f"format {str(self.how.get('format'))[:40]!r} of compressed-tensors"
        elif self.method == "awq" and str(self.how.get("version", "gemm")).lower() != "gemm":
            why = f"version {str(self.how['version'])[:40]!r} of AWQ"
        elif self.method in ("gptq", "awq") and self.how.get("bits") not in (4, 8):
            why = f"{self.method.upper()} with {str(self.how.get('bits'))[:40]} bits"
        elif self.method == "awq" and self.how["bits"] != 4:
            why = "AWQ with 8 bits"
        if why:
            raise ModelError(f"{self.path / 'config.json'}: {why}: aiosd does not read them", INSTEAD)

    def __contains__(self, name: str) -> bool:
        return super().__contains__(name) or self._packed_name(name) in self.place

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name in self.place and f"{name}_scale" not in self.place and f"{name}_scale_inv" not in self.place:
            return super().tensor(name, shape)
        return torch.from_numpy(plain(self.stored(name, shape)))

    def stored(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        """Raises ModelError."""
        base = name.removesuffix("weight")
        try:
            if self._packed_name(name) in self.place:
                made = self._words(base, shape)
            elif f"{name}_scale" in self.place or f"{name}_scale_inv" in self.place:
                made = self._bytes(name, shape)
            else:
                made = stored.whole(super().tensor(name, shape))
        except (RuntimeError, IndexError, KeyError, TypeError, ZeroDivisionError) as error:  # of torch
            why = " ".join(str(error).split())[:200]
            raise ModelError(
                f"{self.path}: {name}: not as config.json describes its {self.method} weights: {why}",
                COPY_AGAIN,
            ) from None
        return made

    def _expanded(self, values: torch.Tensor) -> StoredTensor:
        self.expanded_bytes += values.nbytes
        return stored.whole(values)

    def _packed_name(self, name: str) -> str:
        if self.method == "compressed-tensors":
            return f"{name}_packed"
        return name.removesuffix("weight") + "qweight"

    def _any(self, name: str) -> torch.Tensor:
        """Return a tensor of any shape; the caller's arithmetic fails for a wrong one."""
        shard = self.place[name]
        return super().tensor(name, tuple(self.headers[shard][name]["shape"]))

    # numbers in words of 32 bits

    def _words(self, base: str, shape: tuple[int, ...]) -> StoredTensor:
        if self.method == "compressed-tensors":
            numbers, scale, zero, order = self._compressed(base, shape)
        elif self.method == "gptq":
            numbers, scale, zero, order = self._gptq(base)
        else:
            numbers, scale, zero, order = self._awq(base)
        if tuple(numbers.shape) != shape:
            raise IndexError(f"shape {tuple(numbers.shape)} instead of {shape}")
        groups, bits = scale.shape[1], self._bits(base)
        size = shape[1] // groups
        trivial = order is None or torch.equal(order.long(), torch.arange(shape[1]) // size)
        if trivial and size % BLOCK == 0 and bits == 4:
            return stored.four_bits(numbers, _spread(scale, size), _spread(zero, size))
        middle = bool((zero == 128).all())
        if trivial and size % BLOCK == 0 and bits == 8 and middle:
            return stored.eight_bits((numbers.int() - 128).to(torch.int8), _spread(scale, size))
        index = torch.arange(shape[1]) // size if order is None else order.long()
        return self._expanded((numbers.float() - zero.float()[:, index]) * scale.float()[:, index])

    def _bits(self, base: str) -> int:
        """The bits of a number, from the shapes: config.json may have several schemes."""
        if self.method != "compressed-tensors":
            return int(self.how["bits"])
        words = self._any(f"{base}weight_packed").shape[1]
        return int(words * 32 // self._any(f"{base}weight_shape")[1])

    def _compressed(self, base: str, shape: tuple[int, ...]) -> Numbers:
        bits, scale = self._bits(base), self._any(f"{base}weight_scale")
        if bits not in (4, 8):
            raise ModelError(f"{self.path}: {base}weight has {bits} bits: aiosd reads 4 and 8", INSTEAD)
        scale = scale.view(shape[0], -1) if scale.numel() > 1 else scale.view(1, 1).expand(shape[0], 1)
        zero = torch.full(scale.shape, 1 << bits - 1, dtype=torch.uint8)
        if f"{base}weight_zero_point" in self.place:
            zero = _unpacked(self._any(f"{base}weight_zero_point").t(), bits).t()[: shape[0]]
        order = self._any(f"{base}weight_g_idx") if f"{base}weight_g_idx" in self.place else None
        return _unpacked(self._any(f"{base}weight_packed"), bits)[:, : shape[1]], scale, zero, order

    def _gptq(self, base: str) -> Numbers:
        bits = int(self.how["bits"])
        zero = _unpacked(self._any(f"{base}qzeros"), bits).t()
        if self.how.get("checkpoint_format", "gptq") == "gptq":  # stores one less
            zero = zero + 1
        numbers = _unpacked(self._any(f"{base}qweight").t(), bits)
        order = self._any(f"{base}g_idx") if f"{base}g_idx" in self.place else None
        return numbers, self._any(f"{base}scales").t(), zero, order

    def _awq(self, base: str) -> Numbers:
        def numbers(name: str) -> torch.Tensor:
            found = _unpacked(self._any(name), 4)
            return found.view(len(found), -1, 8)[..., list(AWQ_ORDER)].flatten(1).t()

        return numbers(f"{base}qweight"), self._any(f"{base}scales").t(), numbers(f"{base}qzeros"), None

    # numbers of a byte each

    def _bytes(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        numbers = super().tensor(name, shape)
        inverse = f"{name}_scale_inv" in self.place
        scale = self._any(f"{name}_scale_inv" if inverse else f"{name}_scale").float()
        if scale.numel() == 1 or scale.shape in ((shape[0],), (shape[0], 1)):  # of all, or of each output
            scale = scale.reshape(-1, 1).expand(shape[0], 1)
            size = shape[1]
        else:
            rows, size = self._block(scale, shape)
            scale = scale.repeat_interleave(rows, 0)[: shape[0]]
        index = torch.arange(shape[1]) // size
        if numbers.dtype not in (torch.int8, torch.float8_e4m3fn) or f"{name}_zero_point" in self.place:
            raise ModelError(f"{self.path}: {name}: {numbers.dtype} with a zero point or as it is", INSTEAD)
        if shape[1] % BLOCK or size % BLOCK:
            return self._expanded(numbers.float() * scale[:, index])
        return stored.eight_bits(numbers, scale[:, index[::BLOCK]])

    def _block(self, scale: torch.Tensor, shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns that share a scale."""
        given = self.how.get("weight_block_size")
        groups = self.how.get("config_groups") or {}
        for group in groups.values():
            weights = group.get("weights") or {}
            given = given or weights.get("block_structure")
            if weights.get("group_size"):
                return 1, int(weights["group_size"])
        if not given:
            raise KeyError("no weight_block_size")
        return int(given[0]), int(given[1])


def _unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Words [rows, n] to numbers [rows, n * 32 / bits], the lowest bits first."""
    by = torch.arange(0, 32, bits, dtype=torch.int32)
    return (words.unsqueeze(-1) >> by & (1 << bits) - 1).to(torch.uint8).flatten(1)


def _spread(values: torch.Tensor, size: int) -> torch.Tensor:
    """From one for each group to one for each block."""
    return values.repeat_interleave(size // BLOCK, 1)


class FewBits(ModelFolder):
    """A folder with float weights, whose linears become Q4_1 and whose embedding and head become Q8_0."""

    def stored(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        from gguf import GGMLQuantizationType
        from gguf.quants import quantize

        values = self.tensor(name, shape)
        kind = "Q8_0" if name in ENDS else "Q4_1"
        if shape[1] % BLOCK or name.endswith(SMALL):
            return stored.whole(values)
        made = quantize(values.float().numpy(), GGMLQuantizationType[kind])
        return StoredTensor(kind, shape, made.reshape(-1).data)

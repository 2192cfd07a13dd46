"""The weights of a decoder (family.py), read layer by layer from a model folder or a GGUF file.

A layer is a dictionary: qkv, out, gate_up, down, router, shared, and expert.E.gate_up, expert.E.down are
linears, each with a bias, or None, under NAME_bias; the rest are norms.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from aiosd.cores.engine.family import DecoderSpec
from aiosd.cores.engine.folder import ModelFolder
from aiosd.cores.engine.gguf import GgufFile
from aiosd.cores.engine.packed_folder import FewBits, PackedFolder
from aiosd.cores.engine.stored import StoredTensor


@dataclass
class Weights:
    """Joined so that one product computes several: qkv is [q; k; v], gate_up is [gate; up]."""

    embedding: torch.Tensor
    head: torch.Tensor
    norm: torch.Tensor
    layers: Iterator[dict[str, torch.Tensor | None]]  # one at a time: memory holds them once


@dataclass
class StoredWeights:
    """As they lie in a file: the parts of each linear, one below the other."""

    embedding: StoredTensor
    head: StoredTensor
    norm: torch.Tensor
    layers: Iterator[dict[str, list[StoredTensor] | torch.Tensor | None]]


@dataclass(frozen=True)
class LinearParts:
    parts: tuple[tuple[str, int], ...]  # tensors, and how many outputs each has
    inputs: int
    bias: bool = False


def linears(spec: DecoderSpec, i: int) -> dict[str, LinearParts]:
    layer, hidden = spec.layers[i], spec.hidden
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    made = {
        "qkv": LinearParts(
            (("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)),
            hidden,
            spec.qkv_bias,
        ),
        "out": LinearParts((("self_attn.o_proj", hidden),), q, spec.out_bias),
    }
    if layer.inner:
        made |= _mlp(spec, "", "mlp.shared_expert" if layer.experts else "mlp", layer.inner)
    if layer.experts:
        made["router"] = LinearParts((("mlp.gate", layer.experts),), hidden)
        if layer.inner:
            made["shared"] = LinearParts((("mlp.shared_expert_gate", 1),), hidden)
        for e in range(layer.experts):
            made |= _mlp(spec, f"expert.{e}.", f"mlp.experts.{e}", spec.expert_inner)
    for name, tensor in spec.family.joined.items():
        one = made[name]
        made[name] = replace(one, parts=((tensor, sum(rows for _, rows in one.parts)),))
    return made


def _mlp(spec: DecoderSpec, slot: str, name: str, inner: int) -> dict[str, LinearParts]:
    return {
        f"{slot}gate_up": LinearParts(
            ((f"{name}.gate_proj", inner), (f"{name}.up_proj", inner)), spec.hidden, spec.mlp_bias
        ),
        f"{slot}down": LinearParts(((f"{name}.down_proj", spec.hidden),), inner, spec.mlp_bias),
    }


def norms(spec: DecoderSpec) -> dict[str, tuple[str, int]]:
    """The tensor and the width of each norm of a layer."""
    made = {name: (tensor, spec.hidden) for name, tensor in spec.family.norms.items()}
    if spec.family.qk_norm:
        whole = spec.family.qk_norm == "all"
        made["q_norm"] = ("self_attn.q_norm", spec.head_dim * (spec.heads if whole else 1))
        made["k_norm"] = ("self_attn.k_norm", spec.head_dim * (spec.kv_heads if whole else 1))
    return made


class _Source:
    """A folder or a file, by the names that Llama gives its tensors."""

    def __init__(self, folder: ModelFolder | GgufFile, spec: DecoderSpec) -> None:
        self.folder, self.spec = folder, spec
        self._names = spec.family.names if isinstance(folder, ModelFolder) else {}
        self._inside = spec.family.inside if isinstance(folder, ModelFolder) else ""
        self._one_plus = spec.family.one_plus and isinstance(folder, ModelFolder)  # GGUF holds the sums

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        found = self.folder.tensor(self._theirs(name), shape)
        order = self._order(name)
        if order is None:
            return found
        return found.view(-1, self.spec.head_dim, *shape[1:])[:, order].reshape(shape)

    def stored(self, name: str, *shape: int) -> StoredTensor:
        assert isinstance(self.folder, (GgufFile, PackedFolder, FewBits))
        found, order = self.folder.stored(self._theirs(name), shape), self._order(name)
        if order is None:
            return found
        rows = np.frombuffer(found.data, np.uint8).reshape(
            -1, self.spec.head_dim, len(found.data) // shape[0]
        )
        return StoredTensor(found.type, found.shape, memoryview(rows[:, order].tobytes()))

    def __contains__(self, name: str) -> bool:
        return self._theirs(name) in self.folder

    def norm(self, name: str, width: int) -> torch.Tensor:
        weight = self.folder.tensor(f"{self._theirs(name)}.weight", (width,))
        return weight.float() + 1 if self._one_plus else weight  # a sum in few bits would lose small weights

    def _theirs(self, name: str) -> str:
        if not self._names:
            return self._inside + name
        known = rf"\b({'|'.join(map(re.escape, self._names))})\b"
        return self._inside + re.sub(known, lambda found: self._names[found[0]], name)

    def _order(self, name: str) -> list[int] | None:
        """The order of a head's numbers that puts the two of a rotation where Llama has them: half of the
        rotated part apart. None: they are there."""
        if not self.spec.family.pairs or not name.rsplit(".", 1)[0].endswith(("q_proj", "k_proj")):
            return None
        turned = self.spec.turned
        return [*range(0, turned, 2), *range(1, turned, 2), *range(turned, self.spec.head_dim)]


def read_weights(
    folder: ModelFolder | GgufFile, spec: DecoderSpec, device: torch.device, dtype: torch.dtype
) -> Weights:
    source, norm_dtype = _Source(folder, spec), torch.float32 if spec.family.one_plus else dtype

    def get(name: str, *shape: int) -> torch.Tensor:
        return source.tensor(name, *shape).to(device, dtype)

    def norm(name: str, width: int) -> torch.Tensor:
        return source.norm(name, width).to(device, norm_dtype)

    def layer(i: int) -> dict[str, torch.Tensor | None]:
        begin = f"model.layers.{i}."
        made: dict[str, torch.Tensor | None] = {}
        for name, one in linears(spec, i).items():
            made[name] = torch.cat(
                [get(f"{begin}{part}.weight", rows, one.inputs) for part, rows in one.parts]
            )
            biases = [get(f"{begin}{part}.bias", rows) for part, rows in one.parts] if one.bias else []
            made[f"{name}_bias"] = torch.cat(biases) if biases else None
        for name, (tensor, width) in norms(spec).items():
            made[name] = norm(begin + tensor, width)
        return made

    embedding = get("model.embed_tokens.weight", spec.vocab, spec.hidden)
    tied = spec.tied or "lm_head.weight" not in source
    head = embedding if tied else get("lm_head.weight", spec.vocab, spec.hidden)
    return Weights(
        embedding, head, norm("model.norm", spec.hidden), (layer(i) for i in range(len(spec.layers)))
    )


def read_stored(file: GgufFile | PackedFolder | FewBits, spec: DecoderSpec) -> StoredWeights:
    source = _Source(file, spec)

    def layer(i: int) -> dict[str, list[StoredTensor] | torch.Tensor | None]:
        begin = f"model.layers.{i}."
        made: dict[str, list[StoredTensor] | torch.Tensor | None] = {}
        for name, one in linears(spec, i).items():
            parts = [source.stored(f"{begin}{part}.weight", rows, one.inputs) for part, rows in one.parts]
            made[name] = halves(parts[0]) if name.endswith("gate_up") and len(parts) == 1 else parts
            biases = (
                [source.tensor(f"{begin}{part}.bias", rows) for part, rows in one.parts] if one.bias else []
            )
            made[f"{name}_bias"] = torch.cat(biases) if biases else None
        for name, (tensor, width) in norms(spec).items():
            made[name] = source.norm(begin + tensor, width)
        return made

    embedding = source.stored("model.embed_tokens.weight", spec.vocab, spec.hidden)
    tied = spec.tied or "lm_head.weight" not in file
    head = embedding if tied else source.stored("lm_head.weight", spec.vocab, spec.hidden)
    return StoredWeights(
        embedding, head, source.norm("model.norm", spec.hidden), (layer(i) for i in range(len(spec.layers)))
    )


def halves(stored: StoredTensor) -> list[StoredTensor]:
    """Gate and up, where one tensor holds both."""
    shape, middle = (stored.shape[0] // 2, stored.shape[1]), len(stored.data) // 2
    return [StoredTensor(stored.type, shape, data) for data in (stored.data[:middle], stored.data[middle:])]

"""A GGUF file: its metadata, its tensors as they are stored, and the same model in Hugging Face's words.

The file is mapped, not copied. Everything in it may be wrong or hostile: each length, offset and type is
checked against the size of the file before it is used (ModelError). Format: ggml's docs/gguf.md. Looks like
aiosd.cores.engine.folder.ModelFolder to the rest of the engine.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aiosd.cores.engine import gguf_config
from aiosd.cores.engine import stored as formats
from aiosd.cores.engine.folder import unreadable
from aiosd.cores.engine.stored import StoredTensor
from aiosd.errors import ModelError

MAGIC = b"GGUF"
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
KEYS_MAX, TENSORS_MAX, ITEMS_MAX, DIMENSIONS_MAX = 10_000, 100_000, 2_000_000, 4
NAME_BYTES_MAX, TEXT_BYTES_MAX = 256, 16 << 20
SAMPLE_BYTES, SAMPLES = 1 << 16, 16
AGAIN = "download the file again, and compare its checksum"
# types of tensors: number, name, values in a block, bytes of a block
TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
}  # fmt: skip
NAMES = {  # of Llama and its relatives (family.py) → of GGUF
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "attention_out_norm": "post_attention_norm", "mlp_out_norm": "post_ffw_norm",
    "self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up",
    "mlp.gate": "ffn_gate_inp", "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp", "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp", "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps", "mlp.experts.down_proj": "ffn_down_exps",
}  # fmt: skip
WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
EXPERT = re.compile(r"\.experts\.(\d+)(?=\.)")  # GGUF has all experts of a layer in one tensor
PAIRED = {"llama", "mistral", "mixtral", "smollm3", "granite"}  # queries and keys in the order of pairs


class GgufFile:
    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.tensors: dict[str, StoredTensor] = {}
        self.metadata: dict[str, Any] = {}
        for file in _parts(self.path):
            self._read(file)
        shapes = {name: one.shape for name, one in self.tensors.items()}
        self.config = gguf_config.config(self.path, self.metadata, shapes)
        for name in ("rope_freqs.weight", "rope_factors_short.weight"):
            if name in self.tensors:  # a divisor for each frequency: of Llama 3, and of Phi-3
                factors = plain(self.tensors[name])
                if factors.ndim != 1 or not np.all(factors > 0):
                    raise ModelError(f"{self.path}: {name} does not hold numbers above 0", AGAIN)
                self.config["rope_parameters"]["factors"] = factors.tolist()

    # what ModelFolder has too

    @property
    def parameters(self) -> int:
        return sum(one.count for one in self.tensors.values())

    def identity(self) -> str:
        """Hex digest that changes with metadata, vocabulary or weights, from samples of the file."""
        digest = hashlib.sha256()
        for file in _parts(self.path):
            size = file.stat().st_size
            digest.update(f"{size}".encode())
            with file.open("rb") as f:
                digest.update(f.read(1 << 20))
                for i in range(SAMPLES):
                    f.seek(max(0, size - SAMPLE_BYTES) * i // (SAMPLES - 1))
                    digest.update(f.read(SAMPLE_BYTES))
        return digest.hexdigest()[:32]

    def __contains__(self, name: str) -> bool:
        return gguf_name(name) in self.tensors

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Return a tensor in float32, by its name in Hugging Face's words."""
        return torch.from_numpy(plain(self.stored(name, shape)))

    def stored(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        found, expert = self.tensors.get(gguf_name(name)), EXPERT.search(name)
        if found is None:
            raise ModelError(f"{self.path}: no tensor {gguf_name(name)}", AGAIN)
        if expert and len(found.shape) == 3 and int(expert[1]) < found.shape[0]:
            size, number = len(found.data) // found.shape[0], int(expert[1])
            found = StoredTensor(found.type, found.shape[1:], found.data[number * size : (number + 1) * size])
        if found.shape != shape and (1, *found.shape) != shape:  # a linear of one output is stored as a row
            why = f"{gguf_name(name)} has shape {found.shape}, the metadata say {shape}"
            raise ModelError(f"{self.path}: {why}", AGAIN)
        return self._rotated(name, replace(found, shape=shape))

    def _rotated(self, name: str, stored: StoredTensor) -> StoredTensor:
        """GGUF gives the queries and keys of Llama another order of rows: pairs side by side."""
        part = name.rsplit(".", 2)[1]
        if self.config["model_type"] not in PAIRED or part not in ("q_proj", "k_proj"):
            return stored
        heads = self.config["num_attention_heads" if part == "q_proj" else "num_key_value_heads"]
        return replace(stored, heads=heads)

    # reading

    def _read(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                data = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
        except OSError as error:
            raise unreadable(path, error) from None
        except ValueError:
            raise ModelError(f"{path}: the file is empty", AGAIN) from None
        cursor = _Cursor(path, data)
        if bytes(cursor.take(4)) != MAGIC:
            raise ModelError(f"{path}: not a GGUF file", "name a file that ends in .gguf, or a model folder")
        version = cursor.number("I")
        if version not in (2, 3):
            raise ModelError(
                f"{path}: GGUF version {version}; aiosd reads 2 and 3",
                "convert it again with a newer llama.cpp",
            )
        tensors, keys = cursor.count(TENSORS_MAX), cursor.count(KEYS_MAX)
        for _ in range(keys):
            key = cursor.text(TEXT_BYTES_MAX)
            self.metadata.setdefault(key, cursor.value(cursor.number("I")))
        infos = [cursor.tensor() for _ in range(tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
            raise cursor.wrong(f"an alignment of {alignment}")
        begin = -(-cursor.at // alignment) * alignment
        for name, kind, shape, offset in infos:
            name_of, values, size = kind
            if shape[-1] % values:
                raise cursor.wrong(f"{name}: {shape[-1]} values in blocks of {values}")
            length = math.prod(shape) // values * size
            at = begin + offset
            if offset % alignment or at + length > len(data):
                raise ModelError(
                    f"{path}: truncated: {name} ends at byte {at + length} of {len(data)}", AGAIN
                )
            if name in self.tensors:
                raise cursor.wrong(f"two tensors {name}")
            self.tensors[name] = StoredTensor(name_of, shape, data[at : at + length])


class _Cursor:
    """A place in the header. Each step is checked against the end of the file."""

    def __init__(self, path: Path, data: memoryview) -> None:
        self.path, self._data, self.at = path, data, 0

    def wrong(self, why: str) -> ModelError:
        return ModelError(f"{self.path}: damaged header: {why}", AGAIN)

    def _ends(self) -> ModelError:
        return ModelError(f"{self.path}: truncated: the header ends after {len(self._data)} bytes", AGAIN)

    def take(self, size: int) -> memoryview:
        taken = self._data[self.at : self.at + size]
        if len(taken) < size:
            raise self._ends()
        self.at += size
        return taken

    def number(self, form: str) -> Any:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def count(self, most: int) -> int:
        value: int = self.number("Q")
        if value > most:
            raise self.wrong(f"a count of {value}")
        return value

    def text(self, most: int) -> str:
        return bytes(self.take(self.count(most))).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text(TEXT_BYTES_MAX)
        if kind != ARRAY:
            if kind not in SCALARS:
                raise self.wrong(f"a value of type {kind}")
            return self.number(SCALARS[kind])
        inner, count = self.number("I"), self.count(ITEMS_MAX)
        if inner == STRING:
            return self._texts(count)
        if inner not in SCALARS:
            raise self.wrong(f"a list of type {inner}")
        form = f"<{count}{SCALARS[inner]}"
        return list(struct.unpack(form, self.take(struct.calcsize(form))))

    def _texts(self, count: int) -> list[str]:
        """As `text` does, but a vocabulary has 50,000 and more."""
        made, at, data, length = [], self.at, self._data, struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                (size,) = length(data, at)
                if size > TEXT_BYTES_MAX:
                    raise self.wrong(f"a count of {size}")
                begin, at = at + 8, at + 8 + size
                made.append(str(data[begin:at], "utf-8", "replace"))
        except struct.error:
            at = len(data) + 1
        if at > len(data):
            raise self._ends()
        self.at = at
        return made

    def tensor(self) -> tuple[str, tuple[str, int, int], tuple[int, ...], int]:
        """Return name, type, shape and offset."""
        name, dimensions = self.text(NAME_BYTES_MAX), self.number("I")
        if not 1 <= dimensions <= DIMENSIONS_MAX:
            raise self.wrong(f"{name}: {dimensions} dimensions")
        shape = tuple(reversed([self.count(1 << 40) for _ in range(dimensions)]))
        kind, offset = self.number("I"), self.number("Q")
        if kind not in TYPES:
            raise ModelError(f"{self.path}: {name} has type {kind}, which aiosd does not know", AGAIN)
        if 0 in shape:
            raise self.wrong(f"{name} has no values")
        return name, TYPES[kind], shape, offset


def _parts(path: Path) -> list[Path]:
    """Return the files of a model: NAME-00001-of-00003.gguf names the first of three."""
    split = re.fullmatch(r"(.*)-00001-of-(\d{5})\.gguf", path.name)
    if split is None:
        return [path]
    parts = [path.with_name(f"{split[1]}-{i:05d}-of-{split[2]}.gguf") for i in range(1, int(split[2]) + 1)]
    missing = [part for part in parts if not part.exists()]
    if missing:
        raise ModelError(f"{missing[0]}: no such file", "put all parts of the model into one folder")
    return parts


def gguf_name(name: str) -> str:
    """model.layers.3.self_attn.q_proj.weight → blk.3.attn_q.weight"""
    if layer := LAYER.fullmatch(EXPERT.sub(".experts", name)):
        return f"blk.{layer[1]}.{NAMES.get(layer[2], layer[2])}.{layer[3]}"
    return WHOLE.get(name, name)


def plain(stored: StoredTensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return a tensor's values in float32, [*shape]."""
    stored = stored.ordered()
    if stored.type in formats.OURS:
        return formats.floats(stored)
    if stored.type == "F32":
        return np.frombuffer(stored.data, np.float32).reshape(stored.shape).copy()
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    rows = np.frombuffer(stored.data, np.uint8).reshape(*stored.shape[:-1], -1)
    kind = GGMLQuantizationType[stored.type]
    made: np.ndarray[Any, np.dtype[np.float32]] = dequantize(rows, kind).reshape(stored.shape)
    return made


def stored_bytes(stored: Mapping[str, StoredTensor]) -> dict[str, int]:
    """Return the bytes of each type of tensor."""
    sizes: dict[str, int] = {}
    for one in stored.values():
        sizes[one.type] = sizes.get(one.type, 0) + len(one.data)
    return sizes

"""Estimate the memory that a model will take, from the headers of its files. Loads nothing, knows no torch.

A file may be wrong or hostile: what cannot be read counts as 0, and the worker then says what is wrong.
"""

from __future__ import annotations

import json
import math
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from aiosd.config.config import EngineConfig

PROCESS_BYTES = 320 << 20  # a worker without a model: the interpreter and PyTorch
LEAST_KV_BYTES = 256 << 20  # no model needs more KV than this to be useful
HEADER_BYTES_MAX = 64 << 20
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
WRONG = (OSError, ArithmeticError, LookupError, ValueError, TypeError, AttributeError, struct.error,
         RecursionError)  # fmt: skip
# GGUF (ggml's docs/gguf.md): scalar types, and for each tensor type values and bytes of a block
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
FLOAT_TYPES = (0, 1, 30)
BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 10: (256, 84),
    11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 30: (1, 2),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of one worker. `mapped` of the weights are the pages of a file, which replicas share."""

    weights: int = 0
    mapped: int = 0
    kv_per_token: int = 0
    context_length: int = 0

    @property
    def fixed(self) -> int:
        return PROCESS_BYTES + self.weights

    def least_kv(self, kv_bytes: int) -> int:
        """The KV without which the model is of no use: of one whole context, or what is configured."""
        of_context = self.kv_per_token * self.context_length or LEAST_KV_BYTES
        return min(of_context, LEAST_KV_BYTES, kv_bytes or LEAST_KV_BYTES)

    def most_kv(self, kv_bytes: int, max_running: int) -> int:
        """The KV that the model uses if there is room. `kv_bytes` 0: fitted to what is left."""
        return kv_bytes or self.kv_per_token * self.context_length * max_running or LEAST_KV_BYTES


def footprint(path: Path, engine: EngineConfig, on_gpu: bool) -> Footprint:
    try:
        if path.suffix == ".gguf":
            return of_gguf(path, on_gpu)
        return of_folder(path, engine, on_gpu)
    except WRONG:
        return Footprint()


def opened(path: Path) -> BinaryIO:
    """Only a file, so that a named pipe does not hold up the daemon. Raises OSError."""
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(f"{path} is no file")
    return file


def of_folder(folder: Path, engine: EngineConfig, on_gpu: bool) -> Footprint:
    with opened(folder / "config.json") as file:
        config = json.loads(file.read(HEADER_BYTES_MAX))
    config |= config.get("text_config") or {}
    width = SIZES.get(engine.dtype, 0) or (0 if on_gpu else 4)
    weights = 0
    for shard in folder.glob("*.safetensors"):
        with opened(shard) as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, HEADER_BYTES_MAX)))
        header.pop("__metadata__", None)
        for one in header.values():
            stored = one["data_offsets"][1] - one["data_offsets"][0]
            count = math.prod(one["shape"])
            weights += count * width if width and one["dtype"] in FLOATS else stored
    if engine.quantization == "int8" and not on_gpu:
        weights = weights // 4
    heads = config["num_attention_heads"]
    key = config.get("head_dim") or config["hidden_size"] // heads
    shape = config["num_hidden_layers"], config.get("num_key_value_heads") or heads, 2 * key
    per_token = math.prod(shape) * (width or 2)
    return Footprint(weights, 0, per_token, int(config["max_position_embeddings"]))


def of_gguf(path: Path, on_gpu: bool) -> Footprint:
    stem, _, number = path.stem.partition("-00001-of-")
    parts = sorted(path.parent.glob(f"{stem}-*-of-{number}.gguf")) if number else [path]
    facts: dict[str, Any] = {}
    weights = mapped = 0
    for part in parts:
        with opened(part) as file:
            more, tensors = gguf_header(file)
        facts = more | facts
        for kind, count in tensors:
            values, size = BLOCKS.get(kind, (1, 4))
            packed = kind in BLOCKS and kind not in FLOAT_TYPES and not on_gpu
            stored = count * size // values
            weights += stored if packed else count * (2 if on_gpu else 4)
            mapped += stored if packed else 0
    of = facts["general.architecture"]
    heads = int(facts[f"{of}.attention.head_count"])
    key = int(facts.get(f"{of}.attention.key_length") or facts[f"{of}.embedding_length"] // heads)
    value = int(facts.get(f"{of}.attention.value_length", key))
    kv_heads = int(facts.get(f"{of}.attention.head_count_kv", heads))
    per_token = int(facts[f"{of}.block_count"]) * kv_heads * (key + value) * (2 if on_gpu else 4)
    return Footprint(weights, mapped, per_token, int(facts[f"{of}.context_length"]))


def gguf_header(file: BinaryIO) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    """Return the numbers and texts of the metadata, and type and count of each tensor. Raises ValueError."""
    header = GgufHeader(file)
    if header.bytes(4) != b"GGUF" or header.number("I") < 2:
        raise ValueError("no GGUF file")
    tensors, keys = header.number("Q"), header.number("Q")
    facts = {}
    for _ in range(min(keys, 10_000)):
        key = header.bytes(header.number("Q")).decode()
        facts[key] = header.value(header.number("I"))
    found = []
    for _ in range(min(tensors, 100_000)):
        header.bytes(header.number("Q"))
        count = math.prod(header.number("Q") for _ in range(min(header.number("I"), 4)))
        found.append((header.number("I"), count))
        header.number("Q")
    return facts, found


class GgufHeader:
    """Reads on from the beginning of a file, HEADER_BYTES_MAX at most."""

    def __init__(self, file: BinaryIO) -> None:
        self._data, self._at = file.read(HEADER_BYTES_MAX), 0

    def bytes(self, size: int) -> bytes:
        taken = self._data[self._at : self._at + size]
        if len(taken) < size:
            raise ValueError("the header is cut")
        self._at += size
        return taken

    def number(self, form: str) -> Any:
        layout = struct.Struct("<" + form)
        return layout.unpack(self.bytes(layout.size))[0]

    def value(self, kind: int) -> Any:
        """A scalar or text. An array is skipped, and None."""
        if kind == STRING:
            return self.bytes(self.number("Q")).decode("utf-8", "replace")
        if kind != ARRAY:
            return self.number(SCALARS[kind])
        item, count = self.number("I"), self.number("Q")
        if item == STRING:
            for _ in range(min(count, 2_000_000)):
                (size,) = struct.unpack_from("<Q", self._data, self._at)
                self._at += 8 + size
        elif item in SCALARS:
            self.bytes(count * struct.calcsize(SCALARS[item]))
        else:
            raise ValueError("arrays in arrays")
        return None

"""A context's exact state as one file: safetensors that any tool opens, with a checksum of itself inside.

Tensors: `tokens` int32 [tokens], and `kv.0`, `kv.1`, … as the engine's core lays them out, whole blocks of
the first of these tokens. Beside them, in __metadata__: the model's identity, the layout, the prompt's length
and `about`, the daemon's own JSON (messages, an unfinished answer). No torch; files are descriptors.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from aiosd.errors import BadRequest, BadSnapshot
from aiosd.spec import read_json

VERSION = "1"
HEADER_BYTES_MAX = 32 << 20
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4}
# The checksum stands at a fixed place: SHA-256 of the file with zeros there.
OPENING = b'{"__metadata__":{"sha256":"'
SUM_AT, SUM_SIZE = 8 + len(OPENING), 64
NO_SUM = "0" * SUM_SIZE
COPY_AGAIN = "copy the file again"
NOT_ONE, OUT_OF = "this is not a kv file of aiosd", "copy one out of contexts/NAME/kv"


@dataclass(frozen=True, slots=True)
class Tensor:
    dtype: str
    shape: tuple[int, ...]
    start: int = 0  # in the file
    end: int = 0

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Meta:
    model: str  # identity; empty: no KV is in the file
    layout: str  # of the KV tensors, as Model.info has it
    prompt: int  # tokens of the prompt, among `tokens`
    about: str


@dataclass(frozen=True, slots=True)
class Header:
    meta: Meta
    tensors: dict[str, Tensor]
    size: int  # of the whole file

    @property
    def tokens(self) -> int:
        return self.tensors["tokens"].shape[0]

    @property
    def kv(self) -> list[Tensor]:
        return [self.tensors[f"kv.{i}"] for i in range(len(self.tensors) - 1)]


def layout(meta: Meta, tensors: dict[str, Tensor]) -> tuple[bytes, Header]:
    """The file's first bytes, and where each tensor goes behind them. The checksum is not made yet."""
    at, placed = 0, {}
    for name, tensor in tensors.items():
        placed[name] = (tensor, at, at + tensor.bytes)
        at += tensor.bytes
    facts = {"sha256": NO_SUM, "format": "pt", "aios_kv": VERSION, "model": meta.model}
    facts |= {"layout": meta.layout, "prompt": str(meta.prompt), "about": meta.about}
    entries = {
        name: {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [start, end]}
        for name, (t, start, end) in placed.items()
    }
    text = json.dumps({"__metadata__": facts, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 64)  # so that what is mapped is aligned
    first = 8 + len(text)
    spread = {n: Tensor(t.dtype, t.shape, first + s, first + e) for n, (t, s, e) in placed.items()}
    return len(text).to_bytes(8, "little") + text, Header(meta, spread, first + at)


def seal(fd: int) -> None:
    """Writes the checksum into a finished file."""
    with mapped(fd) as data:
        digest = _sum(data)
    os.pwrite(fd, digest.encode(), SUM_AT)


def copy(source: int, target: int, about: str) -> int:
    """The file with another `about`, sealed, into an empty one; gives its size."""
    old = read(source)
    first, new = layout(replace(old.meta, about=about), old.tensors)
    os.pwrite(target, first, 0)
    os.lseek(target, len(first), os.SEEK_SET)
    at = old.tensors["tokens"].start
    while at < old.size:
        at += os.sendfile(target, source, at, old.size - at)
    seal(target)
    return new.size


def verify(fd: int, header: Header) -> None:
    """Raises BadSnapshot when a byte is not what it was."""
    with mapped(fd) as data:
        if len(data) != header.size:
            raise BadSnapshot(f"the file has {len(data)} bytes and not {header.size}", COPY_AGAIN)
        if data[SUM_AT : SUM_AT + SUM_SIZE] != _sum(data).encode():
            raise BadSnapshot("the checksum is wrong: the file was changed or damaged", COPY_AGAIN)


def _sum(data: mmap.mmap) -> str:
    digest = hashlib.sha256()
    with memoryview(data) as view:
        digest.update(view[:SUM_AT])
        digest.update(NO_SUM.encode())
        with view[SUM_AT + SUM_SIZE :] as rest:
            digest.update(rest)
    return digest.hexdigest()


@contextmanager
def mapped(fd: int) -> Iterator[mmap.mmap]:
    try:
        data = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    except ValueError:
        raise BadSnapshot("the file is empty", COPY_AGAIN) from None
    with data:
        yield data


def read(fd: int) -> Header:
    size = int.from_bytes(os.pread(fd, 8, 0), "little")
    return parse(os.pread(fd, 8 + min(size, HEADER_BYTES_MAX), 0))


def size_of(data: bytes | bytearray) -> int | None:
    """Bytes of the whole file, told from its beginning; None: more has to come. Raises BadSnapshot."""
    beginning, known = data[8:SUM_AT], int.from_bytes(data[:8], "little") if len(data) >= 8 else 0
    if beginning != OPENING[: len(beginning)] or known > HEADER_BYTES_MAX:
        raise BadSnapshot(NOT_ONE, OUT_OF)
    if len(data) < max(SUM_AT, 8 + known):
        return None
    return parse(data).size


def parse(data: bytes | bytearray) -> Header:
    """`data` begins with the whole header. Raises BadSnapshot for anything aiosd has not written so."""
    size = int.from_bytes(data[:8], "little")
    if data[8:SUM_AT] != OPENING or size > HEADER_BYTES_MAX or len(data) < 8 + size:
        raise BadSnapshot(NOT_ONE, OUT_OF)
    try:
        raw = read_json(data[8 : 8 + size].decode())
        assert isinstance(raw, dict)
        facts = raw.pop("__metadata__")
        meta = Meta(facts["model"], facts["layout"], int(facts["prompt"]), facts["about"])
        tensors = {name: _tensor(entry, 8 + size) for name, entry in raw.items()}
        version = facts["aios_kv"]
    except (BadRequest, UnicodeDecodeError, KeyError, TypeError, ValueError, AttributeError, AssertionError):
        raise BadSnapshot("the header of the file makes no sense", COPY_AGAIN) from None
    if version != VERSION:
        raise BadSnapshot(f"the file has version {version!r:.20}; this aiosd reads {VERSION}")
    return Header(meta, tensors, _checked(meta, tensors, 8 + size))


def _tensor(entry: Any, first: int) -> Tensor:
    start, end = entry["data_offsets"]
    shape = tuple(int(n) for n in entry["shape"])
    made = Tensor(str(entry["dtype"]), shape, first + int(start), first + int(end))
    if min(shape, default=0) < 0 or made.end - made.start != made.bytes:
        raise ValueError
    return made


def _checked(meta: Meta, tensors: dict[str, Tensor], first: int) -> int:
    """Gives the file's size: tensors fill it without gap or overlap, and are those there should be."""
    at = first
    for tensor in tensors.values():
        if tensor.start != at:
            raise BadSnapshot("the tensors of the file overlap or leave gaps", COPY_AGAIN)
        at = tensor.end
    tokens = tensors.get("tokens")
    names = ["tokens", *(f"kv.{i}" for i in range(len(tensors) - 1))]
    if tokens is None or list(tensors) != names or tokens.dtype != "I32" or len(tokens.shape) != 1:
        raise BadSnapshot("the file has other tensors than tokens, kv.0, kv.1, …", COPY_AGAIN)
    if not all(isinstance(text, str) for text in (meta.model, meta.layout, meta.about)):
        raise BadSnapshot("the header of the file makes no sense", COPY_AGAIN)
    if not 0 <= meta.prompt <= tokens.shape[0]:
        raise BadSnapshot("the prompt is longer than the tokens", COPY_AGAIN)
    return at

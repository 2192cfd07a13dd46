"""A context's exact state as one file: safetensors, which any tool opens, with a checksum inside.

Tensors: `about`, the daemon's own JSON as bytes (messages, an unfinished answer); `tokens`, int32; and
`kv.0`, `kv.1`, … in the layout of the engine's core: whole blocks with the KV of the first tokens. The header
is small and its numbers are bounded, because users write such files too. Knows no torch. Files are
descriptors.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from aiosd.errors import BadRequest, BadSnapshot
from aiosd.syscall.foreign import read_json

VERSION = "1"
HEADER_BYTES_MAX = 64 << 10
DIMENSIONS_MAX, NUMBER_MAX = 8, 1 << 40
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "U8": 1}
# The checksum is at a fixed place. It is the SHA-256 of the file with zeros in that place.
OPENING = b'{"__metadata__":{"sha256":"'
SUM_AT, SUM_SIZE = 8 + len(OPENING), 64
NO_SUM = "0" * SUM_SIZE
ALIGNED = 64
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
    model: str  # identity; empty: the file holds no KV
    layout: str  # of the KV tensors, as in Model.info
    prompt: int  # how many of the tokens are the prompt


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
        return [self.tensors[f"kv.{i}"] for i in range(len(self.tensors) - 2)]


def layout(meta: Meta, about: bytes, tensors: dict[str, Tensor]) -> tuple[bytes, Header]:
    """The first bytes of the file, up to the end of `about`, and the place of each tensor."""
    about += b" " * (-len(about) % ALIGNED)  # so that the next tensor is aligned when mapped
    at, placed = 0, {}
    for name, tensor in {"about": Tensor("U8", (len(about),)), **tensors}.items():
        placed[name] = (tensor, at, at + tensor.bytes)
        at += tensor.bytes
    facts = {"sha256": NO_SUM, "format": "pt", "aios_kv": VERSION, "model": meta.model}
    facts |= {"layout": meta.layout, "prompt": str(meta.prompt)}
    entries = {
        name: {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [start, end]}
        for name, (t, start, end) in placed.items()
    }
    text = json.dumps({"__metadata__": facts, **entries}, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNED)
    first = 8 + len(text)
    spread = {n: Tensor(t.dtype, t.shape, first + s, first + e) for n, (t, s, e) in placed.items()}
    return len(text).to_bytes(8, "little") + text + about, Header(meta, spread, first + at)


def seal(fd: int) -> None:
    """Write the checksum into a finished file."""
    with mapped(fd) as data:
        digest = _sum(data)
    os.pwrite(fd, digest.encode(), SUM_AT)


def copy(source: int, target: int, about: bytes) -> int:
    """Copy the file into an empty one with another `about`, seal the copy, and return its size."""
    old = read(source)
    rest = {name: tensor for name, tensor in old.tensors.items() if name != "about"}
    beginning, new = layout(old.meta, about, rest)
    os.pwrite(target, beginning, 0)
    os.lseek(target, len(beginning), os.SEEK_SET)
    at = old.tensors["tokens"].start
    while at < old.size:
        at += os.sendfile(target, source, at, old.size - at)
    seal(target)
    return new.size


def about(fd: int, header: Header) -> bytes:
    place = header.tensors["about"]
    return os.pread(fd, place.bytes, place.start)


def verify(fd: int, header: Header) -> None:
    """Raise BadSnapshot when a byte has changed since `seal`. A file that was never sealed passes."""
    with mapped(fd) as data:
        if len(data) != header.size:
            raise BadSnapshot(f"the file has {len(data)} bytes instead of {header.size}", COPY_AGAIN)
        given = data[SUM_AT : SUM_AT + SUM_SIZE]
        if given != NO_SUM.encode() and given != _sum(data).encode():
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
    """Size of the whole file in bytes, from its first bytes; None: too few bytes yet. Raises BadSnapshot."""
    beginning, known = data[8:SUM_AT], int.from_bytes(data[:8], "little") if len(data) >= 8 else 0
    if beginning != OPENING[: len(beginning)] or known > HEADER_BYTES_MAX:
        raise BadSnapshot(NOT_ONE, OUT_OF)
    if len(data) < max(SUM_AT, 8 + known):
        return None
    return parse(data).size


def parse(data: bytes | bytearray) -> Header:
    """Read the header, with which `data` begins. Raises BadSnapshot for anything but a kv file of aiosd."""
    size = int.from_bytes(data[:8], "little")
    if data[8:SUM_AT] != OPENING or size > HEADER_BYTES_MAX or len(data) < 8 + size:
        raise BadSnapshot(NOT_ONE, OUT_OF)
    try:
        raw = read_json(data[8 : 8 + size].decode())
        facts = raw.pop("__metadata__")
        model, made, prompt, version = (facts[key] for key in ("model", "layout", "prompt", "aios_kv"))
        meta = Meta(str(model), str(made), number(int(prompt)))
        tensors = {name: _tensor(entry, 8 + size) for name, entry in raw.items()}
    except (BadRequest, UnicodeDecodeError, KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise BadSnapshot("the header of the file is damaged", COPY_AGAIN) from None
    if version != VERSION:
        raise BadSnapshot(f"the file has version {str(version)[:20]!r}; this aiosd reads {VERSION}")
    return Header(meta, tensors, _checked(meta, tensors, 8 + size))


def number(value: object) -> int:
    """Raise ValueError for numbers so large that arithmetic with them takes long."""
    if type(value) is not int or not 0 <= value < NUMBER_MAX:
        raise ValueError
    return value


def _tensor(entry: Any, first: int) -> Tensor:
    start, end = map(number, entry["data_offsets"])
    shape = tuple(map(number, entry["shape"][: DIMENSIONS_MAX + 1]))
    made = Tensor(str(entry["dtype"]), shape, first + start, first + end)
    if len(shape) > DIMENSIONS_MAX or end - start != made.bytes:
        raise ValueError
    return made


def _checked(meta: Meta, tensors: dict[str, Tensor], first: int) -> int:
    """Check that the right tensors fill the file without gap or overlap, and return the file's size."""
    at = first
    for tensor in tensors.values():
        if tensor.start != at:
            raise BadSnapshot("the tensors of the file overlap or leave gaps", COPY_AGAIN)
        at = tensor.end
    names = ["about", "tokens", *(f"kv.{i}" for i in range(len(tensors) - 2))]
    if list(tensors) != names or any(
        tensors[name].dtype != dtype or len(tensors[name].shape) != 1
        for name, dtype in (("about", "U8"), ("tokens", "I32"))
    ):
        raise BadSnapshot("the file has other tensors than about, tokens, kv.0, kv.1, …", COPY_AGAIN)
    if meta.prompt > tensors["tokens"].shape[0]:
        raise BadSnapshot("the prompt is longer than the tokens", COPY_AGAIN)
    return at

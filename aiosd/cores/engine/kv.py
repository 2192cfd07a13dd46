"""Paged KV: the pool of blocks, their reference counts, and the index that finds full blocks by content.

A block holds the keys and values of BLOCK consecutive tokens. Full blocks are immutable and shared by
reference count. A full block's key is a hash of all tokens up to its end, salted with the owner. The salt
keeps users from learning by timing what others asked. Knows no torch and no sequences.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence

BLOCK = 16  # tokens


def chain(previous: bytes, tokens: Sequence[int], tag: int = 0) -> bytes:
    """Key of a full block. The tag separates equal tokens whose KV was computed in different ways."""
    return hashlib.blake2b(previous + array("q", [tag, *tokens]).tobytes(), digest_size=16).digest()


def root(owner: str) -> bytes:
    return hashlib.blake2b(owner.encode(), digest_size=16, person=b"aiosd owner").digest()


def block_keys(
    last: bytes, tokens: Sequence[int], prompt: int, chunk: int, known: int = 0
) -> Iterator[bytes]:
    """Keys of the full blocks from number `known` on. `last` is the key of the block before, or the root.

    With a chunk, KV depends on how it was computed. Blocks inside whole chunks of the prompt are equal for
    all prompts that begin alike. The other blocks are equal only for prompts of the same length.
    """
    whole = prompt // chunk * chunk
    for start in range(known * BLOCK, len(tokens) - BLOCK + 1, BLOCK):
        tag = 0 if chunk == 1 or start + BLOCK <= whole else prompt
        last = chain(last, tokens[start : start + BLOCK], tag)
        yield last


class BlockPool:
    """Each block is free, held (refcount > 0), or idle (cached, refcount 0, evictable)."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        self._refs = [0] * total
        self._key: list[bytes | None] = [None] * total
        self._cached: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def available(self) -> int:
        return len(self._free) + len(self._idle)

    @property
    def held(self) -> int:
        return self.total - self.available

    def allocate(self) -> int | None:
        """Take a block, or return None when all blocks are held."""
        if self._free:
            block = self._free.pop()
        elif self._idle:
            block, _ = self._idle.popitem(last=False)
            self._forget(block)
        else:
            return None
        self._refs[block] = 1
        return block

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """Take a reference to each block of the longest cached prefix."""
        found = []
        for key in keys:
            block = self._cached.get(key)
            if block is None:
                break
            if self._refs[block] == 0:
                del self._idle[block]
            self._refs[block] += 1
            found.append(block)
        return found

    def first_missing(self, keys: Sequence[bytes]) -> bytes | None:
        return next((key for key in keys if key not in self._cached), None)

    def publish(self, block: int, key: bytes) -> None:
        """Make a full, held block findable. Ignore it if another block has the key: their content is
        equal."""
        if key not in self._cached and self._key[block] is None:
            self._cached[key] = block
            self._key[block] = key

    def release(self, blocks: Sequence[int]) -> None:
        """Drop references, the last block first. So `allocate` reuses the end of a prompt before its
        beginning, which more prompts share."""
        for block in reversed(blocks):
            self._refs[block] -= 1
            if self._refs[block] == 0:
                if self._key[block] is None:
                    self._free.append(block)
                else:
                    self._idle[block] = None

    def drop_idle(self) -> None:
        while self._idle:
            block, _ = self._idle.popitem(last=False)
            self._forget(block)
            self._free.append(block)

    def _forget(self, block: int) -> None:
        key = self._key[block]
        assert key is not None
        del self._cached[key]
        self._key[block] = None

"""Paged KV: which blocks exist, who uses them, which can be found again by their content.

A block holds the keys and values of BLOCK consecutive tokens. Full blocks are immutable and shared by
reference count; their key is a hash chained over all tokens before them and salted with the owner, so
that nobody can find out by timing what somebody else has asked. Knows no torch and no sequences.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence

BLOCK = 16  # tokens


def chain(previous: bytes, tokens: Sequence[int], tag: int = 0) -> bytes:
    """Key of a full block. The tag tells apart equal tokens whose KV was computed another way."""
    return hashlib.blake2b(previous + array("q", [tag, *tokens]).tobytes(), digest_size=16).digest()


def root(owner: str) -> bytes:
    return hashlib.blake2b(owner.encode(), digest_size=16, person=b"aiosd owner").digest()


def block_keys(
    last: bytes, tokens: Sequence[int], prompt: int, chunk: int, known: int = 0
) -> Iterator[bytes]:
    """Keys of the blocks that the tokens fill, from number `known` on; `last` is the key before, or the root.

    With a chunk the KV of a token depends on how it was computed: blocks inside whole chunks of the
    prompt are the same for every prompt that begins like it, the others only for this prompt length.
    """
    whole = prompt // chunk * chunk
    for start in range(known * BLOCK, len(tokens) - BLOCK + 1, BLOCK):
        tag = 0 if chunk == 1 or start + BLOCK <= whole else prompt
        last = chain(last, tokens[start : start + BLOCK], tag)
        yield last


class BlockPool:
    """A block is in exactly one state: free, held (refcount > 0), or idle (cached, refcount 0, evictable)."""

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
        """A block of one's own, or None when every block is held."""
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
        """Take a reference to every block of the longest cached prefix."""
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
        """Make a full, held block findable. The first one with a key stays: its content is the same."""
        if key not in self._cached and self._key[block] is None:
            self._cached[key] = block
            self._key[block] = key

    def release(self, blocks: Sequence[int]) -> None:
        """Drop references, last block first: a prefix is worth more than what hangs on it."""
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

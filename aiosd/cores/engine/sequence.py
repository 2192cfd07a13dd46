"""One request inside the engine: its tokens, its KV blocks, its text, and when it ends.

Facts only; what is derived is a property. Knows no batch and no model.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from aiosd.cores.engine.constraint import Constraint
from aiosd.cores.engine.kv import BLOCK, block_keys
from aiosd.cores.engine.sampler import TokenLogprob
from aiosd.cores.engine.text import TextStream
from aiosd.errors import BadRequest
from aiosd.syscall.sampling import Sampling

Finish = Literal["stop", "length", "preempted", "failed"]


@dataclass(frozen=True, slots=True)
class Output:
    """What one step brought for one request.

    `text` holds whole characters and never part of a stop string; the texts of a request add up to its
    answer. `tokens` includes the end-of-sequence token, which has no text. "preempted" is not an end:
    add the request again with all its tokens as `resume`.
    """

    id: int
    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish: Finish | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of prompt and resumed tokens, those whose KV was found in the cache
    embedding: tuple[float, ...] = ()  # of a text that was to be embedded, of length 1
    error: BadRequest | None = None  # why it failed


@dataclass(slots=True, eq=False)
class Sequence:
    id: int
    tokens: list[int]  # prompt, then answer
    prompt: int  # length of the prompt
    sampling: Sampling
    limit: int  # length at which the context is full
    eos: frozenset[int]
    stream: TextStream
    root: bytes  # the owner's, from which the keys of the blocks are chained
    blocks: array[int] = field(default_factory=lambda: array("i"))
    keys: list[bytes] = field(default_factory=list)
    computed: int = 0  # tokens whose KV is in the blocks
    published: int = 0  # blocks others can find
    cached: int = 0
    context: int = 0  # the conversation it is a turn of; 0: none
    finish: Finish | None = None
    constraint: Constraint | None = None  # None: any token may follow
    pooled: NDArray[np.float64] | None = None  # to be embedded: the sum of its final hidden states so far

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt

    @property
    def pending(self) -> int:
        """Known tokens not yet in the KV."""
        return len(self.tokens) - self.computed

    @property
    def decoding(self) -> bool:
        return self.pending == 1 and self.computed >= self.prompt

    @property
    def banned(self) -> Tokens[int]:
        """End tokens may not be drawn before min_tokens."""
        return tuple(self.eos) if self.generated < self.sampling.min_tokens else ()

    def allowed(self) -> NDArray[np.bool_] | None:
        """Of each token, what a constraint lets through. An end token that the request does not want yet is
        there only where nothing else is: a whole answer ends. Raises BadRequest."""
        if self.constraint is None:
            return None
        allowed = self.constraint.allowed()
        if self.sampling.ignore_eos or self.banned:
            others = allowed.copy()
            others[list(self.eos)] = False
            return others if others.any() else allowed
        return allowed

    def same_as(self, sampling: Sampling, root: bytes, grammar: str) -> bool:
        own = self.constraint.grammar if self.constraint else ""
        return self.sampling == sampling and self.root == root and own == grammar

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // BLOCK)

    def accept(self, token: int) -> str:
        """Append a token of the answer; gives the text it completes and sets `finish`. Raises BadRequest
        where a constraint does not have it."""
        self.tokens.append(token)
        whole = self.constraint is not None and self.constraint.accept(token)
        text, stopped = self.stream.push(token)
        if stopped:
            self.finish = "stop"
            return text
        if whole or (token in self.eos and not self.sampling.ignore_eos):
            self.finish = "stop"
        elif self.generated >= self.sampling.max_tokens or len(self.tokens) >= self.limit:
            self.finish = "length"
        return text + self.stream.flush() if self.finish else text

    def full_keys(self, chunk: int) -> list[bytes]:
        """Keys of the blocks that the known tokens fill."""
        self.keys += block_keys(
            self.keys[-1] if self.keys else self.root, self.tokens, self.prompt, chunk, len(self.keys)
        )
        return self.keys

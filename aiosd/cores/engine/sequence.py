"""One request inside the engine: its tokens, its KV blocks, its text, and when it ends.

Fields are facts, properties are derived from them. Knows no batch and no model.
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
from aiosd.cores.engine.penalties import Penalties
from aiosd.cores.engine.sampler import TokenLogprob
from aiosd.cores.engine.text import TextStream
from aiosd.errors import BadRequest
from aiosd.syscall.sampling import Sampling

Finish = Literal["stop", "length", "preempted", "failed"]


@dataclass(frozen=True, slots=True)
class Output:
    """The result of one step for one request.

    `text` holds whole characters and no part of a stop string. The texts of a request, joined, are its
    answer. `tokens` includes the end-of-sequence token, which has no text. "preempted" is not an end: add the
    request again with all its tokens as `resume`.
    """

    id: int
    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish: Finish | None = None
    prompt_tokens: int = 0
    stopped: str = ""  # the stop string that ended the text
    cached_tokens: int = 0  # prompt and resumed tokens whose KV was in the cache
    embedding: tuple[float, ...] = ()  # a unit vector; empty unless `embed` was asked for
    error: BadRequest | None = None  # the reason of finish="failed"


@dataclass(slots=True, eq=False)
class Sequence:
    id: int
    tokens: list[int]  # prompt, then answer
    prompt: int  # length of the prompt
    sampling: Sampling
    limit: int  # length at which the context is full
    eos: frozenset[int]
    stream: TextStream
    root: bytes  # kv.root(owner): the hash with which the keys of the blocks begin
    blocks: array[int] = field(default_factory=lambda: array("i"))
    keys: list[bytes] = field(default_factory=list)
    computed: int = 0  # tokens whose KV is in the blocks
    published: int = 0  # blocks that other sequences can find
    cached: int = 0
    context: int = 0  # its conversation; 0: none
    finish: Finish | None = None
    constraint: Constraint | None = None  # None: any token may follow
    penalties: Penalties | None = None  # None: the logits are taken as they are
    pooled: NDArray[np.float64] | None = None  # of an embedding: the sum of the final hidden states so far

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt

    @property
    def pending(self) -> int:
        """How many known tokens have no KV yet."""
        return len(self.tokens) - self.computed

    @property
    def decoding(self) -> bool:
        return self.pending == 1 and self.computed >= self.prompt

    @property
    def banned(self) -> Tokens[int]:
        """The tokens that may not be drawn: the end tokens, until there are min_tokens."""
        return tuple(self.eos) if self.generated < self.sampling.min_tokens else ()

    def allowed(self) -> NDArray[np.bool_] | None:
        """Whether the constraint allows each token. An unwanted end token is allowed only when no other token
        is: the answer is then complete. None: no constraint. Raises BadRequest."""
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
        """Append a token of the answer, return the text that it completes, and set `finish` at the end.
        Raises BadRequest when the constraint does not allow the token."""
        self.tokens.append(token)
        if self.penalties is not None:
            self.penalties.push(token)
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
        """The keys of all full blocks of known tokens."""
        self.keys += block_keys(
            self.keys[-1] if self.keys else self.root, self.tokens, self.prompt, chunk, len(self.keys)
        )
        return self.keys

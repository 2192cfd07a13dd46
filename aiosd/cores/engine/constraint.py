"""Constrained decoding: which tokens may come next in an answer that a grammar describes
(aiosd.syscall.grammar).

A constraint is a function of its grammar and of the tokens accepted so far, as the rest of a sequence is: who
comes back pushes its tokens again. The masks are llguidance's; a token means the bytes that the vocabulary
gives it in a text. Knows no batch and no sampling.
"""

from __future__ import annotations

from collections import OrderedDict

import llguidance
import numpy as np
from numpy.typing import NDArray

from aiosd.cores.engine.vocabulary import Vocabulary
from aiosd.errors import BadRequest
from aiosd.syscall.grammar import limits, reason

COMPILED_MAX = 32  # grammars that are kept, of some kilobytes up to some megabytes each


class Constraint:
    def __init__(self, grammar: str, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        self.grammar = grammar
        self._matcher = matcher
        self._vocab_size = vocab_size

    def accept(self, token: int) -> bool:
        """Whether the answer is whole, and nothing can follow. Raises BadRequest."""
        self._matcher.consume_token(token)
        self._check()
        return self._matcher.is_stopped()

    def allowed(self) -> NDArray[np.bool_]:
        """Of each token of the vocabulary; the end tokens among them where the answer may end. Raises
        BadRequest."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)

    def _check(self) -> None:
        if self._matcher.is_error():
            why = reason(self._matcher.get_error())
            raise BadRequest(f"the answer cannot be decoded by its schema: {why}", "use a simpler schema")


class Constraints:
    """Those of one model. A compiled grammar is kept as it is before any token."""

    def __init__(self, vocabulary: Vocabulary, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        tokens = TokenBytes(vocabulary, max(vocab_size, len(vocabulary)))
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(tokens), eos_token=tokens.eos_tokens or None
        )
        self._compiled: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()

    def make(self, grammar: str) -> Constraint:
        """Raises BadRequest."""
        matcher = self._compiled.pop(grammar, None) or self._compile(grammar)
        self._compiled[grammar] = matcher
        if len(self._compiled) > COMPILED_MAX:
            self._compiled.popitem(last=False)
        return Constraint(grammar, matcher.deep_copy(), self._vocab_size)

    def _compile(self, grammar: str) -> llguidance.LLMatcher:
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, limits=limits(), log_level=0)
        Constraint(grammar, matcher.deep_copy(), self._vocab_size).allowed()  # some are too much at once
        return matcher


class TokenBytes:
    """What llguidance wants to know of a vocabulary: the bytes of each token, none of a special one."""

    def __init__(self, vocabulary: Vocabulary, size: int) -> None:
        self.eos_tokens = sorted(token for token in vocabulary.eos if token < size)
        self.eos_token_id = self.eos_tokens[0] if self.eos_tokens else None
        self.bos_token_id = None
        spelled = [vocabulary.spelling(token) for token in range(size)]
        self.tokens = [bytes_ or f"<{token}>".encode() for token, bytes_ in enumerate(spelled)]
        self.special_token_ids = [token for token, bytes_ in enumerate(spelled) if not bytes_]
        self._encode = vocabulary.encode

    def __call__(self, text: bytes) -> list[int]:
        return self._encode(text.decode())

"""How a request's tokens so far, and its logit_bias, change the logits of the next token.

The counts are a function of the prompt and the answer: a request that comes back pushes its tokens again. The
order is that of transformers and vLLM, the arithmetic is float32. Knows no batch and draws nothing.
"""

from __future__ import annotations

from array import array

import numpy as np

from aiosd.cores.engine.sampler import Row
from aiosd.syscall.sampling import Sampling


class Penalties:
    def __init__(self, sampling: Sampling, prompt: list[int]) -> None:
        self._sampling = sampling
        self._biased = np.array([int(token) for token in sampling.logit_bias], np.intp)
        self._biases = np.array(list(sampling.logit_bias.values()), np.float32)
        self._tokens = array("i")  # each once, in the order in which they came
        self._counts = array("i")  # how often each is in the answer
        self._places: dict[int, int] = {}
        if sampling.repetition_penalty != 1.0:
            for token in prompt:
                self._place(token)

    def push(self, token: int) -> None:
        """Count a token of the answer."""
        self._counts[self._place(token)] += 1

    def applied(self, logits: Row) -> Row:
        """Return the changed logits."""
        s, x = self._sampling, logits.copy()
        x[self._biased] += self._biases
        tokens = np.frombuffer(self._tokens, np.intc)
        counts = np.frombuffer(self._counts, np.intc).astype(np.float32)
        said = x[tokens]
        if s.repetition_penalty != 1.0:
            said = np.where(said < 0, said * s.repetition_penalty, said / s.repetition_penalty)
        said -= counts * s.frequency_penalty
        said -= (counts > 0) * np.float32(s.presence_penalty)
        x[tokens] = said
        return x

    def _place(self, token: int) -> int:
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._tokens):
            self._tokens.append(token)
            self._counts.append(0)
        return place

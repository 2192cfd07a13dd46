"""Decode one request so plainly that the code is obviously right: the oracle of the engine, for tests only.

Computes the whole prefix again for each token, sorts with Python's sort, and decodes the whole text each
time. Shares only the random numbers and the vocabulary with the fast path.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import numpy as np

from aiosd.cores.engine.sampler import uniform
from aiosd.cores.engine.text import Codec
from aiosd.syscall.sampling import Sampling

Logits = Callable[[list[int]], list[float]]  # tokens → logits of the next token


def decode_one(
    logits: Logits, codec: Codec, eos: frozenset[int], prompt: list[int], sampling: Sampling, context: int
) -> tuple[list[int], str, str]:
    """Tokens, text and finish reason of the answer."""
    answer: list[int] = []
    while True:
        row = changed(logits(prompt + answer), sampling, prompt, answer)
        if len(answer) < sampling.min_tokens:
            row = [-math.inf if t in eos else x for t, x in enumerate(row)]
        answer.append(draw(row, sampling, len(answer)))
        text = codec.decode(answer)
        watched = len(codec.decode(answer[: sampling.min_tokens]).rstrip("\ufffd"))
        hits = [at for at in (text.find(s, watched) for s in sampling.stop) if at >= 0]
        if hits and len(answer) > sampling.min_tokens:
            return answer, text[: min(hits)], "stop"
        if answer[-1] in eos and not sampling.ignore_eos:
            return answer, text, "stop"
        if len(answer) >= sampling.max_tokens or len(prompt) + len(answer) >= context:
            return answer, text, "length"


def changed(row: list[float], sampling: Sampling, prompt: list[int], answer: list[int]) -> list[float]:
    """Return the logits after logit_bias and the penalties, in the float32 of the logits."""
    x = [np.float32(one) for one in row]
    for id, bias in sampling.logit_bias.items():
        x[int(id)] += np.float32(bias)
    penalty = np.float32(sampling.repetition_penalty)
    for token in {*prompt, *answer}:
        x[token] = x[token] * penalty if x[token] < 0 else x[token] / penalty
    for token, count in Counter(answer).items():
        x[token] -= np.float32(count) * np.float32(sampling.frequency_penalty)
        x[token] -= np.float32(sampling.presence_penalty)
    return [float(one) for one in x]


def draw(row: list[float], sampling: Sampling, index: int) -> int:
    ranked = sorted(range(len(row)), key=lambda t: (-row[t], t))
    if sampling.temperature == 0:
        return ranked[0]
    plain = not 0 < sampling.top_k < len(row) and sampling.top_p >= 1
    if sampling.top_k > 0:
        ranked = ranked[: sampling.top_k]
    weights = {t: math.exp((row[t] - row[ranked[0]]) / sampling.temperature) for t in ranked}
    total, summed, kept = sum(weights.values()), 0.0, []
    for t in ranked:
        kept.append(t)
        summed += weights[t]
        if summed >= sampling.top_p * total and sampling.top_p < 1:
            break
    kept = [t for t in kept if weights[t] >= sampling.min_p]
    order = sorted(kept) if plain else kept
    point = uniform(sampling.seed, index) * sum(weights[t] for t in order)
    for t in order:
        point -= weights[t]
        if point < 0:
            return t
    return order[-1]

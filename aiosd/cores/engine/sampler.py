"""Choose a token from a row of logits: a pure function of (logits, sampling, index of the token).

Has no state. The random number depends only on the seed and the index, so a request that was preempted, moved
or batched differently draws the same tokens. Works on numpy rows; knows no model and no batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aiosd.syscall.sampling import Sampling

Row = NDArray[np.float32]
HEAD = 1024  # top-p first looks at this many likeliest tokens: sorting a whole vocabulary is slow
MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural logarithms under the model's own distribution, before penalties, bias and temperature."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the likeliest tokens, likeliest first


def _mix(x: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) that depends only on the seed and the index of the token in the answer."""
    key = _mix((seed & MASK) + 0x9E3779B97F4A7C15 & MASK)
    return (_mix(key + (index + 1) * 0x9E3779B97F4A7C15 & MASK) >> 11) * 2.0**-53


def choose(
    logits: Row,
    sampling: Sampling,
    index: int,
    banned: Sequence[int] = (),
    allowed: NDArray[np.bool_] | None = None,
) -> int:
    """Choose a token. `allowed`: whether each token may be chosen; it replaces `banned`."""
    if allowed is not None:
        tokens = np.flatnonzero(allowed)
        return int(tokens[choose(logits[tokens], sampling, index)])
    if banned:
        logits = logits.copy()
        logits[list(banned)] = -np.inf
    if sampling.temperature <= 0.0:
        return int(logits.argmax())
    tokens, weights = candidates(logits, sampling)
    total = np.cumsum(weights)
    at = int(np.searchsorted(total, uniform(sampling.seed, index) * total[-1], side="right"))
    return int(tokens[min(at, len(tokens) - 1)])


def candidates(logits: Row, sampling: Sampling) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The tokens that may be drawn, and their unnormalised weights. Equal logits rank by token id."""
    x = logits.astype(np.float64)
    x = (x - x.max()) / sampling.temperature
    k = sampling.top_k if 0 < sampling.top_k < len(x) else len(x)
    if k == len(x) and sampling.top_p >= 1.0:
        tokens, weights = np.arange(len(x)), np.exp(x)
    elif k < len(x):
        tokens = _ranked(x, k)
        weights = np.exp(x[tokens])
        total = float(weights.sum())
    else:
        total = float(np.exp(x).sum())
        tokens = _ranked(x, min(HEAD, len(x)))
        weights = np.exp(x[tokens])
        if float(weights.sum()) < sampling.top_p * total:
            tokens = _ranked(x, len(x))
            weights = np.exp(x[tokens])
    if sampling.top_p < 1.0:
        keep = int(np.searchsorted(np.cumsum(weights), sampling.top_p * total, side="left")) + 1
        tokens, weights = tokens[:keep], weights[:keep]
    if sampling.min_p > 0.0:
        kept = weights >= sampling.min_p  # the likeliest token has the weight 1
        tokens, weights = tokens[kept], weights[kept]
    return tokens, weights


def _ranked(x: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    """Indices of the k largest values, the largest first. Of equal values the lower index comes first."""
    if k < len(x):
        kept = np.flatnonzero(x >= np.partition(x, len(x) - k)[len(x) - k])
    else:
        kept = np.arange(len(x))
    return kept[np.argsort(-x[kept], kind="stable")][:k]


def logprob(logits: Row, token: int, alternatives: int) -> TokenLogprob:
    x = logits.astype(np.float64)
    x -= x.max()
    x -= np.log(np.exp(x).sum())
    top = _ranked(x, min(alternatives, len(x))) if alternatives > 0 else np.empty(0, np.int64)
    return TokenLogprob(token, float(x[token]), tuple((int(t), float(x[t])) for t in top))

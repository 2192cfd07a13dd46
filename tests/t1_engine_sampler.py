"""The sampler is a pure function that agrees with the naive sampler."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiosd.cores.engine.oracle import draw
from aiosd.cores.engine.sampler import HEAD, Row, candidates, choose, logprob, uniform
from aiosd.syscall.sampling import Sampling

samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.integers(0, 60),
    top_p=st.sampled_from([0.01, 0.3, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.4, 1.0]),
    seed=st.integers(-(2**63), 2**63),
)


def row(seed: int, size: int, coarse: bool) -> Row:
    x = np.random.default_rng(seed).normal(0, 3, size)
    return (np.round(x) if coarse else x).astype(np.float32)  # coarse: many equal logits


@settings(max_examples=300, deadline=None)
@given(samplings, st.integers(0, 2**32), st.integers(1, 50), st.booleans(), st.integers(0, 9999))
def test_it_draws_what_the_naive_sampler_draws(
    s: Sampling, seed: int, size: int, coarse: bool, index: int
) -> None:
    logits = row(seed, size, coarse)
    token = choose(logits, s, index)
    assert token == choose(logits.copy(), s, index)
    assert token == draw([float(x) for x in logits], s, index)


@pytest.mark.parametrize("top_p", [0.5, 0.999])
def test_top_p_beyond_the_sorted_head_is_the_same(top_p: float) -> None:
    for flat in (0.01, 3.0):
        logits = (row(1, 3 * HEAD, False) * flat).astype(np.float32)
        s = Sampling(temperature=1.0, top_p=top_p)
        tokens, _ = candidates(logits, s)
        order = np.argsort(-logits.astype(np.float64), kind="stable")
        p = np.exp(logits[order].astype(np.float64))
        keep = int(np.searchsorted(np.cumsum(p), top_p * p.sum())) + 1
        assert tokens.tolist() == order[:keep].tolist()


def test_banned_tokens_are_never_drawn() -> None:
    logits = np.array([9, 1, 8, 1], np.float32)
    assert choose(logits, Sampling(), 0, [0]) == 2
    drawn = {choose(logits, Sampling(temperature=5.0), i, [0, 2]) for i in range(50)}
    assert drawn == {1, 3}


def test_frequencies_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    n = 4000
    counts = np.bincount([choose(logits, Sampling(temperature=1.0, seed=i), i % 7) for i in range(n)])
    assert np.abs(counts / n - [0.5, 0.3, 0.2]).max() < 0.03


@given(st.integers(-(2**70), 2**70), st.integers(0, 2**40))
def test_random_numbers_are_a_function_of_seed_and_index(seed: int, index: int) -> None:
    assert 0 <= uniform(seed, index) < 1
    assert uniform(seed, index) == uniform(seed, index)
    assert uniform(seed, index) != uniform(seed, index + 1)


def test_logprobs_are_those_of_the_model_before_temperature() -> None:
    logits = np.array([2, 1, 0, 1], np.float32)
    total = math.log(sum(math.exp(float(x)) for x in logits))
    got = logprob(logits, 2, 3)
    assert got.logprob == pytest.approx(-total)
    assert [t for t, _ in got.top] == [0, 1, 3]
    assert got.top[0][1] == pytest.approx(2 - total)
    assert logprob(logits, 2, 0).top == ()

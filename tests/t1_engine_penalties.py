"""Penalties, logit_bias and min_p choose the tokens that transformers' processors choose."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from aiosd.cores.engine.penalties import Penalties
from aiosd.cores.engine.sampler import candidates
from aiosd.errors import BadRequest
from aiosd.syscall.sampling import Sampling
from tests.t1_engine_models import VOCAB, alone, engine, model, prompt, reference

GREEDY = Sampling(max_tokens=60, ignore_eos=True)
SOME_BIAS = {"17": -100.0, "40": 3.5, "383": -1.25}
PENALISED = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8},
    {"logit_bias": SOME_BIAS},
    {"frequency_penalty": 0.7},
    {"presence_penalty": -1.1},
    {"repetition_penalty": 1.1, "frequency_penalty": 0.3, "presence_penalty": 0.9, "logit_bias": SOME_BIAS},
]


class OpenAiPenalties(LogitsProcessor):
    """What OpenAI's documentation says of the two, which transformers does not have."""

    def __init__(self, frequency: float, presence: float, prompt: int) -> None:
        self._frequency, self._presence, self._prompt = frequency, presence, prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        for token, count in Counter(input_ids[0, self._prompt :].tolist()).items():
            scores[0, token] -= torch.tensor(float(count)) * self._frequency
            scores[0, token] -= self._presence
        return scores


def processors(s: Sampling, prompt_tokens: int) -> LogitsProcessorList:
    made: list[Any] = []
    if s.logit_bias:
        made.append(SequenceBiasLogitsProcessor([[[int(t)], b] for t, b in s.logit_bias.items()]))
    if s.repetition_penalty != 1.0:
        made.append(RepetitionPenaltyLogitsProcessor(s.repetition_penalty))
    made.append(OpenAiPenalties(s.frequency_penalty, s.presence_penalty, prompt_tokens))
    return LogitsProcessorList(made)


@pytest.mark.parametrize("keys", PENALISED)
def test_an_answer_has_the_tokens_that_transformers_generates(keys: dict[str, Any]) -> None:
    s, asked, changed = dataclasses.replace(GREEDY, **keys), prompt(23), 0
    for name in ("llama", "qwen3", "gemma3"):
        whole = reference(name).generate(
            torch.tensor([asked]),
            attention_mask=torch.ones(1, len(asked), dtype=torch.long),
            logits_processor=processors(s, len(asked)),
            do_sample=False,
            max_new_tokens=s.max_tokens,
            eos_token_id=None,
        )
        got = alone(model(name), asked, s).tokens
        assert got == whole[0, len(asked) :].tolist()
        changed += got != alone(model(name), asked, GREEDY).tokens
    assert changed >= 2


samplings = st.builds(
    Sampling,
    frequency_penalty=st.floats(-2, 2, width=32),
    presence_penalty=st.floats(-2, 2, width=32),
    repetition_penalty=st.floats(0.5, 3),
    logit_bias=st.dictionaries(st.integers(0, 49).map(str), st.floats(-100, 100, width=32)),
)


@settings(max_examples=200)
@given(
    samplings, st.integers(0, 2**32), st.lists(st.integers(0, 49), min_size=1), st.lists(st.integers(0, 49))
)
def test_the_changed_logits_have_the_bits_of_transformers(
    s: Sampling, seed: int, asked: list[int], answer: list[int]
) -> None:
    logits = np.random.default_rng(seed).normal(0, 3, 50).astype(np.float32)
    before = logits.copy()
    penalties = Penalties(s, asked)
    for token in answer:
        penalties.push(token)
    theirs: Any = torch.tensor(logits[None])
    for processor in processors(s, len(asked)):
        theirs = processor(torch.tensor([[*asked, *answer]]), theirs)
    assert np.array_equal(penalties.applied(logits), theirs[0].numpy())
    assert np.array_equal(logits, before), "the model's own logits are for logprobs"


@pytest.mark.parametrize("min_p", [0.001, 0.05, 0.3, 1.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (30, 1.0), (0, 0.9), (30, 0.9)])
def test_min_p_leaves_the_tokens_that_transformers_leaves(min_p: float, top_k: int, top_p: float) -> None:
    s = Sampling(temperature=0.8, top_k=top_k, top_p=top_p, min_p=min_p)
    warpers = [TemperatureLogitsWarper(0.8), TopPLogitsWarper(top_p), MinPLogitsWarper(min_p)]
    if top_k:
        warpers.insert(1, TopKLogitsWarper(top_k))
    for seed in range(30):
        logits = np.random.default_rng(seed).normal(0, 2, VOCAB).astype(np.float32)
        theirs = torch.tensor(logits[None])
        for warp in warpers:
            theirs = warp(torch.tensor([[0]]), theirs)
        tokens, weights = candidates(logits, s)
        assert sorted(tokens.tolist()) == torch.isfinite(theirs[0]).nonzero().flatten().tolist()
        chance = torch.softmax(theirs[0].double(), 0)[torch.tensor(tokens)].numpy()
        assert np.allclose(weights / weights.sum(), chance, atol=1e-6)


def test_a_bias_of_100_forces_and_of_minus_100_forbids_a_token() -> None:
    m, asked = model("llama"), prompt(20)
    s = dataclasses.replace(GREEDY, temperature=1.0, seed=3, max_tokens=20)
    free = alone(m, asked, s).tokens
    assert set(alone(m, asked, dataclasses.replace(s, logit_bias={"77": 100.0})).tokens) == {77}
    most = Counter(free).most_common(1)[0][0]
    assert most not in alone(m, asked, dataclasses.replace(s, logit_bias={str(most): -100.0})).tokens


def test_logprobs_stay_those_of_the_model() -> None:
    m, asked = model("llama"), prompt(20)
    s = dataclasses.replace(GREEDY, logprobs=0, max_tokens=1)
    own = alone(m, asked, dataclasses.replace(s, logprobs=20)).logprobs[0]
    token, logprob = own.top[5]
    forced = alone(m, asked, dataclasses.replace(s, logit_bias={str(token): 100.0})).logprobs[0]
    assert (forced.token, forced.logprob) == (token, logprob)


def test_a_bias_of_a_token_that_the_model_does_not_have_is_refused() -> None:
    e = engine(model("llama"))
    with pytest.raises(BadRequest, match=f"tokens 0 to {VOCAB - 1}, and no {VOCAB}"):
        e.add(1, prompt(3), Sampling(logit_bias={str(VOCAB): 1.0}), owner="ada")
    assert e.idle

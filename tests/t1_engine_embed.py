"""Embeddings: the direction of the mean final hidden state, with the same bits beside any other requests."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from aiosd.cores.engine.engine import Engine
from aiosd.syscall.sampling import Sampling
from tests.t1_engine_exact import CORES, GREEDY, get
from tests.t1_engine_models import FAMILY, FOREIGN, engine, prompt, reference

NOTHING = Sampling(max_tokens=1)


def embed(e: Engine, id: int, tokens: list[int]) -> tuple[float, ...]:
    e.add(id, tokens, NOTHING, owner="ada", embed=True)
    while True:
        for output in e.step():
            if output.id == id:
                return output.embedding


@pytest.mark.parametrize(
    ("name", "core"),
    [(n, c) for n in FAMILY for c in ("fused", "torch")] + [(n, "foreign") for n in (*FOREIGN, "llama-odd")],
)
def test_an_embedding_agrees_with_transformers(name: str, core: str) -> None:
    tokens = prompt(90)
    with torch.inference_mode():
        made = reference(name).get_decoder()(torch.tensor([tokens])).last_hidden_state[0].double().mean(0)
    expected = (made / made.norm()).numpy()
    got = embed(engine(get(name, core)), 0, tokens)
    assert np.abs(np.array(got) - expected).max() < 1e-4
    assert np.linalg.norm(got) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("name", "core"), CORES)
def test_neighbours_cuts_a_cached_prefix_and_preemption_change_nothing(name: str, core: str) -> None:
    m, rng, tokens = get(name, core), random.Random(3), prompt(150)
    expected = embed(engine(m), 0, tokens)
    among = engine(m, prefill_tokens=70)
    among.add(50, tokens, GREEDY, owner="ada")  # its prefix stays in the cache
    for i in range(5):
        among.add(i + 1, prompt(rng.randint(20, 100), seed=i + 1), GREEDY, owner=str(i))
    for _ in range(4):
        among.step()
    assert embed(among, 60, tokens) == expected
    cut = engine(m, prefill_tokens=70)
    cut.add(0, tokens, NOTHING, owner="ada", embed=True)
    cut.step()
    cut.remove(0)
    cut.add(1, prompt(80), GREEDY, owner="eve")
    cut.step()
    assert embed(cut, 0, tokens) == expected

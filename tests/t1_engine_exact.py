"""A request's tokens and log-probabilities are a function of model, prompt and sampling alone.

Whatever else runs, wherever prefill is cut, however often it is preempted, with its KV kept or lost:
the same tokens, the same bits.
"""

from __future__ import annotations

import random
from array import array

import pytest
import torch

from aiosd.cores.engine.core import Batch, Segment
from aiosd.cores.engine.engine import Engine
from aiosd.cores.engine.model import LoadedModel, load
from aiosd.cores.engine.ops import library
from aiosd.syscall.sampling import Sampling
from tests.t1_engine_models import (
    FAMILY,
    FOREIGN,
    RELATIVES,
    Answer,
    alone,
    engine,
    folder,
    model,
    prompt,
    reference,
    run,
)

CORES = [
    ("llama", "fused"),
    ("llama-odd", "fused"),
    ("qwen3", "fused"),
    ("llama-odd", "int8"),
    ("llama", "torch"),
    ("llama-odd", "torch"),
    ("qwen2", "torch"),
    ("gemma3", "foreign"),
    ("phi", "auto"),
    ("mixtral", "foreign"),
    ("phi3-long", "auto"),
    *((name, core) for name in RELATIVES for core in ("fused", "torch")),
    ("qwen2-moe", "int8"),
]
GREEDY = Sampling(max_tokens=24, ignore_eos=True, logprobs=2)
DRAWN = Sampling(max_tokens=24, ignore_eos=True, logprobs=2, temperature=1.0, top_p=0.95, seed=7)
PENALISED = Sampling(
    max_tokens=24, ignore_eos=True, logprobs=2, temperature=0.7, seed=8, min_p=0.02,
    frequency_penalty=0.5, presence_penalty=0.2, repetition_penalty=1.2, logit_bias={"70": 2.0},
)  # fmt: skip


def get(name: str, core: str) -> LoadedModel:
    if core in ("fused", "int8") and library() is None:
        pytest.skip("compiled operations are not built")
    return model(name, core)


@pytest.mark.parametrize(
    ("name", "core"),
    [(n, c) for n in FAMILY for c in ("fused", "torch")] + [(n, "foreign") for n in (*FOREIGN, "llama-odd")],
)
def test_logits_agree_with_transformers(name: str, core: str) -> None:
    tokens = prompt(90)
    answer = alone(get(name, core), tokens, Sampling(max_tokens=30, ignore_eos=True, logprobs=5))
    with torch.inference_mode():
        logits = reference(name)(torch.tensor([tokens + answer.tokens])).logits[0, len(tokens) - 1 : -1]
    expected = torch.log_softmax(logits.double(), -1)
    for row, got in zip(expected, answer.logprobs, strict=True):
        for token, value in got.top:
            assert abs(float(row[token]) - value) < 2e-3
        assert got.token == got.top[0][0]


@pytest.mark.parametrize(("name", "core"), [("llama-odd", "torch"), ("phi", "auto")])
def test_without_determinism_an_answer_is_right_up_to_rounding(name: str, core: str) -> None:
    loose = load(folder(name), core=core, deterministic=False)
    assert not loose.info["exact"]
    assert loose.core.chunk == 1
    exact = alone(get(name, core), prompt(90), GREEDY)
    got = alone(loose, prompt(90), GREEDY)
    assert got.tokens == exact.tokens
    for a, b in zip(got.logprobs, exact.logprobs, strict=True):
        assert abs(a.logprob - b.logprob) < 1e-3


def among(m: LoadedModel, sampling: Sampling, neighbours: int, prefill_tokens: int) -> Answer:
    """Neighbours of all lengths come and go while the request runs."""
    rng = random.Random(neighbours)
    e = engine(m, prefill_tokens=prefill_tokens)
    answers: dict[int, Answer] = {}
    waiting = list(range(100, 100 + neighbours))
    e.add(99, prompt(40, 99), Sampling(max_tokens=3), owner="eve")
    joined = False
    while not e.idle or not joined:
        for id in [waiting.pop() for _ in range(min(len(waiting), rng.randint(0, 3)))]:
            e.add(
                id,
                prompt(rng.randint(1, 150), id),
                Sampling(max_tokens=rng.randint(1, 30), temperature=rng.choice([0.0, 0.8]), seed=id),
                owner="eve",
            )
        if not joined and rng.random() < 0.5:
            e.add(1, prompt(77), sampling, owner="ada")
            joined = True
        for output in e.step():
            answers.setdefault(output.id, Answer()).take(output)
    return answers[1]


@pytest.mark.parametrize(("name", "core"), CORES)
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN, PENALISED], ids=["greedy", "drawn", "penalised"])
def test_neighbours_and_the_cutting_of_prefill_change_nothing(
    name: str, core: str, sampling: Sampling
) -> None:
    m = get(name, core)
    expected = alone(m, prompt(77), sampling)
    company = ((1, 64), (7, 100), (31, 512)) if m.info["core"] != "transformers" else ((7, 100),)
    for neighbours, prefill_tokens in company:
        assert among(m, sampling, neighbours, prefill_tokens) == expected


def interrupted(
    m: LoadedModel, sampling: Sampling, rng: random.Random, lose_kv: bool, company: int
) -> Answer:
    """Remove and add the request several times, also during prefill, while others run."""
    e: Engine = engine(m, prefill_tokens=64)
    answer = Answer()
    for i in range(company):
        e.add(10 + i, prompt(30 + 17 * i, i), Sampling(max_tokens=200, ignore_eos=True), owner="eve")
    while answer.finish is None:
        if lose_kv:
            e.pool.drop_idle()
        e.add(1, prompt(130), sampling, owner="ada", resume=answer.tokens)
        for _ in range(rng.randint(1, 9)):
            for output in e.step():
                if output.id == 1:
                    answer.take(output)
        e.remove(1, keep=not lose_kv)
    return answer


@pytest.mark.parametrize(("name", "core"), CORES)
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN, PENALISED], ids=["greedy", "drawn", "penalised"])
@pytest.mark.parametrize("lose_kv", [False, True], ids=["kept", "lost"])
def test_preemption_at_any_token_changes_nothing(
    name: str, core: str, sampling: Sampling, lose_kv: bool
) -> None:
    m = get(name, core)
    expected = alone(m, prompt(130), sampling)
    rng = random.Random(3)
    for company in (0, 3):
        got = interrupted(m, sampling, rng, lose_kv, company)
        got.cached = expected.cached
        assert got == expected


@pytest.mark.parametrize(("name", "core"), CORES)
def test_a_cached_prefix_changes_nothing(name: str, core: str) -> None:
    m = get(name, core)
    shared = prompt(200)
    e = engine(m)
    for id, (tokens, least) in enumerate(
        [
            (shared, 0),
            (shared[:150] + prompt(40), 128),
            (shared[:150], 128),
            (shared + prompt(9), 128),
            (shared[:70] + prompt(100), 64),
        ]
    ):
        e.add(id, tokens, GREEDY, owner="ada")
        answers: dict[int, Answer] = {}
        run(e, answers)
        expected = alone(m, tokens, GREEDY)
        assert least <= answers[id].cached < len(tokens)
        answers[id].cached = 0
        assert answers[id] == expected


def test_a_conversation_that_goes_on_finds_its_whole_past_in_the_cache() -> None:
    m = get("llama", "fused")
    e = engine(m)
    answers: dict[int, Answer] = {}
    e.add(1, prompt(100), GREEDY, owner="ada")
    run(e, answers)
    longer = prompt(100) + answers[1].tokens + prompt(30, 5)
    e.add(2, longer, GREEDY, owner="ada")
    run(e, answers)
    assert answers[2].cached == 112  # 123 tokens have KV: whole blocks of them
    answers[2].cached = 0
    assert answers[2] == alone(m, longer, GREEDY)


def test_prefixes_are_never_shared_between_owners() -> None:
    m = model("llama")
    e = engine(m)
    answers: dict[int, Answer] = {}
    for id, owner in enumerate(["ada", "bob", "ada"]):
        e.add(id, prompt(100), GREEDY, owner=owner)
        run(e, answers)
    assert answers[0].cached == 0
    assert answers[1].cached == 0
    assert answers[2].cached >= 64


def test_both_builds_of_the_operations_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [library("avx2"), library("avx512")]
    if None in both:
        pytest.skip("one of them is not built, or not for this CPU")
    from aiosd.cores.engine import model as module

    answers = []
    for lib in both:
        monkeypatch.setattr(module, "library", lambda lib=lib: lib)
        names = ("llama", "llama-odd", "qwen3", "gemma2", "olmo3", "qwen2-moe")
        answers.append([alone(load(folder(n)), prompt(300), DRAWN) for n in names])
    assert answers[0] == answers[1]


def test_neighbours_change_nothing_with_several_threads() -> None:
    torch.set_num_threads(2)
    try:
        for name in ("llama-odd", "phi"):
            m = model(name, "torch" if name in FAMILY else "auto")
            short = Sampling(max_tokens=5, ignore_eos=True, logprobs=1)
            assert among(m, short, 2, 512) == alone(m, prompt(77), short)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("name", ["llama-odd", "gemma2", "qwen2-moe"])
def test_the_number_of_threads_changes_no_bits_of_the_fused_path(name: str) -> None:

    if library() is None:
        pytest.skip("compiled operations are not built")
    answers = [alone(load(folder(name), threads=n), prompt(130), DRAWN) for n in (1, 2, 3)]
    torch.set_num_threads(1)
    assert answers[0] == answers[1] == answers[2]


def test_a_late_thread_does_not_count_the_experts_of_a_later_layer() -> None:
    """Each layer gives its experts other rows. A thread that counted those of another layer never ended."""
    if library() is None:
        pytest.skip("compiled operations are not built")
    m = load(folder("mixtral"), threads=5)
    torch.set_num_threads(1)
    kv, blocks, rng = m.core.reserve(8), array("i", range(8)), random.Random(1)
    for _ in range(3000):
        n = rng.randint(1, 40)
        tokens = [rng.randrange(3, 380) for _ in range(n)]
        rows, _ = m.core.forward(Batch(tokens, [Segment(blocks, 0, n, n)], [n - 1]), kv)
        assert rows.isfinite().all()


@pytest.mark.parametrize("name", ["llama-odd", "qwen3-moe"])
def test_more_threads_than_cores_are_late_and_harm_nothing(name: str) -> None:
    if library() is None:
        pytest.skip("compiled operations are not built")
    expected = alone(model(name, "fused"), prompt(77), GREEDY)
    for _ in range(3):
        m = load(folder(name), threads=7)
        torch.set_num_threads(1)
        assert among(m, GREEDY, 7, 100) == expected
        del m  # joins its threads, sleeping or late

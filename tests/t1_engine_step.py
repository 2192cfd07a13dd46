"""Requests in Engine.step(): they end, share prefixes, wait, lose their place and come back."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from aiosd.cores.engine.engine import Engine
from aiosd.cores.engine.kv import BLOCK
from aiosd.cores.engine.oracle import decode_one
from aiosd.cores.engine.sequence import Output
from aiosd.errors import BadRequest, ModelError, TooLong
from aiosd.syscall.sampling import Sampling
from tests.t1_engine_models import Answer, alone, engine, model, prompt, reference, run

LONG = Sampling(max_tokens=40, ignore_eos=True)


def common_words(n: int = 200) -> str:
    """Text from a real answer of the model."""
    return alone(model("llama"), prompt(20), dataclasses.replace(LONG, max_tokens=n)).text


ORACLE = [
    Sampling(max_tokens=30),
    Sampling(max_tokens=30, temperature=1.2, seed=3),
    Sampling(max_tokens=30, temperature=0.9, top_k=20, top_p=0.8, seed=4, ignore_eos=True),
    Sampling(max_tokens=30, temperature=3.0, seed=5, min_tokens=12),
    Sampling(max_tokens=12, temperature=2.0, seed=6, min_tokens=30),
    Sampling(max_tokens=60, temperature=1.5, seed=7, stop=("e", "th", " a")),
    Sampling(max_tokens=60, temperature=1.5, seed=8, min_tokens=9, stop=("a", "e", "i", "o", "t")),
    Sampling(max_tokens=60, frequency_penalty=0.6, presence_penalty=0.4, repetition_penalty=1.15),
    Sampling(
        max_tokens=60, temperature=1.1, seed=9, min_p=0.05, min_tokens=40, logit_bias={"2": 9.0, "70": 2.5}
    ),
    Sampling(
        max_tokens=60,
        temperature=0.9,
        seed=10,
        top_k=50,
        top_p=0.9,
        min_p=0.1,
        frequency_penalty=-0.3,
        presence_penalty=1.5,
        repetition_penalty=0.9,
        logit_bias={"100": -100.0},
    ),
]


@pytest.mark.parametrize("sampling", ORACLE)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_engine_answers_what_the_oracle_answers(sampling: Sampling, name: str) -> None:
    m = model(name)

    def logits(tokens: list[int]) -> list[float]:
        with torch.inference_mode():
            return [float(x) for x in reference(name)(torch.tensor([tokens])).logits[0, -1]]

    expected = decode_one(logits, m.vocabulary, m.eos, prompt(33), sampling, m.context_length)
    e = engine(m)
    answers: dict[int, Answer] = {}
    for i in range(3):
        e.add(50 + i, prompt(21 + i, i), LONG, owner="eve")
    e.add(1, prompt(33), sampling, owner="ada")
    run(e, answers)
    assert (answers[1].tokens, answers[1].text, answers[1].finish) == expected


def test_texts_are_the_text_of_the_tokens() -> None:
    for seed in range(6):
        got = alone(model("llama"), prompt(9), Sampling(max_tokens=80, temperature=1.5, seed=seed))
        assert got.text == model("llama").decode(got.tokens)


@pytest.mark.parametrize("at", [0, 7, 31, 90])
def test_a_stop_string_ends_the_answer_before_it(at: int) -> None:
    text = common_words()
    stop = text[at : at + 6]
    got = alone(model("llama"), prompt(20), Sampling(max_tokens=200, ignore_eos=True, stop=("\x00", stop)))
    assert got.finish == "stop"
    assert got.text == text[: text.index(stop)]


def test_resuming_rebuilds_what_was_held_back() -> None:
    text = common_words()
    stop = (text[40:48], text[30:33] + "\x00")
    sampling = Sampling(max_tokens=200, ignore_eos=True, stop=stop)
    whole = alone(model("llama"), prompt(20), sampling)
    for cut in range(1, len(whole.tokens)):
        e = engine(model("llama"))
        answer = Answer()
        e.add(1, prompt(20), sampling, owner="ada")
        while len(answer.tokens) < cut:
            for output in e.step():
                answer.take(output)
        e.remove(1)
        e.add(1, prompt(20), sampling, owner="ada", resume=answer.tokens)
        answers = {1: answer}
        run(e, answers)
        assert (answer.tokens, answer.text, answer.finish) == (whole.tokens, whole.text, "stop")


def test_resumed_tokens_are_not_emitted_again_and_count_for_the_limits() -> None:
    m = model("llama")
    whole = alone(m, prompt(20), LONG)
    e = engine(m)
    answers: dict[int, Answer] = {}
    e.add(1, prompt(20), LONG, owner="ada", resume=whole.tokens[:25])
    run(e, answers)
    assert answers[1].tokens == whole.tokens[25:]
    assert answers[1].finish == "length"


def test_a_request_whose_answer_was_complete_ends_at_once() -> None:
    m = model("llama")
    whole = alone(m, prompt(20), LONG)
    e = engine(m)
    e.add(1, prompt(20), LONG, owner="ada", resume=whole.tokens)
    assert not e.idle
    assert e.step() == [Output(1, finish="length", prompt_tokens=20)]
    assert e.idle


def test_the_context_ends_the_answer() -> None:
    m = model("llama")
    got = alone(m, prompt(500), LONG)
    assert len(got.tokens) == m.context_length - 500
    assert got.finish == "length"


def test_zero_max_tokens_gives_no_tokens() -> None:
    got = alone(model("llama"), prompt(5), Sampling(max_tokens=0))
    assert (got.tokens, got.finish) == ([], "length")


def test_a_prompt_that_can_never_fit_is_refused_with_numbers() -> None:
    m = model("llama")
    with pytest.raises(TooLong, match="512 tokens and the model's context holds 512"):
        engine(m).add(1, prompt(512), LONG, owner="ada")
    with pytest.raises(TooLong, match="64 tokens and the KV memory holds 64") as caught:
        engine(m, tokens=64).add(1, prompt(64), LONG, owner="ada")
    assert "kv_bytes" in caught.value.hint
    with pytest.raises(TooLong):
        Engine(m, kv_bytes=10)
    for wrong in ([], [m.vocab_size], [-1]):
        with pytest.raises(BadRequest):
            engine(m).add(1, wrong, LONG, owner="ada")


def test_one_request_alone_that_fills_the_memory_ends_with_length() -> None:
    got = alone(model("llama"), prompt(40), LONG, tokens=64)
    assert got.finish == "length"
    assert got.tokens == alone(model("llama"), prompt(40), LONG).tokens[: len(got.tokens)]
    assert len(got.tokens) == 64 - 40 + 1


def test_when_memory_is_full_the_youngest_goes_and_comes_back_with_the_same_answer() -> None:
    m = model("llama")
    expected = {i: alone(m, prompt(30, i), LONG) for i in range(4)}
    e = engine(m, tokens=160)
    answers: dict[int, Answer] = {}
    for i in expected:
        e.add(i, prompt(30, i), LONG, owner=f"u{i}")
    pushed_out = []
    while not e.idle:
        for output in e.step():
            answers.setdefault(output.id, Answer()).take(output)
            if output.finish == "preempted":
                pushed_out.append(output.id)
                e.add(
                    output.id,
                    prompt(30, output.id),
                    LONG,
                    owner=f"u{output.id}",
                    resume=answers[output.id].tokens,
                )
    assert pushed_out
    assert 0 not in pushed_out
    for i, answer in answers.items():
        assert (answer.tokens, answer.text, answer.finish) == (expected[i].tokens, expected[i].text, "length")


def test_unused_prefixes_are_evicted_before_anybody_is_pushed_out() -> None:
    e = engine(model("llama"), tokens=128)
    for i in range(5):
        answers: dict[int, Answer] = {}
        e.add(i, prompt(60, i), LONG, owner="ada")
        run(e, answers)
        assert answers[i].finish == "length"
        assert len(answers[i].tokens) == 40
    assert e.stats["kv_blocks_used"] == 0


def test_a_removed_request_is_never_heard_of_again_and_its_blocks_stay_findable() -> None:
    e = engine(model("llama"))
    e.add(1, prompt(100), LONG, owner="ada")
    e.add(2, prompt(50), LONG, owner="ada")
    e.step()
    e.remove(1)
    e.remove(1)
    e.remove(77)
    answers: dict[int, Answer] = {}
    e.add(3, prompt(100), LONG, owner="ada")
    run(e, answers)
    assert 1 not in answers
    assert answers[3].cached == 6 * BLOCK
    assert e.stats["prefix_hit_tokens"] == 6 * BLOCK


def test_a_request_waits_for_a_shared_prefix_in_prefill() -> None:
    m = model("llama")
    for core in ("auto", "torch"):
        m = model("llama", core)
        e = engine(m, prefill_tokens=64)
        answers: dict[int, Answer] = {}
        for i in range(4):
            e.add(i, prompt(200) + prompt(20, i), LONG, owner="ada")
        e.add(9, prompt(30, 9), LONG, owner="ada")
        run(e, answers)
        assert e.stats["prefix_hit_tokens"] == 3 * 192
        for i in range(4):
            assert answers[i].tokens == alone(m, prompt(200) + prompt(20, i), LONG).tokens


def test_more_kv_than_the_machine_has_is_an_error_with_a_hint() -> None:
    with pytest.raises(ModelError, match="no room"):
        Engine(model("llama"), kv_bytes=1 << 50)


def test_at_most_max_running_run_and_all_end() -> None:
    e = engine(model("llama"), max_running=2)
    for i in range(5):
        e.add(i, prompt(10, i), Sampling(max_tokens=4, ignore_eos=True), owner="ada")
    answers: dict[int, Answer] = {}
    most = 0
    while not e.idle:
        for output in e.step():
            answers.setdefault(output.id, Answer()).take(output)
        most = max(most, e.stats["running"])
    assert most == 2
    assert all(len(answers[i].tokens) == 4 for i in range(5))
    assert e.stats["generated_tokens"] == 20


def test_decoding_continues_while_a_long_prompt_is_computed() -> None:
    e = engine(model("llama"), prefill_tokens=32)
    e.add(1, prompt(10), LONG, owner="ada")
    e.step()
    e.add(2, prompt(400), LONG, owner="ada")
    for _ in range(8):
        assert [o.id for o in e.step()] == [1]


def test_end_of_sequence_ends_but_not_before_min_tokens() -> None:
    m = model("llama")
    hot = Sampling(max_tokens=300, temperature=4.0, seed=1)
    got = alone(m, prompt(10), hot)
    assert got.finish == "stop"
    assert got.tokens[-1] in m.eos
    assert 1 < len(got.tokens) < 290
    later = alone(m, prompt(10), dataclasses.replace(hot, min_tokens=200))
    assert not m.eos & set(later.tokens[:200])
    assert len(later.tokens) >= 200
    ignored = alone(m, prompt(10), dataclasses.replace(hot, ignore_eos=True))
    assert ignored.tokens[: len(got.tokens)] == got.tokens
    assert ignored.finish == "length"

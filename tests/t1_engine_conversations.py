"""KV of conversations: hold it between turns, fork, snapshot, restore elsewhere, drop. Tokens never
change."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aiosd.cores.engine.engine import Engine
from aiosd.cores.engine.kv import BLOCK
from aiosd.errors import BadRequest, BadSnapshot
from aiosd.syscall.sampling import Sampling
from tests.t1_engine_exact import CORES, get
from tests.t1_engine_models import Answer, alone, engine, prompt

TURN = Sampling(max_tokens=20, ignore_eos=True, logprobs=2, temperature=0.9, seed=3)


def drain(e: Engine, id: int) -> Answer:
    answer = Answer()
    while not e.idle:
        for output in e.step():
            if output.id == id:
                answer.take(output)
    return answer


def moved(source: Engine, target: Engine, context: int, owner: str = "ada") -> int:
    snapshot = source.snapshot(context)
    assert snapshot is not None
    kv = [torch.empty(s, dtype=d) for s, d in zip(snapshot.shapes, snapshot.dtypes, strict=True)]
    source.conversations.copy(snapshot, kv)
    return target.restore(context, owner, snapshot.tokens, snapshot.prompt, kv)


@pytest.mark.parametrize(("name", "core"), CORES)
def test_an_answer_goes_on_in_another_engine_with_the_same_bits(name: str, core: str) -> None:
    m = get(name, core)
    expected = alone(m, prompt(130), TURN)
    here, there = engine(m), engine(m)
    here.add(1, prompt(130), TURN, owner="ada", context=5)
    first = Answer()
    while len(first.tokens) < 9:
        for output in here.step():
            first.take(output)
    assert moved(here, there, 5) == (130 + len(first.tokens) - 1) // BLOCK * BLOCK
    assert drain(here, 1).tokens == expected.tokens[9:]  # the snapshot disturbs nothing
    there.add(1, prompt(130), TURN, owner="ada", context=5, resume=first.tokens)
    rest = drain(there, 1)
    assert (first.tokens + rest.tokens, first.logprobs + rest.logprobs) == (
        expected.tokens,
        expected.logprobs,
    )
    assert there.stats["prefix_hit_tokens"] >= 64


def test_the_next_turn_and_a_fork_find_the_kv_that_is_held() -> None:
    m = get("llama", "fused")
    e = engine(m)
    e.add(1, prompt(100), TURN, owner="ada", context=1)
    answer = drain(e, 1)
    assert e.conversations.fork(1, 2)
    held = e.pool.held
    for context in (1, 2):
        e.pool.drop_idle()  # drop all blocks that are not held
        turn = [*prompt(100), *answer.tokens, *prompt(10, context)]
        hits = e.stats["prefix_hit_tokens"]
        e.add(context, turn, TURN, owner="ada", context=context)
        got = drain(e, context)
        assert e.stats["prefix_hit_tokens"] - hits == (100 + 20 - 1) // BLOCK * BLOCK
        assert got.logprobs == alone(m, turn, TURN).logprobs
    assert e.pool.held < 2 * held + 4  # the forks share blocks
    e.conversations.drop(1)
    e.conversations.drop(2)
    assert e.pool.held == 0


def test_kv_of_one_owner_is_not_found_by_another() -> None:
    m = get("llama", "fused")
    here, there = engine(m), engine(m)
    here.add(1, prompt(100), TURN, owner="ada", context=1)
    drain(here, 1)
    moved(here, there, 1, "eve")
    there.add(1, prompt(100), TURN, owner="ada")
    drain(there, 1)
    assert there.stats["prefix_hit_tokens"] == 0


def test_the_least_recently_used_conversation_leaves_a_full_pool_and_pinned_ones_last() -> None:
    m = get("llama", "fused")
    e = engine(m, tokens=24 * BLOCK)
    gone: list[int] = []
    e.conversations.spill = gone.append
    for context in (1, 2, 3):
        e.add(context, prompt(90, context), replace(TURN, max_tokens=2), owner="ada", context=context)
        drain(e, context)
        e.conversations.pin(context, context == 1)
    assert not gone
    e.add(4, prompt(250), TURN, owner="ada")
    assert drain(e, 4) == alone(m, prompt(250), TURN)
    assert gone == [2, 3]
    e.add(5, prompt(340), replace(TURN, max_tokens=2), owner="ada")
    assert drain(e, 5).finish == "length"
    assert gone == [2, 3, 1]
    assert e.conversations.snapshot(1) is None


def test_a_restored_conversation_makes_room_for_itself_or_is_cut() -> None:
    m = get("llama", "fused")
    here, small = engine(m), engine(m, tokens=4 * BLOCK)
    here.add(1, prompt(100), TURN, owner="ada", context=1)
    drain(here, 1)
    assert moved(here, small, 1) == 4 * BLOCK
    small.add(1, prompt(20), TURN, owner="ada")
    assert drain(small, 1) == alone(m, prompt(20), TURN)


@pytest.mark.parametrize("wrong", ["tokens", "heads", "dtype", "count", "short"])
def test_kv_of_another_shape_is_refused(wrong: str) -> None:
    m = get("llama", "fused")
    e = engine(m)
    _, floats = e._kv[0].shape
    shape = (2, floats)
    kv = [torch.zeros(shape)]
    tokens = prompt(40)
    if wrong == "tokens":
        tokens = [m.vocab_size] * 40
    elif wrong == "heads":
        kv = [torch.zeros(2, floats + 1)]
    elif wrong == "dtype":
        kv = [torch.zeros(shape, dtype=torch.float16)]
    elif wrong == "count":
        kv = kv * 2
    else:
        tokens = tokens[:20]
    with pytest.raises((BadSnapshot, BadRequest)):
        e.restore(1, "ada", tokens, 40, kv)
    assert e.pool.held == 0


def test_requests_waiting_for_memory_do_not_block_each_other() -> None:
    """Both waiting requests hold KV and need more than is free, so one must release its own."""
    m = get("llama", "fused")
    e = engine(m, tokens=28 * BLOCK)
    for context, length in ((1, 100), (2, 180)):
        e.add(context, prompt(length, context), replace(TURN, max_tokens=2), owner="ada", context=context)
        drain(e, context)
    e.add(9, prompt(60, 9), replace(TURN, max_tokens=60), owner="eve")
    e.step()
    e.add(3, prompt(380, 5), replace(TURN, max_tokens=3), owner="ada", context=1)
    e.add(4, prompt(230, 6), replace(TURN, max_tokens=3), owner="ada", context=2)
    e.add(5, prompt(5, 7), replace(TURN, max_tokens=3), owner="bob")
    ended = {output.id for _ in range(400) for output in e.step() if output.finish}
    assert ended == {9, 3, 4, 5}
    assert e.idle


def test_a_cancelled_turn_leaves_nothing_held() -> None:
    m = get("llama", "fused")
    e = engine(m)
    e.add(1, prompt(100), TURN, owner="ada", context=1)
    e.step()
    e.step()
    e.remove(1, keep=False)
    assert e.pool.held == 0
    assert e.snapshot(1) is None


def test_a_preempted_request_keeps_its_kv_while_nobody_needs_the_room() -> None:
    m = get("llama", "fused")
    expected = alone(m, prompt(100), TURN)
    e = engine(m, tokens=16 * BLOCK)
    for pressure in (False, True):
        answer = Answer()
        e.add(1, prompt(100), TURN, owner="ada")
        while len(answer.tokens) < 5:
            for output in e.step():
                answer.take(output)
        e.remove(1)
        assert e.pool.held == 7
        if pressure:  # another request needs the whole memory
            e.add(2, prompt(230), replace(TURN, max_tokens=2), owner="eve")
            drain(e, 2)
        steps = e.stats["steps"]
        e.add(1, prompt(100), TURN, owner="ada", resume=answer.tokens)
        rest = drain(e, 1)
        assert answer.tokens + rest.tokens == expected.tokens
        assert answer.logprobs + rest.logprobs == expected.logprobs
        assert (e.stats["steps"] - steps == len(rest.tokens)) or pressure
        assert e.pool.held == 0

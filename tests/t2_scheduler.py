"""The scheduler with real worker processes and without a mount: exact tokens, fairness, ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aiosd.access.caller import Caller
from aiosd.access.permissions import Permission
from aiosd.config.config import Config, DaemonConfig, EngineConfig
from aiosd.cores import wire
from aiosd.database.store import Store
from aiosd.errors import Busy, RequestFailed, StoreFull
from aiosd.kernel import Kernel
from aiosd.scheduler.handler import Source
from aiosd.scheduler.numbers import Numbers
from aiosd.syscall.request import Request, State
from tests.running import wait_until

ME = Caller(os.getuid(), os.getgid(), os.getpid())
LONG_S = 120.0
MakeKernel = Callable[..., Kernel]


def ask(kernel: Kernel, text: str, context: str = "", **params: object) -> Request:
    """Submit through an agent with `params` in its params.json."""
    name = f"a{len(kernel.agents.names())}"
    agent = kernel.agents.add(name)
    kernel.agents.change(agent, params={"ignore_eos": True, **params}, context=context)
    return kernel.admission.submit(ME, Source(f"/agents/{name}/syscall/llm", agent), text.encode())


def ended(request: Request) -> Request:
    """Wait for the end of the answer, like a reader."""
    changed = threading.Event()
    unwatch = request.answer.watch(changed.set)
    while not request.answer.ended:
        assert changed.wait(LONG_S), f"request {request.id} is {request.state} still"
        changed.clear()
    unwatch()
    return request


PROMPTS = [f"question {i} " + "word " * (i * 7 % 40) for i in range(12)]
SAMPLINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 11},
    {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.01,
        "seed": 5,
        "frequency_penalty": 0.3,
        "presence_penalty": 0.1,
        "repetition_penalty": 1.1,
        "logit_bias": {"100": 2, "2": -100},
    },
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, random_llama: Path) -> dict[tuple[int, int], list[int]]:
    """The tokens of each request when it runs alone."""
    state = DaemonConfig(state=str(tmp_path_factory.mktemp("alone")))
    kernel = Kernel(Config(daemon=state, engine=EngineConfig(max_running=1)), random_llama)
    kernel.start()
    asked = {
        (i, j): ask(kernel, PROMPTS[i], max_tokens=30 + 5 * i, **SAMPLINGS[j])
        for i in range(12)
        for j in range(3)
    }
    tokens = {key: ended(request).tokens for key, request in asked.items()}
    kernel.stop()
    return tokens


def test_a_preempted_request_has_the_tokens_of_an_undisturbed_one(
    make_kernel: MakeKernel, alone: dict[tuple[int, int], list[int]]
) -> None:
    kernel = make_kernel("[engine]\nmax_running = 5\n[scheduler]\npolicy = 'rr'\nquantum = 4\n")
    kernel.start()
    asked = {
        (i, j): ask(kernel, PROMPTS[i], max_tokens=30 + 5 * i, **SAMPLINGS[j])
        for i in range(12)
        for j in range(3)
    }
    for key, request in asked.items():
        assert ended(request).state is State.DONE
        assert request.tokens == alone[key], key
    assert sum(r.preemptions for r in asked.values()) > 12, "how many depends on the machine"


def test_what_comes_after_a_whole_answer_is_no_part_of_it(make_kernel: MakeKernel, slow_llama: Path) -> None:
    """While an answer is judged at its end, its worker may die, and another one begin with it again."""
    kernel = make_kernel("", slow_llama)
    kernel.start()
    request = ask(kernel, "go on", max_tokens=200)
    wait_until(lambda: len(request.tokens) > 5, "tokens", LONG_S)
    request.finish_reason = "stop"
    worker = kernel.pool.find(request.worker)
    assert worker
    said = request.text
    kernel.delivery.worker_said(worker, wire.Step([wire.Tokens(request.id, [7], "more", [], 0, "")], {}))
    assert "more" not in request.text.removeprefix(said)
    assert not request.state.final


@pytest.mark.parametrize("policy", ["priority", "fair", "las", "edf"])
def test_every_policy_ends_every_request_with_the_same_tokens(
    make_kernel: MakeKernel, alone: dict[tuple[int, int], list[int]], policy: str
) -> None:
    """priority and edf preempt at once, also a request that its worker has not started yet."""
    kernel = make_kernel(f"[engine]\nmax_running = 2\n[scheduler]\npolicy = '{policy}'\nquantum = 3\n")
    kernel.start()
    asked: dict[tuple[int, int], Request] = {}
    for i, j in list(alone)[:18]:
        text = json.dumps({"prompt": PROMPTS[i], "deadline_s": 600 - 60 * i, "nice": 18 - i})
        longer = 400 if len(asked) < 2 else 0  # so that they still run when the others arrive
        asked[i, j] = request = ask(kernel, text, max_tokens=30 + 5 * i + longer, **SAMPLINGS[j])
        if len(asked) == 2:  # both places are taken
            wait_until(lambda r=request: bool(r.tokens), "tokens", LONG_S)  # type: ignore[misc]
    for key, request in asked.items():
        assert ended(request).state is State.DONE
        assert request.tokens[: len(alone[key])] == alone[key], key
    assert sum(r.preemptions for r in asked.values()) > 0


def test_tokens_stay_the_same_when_preemption_loses_the_kv(
    make_kernel: MakeKernel, alone: dict[tuple[int, int], list[int]]
) -> None:
    """There is so little KV memory that others take the blocks of a preempted request."""
    kernel = make_kernel(
        "[engine]\nmax_running = 3\nkv_bytes = 400000\n[scheduler]\npolicy = 'rr'\nquantum = 9\n"
    )
    kernel.start()
    asked = {
        key: ask(kernel, PROMPTS[key[0]], max_tokens=30 + 5 * key[0], **SAMPLINGS[key[1]]) for key in alone
    }
    for key, request in asked.items():
        assert ended(request).tokens == alone[key], key


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_its_requests_go_on_with_the_right_tokens(
    make_kernel: MakeKernel, alone: dict[tuple[int, int], list[int]]
) -> None:
    kernel = make_kernel("[engine]\nmax_running = 5\n")
    kernel.start()
    asked = {
        key: ask(kernel, PROMPTS[key[0]], max_tokens=30 + 5 * key[0], **SAMPLINGS[key[1]]) for key in alone
    }
    wait_until(lambda: any(len(r.tokens) > 5 for r in asked.values()), "the first tokens", LONG_S)
    os.kill(kernel.pool.workers()[0].process.pid, signal.SIGKILL)
    for key, request in asked.items():
        assert ended(request).state is State.DONE
        assert request.tokens == alone[key], key
    assert kernel.pool.restarts == 1


@pytest.mark.slow
def test_a_request_that_kills_its_workers_is_failed_and_others_are_not(
    make_kernel: MakeKernel, slow_llama: Path
) -> None:
    text = "[engine]\nmax_running = 1\n[limits]\nworker_deaths_per_request = 1\n"
    kernel = make_kernel(f'[scheduler]\npolicy = "fifo"\n{text}', slow_llama)  # the same request runs again
    kernel.start()
    poisoned = ask(kernel, "poison", max_tokens=900)
    innocent = ask(kernel, "hello", max_tokens=5)
    for deaths in (1, 2):
        seen = len(poisoned.tokens)
        wait_until(lambda n=seen: len(poisoned.tokens) > n, "tokens", LONG_S)  # type: ignore[misc]
        os.kill(kernel.pool.workers()[0].process.pid, signal.SIGKILL)
        wait_until(lambda n=deaths: poisoned.worker_deaths == n, "the death", LONG_S)  # type: ignore[misc]
    assert ended(poisoned).state is State.FAILED
    assert "2 workers died" in poisoned.error
    assert ended(innocent).state is State.DONE


def test_turns_of_one_context_run_one_after_the_other_and_are_kept(make_kernel: MakeKernel) -> None:
    kernel = make_kernel()
    kernel.context_objects.add("talk", ME)
    kernel.permissions.set("/contexts/talk", Permission(ME.uid, ME.gid, 0o700))
    kernel.start()
    turns = [ask(kernel, f"turn {i}", context="talk", max_tokens=6) for i in range(4)]
    for request in turns:
        assert ended(request).state is State.DONE
    said = kernel.contexts.messages(kernel.contexts.get("talk"))
    assert [m["role"] for m in said] == ["user", "assistant"] * 4
    assert [m["content"] for m in said[::2]] == [f"turn {i}" for i in range(4)]
    assert [m["content"] for m in said[1::2]] == [r.text for r in turns]
    lengths = [r.usage.prompt_tokens for r in turns]
    assert lengths == sorted(set(lengths)), "each turn sees those before it"


def test_a_cancelled_turn_leaves_no_trace_and_lets_the_next_one_go(make_kernel: MakeKernel) -> None:
    kernel = make_kernel()
    kernel.context_objects.add("talk", ME)
    kernel.permissions.set("/contexts/talk", Permission(ME.uid, ME.gid, 0o700))
    kernel.start()
    first = ask(kernel, "first", context="talk", max_tokens=900)
    second = ask(kernel, "second", context="talk", max_tokens=3)
    wait_until(lambda: bool(first.tokens), "a token", LONG_S)
    assert kernel.ending.cancel(first)
    assert not kernel.ending.cancel(first), "a request ends once"
    with pytest.raises(RequestFailed):
        first.answer.read(1, 1 << 20)
    assert ended(second).state is State.DONE
    said = kernel.contexts.messages(kernel.contexts.get("talk"))
    assert [m["content"] for m in said] == ["second", second.text]


@pytest.mark.slow
def test_requests_survive_the_daemon(make_kernel: MakeKernel, slow_llama: Path) -> None:
    """Some requests run and some wait when the daemon stops. The next daemon ends all, with the right
    tokens."""

    def asked(kernel: Kernel) -> list[Request]:
        return [
            ask(kernel, PROMPTS[i], max_tokens=50 + 5 * i, **SAMPLINGS[j])
            for i in range(3)
            for j in range(len(SAMPLINGS))
        ]

    before = make_kernel("[engine]\nmax_running = 2\n", slow_llama)
    before.start()
    ids = [request.id for request in asked(before)]
    wait_until(lambda: before.scheduler.counters["tokens"] > 10, "tokens", LONG_S)
    before.stop()
    after = make_kernel("", slow_llama)
    assert any(after.store.unfinished())
    after.start()
    requests = [ended(after.admission.get(id)) for id in ids]
    undisturbed = [ended(request) for request in asked(after)]
    for request, same in zip(requests, undisturbed, strict=True):
        assert request.state is State.DONE
        if request.tokens:  # ended by this daemon; the text of the others is in the store
            assert request.tokens == same.tokens


def test_a_number_that_was_given_is_not_given_again_after_a_kill(
    make_kernel: MakeKernel, tmp_path: Path
) -> None:
    """The state is as after kill -9 of a daemon that had given out numbers and stored no request with
    them."""
    before = make_kernel()
    given = [before.admission.allocate("a0") for _ in range(3)]
    left = tmp_path / "left"
    shutil.copytree(before.store.folder, left)
    store = Store(left, {})
    assert Numbers(store).take() > max(given)
    store.close()


def test_ids_are_never_used_twice_even_when_their_agent_is_gone(make_kernel: MakeKernel) -> None:
    before = make_kernel()
    last = ask(before, "x").id
    before.agent_objects.remove("a0")
    before.stop()
    assert make_kernel().admission.new_id() > last


def test_a_user_at_his_bound_is_told_to_try_again(make_kernel: MakeKernel) -> None:
    kernel = make_kernel("[quota]\nqueued_requests = 3\n")
    for _ in range(3):
        ask(kernel, "x")
    with pytest.raises(Busy, match="3 requests of yours"):
        ask(kernel, "x")


def test_a_full_disk_refuses_before_anything_is_accepted(make_kernel: MakeKernel) -> None:
    kernel = make_kernel("[limits]\ndisk_reserve_bytes = 9000000000000000000\n")
    with pytest.raises(StoreFull, match="the disk is full"):
        ask(kernel, "x")
    assert kernel.scheduler.unfinished() == []


def test_a_paused_agent_waits_and_others_go_on(make_kernel: MakeKernel) -> None:
    kernel = make_kernel()
    agent = kernel.agents.add("slow")
    kernel.agent_objects.pause(agent, True)
    kernel.start()
    held = kernel.admission.submit(ME, Source("/agents/slow/syscall/llm", agent), b"x")
    assert ended(ask(kernel, "y", max_tokens=3)).state is State.DONE
    assert held.state is State.QUEUED
    kernel.agent_objects.pause(agent, False)
    assert ended(held).state is State.DONE


def test_a_prompt_too_long_for_its_model_fails_with_the_numbers(make_kernel: MakeKernel) -> None:
    kernel = make_kernel()
    kernel.start()
    request = ended(ask(kernel, "word " * 2000))
    assert request.state is State.FAILED
    assert "1024" in request.error


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_fails_its_requests_with_the_reason(
    make_kernel: MakeKernel,
) -> None:
    kernel = make_kernel("[models.broken]\npath = '/nonexistent/model'\n")
    agent = kernel.agents.add("a")
    kernel.agents.change(agent, model="broken")
    kernel.start()
    request = kernel.admission.submit(ME, Source("/agents/a/syscall/llm", agent), b"x")
    assert ended(request).state is State.FAILED
    assert "/nonexistent/model" in request.error


def test_a_request_no_worker_can_compute_fails_alone(make_kernel: MakeKernel) -> None:
    """A request that fails in the tokenizer or on the wire must not end the threads that serve others."""
    kernel = make_kernel()
    kernel.context_objects.add("deep", ME)
    kernel.permissions.set("/contexts/deep", Permission(ME.uid, ME.gid, 0o700))
    nested: list[object] = []
    for _ in range(5000):
        nested = [nested]
    kernel.start()
    broken = ask(kernel, "x", max_tokens=3)
    fine = ask(kernel, "y", max_tokens=3)
    ended(broken)
    ended(fine)
    context = kernel.contexts.get("deep")
    kernel.contexts.messages = lambda _: [{"role": "user", "content": "", "tool_calls": nested}]  # type: ignore
    assert ended(ask(kernel, "z", context=context.name, max_tokens=3)).state is State.FAILED
    kernel.contexts.messages = lambda _: [{"role": "user", "content": "\ud800"}]  # type: ignore
    assert ended(ask(kernel, "z", context=context.name, max_tokens=3)).state is State.FAILED
    assert ended(ask(kernel, "y", max_tokens=3)).state is State.DONE
    assert kernel.pool.restarts == 0


@pytest.mark.slow
def test_turns_are_stored_once_though_many_threads_end_requests(make_kernel: MakeKernel) -> None:
    kernel = make_kernel()
    held = kernel.agents.add("held")
    kernel.agent_objects.pause(held, True)
    for i in range(4):
        kernel.context_objects.add(f"c{i}", ME)
        kernel.permissions.set(f"/contexts/c{i}", Permission(ME.uid, ME.gid, 0o700))
    kernel.start()
    stop = threading.Event()

    def disturb() -> None:
        while not stop.is_set():
            kernel.admission.submit(ME, Source("/agents/held/syscall/llm", held), b"x")
            kernel.agent_objects.cancel_all(held)

    noise = [threading.Thread(target=disturb) for _ in range(3)]
    for thread in noise:
        thread.start()
    try:
        turns = [ask(kernel, "x", context=f"c{i % 4}", max_tokens=1) for i in range(80)]
        for request in turns:
            ended(request)
    finally:
        stop.set()
        for thread in noise:
            thread.join()
    for i in range(4):
        assert len(kernel.contexts.messages(kernel.contexts.get(f"c{i}"))) == 40


def test_the_newest_that_ended_are_kept_however_many_wait(make_kernel: MakeKernel) -> None:
    kernel = make_kernel("[limits]\nkeep_requests = 3\n")
    kernel.start()
    agent = kernel.agents.add("a")
    kernel.agent_objects.pause(agent, True)
    source = Source("/agents/a/syscall/llm", agent)
    asked = [kernel.admission.submit(ME, source, b"hello") for _ in range(12)]
    for request in asked[:4]:
        kernel.ending.cancel(request)
    kept = [r.id for r in asked if r.id in kernel.store.request_ids(agent.id)]
    assert kept == [r.id for r in asked[1:]], "three that ended, and all that wait"
    assert kernel.admission.get(asked[1].id) is kernel.admission.get(asked[1].id)
    for request in asked[4:]:
        kernel.ending.cancel(request)
    assert len(kernel.store.request_ids(agent.id)) == 3

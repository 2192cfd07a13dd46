"""Models that load with their first request and leave when they are idle or others need the room."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from aiosd.access.permissions import Permission
from aiosd.cores import pool, wire
from aiosd.cores.launch import Child
from aiosd.cores.models import Model, ModelState
from aiosd.errors import BadRequest, NoRoom
from aiosd.host.memory import Memory, resident
from aiosd.kernel import Kernel
from aiosd.policies import residence
from aiosd.scheduler import demand
from aiosd.syscall.request import Request, State
from tests.running import wait_until
from tests.t2_scheduler import ME, ask, ended

MakeKernel = Callable[..., Kernel]
LONG_S = 60.0
ALICE = 60001


@pytest.fixture
def two(make_kernel: MakeKernel, random_llama: Path, slow_llama: Path) -> Callable[..., Kernel]:
    """Kernels with the models a and b, which load on demand."""

    def make(more: str = "", a: str = "", b: str = "") -> Kernel:
        models = f"[models.a]\npath = '{random_llama}'\n{a}\n[models.b]\npath = '{slow_llama}'\n{b}\n"
        return make_kernel(more + models, None)

    return make


def room_for_one(kernel: Kernel) -> None:
    """Let the machine have memory for one worker, whichever it is."""
    total = 600_000_000

    def memory() -> Memory:
        used = sum(resident(worker.process.pid)[0] for worker in kernel.pool.workers())
        return Memory(total, total - used)

    kernel.rooms.memory = memory


SMALL = "[engine]\nkv_bytes = 100000000\nmax_running = 1\nwarm = false\n"


def state(kernel: Kernel, name: str) -> ModelState:
    return kernel.models.get(name).shown_state


def becomes(kernel: Kernel, name: str, wanted: ModelState) -> None:
    wait_until(lambda: state(kernel, name) is wanted, f"{name} {wanted}", LONG_S)


def to(model: str, text: str = "hello", **more: object) -> str:
    return json.dumps({"prompt": text, "model": model, **more})


def begun(request: Request) -> Request:
    wait_until(lambda: bool(request.tokens), "tokens", LONG_S)
    return request


def test_a_model_comes_with_its_first_request_and_goes_when_it_was_idle(two: Callable[..., Kernel]) -> None:
    kernel = two(a="keep_alive = '300ms'")
    kernel.start()
    assert [state(kernel, name) for name in "ab"] == [ModelState.ABSENT] * 2
    assert not kernel.pool.workers()
    request = ask(kernel, to("a"), max_tokens=5)
    assert kernel.demand.why(kernel.models.get("a")) in ("model a loads", "model a loads soon")
    assert ended(request).state is State.DONE
    becomes(kernel, "a", ModelState.ABSENT)
    assert state(kernel, "b") is ModelState.ABSENT, "nobody asked it"
    assert ended(ask(kernel, to("a"), max_tokens=5)).tokens == request.tokens


def test_a_request_says_how_long_its_model_stays_and_shortens_no_other_users_time(
    two: Callable[..., Kernel],
) -> None:
    kernel = two()
    kernel.start()
    assert ended(ask(kernel, to("a", keep_alive=0), max_tokens=3)).state is State.DONE
    becomes(kernel, "a", ModelState.ABSENT)
    ended(ask(kernel, to("a", keep_alive="1h"), max_tokens=3))
    stay = kernel.models.get("a").stay
    assert 3500 < stay.until_s - stay.used_s <= 3600
    assert stay.ended(ALICE, stay.used_s, 0.0) == stay.used_s
    assert 3500 < stay.until_s - stay.used_s <= 3600, "another user's 0 does not end it"
    for wrong in ("always", "soon", True, -1):
        request = ask(kernel, to("a", keep_alive=wrong))
        assert request.state is State.FAILED
        assert "keep" in request.error


def test_a_conversation_keeps_its_kv_when_its_model_leaves(two: Callable[..., Kernel]) -> None:
    kernel = two(a="keep_alive = '200ms'")
    kernel.start()
    context = kernel.contexts.add("chat")
    kernel.permissions.set("/contexts/chat", Permission(ME.uid, ME.gid, 0o700))
    first = ended(ask(kernel, to("a", "word " * 60), "chat", max_tokens=5))
    becomes(kernel, "a", ModelState.ABSENT)
    assert kernel.residency.state(context) == "host"
    second = ended(ask(kernel, to("a", "go on"), "chat", max_tokens=5))
    assert second.usage.cached_tokens >= first.usage.prompt_tokens - 16


def test_always_is_there_from_the_start_and_stays(two: Callable[..., Kernel]) -> None:
    kernel = two("[engine]\nkeep_alive = '0'\n", a="keep_alive = 'always'")
    kernel.start()
    becomes(kernel, "a", ModelState.READY)
    ended(ask(kernel, to("a"), max_tokens=3))
    ended(ask(kernel, to("b"), max_tokens=3))
    becomes(kernel, "b", ModelState.ABSENT)
    assert state(kernel, "a") is ModelState.READY


def test_unload_ends_the_workers_and_the_next_request_brings_the_model_back(
    two: Callable[..., Kernel],
) -> None:
    kernel = two()
    kernel.start()
    before = begun(ask(kernel, to("b"), max_tokens=400))
    model = kernel.models.get("b")
    kernel.model_objects.command(model, ME, "unload", "")
    wait_until(lambda: not kernel.pool.workers(), "the end of the worker", LONG_S)
    kernel.demand.look()
    assert model.state is ModelState.ABSENT, "what waits does not load it again"
    assert "was unloaded" in kernel.demand.why(model)
    assert before.state is State.QUEUED
    after = ask(kernel, to("b"), max_tokens=3)
    assert ended(after).state is State.DONE
    assert ended(before).state is State.DONE
    assert len(before.tokens) == 400


def test_keep_alive_by_command_survives_a_restart(two: Callable[..., Kernel]) -> None:
    kernel = two()
    kernel.model_objects.command(kernel.models.get("a"), ME, "keep_alive", "2h")
    kernel.stop()
    assert two().models.get("a").stay.keep_alive_s == 7200


def test_requests_of_an_absent_model_load_it_after_a_restart(two: Callable[..., Kernel]) -> None:
    kernel = two()
    request = ask(kernel, to("a"), max_tokens=5)  # this kernel never starts
    kernel.stop()
    later = two()
    later.start()
    wait_until(lambda: later.admission.get(request.id).state is State.DONE, "the answer", LONG_S)


def test_a_model_that_cannot_be_loaded_fails_its_requests_with_the_reason(
    make_kernel: MakeKernel, tmp_path: Path, random_llama: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    kernel = make_kernel(f"[models.broken]\npath = '{broken}'\n[models.a]\npath = '{random_llama}'\n", None)
    kernel.start()
    assert "broken/config.json:1: not JSON" in ended(ask(kernel, to("broken"))).error
    assert state(kernel, "broken") is ModelState.FAILED
    assert ended(ask(kernel, to("a"), max_tokens=3)).state is State.DONE


def test_a_worker_killed_while_it_loads_is_replaced(two: Callable[..., Kernel]) -> None:
    kernel = two(SMALL)
    kernel.start()
    request = ask(kernel, to("a"), max_tokens=5)
    wait_until(lambda: bool(kernel.pool.workers()), "the worker", LONG_S)
    os.kill(kernel.pool.workers()[0].process.pid, signal.SIGKILL)
    assert ended(request).state is State.DONE
    assert kernel.pool.restarts == 1


def test_a_model_whose_workers_never_come_says_why(
    two: Callable[..., Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Absent(Child):
        def connect(self, kinds: Collection[type[Any]] = wire.MESSAGES) -> wire.Channel:
            raise OSError("there is no device x")

    kernel = two(SMALL)
    kernel.pool._launch = Absent
    monkeypatch.setattr(pool, "RESTART_S_MIN", 0.0)
    kernel.start()
    failed = ended(ask(kernel, to("a")))
    assert failed.error.endswith("7 workers died one after the other, the last one: there is no device x")


def test_an_idle_model_leaves_for_one_that_has_no_room(two: Callable[..., Kernel]) -> None:
    kernel = two(SMALL)
    room_for_one(kernel)
    kernel.start()
    for name, other in ("ab", "ba", "ab"):
        assert ended(ask(kernel, to(name), max_tokens=3)).state is State.DONE
        assert state(kernel, other) is ModelState.ABSENT


def test_busy_models_take_turns_and_their_answers_stay_the_same(
    two: Callable[..., Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The turn of a model ends also while it answers: the request goes on when the model is back."""
    monkeypatch.setattr(residence, "STAY_LOADS", 0.0)
    monkeypatch.setattr(residence, "STAY_S", 0.0)
    monkeypatch.setattr(residence, "TURN_S", 0.5)
    monkeypatch.setattr(residence, "WAIT_S", 0.2)
    monkeypatch.setattr(demand, "DRAIN_S", 0.3)
    kernel = two(SMALL)
    room_for_one(kernel)
    kernel.start()
    long = [begun(ask(kernel, to("b"), max_tokens=1500))]
    long += [ask(kernel, to("b"), max_tokens=1500) for _ in range(9)]
    short = ask(kernel, to("a"), max_tokens=30)
    wait_until(lambda: state(kernel, "a") is ModelState.WAITING, "a waits", LONG_S)
    assert kernel.demand.why(kernel.models.get("a")).startswith("model a waits: ")
    assert ended(short).state is State.DONE
    assert not all(request.state.final for request in long), "they were interrupted"
    assert {tuple(ended(request).tokens) for request in long} == {tuple(long[0].tokens)}


def test_a_cancelled_wish_lets_the_others_stay(
    two: Callable[..., Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residence, "STAY_LOADS", 0.0)
    monkeypatch.setattr(residence, "STAY_S", 0.0)
    monkeypatch.setattr(residence, "TURN_S", 0.0)
    monkeypatch.setattr(residence, "WAIT_S", 0.0)
    kernel = two(SMALL)
    room_for_one(kernel)
    kernel.start()
    long = begun(ask(kernel, to("b"), max_tokens=1900))
    short = ask(kernel, to("a"), max_tokens=30)
    becomes(kernel, "b", ModelState.LEAVING)
    assert kernel.demand.why(kernel.models.get("b")) == "model b leaves for a"
    kernel.ending.cancel(short)
    becomes(kernel, "b", ModelState.READY)
    wait_until(lambda: state(kernel, "a") is ModelState.ABSENT, "a is given up", LONG_S)
    assert ended(long).preemptions == 0


def test_a_model_that_can_never_fit_is_refused_with_the_numbers(two: Callable[..., Kernel]) -> None:
    kernel = two()
    kernel.rooms.memory = lambda: Memory(200 << 20, 100 << 20)
    kernel.start()
    with pytest.raises(
        NoRoom, match=r"model a does not fit: it needs .* of weights, .* of KV .* 105 MB of 210"
    ):
        kernel.names.check_model(ME, "a")
    with pytest.raises(NoRoom):
        kernel.model_objects.command(kernel.models.get("a"), ME, "load", "")
    assert not kernel.pool.workers()


def test_queued_requests_of_a_model_that_can_never_fit_fail(two: Callable[..., Kernel]) -> None:
    earlier = two()
    request = ask(earlier, to("a"), max_tokens=5)
    earlier.stop()
    kernel = two()
    kernel.rooms.memory = lambda: Memory(200 << 20, 100 << 20)
    kernel.start()
    assert "does not fit" in ended(kernel.admission.get(request.id)).error


def owned(kernel: Kernel, name: str, uid: int) -> Model:
    kernel.permissions.set(f"/models/{name}", Permission(uid, uid, 0o700))
    return kernel.models.get(name)


def test_a_users_own_model_does_not_displace_a_busy_model_of_the_administrator(
    two: Callable[..., Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residence, "STAY_LOADS", 0.0)
    monkeypatch.setattr(residence, "STAY_S", 0.0)
    monkeypatch.setattr(residence, "TURN_S", 0.0)
    monkeypatch.setattr(residence, "WAIT_S", 0.0)
    kernel = two(SMALL)
    room_for_one(kernel)
    owned(kernel, "a", ALICE)
    kernel.start()
    long = begun(ask(kernel, to("b"), max_tokens=800))
    mine = ask(kernel, to("a"), max_tokens=3)
    becomes(kernel, "a", ModelState.WAITING)
    assert ended(long).state is State.DONE
    assert (mine.state, long.preemptions) == (State.QUEUED, 0), "it waits until b is idle for long"
    monkeypatch.setattr(residence, "MANNERS_S", 0.5)
    assert ended(mine).state is State.DONE
    monkeypatch.setattr(demand, "DRAIN_S", 0.0)
    asked = [ask(kernel, to("a"), max_tokens=1500) for _ in range(20)]
    begun(asked[0])
    assert ended(ask(kernel, to("b"), max_tokens=3)).state is State.DONE, "the administrator's comes first"
    assert not all(request.state.final for request in asked)


def test_a_warm_process_becomes_the_next_worker(two: Callable[..., Kernel]) -> None:
    kernel = two()
    kernel.start()
    wait_until(lambda: bool(kernel.pool.spares()), "a spare", LONG_S)
    (spare,) = kernel.pool.spares()
    assert ended(ask(kernel, to("a"), max_tokens=3)).state is State.DONE
    assert [w.process.pid for w in kernel.pool.workers()] == [spare.process.pid]
    wait_until(lambda: bool(kernel.pool.spares()), "the next spare", LONG_S)
    (after,) = kernel.pool.spares()
    os.kill(after.process.pid, signal.SIGKILL)
    wait_until(lambda: not after.process.alive(), "its end", LONG_S)
    assert ended(ask(kernel, to("b"), max_tokens=3)).state is State.DONE, "a dead spare is no worker's death"
    assert kernel.pool.restarts == 0


def test_a_prompt_with_a_wrong_keep_alive_is_refused() -> None:
    from aiosd.syscall.chat import Defaults, parse

    with pytest.raises(BadRequest, match="keep_alive"):
        parse(b'{"prompt": "x", "keep_alive": []}', Defaults("m"))
    assert parse(b'{"prompt": "x", "keep_alive": 1.5}', Defaults("m")).keep_alive_s == 1.5


@pytest.mark.slow
def test_every_request_ends_while_models_come_go_and_die(
    two: Callable[..., Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands, kills, short stays and a full memory at once; each answer is that of an undisturbed one."""
    for name, seconds in (("STAY_S", 0.5), ("STAY_LOADS", 0.0), ("TURN_S", 1.0), ("WAIT_S", 0.0)):
        monkeypatch.setattr(residence, name, seconds)
    monkeypatch.setattr(demand, "DRAIN_S", 0.2)
    kernel = two(SMALL + "[limits]\nworker_deaths_per_request = 100\n")
    room_for_one(kernel)
    kernel.start()
    chance, asked = random.Random(7), list[Request]()
    end_s = time.monotonic() + 25
    while time.monotonic() < end_s:
        name = chance.choice("ab")
        model = kernel.models.get(name)
        match chance.randrange(8):
            case 0:
                kernel.model_objects.command(model, ME, "unload", "")
            case 1:
                kernel.model_objects.command(model, ME, "load", "")
            case 2:
                kernel.model_objects.command(model, ME, "keep_alive", chance.choice(["0", "100ms", "1m"]))
            case 3 if kernel.pool.workers():
                with suppress(ProcessLookupError):
                    os.kill(kernel.pool.workers()[0].process.pid, signal.SIGKILL)
            case 4 if asked:
                kernel.ending.cancel(chance.choice(asked))
            case _:
                asked.append(ask(kernel, to(name, keep_alive=chance.choice([None, 0, 1])), max_tokens=40))
        time.sleep(chance.choice([0.0, 0.05, 0.5]))
    for name in "ab":
        asked.append(ask(kernel, to(name), max_tokens=40))  # it brings back what was unloaded
    done = [request for request in asked if ended(request).state is State.DONE]
    assert {request.state for request in asked} <= {State.DONE, State.CANCELLED}
    for name in "ab":
        assert len({tuple(request.tokens) for request in done if request.queue == name}) == 1

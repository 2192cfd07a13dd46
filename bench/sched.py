"""make bench-sched: measure cost and benefit of scheduling, with real worker processes.

The policies take turns with one load. Other parts swap contexts, grow to 2,000 agents, and queue 10,000
requests. Writes bench/results/sched.json and prints tables. Mounts nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiosd.access.caller import Caller
from aiosd.config.config import Config, DaemonConfig, EngineConfig, Quota, SchedulerConfig
from aiosd.cores.models import ModelState
from aiosd.kernel import Kernel
from aiosd.scheduler.chooser import BUILT_IN
from aiosd.scheduler.handler import Source
from aiosd.syscall.request import Request, State
from tests import random_model

RESULT = Path(__file__).parent / "results" / "sched.json"
PLACES = 8  # requests that a worker runs at once


@dataclass
class Agent:
    """One run of an agent: steps in sequence, each a request and then a wait for a tool."""

    name: str
    uid: int
    steps: int
    tokens: int  # tokens of an answer
    prompt: int  # characters of a prompt
    starts_s: float
    tool_s: float
    done_s: float = 0.0  # time from the start of the load to the end of the last step
    waits: list[float] = field(default_factory=list)

    @property
    def completion_s(self) -> float:
        return self.done_s - self.starts_s


@contextlib.contextmanager
def kernel(model: Path, **engine: Any) -> Iterator[Kernel]:
    with tempfile.TemporaryDirectory() as folder:
        quota = Quota(queued_requests=20_000, **engine.pop("quota", {}))
        settings = EngineConfig(**{"max_running": PLACES, **engine})
        made = Kernel(
            Config(
                daemon=DaemonConfig(state=folder),
                engine=settings,
                quota=quota,
                scheduler=SchedulerConfig("fifo"),
            ),
            model,
        )
        made.start()
        try:
            while made.models.all()[0].state is not ModelState.READY:
                time.sleep(0.01)
            yield made
        finally:
            made.stop()


def submit(k: Kernel, agent: str, uid: int, body: dict[str, object]) -> Request:
    found = k.agents.find(agent) or k.agents.add(agent)
    caller = Caller(uid, uid, os.getpid())
    text = json.dumps({"ignore_eos": True, **body}).encode()
    return k.admission.submit(caller, Source(f"/agents/{agent}/syscall/llm", found), text)


def wait(request: Request) -> None:
    ended = threading.Event()

    def changed() -> None:
        if request.answer.ended:
            ended.set()

    unwatch = request.answer.watch(changed)
    while not request.answer.ended:
        ended.wait(1)
    unwatch()
    assert request.state is State.DONE, request.error


def play(k: Kernel, agents: list[Agent]) -> float:
    """Run a load to its end and return the seconds. Each agent is a thread, like a program."""
    began = time.monotonic()

    def live(agent: Agent) -> None:
        time.sleep(agent.starts_s)
        for step in range(agent.steps):
            asked = time.monotonic()
            prompt = f"{agent.name} step {step} ".ljust(agent.prompt, "x")
            wait(submit(k, agent.name, agent.uid, {"prompt": prompt, "max_tokens": agent.tokens}))
            agent.waits.append(time.monotonic() - asked)
            if step < agent.steps - 1:
                time.sleep(agent.tool_s)
        agent.done_s = time.monotonic() - began

    threads = [threading.Thread(target=live, args=(agent,)) for agent in agents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for agent in agents:
        k.agent_objects.remove(agent.name)
    return time.monotonic() - began


def mixed(seed: int) -> list[Agent]:
    """64 agents of one user: 16 long batch agents start first, then 48 short chats."""
    rng = random.Random(seed)
    batch = [Agent(f"batch{i}", 1000, 2, rng.randint(1200, 1800), 200, 0.0, 0.05) for i in range(16)]

    def chat(i: int) -> Agent:
        steps, tokens = rng.randint(1, 3), rng.randint(8, 24)
        return Agent(f"chat{i}", 1000, steps, tokens, 60, rng.uniform(0.1, 6), rng.uniform(0.02, 0.2))

    return batch + [chat(i) for i in range(48)]


def policies(model: Path, rounds: int) -> list[dict[str, Any]]:
    seen: dict[str, list[tuple[float, float, float]]] = {name: [] for name in BUILT_IN}
    with kernel(model) as k:
        for round in range(rounds):
            for name in BUILT_IN:
                k.chooser.switch(name)
                agents = mixed(round)
                took = play(k, agents)
                tokens = sum(a.steps * a.tokens for a in agents)
                chats = [a.completion_s for a in agents if a.name.startswith("chat")]
                seen[name].append(
                    (statistics.mean(a.completion_s for a in agents), statistics.mean(chats), tokens / took)
                )
    middle = {
        name: [statistics.median(column) for column in zip(*runs, strict=True)] for name, runs in seen.items()
    }
    fifo = middle["fifo"]
    return [
        {"policy": name, "mean completion, s": jct, "of fifo's": jct / fifo[0], "chats only, s": chat,
         "tokens/s": rate, "throughput of fifo's": rate / fifo[2]}
        for name, (jct, chat, rate) in middle.items()
    ]  # fmt: skip


def fairness(model: Path, rounds: int) -> list[dict[str, Any]]:
    """A user with one agent beside a user with 63. With half of the machine, the agent takes twice its time
    alone."""
    seen: dict[str, list[float]] = {"alone": [], "fair": [], "fifo": []}
    with kernel(model) as k:
        k.scheduler.quantum_tokens = 16
        for _ in range(rounds):
            for name in seen:
                k.chooser.switch("fifo" if name == "alone" else name)
                others = [Agent(f"other{i}", 2000, 4, 64, 60, 0.0, 0.0) for i in range(63)]
                mine = Agent("mine", 1000, 8, 40, 60, 0.3, 0.05)
                play(k, [mine, *others] if name != "alone" else [mine])
                seen[name].append(statistics.mean(mine.waits))
    half = 2 * statistics.median(seen["alone"])
    return [
        {"one agent": name if name == "alone" else f"beside 63, {name}", "answer, s": statistics.median(runs),
         "of half the machine's": statistics.median(runs) / half}
        for name, runs in seen.items()
    ]  # fmt: skip


def growth(model: Path) -> list[dict[str, Any]]:
    rows = []
    with kernel(model, max_running=64) as k:
        k.chooser.switch("fair")
        for count in (1, 8, 64, 512, 2000):
            agents = [Agent(f"g{i}", 1000 + i % 50, 1, 8, 20, 0.0, 0.0) for i in range(count)]
            busy = k.scheduler.busy_s
            took = play(k, agents)
            rows.append(
                {"agents": count, "total, s": took, "per request, ms": took / count * 1e3,
                 "deciding, ms per request": (k.scheduler.busy_s - busy) / count * 1e3}
            )  # fmt: skip
    return rows


def queue_cost(model: Path, count: int = 10_000) -> list[dict[str, Any]]:
    """Queue requests while the model is unloaded, so that none runs."""
    rows = []
    with kernel(model) as k:
        k.demand.unload(k.models.all()[0])
        k.models.all()[0].state = ModelState.LOADING
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        for i in range(count):
            submit(k, f"a{i % 1000}", 1000 + i % 50, {"prompt": f"question {i}", "max_tokens": 4})
        held = (tracemalloc.get_traced_memory()[0] - before) / count
        tracemalloc.stop()
        scheduler, model_ = k.scheduler, k.models.all()[0]
        for name in BUILT_IN:
            k.chooser.switch(name)
            with scheduler.lock:
                began = time.perf_counter()
                for _ in range(1000):
                    view = scheduler._view(model_.name, (), scheduler.queue.held_back)
                    k.chooser.order(view, 1)
                    scheduler.queue.ready(model_.name).pop(view.waiting[0].id)
                took = (time.perf_counter() - began) / 1000
                for request in scheduler.queue.waiting.values():
                    scheduler.queue.refresh(request)
            rows.append(
                {"policy": name, "one decision, us": took * 1e6, "queued": count, "bytes a request": held}
            )
    return rows


def restoring(model: Path, tokens: int = 1000, times: int = 7) -> list[dict[str, Any]]:
    """The next turn of a conversation whose KV is in various places. Between the turns another prompt fills
    the worker's memory, so that no old KV is left. The model has the shape S (engine_models.py)."""
    took: dict[str, list[float]] = {tier: [] for tier in ("resident", "host", "disk", "cold")}
    caller = Caller(0, 0, os.getpid())
    with kernel(model) as k:
        room = (2 * tokens + 400) * int(k.models.all()[0].info["kv_bytes_per_token"])
    with kernel(model, kv_bytes=room) as k:
        for n, tier in enumerate(list(took) * times):
            k.context_objects.add(f"c{n}", caller)
            context = k.contexts.get(f"c{n}")
            wait(
                submit(k, "a", 0, {"prompt": f"{n}:".ljust(tokens, "x"), "max_tokens": 1, "context": f"c{n}"})
            )
            if tier != "resident":
                k.context_objects.evict(context, tier)
            for letter in "uvw":
                prompt = f"{letter}{n}:".ljust(tokens + 300, letter)
                wait(submit(k, "b", 1, {"prompt": prompt, "max_tokens": 1}))
            assert k.residency.state(context) == tier
            began = time.perf_counter()
            wait(submit(k, "a", 0, {"prompt": "z", "max_tokens": 1, "context": f"c{n}"}))
            took[tier].append(time.perf_counter() - began)
            k.context_objects.remove(f"c{n}")
    middle = {tier: statistics.median(t) * 1e3 for tier, t in took.items()}
    base = middle["resident"]
    return [
        {"KV was": tier, "turn of one token, ms": ms, "more than resident, ms": ms - base,
         "of computing again": (ms - base) / (middle["cold"] - base)}
        for tier, ms in middle.items()
    ]  # fmt: skip


def preempting(name: str, model: Path, times: int, tokens: int) -> list[dict[str, Any]]:
    """Two requests share one place: in quanta (rr), or one after the other (fifo)."""
    took: dict[str, list[float]] = {"fifo": [], "rr": []}
    preemptions = 0
    with kernel(model, max_running=1) as k:
        k.scheduler.quantum_tokens = 10
        for n in range(times):
            for policy in took:
                k.chooser.switch(policy)
                began = time.perf_counter()
                both = [
                    submit(
                        k, f"p{i}", 0, {"prompt": f"{n} {i} {policy} ".ljust(300, "x"), "max_tokens": tokens}
                    )
                    for i in range(2)
                ]
                for request in both:
                    wait(request)
                took[policy].append(time.perf_counter() - began)
                preemptions = sum(request.preemptions for request in both) or preemptions
    fifo, rr = (statistics.median(took[policy]) for policy in ("fifo", "rr"))
    step, pair = fifo / (2 * tokens), (rr - fifo) / preemptions
    return [
        {"shape": name, "preemptions": preemptions, "decode step, ms": step * 1e3,
         "preempt and resume, ms": pair * 1e3, "in decode steps": pair / step}
    ]  # fmt: skip


def show(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{title}\n\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        print("| " + " | ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="policies, fairness, growth, queue, restoring or preempting")
    options = parser.parse_args()
    results: dict[str, Any] = json.loads(RESULT.read_text()) if options.only else {}
    with tempfile.TemporaryDirectory() as scratch:
        model = random_model.make(Path(scratch) / "random", context_length=4096)
        larger = random_model.make(Path(scratch) / "larger", hidden=256, layers=6, context_length=4096)
        parts: dict[str, tuple[str, Callable[[], list[dict[str, Any]]]]] = {
            "policies": ("64 agents, 16 of them long", lambda: policies(larger, options.rounds)),
            "fairness": ("Fair shares", lambda: fairness(larger, options.rounds)),
            "growth": ("More and more agents", lambda: growth(model)),
            "queue": ("A long queue", lambda: queue_cost(model)),
            "restoring": ("A conversation of 1,000 tokens comes back", lambda: restoring(larger)),
            "preempting": (
                "A place is shared",
                lambda: preempting("S", larger, 5, 200),
            ),
        }
        for name, (title, measure) in parts.items():
            if options.only in (None, name):
                results[name] = measure()
                show(title, results[name])
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""An answer belongs to its request alone: the same bits among neighbours, preempted, swapped and moved.

Through the real files and two real worker processes; the log-probabilities stand for the logits.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.running import Daemon, wait_until

pytestmark = [pytest.mark.mount]
CONFIG = "[scheduler]\nquantum = 4\n[engine]\nmax_running = {}\nkv_bytes = 400000\n"
TURNS = [
    {"prompt": "the first turn of a conversation", "max_tokens": 60, "temperature": 0.9, "seed": 4},
    {"prompt": "and the second one", "max_tokens": 80},
    {"prompt": "and the last", "max_tokens": 70, "temperature": 1.0, "seed": 5, "top_p": 0.9},
]


def conversation(daemon: Daemon, context: str, between: Callable[[], None] = lambda: None) -> list[Any]:
    """The tokens and log-probabilities of each turn."""
    (daemon.root / f"contexts/{context}").mkdir()
    found = []
    for turn in TURNS:
        asked = {**turn, "context": context, "ignore_eos": True, "logprobs": True, "top_logprobs": 3}
        fd = os.open(daemon.root / "agents/a/syscall/llm", os.O_RDWR)
        os.write(fd, json.dumps(asked).encode())
        with os.fdopen(fd, "rb") as file:
            answer = json.loads(file.read())
        found.append(answer["choices"][0]["logprobs"]["content"])
        assert len(found[-1]) == turn["max_tokens"]
        between()
    return found


class Neighbours:
    """Let so many other agents ask random questions until the block ends."""

    def __init__(self, daemon: Daemon, count: int, model: str) -> None:
        self._daemon, self._path = daemon, daemon.root / f"models/{model}/llm"
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(count)]

    def _ask(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self._stop.is_set():
            fd = os.open(self._path, os.O_RDWR)
            prompt = "noise " * rng.randint(1, 30)
            asked = {"prompt": prompt, "max_tokens": rng.randint(1, 60), "ignore_eos": True, "seed": seed,
                     "temperature": rng.random()}  # fmt: skip
            os.write(fd, json.dumps(asked).encode())
            while os.read(fd, 65536):
                pass
            os.close(fd)

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def test_the_same_bits_among_neighbours_preempted_swapped_and_moved(
    make_daemon: Callable[..., Daemon], random_llama: Path, tmp_path: Path
) -> None:
    daemon = make_daemon(CONFIG.format(3)).start()
    (daemon.root / "agents/a").mkdir()
    expected = conversation(daemon, "alone")
    daemon.write(f"models/{random_llama.name}/ctl", "replicas 2")
    daemon.write("scheduler/policy", "rr")
    for count in (1, 7, 31):
        with Neighbours(daemon, count, random_llama.name):
            assert conversation(daemon, f"among{count}") == expected, f"among {count}"
    assert int(daemon.table("scheduler/stats")["preemptions"]) > 20

    def swap() -> None:
        tier = tiers.pop()
        daemon.write("contexts/swapped/ctl", f"evict {tier}")
        assert daemon.read("contexts/swapped/state") == f"{tier}\n"

    tiers = ["cold", "disk", "host"]
    assert conversation(daemon, "swapped", swap) == expected

    def move() -> None:
        """Copy the context out with cp, and back in when another process serves the model."""
        daemon.sh(f"cp contexts/moved/kv {tmp_path}/kv")
        pids = daemon.worker_pids()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        wait_until(
            lambda: len(daemon.worker_pids()) == 2 and not set(pids) & set(daemon.worker_pids()), "others"
        )
        wait_until(lambda: daemon.model_state() == "ready", "the model", 60)
        assert daemon.sh(f"cp {tmp_path}/kv contexts/moved/kv").stderr == ""

    assert conversation(daemon, "moved", move) == expected

"""Workers and daemon killed at random under load: every accepted request ends once, with the right tokens.

In the suite it runs for a minute; for longer: .venv/bin/python -m tests.t5_chaos --minutes 10
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import random_model
from tests.running import Daemon, wait_until

pytestmark = [pytest.mark.mount, pytest.mark.root]
CONFIG = """
[scheduler]
quantum = 16
[engine]
max_running = 4
kv_bytes = 600000
host_kv_bytes = 200000
[limits]
keep_requests = 1000000
worker_deaths_per_request = 1000
"""
CLIENTS = 6
QUESTIONS = [
    {"prompt": f"question {i} " + "word " * (7 * i % 30), "max_tokens": 60 + 23 * i % 100, "ignore_eos": True,
     "seed": i, "temperature": i % 3 / 2}
    for i in range(12)
]  # fmt: skip


class Chaos:
    def __init__(self, daemon: Daemon, seed: int) -> None:
        self.daemon, self.random = daemon, random.Random(seed)
        self.did: Counter[str] = Counter()
        self.stopping = threading.Event()
        self.accepted: dict[tuple[str, int], int] = {}  # (agent, id) -> question
        self.lock = threading.Lock()

    # clients

    def client(self, number: int) -> None:
        agent, rng = f"c{number}", random.Random(number)
        state = "unknown"
        while not self.stopping.is_set():
            question = rng.randrange(len(QUESTIONS))
            if state != "new":  # "new": the write was refused, and may be repeated
                id = self.patiently(lambda: int(self.daemon.read(f"agents/{agent}/requests/new")))
            path = f"agents/{agent}/requests/{id}"
            try:
                self.daemon.write(f"{path}/request", json.dumps(QUESTIONS[question]))
            except OSError:
                self.did["write cut off"] += 1
            # only the daemon knows whether it was accepted; an unwritten draft does not outlive it
            state = self.patiently(lambda p=path: self.state(p))  # type: ignore[misc]
            if state in ("new", "unknown"):
                time.sleep(0.05)  # the queue may be full
                continue
            with self.lock:
                self.accepted[agent, id] = question
            if rng.random() < 0.3:
                time.sleep(rng.random() / 5)  # some clients pause, others do not

    def state(self, path: str) -> str:
        if not (self.daemon.root / "status").exists():
            raise OSError("the daemon is away")
        try:
            return self.daemon.read(f"{path}/state").split()[0]
        except FileNotFoundError:
            if not (self.daemon.root / "status").exists():
                raise OSError("the daemon is away") from None
            return "unknown"

    @staticmethod
    def patiently(action: Callable[[], Any]) -> Any:
        """Repeat until it works: the daemon may be dead, or its queue full."""
        end = time.monotonic() + 60
        while True:
            try:
                return action()
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)

    # what goes wrong

    def kill_worker(self) -> None:
        pids = self.daemon.worker_pids()
        if pids:
            os.kill(self.random.choice(pids), signal.SIGKILL)

    def kill_daemon(self) -> None:
        self.daemon.kill()
        self.daemon.start(ready=False)

    def restart_daemon(self) -> None:
        status = self.daemon.stop()
        assert status == 0, f"exit status {status}"
        self.daemon.start(ready=False)

    def switch_policy(self) -> None:
        self.daemon.write(
            "scheduler/policy", self.random.choice(self.daemon.read("scheduler/policies").split())
        )

    def run(self, seconds: float) -> None:
        clients = [threading.Thread(target=self.client, args=(i,)) for i in range(CLIENTS)]
        for thread in clients:
            thread.start()
        actions = [self.kill_worker] * 5 + [self.switch_policy] * 3 + [self.kill_daemon, self.restart_daemon]
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(self.random.random() * 2)
            action = self.random.choice(actions)
            try:
                action()
                self.did[action.__name__] += 1
            except (OSError, ProcessLookupError):  # a worker that was dead already
                pass
        self.stopping.set()
        for thread in clients:
            thread.join()

    # what has to hold

    def check(self, expected: list[str]) -> None:
        for (agent, id), question in self.accepted.items():
            path = f"agents/{agent}/requests/{id}"
            wait_until(lambda p=path: self.state(p) in ("done", "failed", "cancelled"), path, 120)  # type: ignore[misc]
            assert self.state(path) == "done", (path, self.daemon.read(f"{path}/error"))
            document = json.loads(self.daemon.read(f"{path}/response.json"))
            assert document["choices"][0]["message"]["content"] == expected[question], path
            assert document["usage"]["completion_tokens"] == QUESTIONS[question]["max_tokens"]
        for number in range(CLIENTS):
            mine = sum(agent == f"c{number}" for agent, _ in self.accepted)
            assert int(self.daemon.table(f"agents/c{number}/usage")["requests"]) == mine, "each ended once"


def torment(folder: Path, model: Path, seconds: float, seed: int) -> Counter[str]:
    daemon = Daemon(folder, model, CONFIG).start()
    try:
        daemon.write(f"models/{model.name}/ctl", "replicas 2")
        expected = []
        for question in QUESTIONS:
            daemon.write(f"models/{model.name}/llm", json.dumps(question))
            answer = json.loads(daemon.read(f"models/{model.name}/llm"))
            expected.append(answer["choices"][0]["message"]["content"])
        for number in range(CLIENTS):
            (daemon.root / f"agents/c{number}").mkdir()
        chaos = Chaos(daemon, seed)
        chaos.run(seconds)
        chaos.check(expected)
        chaos.did["requests"] = len(chaos.accepted)
        assert daemon.stop() == 0
        return chaos.did
    except BaseException:
        print("the daemon's log ends with:\n" + daemon.log.read_text()[-8000:])
        raise
    finally:
        daemon.clean()


def test_a_minute_of_kills_loses_and_changes_nothing(tmp_path: Path, random_llama: Path) -> None:
    did = torment(tmp_path, random_llama, 60, seed=1)
    assert did["requests"] > 50
    assert did["kill_worker"] >= 3
    assert did["kill_daemon"] >= 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = random_model.make(Path(scratch) / "random")
        print(dict(torment(Path(scratch) / "chaos", model, options.minutes * 60, options.seed)))


if __name__ == "__main__":
    main()

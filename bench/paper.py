"""make bench-paper: the experiment of the AIOS paper (arXiv 2403.16971) on a real model.

Agents in the paper's styles, programs over files in bench/agents, solve tasks: each alone, then 1 to 64 at
once. With aiosd they share a model. Without it each has a model in a process of its own. Each answer is
compared with what the same agent got alone. Then the policies take turns with few places for many agents.

Writes bench/results/paper.json and prints tables. It needs root (a mount), jq and 0.5 GB for each own model.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.running import REPOSITORY, START_S, Daemon, wait_until

RESULT = Path(__file__).parent / "results" / "paper.json"
AGENTS = Path(__file__).parent / "agents"
REAL_MODEL = REPOSITORY / ".venv/models/SmolLM2-135M-Instruct.Q4_1.gguf"  # ./setup --model brings it
STYLES = ("react", "reflexion", "toolloop")
TASKS = {
    "France": "What is the capital of France?", "honey": "What do bees make?",
    "Linux": "Who began Linux?", "Mars": "Why is Mars red?",
    "Water": "What is water made of?", "Danube": "Where does the Danube end?",
    "Hamlet": "Who wrote Hamlet?", "Gold": "What is the symbol of gold?",
    "heart": "What does the heart do?", "Whales": "What is the largest animal?",
    "Unix": "Where was Unix made?", "Tea": "Where does tea come from?",
    "moon": "How long does the moon need?", "Copper": "What is copper good for?",
    "Rome": "When was Rome founded?", "Penguins": "Can penguins fly?",
    "Granite": "What is granite?", "violin": "How is a violin played?",
    "Rice": "What is rice?", "spider": "How many legs has a spider?",
    "Iceland": "What is on Iceland?", "Sahara": "What is the Sahara?",
}  # fmt: skip
OWN_MOST = 16  # own models at once; each takes half a gigabyte
CONTENDED, PLACES = 16, 4  # agents and places when the policies take turns
POLICIES = ("fifo", "rr", "fair", "las")
Answers = list[str]


@dataclass(frozen=True)
class Job:
    """An agent with its task. No two jobs are alike, so none profits from another's answers."""

    number: int

    @property
    def name(self) -> str:
        return f"{STYLES[self.number % 3]}-{self.number}"

    @property
    def command(self) -> list[str]:
        word, question = list(TASKS.items())[self.number % len(TASKS)]
        return [str(AGENTS / STYLES[self.number % 3]), word, question]


@dataclass
class Run:
    """What a number of agents at once took."""

    agents: int
    makespan_s: float
    execution_s: list[float]  # of each agent, from the common start to its end
    answers: dict[str, Answers]
    waited_s: list[float] = field(default_factory=list)  # of each request
    turnaround_s: list[float] = field(default_factory=list)
    load_s: float = 0.0  # of all models
    memory_bytes: int = 0  # of the processes with models, what they share counted once

    def summary(self, alone: dict[str, Answers]) -> dict[str, Any]:
        same = [said == alone[name] for name, said in self.answers.items()]
        facts: dict[str, Any] = {
            "makespan_s": self.makespan_s, "execution_s": statistics.fmean(self.execution_s),
            "execution_p90_s": p90(self.execution_s), "memory_bytes": self.memory_bytes,
            "compared": len(same), "identical": statistics.fmean(same),
        }  # fmt: skip
        if self.waited_s:
            facts |= {"waited_s": statistics.fmean(self.waited_s), "waited_p90_s": p90(self.waited_s)}
            facts["turnaround_s"] = statistics.fmean(self.turnaround_s)
        return facts | ({"load_s": self.load_s} if self.load_s else {})


def p90(values: Sequence[float]) -> float:
    return sorted(values)[int(0.9 * (len(values) - 1))]


# agents


def together(jobs: Sequence[Job], model_of: Callable[[Job], int]) -> Run:
    """Run the agents at once. `model_of` gives the descriptor of an agent's model."""
    models = {job: model_of(job) for job in jobs}
    began = time.perf_counter()

    def one(job: Job) -> tuple[str, float, Answers]:
        model = models[job]
        # the agent finds its model at descriptor 3
        command = ["bash", "-c", 'exec 3<&"$0"; exec "$@"', str(model), *job.command]
        done = subprocess.run(command, pass_fds=[model], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{job.name}: {done.stderr or done.stdout}")
        return job.name, time.perf_counter() - began, done.stdout.splitlines()

    try:
        with ThreadPoolExecutor(len(jobs)) as pool:
            ended = list(pool.map(one, jobs))
        makespan_s = time.perf_counter() - began
    finally:
        for model in models.values():
            os.close(model)
    return Run(len(jobs), makespan_s, [s for _, s, _ in ended], {name: said for name, _, said in ended})


# with aiosd


@contextmanager
def aiosd(model: Path, max_running: int = 64) -> Iterator[Daemon]:
    with tempfile.TemporaryDirectory() as folder:
        daemon = Daemon(Path(folder) / "d", model, f"[engine]\nmax_running = {max_running}\n")
        try:
            daemon.start(ready=False)
            wait_until(lambda: daemon.table("status")["models_ready"] != "-", "the model", START_S)
            yield daemon
        finally:
            daemon.stop()
            daemon.clean()


def shared(daemon: Daemon, jobs: Sequence[Job]) -> Run:
    """Run the agents on the model of the daemon, each with an agent of the tree."""

    def model_of(job: Job) -> int:
        (daemon.root / "agents" / job.name).mkdir()
        return os.open(daemon.root / "agents" / job.name / "syscall/llm", os.O_RDWR)

    run = together(jobs, model_of)
    for job in jobs:
        folder = daemon.root / "agents" / job.name
        for request in (folder / "requests").iterdir():
            if request.name.isdecimal():
                usage = daemon.table(f"agents/{job.name}/requests/{request.name}/usage")
                run.waited_s.append(float(usage["waited_s"]))
                run.turnaround_s.append(float(usage["turnaround_s"]))
        folder.rmdir()
    run.memory_bytes = sum(map(memory_of, daemon.worker_pids()))
    return run


# without it


@contextmanager
def own_models(model: Path, count: int) -> Iterator[tuple[list[int], list[int]]]:
    """Start processes with a model each. Gives their pids and the descriptors that agents speak to."""
    threads = max(1, (os.cpu_count() or 1) // count)  # more would only disturb one another
    with ExitStack() as undo:
        processes, ends = list[subprocess.Popen[bytes]](), list[int]()
        for _ in range(count):
            here, there = socket.socketpair()
            command = [
                sys.executable,
                "-m",
                "bench.paper_model",
                str(model),
                str(threads),
                str(there.fileno()),
            ]
            process = subprocess.Popen(
                command, cwd=REPOSITORY, pass_fds=[there.fileno()],
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            there.close()
            undo.callback(process.wait)
            undo.callback(process.kill)
            processes.append(process)
            ends.append(here.detach())
            undo.callback(os.close, ends[-1])
        for process in processes:
            assert process.stdout
            assert process.stdout.readline() == b"ready\n"
        yield [process.pid for process in processes], ends


def own(model: Path, jobs: Sequence[Job]) -> Run:
    """Run the agents, each with a model of its own that is loaded before they start together."""
    began = time.perf_counter()
    with own_models(model, len(jobs)) as (pids, ends):
        load_s = time.perf_counter() - began
        of = dict(zip(jobs, ends, strict=True))
        run = together(jobs, lambda job: os.dup(of[job]))
        run.load_s, run.memory_bytes = load_s, sum(map(memory_of, pids))
        return run


def alone(model: Path, jobs: Sequence[Job]) -> dict[str, Answers]:
    """Run one agent after the other, with a model that nobody else uses."""
    with own_models(model, 1) as (_, (end,)):
        return {
            name: said
            for job in jobs
            for name, said in together([job], lambda _: os.dup(end)).answers.items()
        }


def memory_of(pid: int) -> int:
    """Pss: shared pages count in proportion. 0: the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


# report


def measure(model: Path, levels: Sequence[int], own_most: int) -> dict[str, Any]:
    jobs = [Job(number) for number in range(max(levels))]
    contended = min(CONTENDED, len(jobs))
    reference = alone(model, jobs)
    result: dict[str, Any] = {"model": model.name, "cpus": os.cpu_count(), "levels": {}, "policies": {}}
    print(f"{'agents':8}{'':10}{'all s':>8}{'one s':>8}{'waited s':>10}{'memory MB':>11}{'identical':>11}")
    for level in levels:
        with aiosd(model) as daemon:
            row = {"aiosd": shared(daemon, jobs[:level]).summary(reference)}
        if level <= own_most:
            row["own"] = own(model, jobs[:level]).summary(reference)
        for side, facts in row.items():
            show(str(level), side, facts)
        result["levels"][level] = row
    for policy in POLICIES:
        with aiosd(model, PLACES) as daemon:
            daemon.write("scheduler/policy", policy)
            result["policies"][policy] = shared(daemon, jobs[:contended]).summary(reference)
        show(f"{contended}/{PLACES}", policy, result["policies"][policy])
    return result


def show(agents: str, side: str, facts: dict[str, Any]) -> None:
    waited = f"{facts['waited_s']:.2f}" if "waited_s" in facts else "-"
    print(
        f"{agents:8}{side:10}{facts['makespan_s']:8.1f}{facts['execution_s']:8.1f}{waited:>10}"
        f"{facts['memory_bytes'] / 1e6:11.0f}{facts['identical']:11.0%}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=REAL_MODEL)
    parser.add_argument("--agents", type=int, nargs="+", default=[1, 4, 16, 64], help="at once")
    parser.add_argument("--own-most", type=int, default=OWN_MOST, help="own models at once")
    options = parser.parse_args()
    if not shutil.which("jq"):
        raise SystemExit("bench-paper needs jq: ./setup --tests installs it")
    if not options.model.exists():
        raise SystemExit(f"{options.model} is missing: ./setup --model brings it")
    began = time.monotonic()
    result = measure(options.model, options.agents, options.own_most)
    for level, row in result["levels"].items():
        if "own" in row:
            ratio = row["own"]["makespan_s"] / row["aiosd"]["makespan_s"]
            print(f"{level} agents: {ratio:.1f} times as fast as with a model each (the paper: 2.1 times)")
    print(f"{time.monotonic() - began:.0f} s")
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Tokens per second of the engine and its peers: `python -m bench.engine`, or `make bench-engine`.

N requests start at once, each with P prompt tokens and 64 new tokens, greedy. The time runs from the arrival
of the first request to the last token. All sides use the same random weights, as many threads and the same
processors, each in a process of its own. They take turns, so that a noisy minute affects all sides. Prints a
table and writes bench/results/engine.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from bench.engine_sides import NEW, of

RESULTS = Path(__file__).parent / "results"
SLOW_S = 20.0  # a side that takes longer runs once


def bandwidth() -> float:
    """Bytes per second that all threads together read from memory."""
    data = torch.ones(1 << 28)  # 1 GiB: no cache holds it
    took = []
    for _ in range(5):
        start = time.perf_counter()
        data.sum()
        took.append(time.perf_counter() - start)
    return data.nbytes / min(took)


class Process:
    """A side in a process of its own (bench.engine_sides)."""

    def __init__(self, model: str, side: str, threads: int) -> None:
        command = [sys.executable, "-m", "bench.engine_sides", model, side, str(threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
        while self._line() != "ready":  # a library may greet on standard output
            pass

    def run(self, length: int, requests: int) -> float:
        """Return the seconds that so many requests of that length take."""
        assert self._process.stdin
        print(length, requests, file=self._process.stdin, flush=True)
        return float(self._line())

    def end(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def _line(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args!r} ended: {self._process.wait()}")
        return line.strip()


def measure(
    name: str, length: int, requests: list[int], options: argparse.Namespace
) -> dict[str, dict[int, list[float]]]:
    """Tokens per second of each run, by side and number of requests."""
    _, makers, _ = of(name)  # made once, before the sides read it
    names = [side for side in makers if re.search(options.sides, side)]
    sides = {side: Process(name, side, options.threads) for side in names}
    for side in sides.values():
        side.run(length, 2)  # to warm up
    rates: dict[str, dict[int, list[float]]] = {side: {n: [] for n in requests} for side in sides}
    for _ in range(options.rounds):
        for n in requests:
            for label, side in sides.items():
                seen = rates[label][n]
                serial = label.endswith("one by one") and n > 1  # N requests take N times as long
                if serial or (seen and n * NEW / seen[0] > SLOW_S):
                    continue
                seen.append(n * NEW / side.run(length, n))
                print(f"  {name} P{length} N{n} {label}: {seen[-1]:.0f}", flush=True)
    for side in sides.values():
        side.end()
    return rates


def table(results: dict[str, dict[str, dict[int, list[float]]]]) -> str:
    lines = ["| tokens/s | " + " | ".join(results) + " |", "|---" * (len(results) + 1) + "|"]
    for label in {side: None for rates in results.values() for side in rates}:
        cells = []
        for rates in results.values():
            values = ["–" if not v else f"{statistics.median(v):.0f}{'*' if len(v) < 3 else ''}"
                      for v in rates.get(label, {}).values()]  # fmt: skip
            cells.append("/".join(values))
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bytes_read_per_second": bandwidth(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.engine", description=__doc__)
    parser.add_argument(
        "--models",
        default="A:128,S:128,S:512,M:128:1/4/16",
        help="MODEL:PROMPT_TOKENS[:N/N/…],…; MODEL is A, S, M, L or a GGUF file",
    )
    parser.add_argument("--requests", default="1,4,16,64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", default="", metavar="REGEX", help="only these")
    parser.add_argument("--result", type=Path, default=RESULTS / "engine.json")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--keep", action="store_true", help="keep the results of other models in engine.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    RESULTS.mkdir(exist_ok=True)
    old: Path = options.result
    results = json.loads(old.read_text())["tokens_per_second"] if options.keep and old.exists() else {}
    for part in options.models.split(","):
        name, length, *only = part.split(":")  # of a GGUF file its path
        requests = [int(n) for n in (only[0].split("/") if only else options.requests.split(","))]
        label = f"{Path(name).stem} P{length}, N={'/'.join(map(str, requests))}"
        results[label] = measure(name, int(length), requests, options)
        report = {"machine": machine(), "new_tokens": NEW, "tokens_per_second": results}
        old.write_text(json.dumps(report, indent=1) + "\n")
    print("\n" + table(results) + "\n\n* one run: it takes longer than 20 s")


if __name__ == "__main__":
    main()

"""Tokens per second of the engine and its peers: `python -m bench.engine`, or `make bench-engine`.

N requests start at once, each with P prompt tokens and 64 new tokens, greedy. The time runs from the arrival
of the first request to the last token. With `--new 1` that is the time to the first token, in seconds. All
sides use the same weights, as many threads and the same processors, each in a process of its own. They take
turns, so that a noisy minute affects all sides. Prints a table of that, and one of the time to load and the
memory that the model took. Writes bench/results/engine.json.
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

from bench.engine_sides import of

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
        self.bytes = 0.0  # in memory at most, beyond the libraries
        while not (line := self._line()).startswith("ready "):  # a library may greet on standard output
            pass
        self.load_s = float(line.split()[1])

    def run(self, length: int, requests: int, new: int) -> float:
        """Return the seconds that so many requests of that length take."""
        assert self._process.stdin
        print(length, requests, new, file=self._process.stdin, flush=True)
        seconds, resident = map(float, self._line().split())
        self.bytes = max(self.bytes, resident)
        return seconds

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
) -> tuple[dict[str, dict[int, list[float]]], dict[str, dict[str, float]]]:
    """Tokens per second (or seconds to the first token) of each run, by side and number of requests; and what
    each side took to load, and in memory.
    """
    _, makers, _ = of(name)  # made once, before the sides read it
    names = [side for side in makers if re.search(options.sides, side)]
    sides = {side: Process(name, side, options.threads) for side in names}
    for side in sides.values():
        side.run(min(length, 128), 2, options.new)  # to warm up
    rates: dict[str, dict[int, list[float]]] = {side: {n: [] for n in requests} for side in sides}
    took: dict[tuple[str, int], float] = {}
    for _ in range(options.rounds):
        for n in requests:
            for label, side in sides.items():
                seen = rates[label][n]
                serial = label.endswith("one by one") and n > 1  # N requests take N times as long
                if serial or took.get((label, n), 0.0) > SLOW_S:
                    continue
                seconds = took[label, n] = side.run(length, n, options.new)
                seen.append(seconds if options.new == 1 else n * options.new / seconds)
                print(f"  {name} P{length} N{n} {label}: {seen[-1]:.3g}", flush=True)
    for side in sides.values():
        side.end()
    return rates, {label: {"load_s": side.load_s, "MB": side.bytes / 1e6} for label, side in sides.items()}


def table(unit: str, results: dict[str, dict[str, dict[int, list[float]]]]) -> str:
    lines = [f"| {unit} | " + " | ".join(results) + " |", "|---" * (len(results) + 1) + "|"]
    for label in {side: None for rates in results.values() for side in rates}:
        cells = []
        for rates in results.values():
            values = ["–" if not v else f"{statistics.median(v):.3g}{'*' if len(v) < 3 else ''}"
                      for v in rates.get(label, {}).values()]  # fmt: skip
            cells.append("/".join(values))
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table_of_loads(loads: dict[str, dict[str, dict[str, float]]]) -> str:
    lines = ["| load, s / memory, MB | " + " | ".join(loads) + " |", "|---" * (len(loads) + 1) + "|"]
    for label in {side: None for found in loads.values() for side in found}:
        cells = [f"{found[label]['load_s']:.2f} / {found[label]['MB']:.0f}" if label in found else "–"
                 for found in loads.values()]  # fmt: skip
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
        help="MODEL:PROMPT_TOKENS[:N/N/…],…; MODEL is A, S, M, L, a GGUF file, or either as GGUF: L-Q4_K_M",
    )
    parser.add_argument("--requests", default="1,4,16,64")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer; 1: measure the time")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", default="", metavar="REGEX", help="only these")
    parser.add_argument("--result", type=Path, default=RESULTS / "engine.json")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--keep", action="store_true", help="keep the results of other models in engine.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    RESULTS.mkdir(exist_ok=True)
    old: Path = options.result
    unit = "first_token_s" if options.new == 1 else "tokens_per_second"
    report = json.loads(old.read_text()) if options.keep and old.exists() else {}
    results, loads = report.setdefault(unit, {}), report.setdefault("loads", {})
    for part in options.models.split(","):
        name, length, *only = part.split(":")  # of a GGUF file its path
        requests = [int(n) for n in (only[0].split("/") if only else options.requests.split(","))]
        label = f"{Path(name).name} P{length}, N={'/'.join(map(str, requests))}"
        results[label], loads[label] = measure(name, int(length), requests, options)
        report["machine"] = machine()
        old.write_text(json.dumps(report, indent=1) + "\n")
    print("\n" + table(unit.replace("_", " "), results) + "\n\n* one run: it takes longer than 20 s\n")
    print(table_of_loads(loads))


if __name__ == "__main__":
    main()

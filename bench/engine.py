"""Tokens per second of the engine and its peers: `python -m bench.engine`, or `make bench-engine`.

N requests start at once, each with P prompt tokens and 64 new tokens, greedy. The time runs from the arrival
of the first request to the last token. All sides use the same random weights and take turns, so that a noisy
minute affects all sides. Prints a table and writes bench/results/engine.json.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from aiosd.cores.engine.engine import Engine
from aiosd.cores.engine.model import load
from aiosd.syscall import grammar
from aiosd.syscall.sampling import Sampling
from bench.engine_models import SHAPES, path_of

NEW = 64
RESULTS = Path(__file__).parent / "results"
SLOW_S = 20.0  # a side that takes longer runs once
ROW = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "n": {"type": "integer"}},
}
SCHEMA = json.dumps({"type": "array", "items": {**ROW, "required": ["name", "n"]}, "minItems": 99})
Prompts = list[list[int]]
Side = Callable[[Prompts], float]  # seconds


def ours(
    path: Path, core: str, quantization: str = "none", deterministic: bool = True, schema: str = ""
) -> Side:
    form = grammar.grammar(grammar.Form(schema), grammar.Voice())
    model = load(path, core=core, quantization=quantization, deterministic=deterministic)
    sampling = Sampling(max_tokens=NEW, ignore_eos=True)

    def run(prompts: Prompts) -> float:
        room = sum(len(p) + NEW + 16 for p in prompts) * model.kv_bytes_per_token
        engine = Engine(model, kv_bytes=room + 64 * 16 * model.kv_bytes_per_token)
        start, made = time.perf_counter(), 0
        for i, prompt in enumerate(prompts):
            engine.add(i, prompt, sampling, owner=str(i), grammar=form)
        while not engine.idle:
            made += sum(len(output.tokens) for output in engine.step())
        assert made == NEW * len(prompts)
        return time.perf_counter() - start

    return run


_config: Any = GenerationConfig  # untyped


def generate(model: Any, batched: bool) -> Side:
    config: Any = _config(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)

    def run(prompts: Prompts) -> float:
        start = time.perf_counter()
        for batch in [prompts] if batched else [[p] for p in prompts]:
            tokens = torch.tensor(batch)
            out = model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=config)
            assert out.shape[1] == len(batch[0]) + NEW
        return time.perf_counter() - start

    return run


def continuous(model: Any) -> Side:
    """transformers' own continuous batching. Its allocation and its start are not measured."""
    config: Any = _config(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)

    def run(prompts: Prompts) -> float:
        pages = sum(-(-(len(p) + NEW) // 256) for p in prompts) + 16
        options = ContinuousBatchingConfig(num_blocks=pages, max_batch_tokens=512)
        with model.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=options
        ) as manager:

            def serve(batch: Prompts) -> int:
                waiting, made = set(manager.add_requests(inputs=batch, max_new_tokens=NEW)), 0
                while waiting:
                    result = manager.get_result(timeout=1)
                    if result is not None and result.is_finished():
                        waiting.discard(result.request_id)
                        made += len(result.generated_tokens)
                return made

            serve([prompts[0][:8]])
            start = time.perf_counter()
            assert serve(prompts) == NEW * len(prompts)
            return time.perf_counter() - start

    return run


def sides_of(path: Path, wanted: str) -> dict[str, Side]:
    def theirs() -> Any:
        new: Any = AutoModelForCausalLM
        return new.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").eval()

    @functools.cache
    def model() -> Any:
        return theirs()

    makers: dict[str, Callable[[], Side]] = {
        "aiosd, fused": lambda: ours(path, "fused"),
        "aiosd, fused, by a schema": lambda: ours(path, "fused", schema=SCHEMA),
        "aiosd, int8": lambda: ours(path, "fused", "int8"),
        "aiosd, torch": lambda: ours(path, "torch"),
        "aiosd, transformers' modules": lambda: ours(path, "foreign"),
        "aiosd, transformers' modules, not deterministic": lambda: ours(path, "foreign", deterministic=False),
        "transformers generate, one by one": lambda: generate(model(), batched=False),
        "transformers generate, static batch": lambda: generate(model(), batched=True),
        "transformers continuous batching": lambda: continuous(theirs()),  # it changes its model's attention
    }
    if importlib.util.find_spec("llama_cpp"):
        from bench.llama_cpp_peer import side

        threads = torch.get_num_threads()
        makers["llama.cpp, F32"] = lambda: side(path, "F32", threads, NEW)
        makers["llama.cpp, Q8_0"] = lambda: side(path, "Q8_0", threads, NEW)
    return {name: make() for name, make in makers.items() if re.search(wanted, name)}


def bandwidth() -> float:
    """Bytes per second that all threads together read from memory."""
    data = torch.ones(1 << 28)  # 1 GiB: no cache holds it
    took = []
    for _ in range(5):
        start = time.perf_counter()
        data.sum()
        took.append(time.perf_counter() - start)
    return data.nbytes / min(took)


def measure(
    name: str, length: int, requests: list[int], rounds: int, wanted: str
) -> dict[str, dict[int, list[float]]]:
    """Tokens per second of each run, by side and number of requests."""
    path = path_of(name)
    rng = np.random.default_rng(0)
    vocab = SHAPES[name]["vocab_size"]
    prompts = [rng.integers(3, vocab, length).tolist() for _ in range(max(requests))]
    sides = sides_of(path, wanted)
    for warm_up in sides.values():
        warm_up(prompts[:2])
    rates: dict[str, dict[int, list[float]]] = {side: {n: [] for n in requests} for side in sides}
    for _ in range(rounds):
        for n in requests:
            for side, run in sides.items():
                seen = rates[side][n]
                serial = side.endswith("one by one") and n > 1  # N requests take N times as long
                if serial or (seen and n * NEW / seen[0] > SLOW_S):
                    continue
                seen.append(n * NEW / run(prompts[:n]))
                print(f"  {name} P{length} N{n} {side}: {seen[-1]:.0f}", flush=True)
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
        help="MODEL:PROMPT_TOKENS[:N/N/…],… of A, S, M, L",
    )
    parser.add_argument("--requests", default="1,4,16,64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", default="", metavar="REGEX", help="only these")
    parser.add_argument("--result", type=Path, default=RESULTS / "engine.json")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--keep", action="store_true", help="keep the results of other models in engine.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    RESULTS.mkdir(exist_ok=True)
    old: Path = options.result
    results = json.loads(old.read_text())["tokens_per_second"] if options.keep and old.exists() else {}
    for part in options.models.split(","):
        name, length, *only = part.split(":")
        requests = [int(n) for n in (only[0].split("/") if only else options.requests.split(","))]
        label = f"{name} P{length}, N={'/'.join(map(str, requests))}"
        results[label] = measure(name, int(length), requests, options.rounds, options.sides)
        report = {"machine": machine(), "new_tokens": NEW, "tokens_per_second": results}
        old.write_text(json.dumps(report, indent=1) + "\n")
    print("\n" + table(results) + "\n\n* one run: it takes longer than 20 s")


if __name__ == "__main__":
    main()

"""One side of bench.engine in a process of its own: `python -m bench.engine_sides MODEL SIDE THREADS`.

Libraries that share a process share their threads too: OpenMP's threads of PyTorch and of llama.cpp wait for
each other's time slices there, and llama.cpp falls to a tenth. So each side has a process, the same number of
threads, and the same processors. It prints `ready SECONDS`: the time to load the model. Then each line of its
standard input is `PROMPT_TOKENS N NEW`. It answers with the seconds that N requests for NEW tokens took, and
with the bytes that the process has in memory more than before the load.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from aiosd.cores.engine.engine import Engine
from aiosd.cores.engine.gguf import GgufFile
from aiosd.cores.engine.model import load
from aiosd.syscall import grammar
from aiosd.syscall.sampling import Sampling
from bench.engine_models import SHAPES, gguf_of, path_of

ROW = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "n": {"type": "integer"}},
}
SCHEMA = json.dumps({"type": "array", "items": {**ROW, "required": ["name", "n"]}, "minItems": 99})
Prompts = list[list[int]]
Side = Callable[[Prompts, int], float]  # how many new tokens -> seconds


def ours(
    path: Path, core: str, quantization: str = "none", deterministic: bool = True, schema: str = ""
) -> Side:
    form = grammar.grammar(grammar.Form(schema), grammar.Voice())
    model = load(path, core=core, quantization=quantization, deterministic=deterministic)

    def run(prompts: Prompts, new: int) -> float:
        sampling = Sampling(max_tokens=new, ignore_eos=True)
        room = sum(len(p) + new + 16 for p in prompts) * model.kv_bytes_per_token
        engine = Engine(model, kv_bytes=room + 64 * 16 * model.kv_bytes_per_token)
        start, made = time.perf_counter(), 0
        for i, prompt in enumerate(prompts):
            engine.add(i, prompt, sampling, owner=str(i), grammar=form)
        while not engine.idle:
            made += sum(len(output.tokens) for output in engine.step())
        assert made == new * len(prompts)
        return time.perf_counter() - start

    return run


_config: Any = GenerationConfig  # untyped


def generate(model: Any, batched: bool) -> Side:
    def run(prompts: Prompts, new: int) -> float:
        config: Any = _config(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
        start = time.perf_counter()
        for batch in [prompts] if batched else [[p] for p in prompts]:
            tokens = torch.tensor(batch)
            out = model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=config)
            assert out.shape[1] == len(batch[0]) + new
        return time.perf_counter() - start

    return run


def continuous(model: Any) -> Side:
    """transformers' own continuous batching. Its allocation and its start are not measured."""

    def run(prompts: Prompts, new: int) -> float:
        config: Any = _config(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
        pages = sum(-(-(len(p) + new) // 256) for p in prompts) + 16
        options = ContinuousBatchingConfig(num_blocks=pages, max_batch_tokens=512)
        with model.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=options
        ) as manager:

            def serve(batch: Prompts) -> int:
                waiting, made = set(manager.add_requests(inputs=batch, max_new_tokens=new)), 0
                while waiting:
                    result = manager.get_result(timeout=1)
                    if result is not None and result.is_finished():
                        waiting.discard(result.request_id)
                        made += len(result.generated_tokens)
                return made

            serve([prompts[0][:8]])
            start = time.perf_counter()
            assert serve(prompts) == new * len(prompts)
            return time.perf_counter() - start

    return run


def theirs(path: Path) -> Any:
    new: Any = AutoModelForCausalLM
    return new.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").eval()


def llama_cpp(path: Path, form: str) -> Side:
    from bench.llama_cpp_peer import side

    return side(path, form, torch.get_num_threads())


SIDES: dict[str, Callable[[Path], Side]] = {
    "aiosd, fused": lambda path: ours(path, "fused"),
    "aiosd, fused, by a schema": lambda path: ours(path, "fused", schema=SCHEMA),
    "aiosd, int8": lambda path: ours(path, "fused", "int8"),
    "aiosd, torch": lambda path: ours(path, "torch"),
    "aiosd, transformers' modules": lambda path: ours(path, "foreign"),
    "aiosd, transformers' modules, not deterministic": lambda path: ours(
        path, "foreign", deterministic=False
    ),
    "transformers generate, one by one": lambda path: generate(theirs(path), batched=False),
    "transformers generate, static batch": lambda path: generate(theirs(path), batched=True),
    "transformers continuous batching": lambda path: continuous(theirs(path)),
}
if importlib.util.find_spec("llama_cpp"):
    SIDES["llama.cpp, F32"] = lambda path: llama_cpp(path, "F32")
    SIDES["llama.cpp, Q8_0"] = lambda path: llama_cpp(path, "Q8_0")


STORED: dict[str, Callable[[Path], Side]] = {  # of a GGUF file
    "aiosd, as stored": lambda path: ours(path, "auto"),
    "aiosd, int8": lambda path: ours(path, "fused", "int8"),
}
if "llama.cpp, F32" in SIDES:
    STORED["llama.cpp, as stored"] = lambda path: llama_cpp(path, "")


def of(name: str) -> tuple[Path, dict[str, Callable[[Path], Side]], int]:
    """Return a model's path, its sides and the size of its vocabulary. `name`: a shape, a GGUF file, or one
    that is made (`gguf_of`).
    """
    if name in SHAPES:
        return path_of(name), SIDES, SHAPES[name]["vocab_size"]
    path = Path(name) if name.endswith(".gguf") else gguf_of(name)
    return path, STORED, GgufFile(path).config["vocab_size"]


def main() -> None:
    name, side, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    path, sides, vocabulary = of(name)
    process = psutil.Process()
    before, began = process.memory_info().rss, time.perf_counter()
    run = sides[side](path)
    print("ready", time.perf_counter() - began, flush=True)
    for line in sys.stdin:
        length, count, new = map(int, line.split())
        rng = np.random.default_rng(0)
        seconds = run([rng.integers(3, vocabulary, length).tolist() for _ in range(count)], new)
        print(seconds, process.memory_info().rss - before, flush=True)


if __name__ == "__main__":
    main()

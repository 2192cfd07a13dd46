"""Perplexity of a GGUF file, by aiosd and by llama.cpp: `python -m bench.perplexity FILE.gguf`.

The text is Python's own documentation of its language (pydoc_data.topics). Both sides get the same tokens in
windows of 512, each after the token that begins a text if the file has one. The score is of the second half
of each window, as llama.cpp's own tool has it. Each side has a process of its own. Writes
bench/results/perplexity.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from array import array
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import torch

from aiosd.cores.engine.core import Batch, Segment
from aiosd.cores.engine.kv import BLOCK
from aiosd.cores.engine.model import load

RESULT = Path(__file__).parent / "results" / "perplexity.json"
WINDOW = 512
TEXT = "\n".join(topics.topics[name] for name in sorted(topics.topics))


def loss(logits: np.ndarray[Any, Any], tokens: list[int]) -> float:
    """Sum of -log of the probability of each token of the second half. logits: [WINDOW, words]."""
    rows = logits[WINDOW // 2 - 1 : WINDOW - 1].astype(np.float64)
    peak = rows.max(1)
    chosen = rows[np.arange(len(rows)), tokens[WINDOW // 2 : WINDOW]]
    return float((peak + np.log(np.exp(rows - peak[:, None]).sum(1)) - chosen).sum())


def ours(file: Path, windows: list[list[int]]) -> float:
    core = load(file).core
    kv, total = core.reserve(WINDOW // BLOCK), 0.0
    for window in windows:
        segment = Segment(array("i", range(WINDOW // BLOCK)), 0, WINDOW, WINDOW)
        total += loss(core.forward(Batch(window, [segment], [*range(WINDOW)]), kv)[0].numpy(), window)
    return total


def theirs(file: Path, windows: list[list[int]]) -> float:
    import llama_cpp as c

    model = c.llama_model_load_from_file(os.fsencode(file), c.llama_model_default_params())
    words = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))
    options = c.llama_context_default_params()
    options.n_ctx = options.n_batch = WINDOW
    options.n_threads = options.n_threads_batch = torch.get_num_threads()
    context, batch, total = c.llama_init_from_model(model, options), c.llama_batch_init(WINDOW, 0, 1), 0.0
    for window in windows:
        c.llama_memory_clear(c.llama_get_memory(context), True)
        batch.n_tokens = WINDOW
        for i, token in enumerate(window):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
            batch.seq_id[i][0] = 0
        assert c.llama_decode(context, batch) == 0
        total += loss(np.ctypeslib.as_array(c.llama_get_logits(context), (WINDOW, words)), window)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.perplexity", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--side", choices=["ours", "theirs"], help="compute one side, of windows on stdin")
    options = parser.parse_args()
    if options.side:
        compute = ours if options.side == "ours" else theirs
        print(compute(options.file, json.load(sys.stdin)))
        return
    model = load(options.file)
    [*begin], room = model.encode("")[:1], WINDOW - len(model.encode("")[:1])
    tokens = model.encode(TEXT)[len(begin) :]
    windows = [begin + tokens[i * room : (i + 1) * room] for i in range(options.windows)]
    found = {}
    for side in ("ours", "theirs"):
        command = [sys.executable, "-m", "bench.perplexity", str(options.file), "--side", side]
        done = subprocess.run(command, input=json.dumps(windows), capture_output=True, text=True, check=True)
        found[side] = math.exp(float(done.stdout.split()[-1]) / (len(windows) * WINDOW // 2))
    ratio = found["ours"] / found["theirs"]
    said = f"aiosd {found['ours']:.4f}, llama.cpp {found['theirs']:.4f}, ratio {ratio:.5f}"
    print(f"{options.file.name}: {said}")
    old = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    old[options.file.name] = {**found, "ratio": ratio, "windows": len(windows)}
    RESULT.write_text(json.dumps(old, indent=1) + "\n")


if __name__ == "__main__":
    main()

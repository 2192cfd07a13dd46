"""Measure the loss of quality by 8-bit weights: `python -m bench.quality`.

The engine answers the held-out dialogues of models/tiny/evaluate.py with full and with 8-bit weights. Prints
how many answers of each are right and how many are equal. Writes bench/results/quality.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from aiosd.cores.engine.engine import Engine
from aiosd.cores.engine.model import load
from aiosd.syscall.sampling import Sampling

RESULT = Path(__file__).parent / "results" / "quality.json"
TINY = Path(__file__).parent.parent / "models" / "tiny"


def answers(quantization: str, conversations: list[list[dict[str, Any]]], tools: list[Any]) -> list[str]:
    model = load(TINY, quantization=quantization)
    engine = Engine(model, kv_bytes=1 << 30)
    for i, (messages, offered) in enumerate(zip(conversations, tools, strict=True)):
        engine.add(i, model.render(messages, offered), Sampling(max_tokens=160), owner="")
    texts = [""] * len(conversations)
    while not engine.idle:
        for output in engine.step():
            texts[output.id] += output.text
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="share of the dialogues to answer")
    options = parser.parse_args()
    sys.path.insert(0, str(TINY))
    import evaluate  # type: ignore[import-not-found]

    checks = evaluate.held_out_checks(options.share, "")
    conversations = [list(check.dialogue.messages[: check.dialogue.target]) for check in checks]
    tools = [list(check.dialogue.tools) or None for check in checks]
    made = {name: answers(name, conversations, tools) for name in ("none", "int8")}
    right = {
        name: sum(text.strip() == check.expected.strip() for text, check in zip(texts, checks, strict=True))
        for name, texts in made.items()
    }
    same = sum(a == b for a, b in zip(made["none"], made["int8"], strict=True))
    results = {"dialogues": len(checks), "right": right, "same answers": same}
    RESULT.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()

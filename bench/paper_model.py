"""A model of one agent alone: `python -m bench.paper_model FILE THREADS SOCKET`. The paper's baseline.

It has aiosd's engine and no daemon. It prints `ready`, then answers each line of JSON of the socket with one.
"""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

from aiosd.cores.engine.engine import Engine
from aiosd.cores.engine.model import LoadedModel, load
from aiosd.syscall.sampling import Sampling

KV_BYTES = 64 << 20  # a conversation of an agent needs a tenth


def answer(engine: Engine, model: LoadedModel, number: int, asked: dict[str, object]) -> str:
    messages, most = asked["messages"], asked["max_tokens"]
    assert isinstance(messages, list)
    assert isinstance(most, int)
    engine.add(number, model.render(messages), Sampling(max_tokens=most), owner="agent")
    text = ""
    while not engine.idle:
        text += "".join(output.text for output in engine.step())
    return text


def main() -> None:
    file, threads, descriptor = sys.argv[1:]
    model = load(Path(file), threads=int(threads))
    engine = Engine(model, kv_bytes=KV_BYTES)
    print("ready", flush=True)
    with socket.socket(fileno=int(descriptor)) as agent, agent.makefile("rw") as lines:
        for number, line in enumerate(lines):
            text = answer(engine, model, number, json.loads(line))
            print(json.dumps({"choices": [{"message": {"content": text}}]}), file=lines, flush=True)


if __name__ == "__main__":
    main()

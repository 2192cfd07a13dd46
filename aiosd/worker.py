"""One worker process: loads a model and runs the engine's step loop for the daemon at the other end.

Trusts nothing it is sent beyond the protocol, keeps no state of its own: what it runs can be given to
another worker at any token. Two threads: this loop, and a reader that only fills the inbox.
"""

from __future__ import annotations

import argparse
import os
import queue
import signal
import socket
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiosd import wire
from aiosd.errors import AiosError, ModelError
from aiosd.sampling import Sampling

if TYPE_CHECKING:
    from aiosd.engine import Model, TokenLogprob


def main() -> None:
    parser = argparse.ArgumentParser(prog="aios-worker")
    parser.add_argument("--fd", type=int, required=True, help="connected socket of the daemon")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the daemon blocks its own, and we inherited that
    channel = wire.Channel(socket.socket(fileno=options.fd))
    first = channel.receive()
    if isinstance(first, wire.Load):
        serve(channel, first)


def serve(channel: wire.Channel, order: wire.Load) -> None:
    # torch takes a second, so it comes after the socket is ours; the engine sets it up and so comes first
    from aiosd.engine import Engine, Output, load  # isort: skip
    import torch  # isort: skip

    device = order.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = load(Path(order.path), device=device, dtype=order.dtype, threads=order.threads or None)
        engine = Engine(
            model, kv_bytes=order.kv_bytes, max_running=order.max_running, prefill_tokens=order.prefill_tokens
        )
    except ModelError as error:
        channel.send(wire.LoadFailed(str(error), error.hint))
        return
    except Exception as error:  # noqa: BLE001 - a model folder is foreign data, and loads through foreign code
        traceback.print_exc()
        channel.send(wire.LoadFailed(f"{order.path}: {error!r}", "the journal has the traceback"))
        return
    channel.send(wire.Ready({**model.info, "context_length": model.context_length, "pid": os.getpid()}))

    inbox: queue.SimpleQueue[wire.Message] = queue.SimpleQueue()
    threading.Thread(target=read, args=(channel, inbox), daemon=True).start()

    live: set[int] = set()  # every Submit is answered by one end: a finish, Refused or Removed

    def obey(message: wire.Message) -> None:
        match message:
            case wire.Submit():
                try:
                    prompt = model.render(message.messages, message.tools or None)
                    sampling = Sampling(**{**message.sampling, "stop": tuple(message.sampling["stop"])})
                    engine.add(message.id, prompt, sampling, owner=message.owner, resume=message.resume)
                    live.add(message.id)
                    channel.send(wire.Started(message.id, len(prompt)))
                except AiosError as error:
                    channel.send(wire.Refused(message.id, str(error), error.hint))
            case wire.Remove() if message.id in live:
                live.discard(message.id)
                engine.remove(message.id)
                channel.send(wire.Removed(message.id))

    def pack(output: Output) -> wire.Tokens:
        if output.finish:
            live.discard(output.id)
        return wire.Tokens(
            id=output.id,
            tokens=list(output.tokens),
            text=output.text,
            logprobs=[logprob(model, p) for p in output.logprobs or ()],
            cached_tokens=output.cached_tokens,
            finish=output.finish or "",
        )

    while True:
        while engine.idle or not inbox.empty():
            obey(inbox.get())
        outputs = engine.step()
        if outputs:
            channel.send(wire.Step([pack(o) for o in outputs], engine.stats))


def logprob(model: Model, one: TokenLogprob) -> dict[str, Any]:
    """The OpenAI shape, with the token's id beside its text."""
    top = [{"token": model.decode([id]), "id": id, "logprob": value} for id, value in one.top]
    chosen = {"token": model.decode([one.token]), "id": one.token, "logprob": one.logprob}
    return {**chosen, "top_logprobs": top}


def read(channel: wire.Channel, inbox: queue.SimpleQueue[wire.Message]) -> None:
    try:
        while (message := channel.receive()) is not None:
            inbox.put(message)
    finally:
        os._exit(0)  # also in the middle of a long step: nobody is there to hear its end


if __name__ == "__main__":
    main()

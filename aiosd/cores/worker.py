"""One worker process: loads a model and runs the engine's step loop for the daemon at the other end.

Trusts nothing it is sent beyond the protocol, keeps no state of its own: what it runs can be given to
another worker at any token. Two threads: this loop, and a reader that only fills the inbox.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import socket
import sys
import threading
import traceback
from bisect import bisect_left
from collections import deque
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from aiosd.cores import wire
from aiosd.cores.numa import stay_near
from aiosd.errors import AiosError, BadSnapshot, ModelError, TooLong, in_words
from aiosd.host.torch_folder import preferred
from aiosd.syscall import grammar
from aiosd.syscall.sampling import Sampling

if TYPE_CHECKING:
    from aiosd.cores.engine.engine import Engine
    from aiosd.cores.engine.model import LoadedModel
    from aiosd.cores.engine.sampler import TokenLogprob
    from aiosd.cores.engine.sequence import Output

LONGEST_TOKEN = 64
PACKAGE = "/usr/lib/aios"  # where a package has its environment
PROMPTS_KEPT = 1024


def main() -> None:
    parser = argparse.ArgumentParser(prog="aios-worker")
    end = parser.add_mutually_exclusive_group(required=True)
    end.add_argument("--fd", type=int, help="connected socket of the daemon")
    end.add_argument("--connect", metavar="PATH", help="where the daemon listens for it")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the daemon blocks its own, and we inherited that
    sock = socket.socket(fileno=options.fd) if options.connect is None else socket.socket(socket.AF_UNIX)
    if options.connect:
        sock.connect(options.connect)
    channel = wire.Channel(sock)
    with suppress(Exception):  # load_engine imports the same, and tells the daemon what is wrong
        preload()
    first = channel.receive()  # a spare waits here for its model
    if isinstance(first, wire.Load):
        with suppress(BrokenPipeError, ConnectionResetError):  # the daemon is gone: there is nobody to tell
            serve(channel, first)


def preload() -> None:
    """Import what each load needs: most of the time of a start. Torch starts its threads later."""
    if sys.prefix == PACKAGE and (other := preferred()):
        sys.path.insert(0, str(other))
    from aiosd.cores.engine import engine, gguf_vocabulary, kvfile, model  # noqa: F401 - engine before torch


def serve(channel: wire.Channel, order: wire.Load) -> None:
    """Load the model and run until the daemon is gone."""
    try:
        engine = load_engine(order)
    except ModelError as error:
        channel.send(wire.LoadFailed(str(error), error.hint))
        return
    except Exception as error:  # noqa: BLE001 - a model folder is foreign data, and loads through foreign code
        traceback.print_exc()
        channel.send(wire.LoadFailed(f"{order.path}: {in_words(error)}", "the journal has the traceback"))
        return
    model = engine.model
    facts = {"context_length": model.context_length, "identity": model.identity, "pid": os.getpid()}
    facts |= {"kv_shapes": model.kv_shapes, "kv_layout": model.kv_layout}
    facts |= {"kv_bytes_per_token": model.kv_bytes_per_token}
    channel.send(wire.Ready({**model.info, **facts}))
    # Half a second for 128k tokens: now, not in the middle of an answer. Whoever needs it first waits.
    threading.Thread(target=lambda: model.constraints, daemon=True).start()
    WorkerLoop(channel, engine).run()


def load_engine(order: wire.Load) -> Engine:
    stay_near(order.cpus, order.nodes)
    # the engine sets torch up, and so is imported first
    from aiosd.cores.engine.engine import Engine
    from aiosd.cores.engine.model import load
    import torch  # isort: skip

    device = order.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    warning = lacks_cuda() if device == "cpu" and os.environ.get("CUDA_VISIBLE_DEVICES") else ""
    if device != "cpu" and order.fraction < 1:
        for number in range(torch.cuda.device_count()):
            torch.cuda.set_per_process_memory_fraction(order.fraction, number)
    model = load(
        Path(order.path),
        device="auto" if device == "span" else device,
        dtype=order.dtype,
        threads=order.threads or None,
        deterministic=order.deterministic,
        quantization=order.quantization,
    )
    if warning:
        model.info["warning"] = warning
    return Engine(
        model, kv_bytes=order.kv_bytes, max_running=order.max_running, prefill_tokens=order.prefill_tokens
    )


def lacks_cuda() -> str:
    """Why PyTorch does not see the GPU that this worker was given, and the remedy."""
    import torch

    if torch.version.cuda is None:
        return "the model runs on the processor: this PyTorch is for CPUs; aiosctl engine install --cuda"
    try:
        torch.empty(1, device="cuda")
    except (RuntimeError, AssertionError) as error:
        why = str(error).partition("\n")[0].strip()
        return f"the model runs on the processor: {why}; nvidia-smi says more"
    return ""


class WorkerLoop:
    """Obeys the daemon between two steps of the engine."""

    def __init__(self, channel: wire.Channel, engine: Engine) -> None:
        self._channel, self._engine = channel, engine
        self._inbox = Inbox()
        self._live: set[int] = set()  # every Submit is answered by one end: a finish, Refused or Removed
        self._prompts: dict[int, list[int]] = {}  # of what runs, and of what was preempted and may come back
        engine.conversations.spill = partial(self._save, evicted=True)

    def run(self) -> NoReturn:
        threading.Thread(target=read, args=(self._channel, self._inbox), daemon=True).start()
        while True:
            self._obey_waiting()
            outputs = self._engine.step()
            if outputs:
                self._emit(outputs)

    def _obey_waiting(self) -> None:
        """One thing that takes long between two steps: those that run wait for no more than that."""
        while self._engine.idle or not self._inbox.empty():
            match message := self._inbox.get():
                case wire.Submit():
                    self._submit(message)
                    if not self._engine.idle:
                        return
                case wire.Remove():
                    self._remove(message)
                case wire.Save():
                    self._save(message.context, message.evict)
                    if message.evict:
                        self._engine.conversations.drop(message.context)
                    if not self._engine.idle:
                        return
                case wire.Restore():
                    self._restore(message, self._inbox.files.popleft())
                    if not self._engine.idle:
                        return
                case wire.Keep(how="drop"):
                    self._engine.conversations.drop(message.context)
                case wire.Keep():
                    self._engine.conversations.pin(message.context, message.how == "pin")
                case wire.Fork():
                    self._engine.conversations.fork(message.context, message.to)

    def _submit(self, message: wire.Submit) -> None:
        if message.id in self._inbox.removed:  # not worth a look; its Remove is about to be answered
            self._live.add(message.id)
            return
        model = self._engine.model
        try:
            if message.sampling["truncation"] != "auto":
                check_length(message, model)
            if message.operation in ("tokenize", "prompt"):
                self._tokenize(message)
                return
            prompt = self._prompts.pop(message.id, None) or render(message, model)
            sampling = Sampling(**{**message.sampling, "stop": tuple(message.sampling["stop"])})
            self._engine.add(
                message.id,
                prompt,
                sampling,
                owner=message.owner,
                resume=message.resume,
                context=message.context,
                embed=message.operation == "embed",
                grammar="" if message.operation == "embed" else grammar_of(message, model, prompt),
            )
        except AiosError as error:
            self._channel.send(wire.Refused(message.id, str(error), error.hint, error.code))
        except Exception as error:  # noqa: BLE001 - no request may end the process that others run in
            traceback.print_exc()
            self._channel.send(
                wire.Refused(
                    message.id,
                    f"cannot be computed: {in_words(error)}"[:300],
                    "the journal has the traceback",
                )
            )
        else:
            self._live.add(message.id)
            self._prompts[message.id] = prompt
            opened = model.vocabulary.opened(prompt) if message.operation == "llm" else ""
            self._channel.send(wire.Started(message.id, len(prompt), opened))

    def _tokenize(self, message: wire.Submit) -> None:
        tokens = render(message, self._engine.model)
        self._channel.send(wire.Started(message.id, len(tokens)))
        answer = wire.Tokens(message.id, [], json.dumps(tokens), [], 0, "stop")
        self._channel.send(wire.Step([answer], self._engine.stats))

    def _remove(self, order: wire.Remove) -> None:
        id = order.id
        self._inbox.removed.discard(id)
        if id in self._live:
            self._live.discard(id)
            self._engine.remove(id, order.keep)
            self._channel.send(wire.Removed(id))
            while len(self._prompts) > PROMPTS_KEPT:
                del self._prompts[next(iter(self._prompts))]

    def _save(self, context: int, evicted: bool) -> None:
        from aiosd.cores.engine import kvfile

        written = kvfile.write(self._engine, context)
        if written is None:
            self._channel.send(wire.NotSaved(context))
            return
        file, tokens = written
        try:
            self._channel.send(wire.Saved(context, tokens, evicted), file)
        finally:
            os.close(file)

    def _restore(self, message: wire.Restore, file: int | None) -> None:
        from aiosd.cores.engine import kvfile

        tokens, error = 0, ""
        try:
            if file is None:
                raise BadSnapshot("its file was lost on the way: this process has too many open")
            known, prompt, kv = kvfile.read(file, self._engine.model, message.check)
            tokens = self._engine.restore(message.context, message.owner, known, prompt, kv)
        except AiosError as refused:  # its next turn computes everything again
            error = refused.explanation
        except Exception as refused:  # noqa: BLE001 - a file may hold anything, and others run in this process
            traceback.print_exc()
            error = repr(refused)[:300]
        finally:
            if file is not None:
                os.close(file)
        self._channel.send(wire.Restored(message.context, tokens, error))

    def _emit(self, outputs: list[Output]) -> None:
        for output in outputs:
            if output.error is not None:
                self._live.discard(output.id)
                self._prompts.pop(output.id, None)
                refused = output.error
                self._channel.send(wire.Refused(output.id, str(refused), refused.hint, refused.code))
        made = [self._pack(output) for output in outputs if output.error is None]
        self._channel.send(wire.Step(made, self._engine.stats))

    def _pack(self, output: Output) -> wire.Tokens:
        if output.finish:
            self._live.discard(output.id)
        if output.finish in ("stop", "length"):
            self._prompts.pop(output.id, None)
        return wire.Tokens(
            id=output.id,
            tokens=list(output.tokens),
            text=json.dumps(output.embedding) if output.embedding else output.text,
            logprobs=[logprob(self._engine.model, p) for p in output.logprobs or ()],
            cached_tokens=output.cached_tokens,
            finish=output.finish or "",
            stopped=output.stopped,
        )


class Inbox(queue.SimpleQueue[wire.Message]):
    """What the daemon said; `removed` are the ids of Removes that are still in it."""

    def __init__(self) -> None:
        super().__init__()
        self.removed: set[int] = set()
        self.files: deque[int | None] = deque()  # of the Restores that are still in it


def render(message: wire.Submit, model: LoadedModel) -> list[int]:
    """Return the prompt. With truncation, the oldest turns go until an answer fits, but no system message."""
    if message.operation in ("embed", "raw", "tokenize"):
        return model.encode(message.messages[-1]["content"])
    tools = message.tools or None
    prompt = model.render(message.messages, tools, message.template)
    if message.sampling["truncation"] != "auto":
        return prompt
    room = model.context_length - min(message.sampling["max_tokens"], model.context_length // 4)
    turns = [i for i, m in enumerate(message.messages) if m["role"] == "user"]
    if turns and all(m["role"] == "system" for m in message.messages[: turns[0]]):
        turns = turns[1:]  # the first turn begins the whole conversation, which does not fit

    def since(turn: int) -> list[int]:
        head = [m for m in message.messages[:turn] if m["role"] == "system"]
        return model.render([*head, *message.messages[turn:]], tools, message.template)

    if len(prompt) <= room or not turns:
        return prompt
    fits = bisect_left(turns, True, key=lambda turn: len(since(turn)) <= room)
    return since(turns[min(fits, len(turns) - 1)])


def grammar_of(message: wire.Submit, model: LoadedModel, prompt: list[int]) -> str:
    """Return the grammar of the answer; empty: it may be any text. Raises BadRequest."""
    vocabulary = model.vocabulary
    form = grammar.Form(message.schema, message.tools, message.decoded, message.tool_choice, message.parallel)
    family, opened, thinks = str(model.info["tool_calls"]), vocabulary.opened(prompt), vocabulary.thinks
    if message.operation == "raw":
        opened, thinks = "", False
    return grammar.grammar(form, grammar.Voice(family, thinks, opened, vocabulary.silent))


def check_length(message: wire.Submit, model: LoadedModel) -> None:
    """Before the work of tokenizing: no token spells more than LONGEST_TOKEN characters on the average."""
    size, most = len(str(message.messages)), model.context_length * LONGEST_TOKEN
    if size > most:
        raise TooLong(
            f"the prompt has {size} characters and the model's context holds {model.context_length} tokens",
            "shorten the prompt, or use a model with a longer context",
        )


def logprob(model: LoadedModel, one: TokenLogprob) -> dict[str, Any]:
    """The OpenAI shape, with the token's id beside its text. Half a character is only in `bytes`."""

    def named(token: int, logprob: float) -> dict[str, Any]:
        said = list(model.vocabulary.spelling(token))
        return {"token": model.decode([token]), "bytes": said, "id": token, "logprob": logprob}

    return {**named(one.token, one.logprob), "top_logprobs": [named(*top) for top in one.top]}


def read(channel: wire.Channel, inbox: Inbox) -> None:
    try:
        while (message := channel.receive()) is not None:
            if isinstance(message, wire.Remove):
                inbox.removed.add(message.id)
            elif isinstance(message, wire.Restore):
                inbox.files.append(channel.take_file())
            inbox.put(message)
    finally:
        os._exit(0)  # also in the middle of a long step: nobody is there to hear its end


if __name__ == "__main__":
    main()

"""make bench-gateway: what HTTP costs beside the files, through the real programs of aios-gateway(8).

    pip install fastapi
    python -m bench.gateway [GGUF FILE]

One user asks by the files, by the gateway's Unix socket, and, if FastAPI is installed, a server that answers
at once. The sides take turns. 64 answers at once stream from the model of the file if one is given, else from
the built-in one. Writes bench/results/gateway.json and prints a table. Run it as root on a quiet machine.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import pwd
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil

from tests.gateway import Gateway
from tests.running import REPOSITORY, Daemon, open_to_all, wait_until

RESULT = Path(__file__).parent / "results" / "gateway.json"
TINY = REPOSITORY / "models/tiny"
USER = "games"
ROUNDS, TIMES = 7, 100
STREAMS, TOKENS, STREAM_ROUNDS = 64, 64, 3
ONE = {"messages": [{"role": "user", "content": "Say something."}], "max_tokens": 1}
LONG = ONE | {"max_tokens": TOKENS, "ignore_eos": True, "stream": True}
Once = Callable[[], float]  # seconds


class Http:
    """A connection to a Unix socket."""

    def __init__(self, address: Path, model: str) -> None:
        self._model = model
        self._http = http.client.HTTPConnection("localhost")
        self._http.sock = socket.socket(socket.AF_UNIX)
        self._http.sock.connect(str(address))

    def ask(self, body: dict[str, Any], path: str = "/v1/chat/completions") -> float:
        """Return the seconds to the first bytes of the answer, and read it to the end."""
        began = time.perf_counter()
        sent, kind = json.dumps(body | {"model": self._model}), {"Content-Type": "application/json"}
        self._http.request("POST", path, sent, kind)
        answer = self._http.getresponse()
        first = answer.read1()
        took = time.perf_counter() - began
        whole = first + answer.read()
        assert answer.status == 200, whole
        return took


def by_file(path: Path, body: dict[str, Any]) -> float:
    """Return the seconds to the first bytes of the answer, and read it to the end."""
    began = time.perf_counter()
    file = os.open(path, os.O_RDWR)
    os.write(file, json.dumps(body).encode() + b"\n")
    os.read(file, 65536)
    took = time.perf_counter() - began
    while os.read(file, 65536):
        pass
    os.close(file)
    return took


def whole(once: Once) -> float:
    began = time.perf_counter()
    once()
    return time.perf_counter() - began


def in_turn(sides: dict[str, Once]) -> dict[str, list[float]]:
    """The median in milliseconds of each side in each round."""
    found: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(ROUNDS):
        for side, once in sides.items():
            once()
            found[side].append(statistics.median(once() for _ in range(TIMES)) * 1e3)
    return found


def at_once(make: Callable[[], Once]) -> float:
    """Tokens per second of all streams together."""
    threads = [threading.Thread(target=make()) for _ in range(STREAMS)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return STREAMS * TOKENS / (time.perf_counter() - began)


def measure(root: Path, address: Path, echo: Path | None, model: str) -> dict[str, dict[str, list[float]]]:
    """What one user sees. `echo`: the socket of a server that answers at once."""
    streamed: dict[str, Callable[[], Once]] = {
        "files": lambda: lambda: by_file(root / f"models/{model}/llm", LONG),
        "gateway": lambda: (lambda http: lambda: http.ask(LONG))(Http(address, model)),
    }
    rates: dict[str, list[float]] = {side: [] for side in streamed}
    for _ in range(STREAM_ROUNDS):
        for side, make in streamed.items():
            rates[side].append(at_once(make))
    file, served = root / "models/tiny/llm", Http(address, "tiny")
    answered: dict[str, Once] = {
        "files": lambda: whole(lambda: by_file(file, ONE)),
        "gateway": lambda: whole(lambda: served.ask(ONE)),
    }
    if echo:
        bare = Http(echo, "tiny")
        answered["FastAPI, no model"] = lambda: whole(lambda: bare.ask({"prompt": "x"}, "/llm"))
    begun: dict[str, Once] = {"files": lambda: by_file(file, LONG), "gateway": lambda: served.ask(LONG)}
    return {
        "one token, ms": in_turn(answered),
        "first token of a stream, ms": in_turn(begun),
        f"{STREAMS} streams, tokens/s": rates,
    }


def as_user(pipe: Any, *given: Any) -> None:
    account = pwd.getpwnam(USER)
    os.initgroups(USER, account.pw_gid)
    os.setresgid(*[account.pw_gid] * 3)
    os.setresuid(*[account.pw_uid] * 3)
    pipe.send(measure(*given))


def serve_echo(address: Path) -> subprocess.Popen[bytes] | None:
    if not importlib.util.find_spec("fastapi"):
        return None
    command = ["-m", "uvicorn", "bench.http_peer:app", "--log-level", "error", "--uds", str(address)]
    return subprocess.Popen([sys.executable, *command], cwd=REPOSITORY)


def main() -> None:
    real = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else None
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = Path(scratch)
        open_to_all(folder)
        daemon = Daemon(folder / "daemon", TINY).start()
        stack.callback(daemon.stop)
        model = "real" if real else "tiny"
        if real:
            daemon.sh("mkdir models/real && chmod 755 models/real && chmod 666 models/real/llm")
            daemon.write("models/real/ctl", f"load {real}")
            wait_until(lambda: daemon.read("models/real/state") == "ready\n", "the model", 60)
        gateway = Gateway(folder / "gateway", daemon).start()
        stack.callback(gateway.stop)
        address = folder / "echo.sock"
        echo = serve_echo(address)
        if echo:
            stack.callback(echo.terminate)
            wait_until(address.exists, "FastAPI")
        ours, theirs = get_context("fork").Pipe()
        given = (theirs, daemon.root, gateway.address, address if echo else None, model)
        user = get_context("fork").Process(target=as_user, args=given)
        user.start()
        theirs.close()
        with closing(ours):
            results = ours.recv()
        user.join()
        memory = psutil.Process(gateway.pid).memory_info().rss / 1e6
    report = {"model of the streams": (real or TINY).name, "front, MB": memory, **results}
    RESULT.write_text(json.dumps(report, indent=1) + "\n")
    print("| median | " + " | ".join(results["one token, ms"]) + " |\n|---|---|---|---|")
    for what, sides in results.items():
        cells = [f"{statistics.median(values):.3g}" for values in sides.values()]
        print(f"| {what} | " + " | ".join(cells) + " |")
    print(f"\nThe front has {memory:.0f} MB in memory.")


if __name__ == "__main__":
    main()

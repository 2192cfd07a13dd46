"""make bench-fs: measure the files, beside the bare FUSE binding and, if installed, an HTTP server.

    pip install fastapi uvicorn
    python -m bench.fs

All sides take turns in one run. Writes medians to bench/results/fs.json and prints a table. Run it as root on
a quiet machine: it mounts the tree.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import importlib.util
import itertools
import json
import os
import selectors
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil

from aiosd.host import mount
from tests import random_model
from tests.running import REPOSITORY, Daemon, wait_until

RESULT = Path(__file__).parent / "results" / "fs.json"
LLM = "agents/a/syscall/llm"
CLIENTS = 4
READERS = 2000
WAITING = 1000
AGENTS = 10_000
GREEDY = 61001  # uid of a user who takes all that the quotas allow
WITH_WORKER = "fusepy and a worker"
Side = dict[str, Callable[[], None]]  # operation → a function that does it once
Sides = dict[str, Callable[[], Side]]  # name → a function that makes the side, called by each client


def read_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.read(fd, 4096)
    os.close(fd)


def transaction(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    os.write(fd, b"hello")
    while os.read(fd, 4096):
        pass
    os.close(fd)


def files(root: Path) -> Side:
    return {"status": lambda: read_file(root / "status"), "transaction": lambda: transaction(root / LLM)}


class Http:
    """A client with one connection that stays open, which is the cheapest way."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port)

    def get(self) -> None:
        self._connection.request("GET", "/status")
        self._connection.getresponse().read()

    def post(self) -> None:
        body = json.dumps({"prompt": "hello"})
        self._connection.request("POST", "/llm", body, {"Content-Type": "application/json"})
        self._connection.getresponse().read()


def http_side(port: int) -> Side:
    client = Http(port)
    return {"status": client.get, "transaction": client.post}


@contextlib.contextmanager
def running(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-m", *command], cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def floor(folder: Path, *options: str) -> Iterator[None]:
    folder.mkdir()
    with running("bench.fuse_floor", str(folder), *options):
        wait_until((folder / "status").exists, "the bare mount")
        yield
        mount.unmount(folder)


@contextlib.contextmanager
def server(port: int) -> Iterator[None]:
    with running("uvicorn", "bench.http_peer:app", "--port", str(port), "--no-access-log"):
        wait_until(lambda: http_side(port)["status"]() is None, "the HTTP server")
        yield


def worker_s(daemon: Daemon) -> float:
    """The median time that requests spent on a worker, from the scheduler's trace."""
    spans: dict[int, float] = {}
    for span in json.loads(daemon.read("scheduler/trace.json"))["traceEvents"]:
        if span.get("ph") == "X" and span["name"] in ("prefill", "decode"):
            spans[span["tid"]] = spans.get(span["tid"], 0.0) + span["dur"] / 1e6
    return statistics.median(spans.values())


def cpu_s(daemon: Daemon, times: int) -> float:
    """CPU time of the daemon for one transaction."""
    assert daemon.process is not None
    process = psutil.Process(daemon.process.pid)
    before = process.cpu_times()
    for _ in range(times):
        transaction(daemon.root / LLM)
    after = process.cpu_times()
    return float(after.user - before.user + after.system - before.system) / times


def one_client(makers: Sides, rounds: int, times: int) -> dict[str, dict[str, float]]:
    """Median seconds of each operation, the sides taking turns."""
    sides = {name: make() for name, make in makers.items()}
    took: dict[str, dict[str, list[float]]] = {name: {} for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            for operation, run in side.items():
                for _ in range(times):
                    began = time.perf_counter()
                    run()
                    took[name].setdefault(operation, []).append(time.perf_counter() - began)
    return {
        name: {operation: statistics.median(t) for operation, t in operations.items()}
        for name, operations in took.items()
    }


def many_clients(sides: Sides, times: int) -> dict[str, dict[str, float]]:
    """Operations per second of several processes at once."""
    fork = get_context("fork")

    def rate(make: Callable[[], Side], operation: str) -> float:
        def client() -> None:
            run = make()[operation]
            for _ in range(times):
                run()

        clients = [fork.Process(target=client) for _ in range(CLIENTS)]
        began = time.perf_counter()
        for process in clients:
            process.start()
        for process in clients:
            process.join()
        assert not any(process.exitcode for process in clients)
        return CLIENTS * times / (time.perf_counter() - began)

    return {
        name: {operation: rate(make, operation) for operation in ("status", "transaction")}
        for name, make in sides.items()
    }


def readers(daemon: Daemon) -> dict[str, Any]:
    """Let thousands of threads wait in read(2) for one answer, and read `status` meanwhile."""
    assert daemon.process is not None
    process = psutil.Process(daemon.process.pid)
    daemon.write("agents/a/ctl", "pause")
    daemon.write(LLM, "hello")
    before = process.memory_info().rss
    answers: list[bytes] = []

    def read() -> None:
        answers.append((daemon.root / LLM).read_bytes())

    threading.stack_size(256 << 10)
    threads = [threading.Thread(target=read) for _ in range(READERS)]
    for thread in threads:
        thread.start()
    wait_until(lambda: process.num_threads() > READERS, "all to be blocked", 60)
    time.sleep(1)
    process.cpu_percent()
    time.sleep(5)
    idle = process.cpu_percent()
    rss = process.memory_info().rss
    took = []
    for _ in range(1000):
        began = time.perf_counter()
        read_file(daemon.root / "status")
        took.append(time.perf_counter() - began)
        time.sleep(0.002)
    daemon.write("agents/a/ctl", "resume")
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    assert len(set(answers)) == 1
    assert len(answers) == READERS
    return {
        "blocked readers": READERS,
        "memory of the daemon, MB": rss / 1e6,
        "more than before, MB": (rss - before) / 1e6,
        "CPU of the daemon, %": idle,
        "status meanwhile, p50, ms": statistics.median(took) * 1e3,
        "status meanwhile, p99, ms": statistics.quantiles(took, n=100)[98] * 1e3,
        "all have the answer after, s": time.perf_counter() - began,
    }


def waiting(daemon: Daemon) -> dict[str, Any]:
    """Let one thread wait with epoll for many requests."""
    began = time.perf_counter()
    selector = selectors.EpollSelector()
    for n in range(WAITING):
        fd = os.open(daemon.root / LLM, os.O_RDWR | os.O_NONBLOCK)
        os.write(fd, b"hello %d" % n)
        selector.register(fd, selectors.EVENT_READ)
    while selector.get_map():
        for key, _ in selector.select():
            with contextlib.suppress(BlockingIOError):
                if not os.read(key.fd, 4096):
                    selector.unregister(key.fd)
                    os.close(key.fd)
    return {"requests of one thread": WAITING, "s": time.perf_counter() - began}


def besieged(daemon: Daemon) -> dict[str, Any]:
    """Let a user take all that the quotas allow and then ask for more without a pause. Read `status`
    meanwhile."""
    (daemon.root / "agents").chmod(0o1777)
    (daemon.root / "contexts").chmod(0o1777)
    fork = get_context("fork")
    full, storm, calls = fork.Event(), fork.Event(), fork.Value("i")

    def until_refused(call: Callable[[int], object]) -> None:
        with contextlib.suppress(OSError):
            for n in itertools.count():
                call(n)

    def take_all() -> None:
        os.setresuid(GREEDY, GREEDY, GREEDY)
        root = daemon.root
        (root / "agents/greedy").mkdir()
        (root / "agents/greedy/ctl").write_text("pause")
        until_refused(lambda n: (root / f"agents/greedy{n}").mkdir())
        until_refused(lambda n: (root / f"contexts/greedy{n}").mkdir())
        until_refused(lambda n: (root / "agents/greedy/syscall/llm").write_bytes(b"x" * 1000))
        held: list[int] = []
        until_refused(lambda n: held.append(os.open(root / "agents/greedy/syscall/llm", os.O_RDONLY)))
        for fd in held:
            threading.Thread(target=os.read, args=(fd, 1), daemon=True).start()
        full.set()
        storm.wait()
        while True:
            with contextlib.suppress(OSError):
                (root / "agents/more").mkdir()
            calls.value += 1

    def status_s() -> float:
        took = []
        for _ in range(2000):
            began = time.perf_counter()
            read_file(daemon.root / "status")
            took.append(time.perf_counter() - began)
        return statistics.median(took)

    threading.stack_size(256 << 10)
    alone = status_s()
    greedy = fork.Process(target=take_all, daemon=True)
    greedy.start()
    full.wait()
    time.sleep(1)
    beside = status_s()
    storm.set()
    stormed = status_s()
    greedy.kill()
    greedy.join()
    return {
        "status alone, ms": alone * 1e3,
        "beside a user at every limit, times": beside / alone,
        "while that user makes calls without a pause, times": stormed / alone,
        "such calls": calls.value,
    }


def listing(daemon: Daemon) -> dict[str, Any]:
    for n in range(AGENTS):
        (daemon.root / f"agents/x{n}").mkdir()

    def ls(*options: str) -> float:
        began = time.perf_counter()
        subprocess.run(["ls", *options, daemon.root / "agents"], stdout=subprocess.DEVNULL, check=True)
        return time.perf_counter() - began

    return {
        "agents": AGENTS,
        "ls, s": statistics.median(ls() for _ in range(5)),
        "ls -l, s": statistics.median(ls("-l") for _ in range(5)),
    }


def table(rows: dict[str, dict[str, float]]) -> None:
    columns = list(next(iter(rows.values())))
    print(f"\n| | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(f'{row[c]:.3g}' if row.get(c) else '–' for c in columns)} |")


def beside(daemon: Daemon, folder: Path, rounds: int, port: int) -> dict[str, Any]:
    """Measure both operations on every side, with one client and with several."""
    with contextlib.ExitStack() as stack:
        bare, least, worked = folder / "floor", folder / "least", folder / "worked"
        stack.enter_context(floor(bare))
        stack.enter_context(floor(least, "least"))
        stack.enter_context(floor(worked, str(folder / "random")))
        sides: Sides = {
            "aiosd": lambda: files(daemon.root),
            "fusepy alone": lambda: files(bare),
            "fusepy, fewest calls": lambda: files(least),
            WITH_WORKER: lambda: {"transaction": files(worked)["transaction"]},
        }
        if importlib.util.find_spec("fastapi"):
            stack.enter_context(server(port))
            sides["FastAPI"] = lambda: http_side(port)
        one_client(sides, 1, 100)  # warm up
        single = {
            name: {f"{operation}, ms": s * 1e3 for operation, s in row.items()}
            for name, row in one_client(sides, rounds, 300).items()
        }
        working_s = {"aiosd": worker_s(daemon), WITH_WORKER: float((worked / "status").read_text())}
        for name, row in single.items():
            row["of that with the worker, ms"] = working_s.get(name, 0.0) * 1e3
            row["without, ms"] = row["transaction, ms"] - row["of that with the worker, ms"]
        single["aiosd"]["daemon's CPU, ms"] = cpu_s(daemon, 1000) * 1e3
        del sides[WITH_WORKER]  # it serves one client at a time
        return {"one client": single, f"{CLIENTS} clients, a second": many_clients(sides, 300)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--port", type=int, default=18080)
    parser.add_argument("--only", metavar="PART", help="beside, readers, waiting, listing or besieged")
    options = parser.parse_args()
    results = json.loads(RESULT.read_text()) if options.only else {}
    parts = {"readers": readers, "waiting": waiting, "listing": listing, "besieged": besieged}
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        folder = Path(scratch)
        folder.chmod(0o755)
        model = random_model.make(folder / "random")
        config = f"[quota.user.root]\nagents = {AGENTS + 1}\nqueued_requests = 5000\n"
        daemon = Daemon(folder / "aiosd", model, config).start()
        stack.callback(daemon.clean)
        (daemon.root / "agents/a").mkdir()
        daemon.write("agents/a/params.json", '{"max_tokens": 1}')
        if options.only in (None, "beside"):
            found = beside(daemon, folder, options.rounds, options.port)
            for rows in found.values():
                table(rows)
            results |= found
        for name, measure in parts.items():
            if options.only in (None, name):
                results[name] = measure(daemon)
                print("\n| what | |\n|---|---|")
                for what, value in results[name].items():
                    print(f"| {what} | {value:.3g} |")
    RESULT.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

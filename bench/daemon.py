"""make bench-daemon: measure the daemon itself, on the real mount, with a model of random weights.

Writes medians to bench/results/daemon.json and prints a table. Run it as root on a quiet machine.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests import random_model
from tests.running import REPOSITORY, Daemon, wait_until

RESULT = Path(__file__).parent / "results" / "daemon.json"


def median(measure: Callable[[], float], times: int) -> float:
    return statistics.median(measure() for _ in range(times))


def start_s(folder: Path, model: Path) -> float:
    """Time from exec until `status` exists. Then end the daemon."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "aiosd", "--mount", folder / "m", "--state", folder / "s", "--model", model],
        cwd=REPOSITORY, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not (folder / "m/status").exists():
        time.sleep(0.002)
    took = time.perf_counter() - began
    process.terminate()
    process.wait()
    return took


def first_answer_s(folder: Path, model: Path) -> float:
    """Time from exec to the end of the first answer, the loading of the model included."""
    began = time.perf_counter()
    daemon = Daemon(folder, model).start(ready=False)
    (daemon.root / f"models/{model.name}/llm").write_text("hello")
    (daemon.root / f"models/{model.name}/llm").read_bytes()
    took = time.perf_counter() - began
    daemon.stop()
    return took


def interrupt_s(daemon: Daemon) -> float:
    """Time from SIGINT to the end of a reader that is blocked in read(2)."""
    reader = subprocess.Popen(["cat", daemon.root / "agents/held/syscall/llm"])
    wait_until(lambda: Path(f"/proc/{reader.pid}/wchan").read_text() == "request_wait_answer", "the block")
    began = time.perf_counter()
    reader.send_signal(signal.SIGINT)
    reader.wait()
    return time.perf_counter() - began


def transaction_s(daemon: Daemon) -> float:
    """Time of open, write, read to the end, and close, for an answer of one token."""
    began = time.perf_counter()
    fd = os.open(daemon.root / "agents/quick/syscall/llm", os.O_RDWR)
    os.write(fd, b"hello")
    while os.read(fd, 4096):
        pass
    os.close(fd)
    return time.perf_counter() - began


def read_s(daemon: Daemon) -> float:
    began = time.perf_counter()
    fd = os.open(daemon.root / "version", os.O_RDONLY)
    os.read(fd, 4096)
    os.close(fd)
    return time.perf_counter() - began


def rss_bytes(daemon: Daemon) -> int:
    assert daemon.process is not None
    pages = Path(f"/proc/{daemon.process.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = random_model.make(folder / "random")
        results = {
            "start to mounted, s": median(lambda: start_s(folder / "start", model), 7),
            "start to first answer, s": median(lambda: first_answer_s(folder / "first", model), 3),
        }
        daemon = Daemon(folder / "daemon", model).start()
        daemon.sh(
            "mkdir agents/held agents/quick; echo pause > agents/held/ctl; echo x > agents/held/syscall/llm"
        )
        daemon.write("agents/quick/params.json", '{"max_tokens": 1}')
        results |= {
            "memory of the daemon, MB": rss_bytes(daemon) / 1e6,
            "SIGINT to end of a blocked reader, ms": median(lambda: interrupt_s(daemon), 15) * 1e3,
            "open, read, close of a value, ms": median(lambda: read_s(daemon), 500) * 1e3,
            "whole transaction of one token, ms": median(lambda: transaction_s(daemon), 200) * 1e3,
        }
        daemon.stop()
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(results, indent=2) + "\n")
    print("| what | median |\n|---|---|")
    for name, value in results.items():
        print(f"| {name} | {value:.2f} |")


if __name__ == "__main__":
    main()

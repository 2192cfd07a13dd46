"""make bench-tools: compare a tool call with the bare sandbox, and measure the agent loop.

    python -m bench.tools

Writes bench/results/tools.json and prints tables. Run it as root on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiosd.tools.catalog import Tools
from aiosd.tools.run.sandbox import Cage, OwnTree, seccomp_filter
from aiosd.tools.run.spawn import memory_file
from tests.running import REPOSITORY, Daemon

RESULT = Path(__file__).parent / "results" / "tools.json"
ARGUMENTS = b'{"expression": "1234*5678"}'
QUESTION = b"What is 1234*5678?"
WAITING = b"What time is it in UTC?"
AGENTS = 64
CLOCK = """
name = "clock"
description = "Tell the current time in a time zone"
command = ["/bin/sh", "-c", "sleep 1; date -u +%H:%M"]
limit = 64
[parameters]
type = "object"
properties.zone.type = "string"
"""  # this tool waits, like a tool that uses the network


def bare(mount: Path) -> None:
    """The same program in the same sandbox, started as a shell script would start it."""
    cage = Cage(TOOLS.get("calc").manifest, None, OwnTree(mount).options())
    program = cage.open_program()
    assert program is not None
    with (
        memory_file(ARGUMENTS) as given,
        memory_file(cage.environment()) as environment,
        memory_file(seccomp_filter()) as seccomp,
    ):
        fds = [environment.fileno(), seccomp.fileno(), program]
        done = subprocess.run(
            cage.command(fds[0], fds[1], program),
            stdin=given,
            capture_output=True,
            pass_fds=fds,
            env={},
            check=True,
        )
    os.close(program)
    assert done.stdout == b"7006652\n"


TOOLS = Tools(Path("/nonexistent"), Path("/nonexistent"))


def transaction(path: Path, text: bytes) -> bytes:
    fd = os.open(path, os.O_RDWR)
    os.write(fd, text)
    said = b""
    while data := os.read(fd, 65536):
        said += data
    os.close(fd)
    return said


def timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def calls(daemon: Daemon, rounds: int) -> dict[str, float]:
    """Medians, the sides taking turns."""
    file = daemon.root / "tools/calc/call"
    took: dict[str, list[float]] = {"bare": [], "files": []}
    for _ in range(rounds):
        took["bare"].append(timed(lambda: bare(daemon.root)))
        took["files"].append(timed(lambda: transaction(file, ARGUMENTS)))
    one, other = (statistics.median(took[side]) * 1e3 for side in ("bare", "files"))
    return {"bwrap alone, ms": one, "through the files, ms": other, "ratio": other / one}


def spans(daemon: Daemon) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = {}
    for event in json.loads(daemon.read("scheduler/trace.json"))["traceEvents"]:
        if event.get("ph") == "X":
            found.setdefault(event["tid"], []).append(event)
    return found


def overhead(daemon: Daemon, rounds: int) -> dict[str, float]:
    """The loop's own time for each of its three steps: the whole time minus the time on workers and in
    tools."""
    file = daemon.root / "agents/a0/syscall/llm"
    left = []
    for _ in range(rounds):
        transaction(file, QUESTION)
        id = int(os.readlink(daemon.root / "agents/a0/requests/latest"))
        steps = daemon.root / f"agents/a0/requests/{id}/steps"
        children = [int(os.path.basename(os.readlink(steps / name))) for name in os.listdir(steps)]
        known = spans(daemon)
        whole = sum(s["dur"] for s in known[id] if s["name"] == "loop")
        inside = sum(s["dur"] for child in children for s in known[child] if s["name"] != "queued")
        left.append((whole - inside) / len(children) / 1e3)
    return {"the loop's own time per step, ms": statistics.median(left)}


def many(daemon: Daemon, question: bytes, answer: bytes) -> dict[str, float]:
    """Steps per second of many agents: all loops at once, and one after the other, as AIOS runs them."""

    def run(agent: int) -> None:
        assert answer in transaction(daemon.root / f"agents/a{agent}/syscall/llm", question)

    def in_turn() -> None:
        for n in range(AGENTS):
            run(n)

    def at_once() -> None:
        threads = [threading.Thread(target=run, args=(n,)) for n in range(AGENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    at_once()
    alone = timed(in_turn)
    together = timed(at_once)
    steps = 3 * AGENTS
    return {
        "agents": AGENTS,
        "one at a time, steps/s": steps / alone,
        "at once, steps/s": steps / together,
        "ratio": alone / together,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        folder.chmod(0o755)
        tool = folder / "tools.d/clock"
        tool.mkdir(parents=True)
        (tool / "tool.toml").write_text(CLOCK)
        config = f"[tools]\nfolder = '{tool.parent}'\n"
        daemon = Daemon(folder / "aiosd", REPOSITORY / "models/tiny", config).start()
        try:
            for n in range(AGENTS):
                (daemon.root / f"agents/a{n}").mkdir()
                daemon.write(f"agents/a{n}/tools", "calc clock")
            daemon.write("tools/calc/limit", str(AGENTS))
            calls(daemon, 5)
            results = {
                "a call": calls(daemon, options.rounds),
                "the loop": overhead(daemon, options.rounds),
                "agents whose tool computes": many(daemon, QUESTION, b"= 7006652"),
                "agents whose tool waits a second": many(daemon, WAITING, b"UTC"),
            }
        finally:
            daemon.clean()
    for what, row in results.items():
        print(f"\n| {what} | |\n|---|---|")
        for key, value in row.items():
            print(f"| {key} | {value:.3g} |")
    RESULT.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

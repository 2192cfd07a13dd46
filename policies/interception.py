"""What happens to KV of an agent that waits for its tools: it stays, goes to the host, or is dropped.

Each choice wastes memory of the worker for some time, and the least waste wins (InferCept, arXiv 2402.01869).
"""

from __future__ import annotations

from dataclasses import dataclass

FULL = 0.8  # of the worker's memory; below it nobody wants the place


@dataclass(frozen=True, slots=True)
class Away:
    """An agent whose model has made calls."""

    expected_s: float  # until its tools have answered
    bytes: int  # its KV
    others_bytes: int  # KV of those that run on the same worker, and wait for what is moved or computed again
    recompute_s: float  # to compute its KV again
    move_s: float  # to bring it to the host's memory, or back
    used: float  # share of the worker's memory for KV, 0 to 1


def place(away: Away) -> str:
    """keep, host or drop."""
    if away.used < FULL:
        return "keep"
    waste = {
        "keep": away.expected_s * away.bytes,
        "host": 2 * away.move_s * (away.bytes + away.others_bytes),
        "drop": away.recompute_s * (away.bytes + away.others_bytes),
    }
    return min(waste, key=lambda choice: waste[choice])

"""Decide about the KV of an agent that waits for its tools: keep it, move it to the host, or drop it.

Each choice wastes some of the worker's memory for some time. The least waste wins (InferCept, arXiv
2402.01869).
"""

from __future__ import annotations

from dataclasses import dataclass

FULL = 0.8  # share of the worker's KV memory in use, below which no other request needs the room


@dataclass(frozen=True, slots=True)
class Away:
    """An agent whose tools run."""

    expected_s: float  # expected time until its tools answer
    bytes: int  # its KV
    others_bytes: int  # KV of the running requests on the same worker, which wait while this KV moves
    recompute_s: float  # time to compute its KV again
    move_s: float  # time to move its KV to the host's memory, or back
    used: float  # share of the worker's memory for KV, 0 to 1


def place(away: Away) -> str:
    """Return keep, host or drop."""
    if away.used < FULL:
        return "keep"
    waste = {
        "keep": away.expected_s * away.bytes,
        "host": 2 * away.move_s * (away.bytes + away.others_bytes),
        "drop": away.recompute_s * (away.bytes + away.others_bytes),
    }
    return min(waste, key=lambda choice: waste[choice])

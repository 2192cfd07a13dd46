"""Choose where the KV of an agent waits while its tools run: on the worker, in host memory, or nowhere.

Each choice wastes the worker's memory for some time. The least waste wins (InferCept, arXiv 2402.01869).
"""

from __future__ import annotations

from dataclasses import dataclass

FULL = 0.8  # share of the worker's memory; below it no other request needs the room


@dataclass(frozen=True, slots=True)
class Away:
    """An agent whose tools run."""

    expected_s: float  # until its tools have answered
    bytes: int  # its KV
    others_bytes: int  # KV of the worker's other requests, which wait during a move or recomputation
    recompute_s: float  # to recompute its KV
    move_s: float  # to move its KV to host memory, or back
    used: float  # used share of the worker's KV memory, 0 to 1


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

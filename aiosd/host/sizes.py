"""Sizes for people."""

from __future__ import annotations


def size(count: int) -> str:
    """98362432 → 98 MB"""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"

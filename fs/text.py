"""Format tables: one key and value on each line, or columns under a header."""

from __future__ import annotations

from collections.abc import Iterable


def table(**rows: object) -> str:
    return "".join(f"{key} {value}\n" for key, value in rows.items())


def columns(header: list[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [header, *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() + "\n" for line in lines
    )

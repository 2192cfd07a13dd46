"""What the listings of aiosctl have in common: a table for people, JSON for programs, names for `xargs`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aiosd.errors import shown
from aiosd.host.sizes import size as size

Row = Mapping[str, Any]
Column = str | Callable[[Row], object]  # a key of the row, or what to make of the row


def options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the options that every listing takes."""
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument("--json", action="store_true", help="print a list of objects, with all that is known")
    forms.add_argument("-q", "--quiet", action="store_true", help="print only the names, one on each line")
    forms.add_argument("--no-legend", action="store_true", help="print no line of titles")
    return parser


def show(
    wanted: argparse.Namespace, rows: Sequence[Row], columns: Mapping[str, Column], key: str = "name"
) -> None:
    """Print `rows` as the options say. `columns`: title → what stands there. `key` names a row."""
    if wanted.json:
        print(json.dumps(rows, indent=2))
        return
    if wanted.quiet:
        for row in rows:
            print(row[key])
        return
    lines = [[str(row[key]), *(cell(row, column) for column in columns.values())] for row in rows]
    if rows and not wanted.no_legend:
        lines.insert(0, [key.upper(), *columns])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def cell(row: Row, column: Column) -> str:
    value = column(row) if callable(column) else row.get(column)
    return "-" if value in (None, "") else shown(str(value))

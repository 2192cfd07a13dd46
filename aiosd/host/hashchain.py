"""Lines of JSON that each hold the SHA-256 of the line before, so that a later change shows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

FIRST = "0" * 64


def verify(lines: Iterable[bytes]) -> tuple[int, list[str]]:
    """How many lines there are, and what is wrong with them."""
    count, last, wrong = 0, FIRST, list[str]()
    for raw in lines:
        count, line = count + 1, raw.rstrip(b"\n")
        if not is_whole(line):
            wrong.append(f"line {count} is cut: a crash, or a full disk")
            continue
        if json.loads(line).get("before") != last:
            wrong.append(f"line {count} does not follow the line before it: one was changed or taken out")
        last = digest(line)
    return count, wrong


def is_whole(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

"""Lines of JSON that each hold the SHA-256 of the line before, so that a later change shows.

A chain may go on in another file. The first line of that file names the file before it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import NamedTuple

FIRST = "0" * 64
CONTINUED = "continued"


class Verified(NamedTuple):
    lines: int
    wrong: list[str]
    last: str  # digest of the last whole line
    earlier: str  # the file that the first line continues; empty: it begins the chain


def verify(lines: Iterable[bytes], last: str = FIRST) -> Verified:
    """Check the lines of a file. `last`: the digest of the last line of the file before it. FIRST: there is
    none, or it is not checked.
    """
    count, wrong, earlier = 0, list[str](), ""
    for raw in lines:
        count, line = count + 1, raw.rstrip(b"\n")
        if not is_whole(line):
            wrong.append(f"line {count} is cut: a crash, or a full disk")
            continue
        facts = json.loads(line)
        if count == 1 and facts.get("what") == CONTINUED:
            earlier = str(facts.get("after"))
        if facts.get("before") != last and not (earlier and count == 1 and last == FIRST):
            wrong.append(f"line {count} does not follow the line before it: one was changed or taken out")
        last = digest(line)
    return Verified(count, wrong, last, earlier)


def is_whole(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

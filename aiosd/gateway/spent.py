"""The tokens that an answer took, found in its bytes as they pass.

Every answer in JSON ends with its `usage`, so nothing else is parsed. An answer that was cut off early has
none: then each line counts as a token, and the prompt by its length.
"""

from __future__ import annotations

import json
from collections.abc import Callable

MARK = b'"usage":'  # in a text of JSON its quotation marks have backslashes
TAIL = 2048  # bytes; usage is at the end
BYTES_PER_TOKEN = 4


class SpentTokens:
    def __init__(self, asked_bytes: int, count: Callable[[int], None]) -> None:
        """`count` gets the tokens once, at the end."""
        self._prompt, self._count = 1 + asked_bytes // BYTES_PER_TOKEN, count
        self._lines, self._tail = 0, b""

    def passed(self, data: bytes) -> None:
        self._lines += data.count(b"\n")
        self._tail = (self._tail + data)[-TAIL:]

    def end(self, whole: bool) -> None:
        """`whole`: the answer came to its end, so without `usage` it took nothing."""
        said = usage_in(self._tail)
        self._count(said if said is not None else 0 if whole else self._prompt + self._lines)


def usage_in(tail: bytes) -> int | None:
    at = tail.rfind(MARK)
    if at < 0:
        return None
    try:
        usage, _ = json.JSONDecoder().raw_decode(tail[at + len(MARK) :].decode("utf-8", "replace").lstrip())
        return max(0, int(usage.get("total_tokens", usage.get("prompt_tokens", 0))))
    except (ValueError, OverflowError, RecursionError, AttributeError, TypeError):  # a tool printed it
        return None

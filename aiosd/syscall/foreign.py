"""Decode untrusted bytes as text and JSON, and refuse values that later code cannot handle. Pure."""

from __future__ import annotations

import json
from typing import Any

from aiosd.errors import BadRequest

DEPTH_MAX = 64


class NotJson(BadRequest):
    """The text is not JSON. `incomplete`: more bytes could make it JSON."""

    def __init__(self, reason: str, incomplete: bool = False) -> None:
        super().__init__(reason)
        self.incomplete = incomplete


def decode(body: bytes) -> str:
    """Return the text of a request. Raises BadRequest."""
    try:
        return body.decode()
    except UnicodeDecodeError as error:
        raise BadRequest(f"byte {error.start} is not UTF-8 text") from None


def prose(text: str) -> str:
    """Return a plain text without its last newlines. Raises BadRequest."""
    return checked(text.rstrip("\n"))


def checked(text: str) -> str:
    """Return the text. Raises BadRequest if it is empty or holds a NUL byte."""
    if "\0" in text:
        raise BadRequest("the request holds a NUL byte", "write text or JSON")
    if not text.strip():
        raise BadRequest("the request is empty", "write a question")
    return text


def read_json(text: str) -> Any:
    """Parse JSON. Raises NotJson, also for a value nested too deep or with half a surrogate pair."""
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also an integer with too many digits
        raise NotJson(f"not JSON: {error}", incomplete=unfinished(text, error)) from None
    if depth(raw) > DEPTH_MAX:
        raise NotJson(f"the JSON is nested deeper than {DEPTH_MAX}", incomplete=False)
    try:
        json.dumps(raw, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise NotJson(
            "half a surrogate pair (\\ud800 to \\udfff) is no character", incomplete=False
        ) from None
    return raw


def depth(value: object) -> int:
    """Return the depth of nesting. Without recursion, and not counted beyond DEPTH_MAX + 1."""
    level, deepest = [value], 0
    while level and deepest <= DEPTH_MAX:
        deepest += 1
        level = [
            child
            for parent in level
            if isinstance(parent, (dict, list))
            for child in (parent.values() if isinstance(parent, dict) else parent)
        ]
    return deepest


def unfinished(text: str, error: Exception) -> bool:
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")

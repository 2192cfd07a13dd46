"""Decode untrusted bytes as text and JSON, and refuse values that later code cannot handle. Pure."""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from typing import Any

from aiosd.errors import BadRequest

DEPTH_MAX = 64
INTEGER_MIN, INTEGER_MAX = -(1 << 63), (1 << 64) - 1
DIGITS_MAX = 20  # characters of the longest such integer
SMALL = 64 << 10  # characters of JSON that are parsed without a look at how many values they have
VALUES_MAX = 100_000  # of a JSON text: no other thread goes on while Python makes them
VALUE_BYTES = 64  # of an empty list, with its place in another
OBJECT = re.compile(rb"(?:\xef\xbb\xbf)?[ \t\r\n]*\{")


class NotJson(BadRequest):
    """The text is not JSON. `incomplete`: more bytes could make it JSON."""

    def __init__(self, reason: str, incomplete: bool = False) -> None:
        super().__init__(reason)
        self.incomplete = incomplete


def is_object(body: bytes | bytearray) -> bool:
    """Whether a request is JSON: its first character is `{`, perhaps behind blanks and a byte order mark."""
    return OBJECT.match(body) is not None


def decode(body: bytes) -> str:
    """Return the text of a request. Raises BadRequest."""
    try:
        return body.decode("utf-8-sig")  # drops a byte order mark
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


def read_json(text: str, values: int = VALUES_MAX) -> Any:
    """Parse JSON. Raises NotJson, also for more than so many values, nesting that is too deep, text that
    UTF-8 cannot encode, duplicate keys, NaN, Infinity, and integers of more than 64 bits."""
    if len(text) > SMALL and values_of(text, values) > values:
        raise NotJson(f"the JSON has more than {values} values")
    try:
        raw = DECODER.decode(text)
    except (ValueError, RecursionError) as error:  # ValueError: also from the hooks of DECODER
        raise NotJson(f"not JSON: {error}", incomplete=unfinished(text, error)) from None
    if depth(raw) > DEPTH_MAX:
        raise NotJson(f"the JSON is nested deeper than {DEPTH_MAX}", incomplete=False)
    try:
        json.dumps(raw, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise NotJson(
            "half a surrogate pair (\\ud800 to \\udfff) is not a character", incomplete=False
        ) from None
    return raw


def values_of(text: str, enough: int = VALUES_MAX) -> int:
    """The most values that a JSON text can have, not exactly above `enough`.

    This takes milliseconds where parsing would take half a second, because no values are made.
    """
    most = text.count(",") + text.count("[") + text.count("{")
    if most <= VALUES_MAX // 100:  # so few that it does not matter which of them are in strings
        return most
    if "\\" in text:
        text = text.replace("\\\\", "").replace('\\"', "")
    if (quotes := text.count('"')) > 4 * (enough + 1):  # each value has two, and two more for its key
        return quotes // 4
    outside = "".join(text.split('"')[::2])
    return outside.count(",") + outside.count("[") + outside.count("{")


def parsed_bytes(body: bytes) -> int:
    """The memory of a request beside its bytes: one wide character makes all of a text wide, and each value
    of JSON is an object."""
    text = body.decode("utf-8", "replace")
    return max(0, sys.getsizeof(text) - len(body)) + (VALUE_BYTES * values_of(text) if is_object(body) else 0)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        count = Counter(key for key, _ in pairs)
        twice = next(key for key, times in count.items() if times > 1)
        raise ValueError(f"the key {twice[:40]!r} stands twice in one object")
    return made


def finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:40]} is too large for a number")
    return number


def bounded(text: str) -> int:
    if len(text) > DIGITS_MAX or not INTEGER_MIN <= int(text) <= INTEGER_MAX:
        raise ValueError(f"{text[:40]} has more than 64 bits")
    return int(text)


def no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a number in JSON")


# Python's own decoder accepts NaN, Infinity, duplicate keys and numbers of any size.
DECODER = json.JSONDecoder(
    object_pairs_hook=unique, parse_float=finite, parse_int=bounded, parse_constant=no_constant
)


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

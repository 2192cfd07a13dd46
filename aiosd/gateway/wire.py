"""Messages between the front and a session: a length, one line of JSON, and bytes.

The first message to a session says who the user is: {"key": KEY}, or {} with the descriptor of the user's
own connection. Every later one is a call {"n", "op", "path"} with bytes. Its answer is {"n", …} with bytes.
Answers come in any order. An answer with "file" has a descriptor (SCM_RIGHTS), and a refusal has "errno" and
"reason".
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

LENGTH = struct.Struct("!I")
MESSAGE_MOST = 64 << 20  # bytes
RECEIVED = 256 << 10  # bytes, at once
FILES_MOST = 64  # descriptors, at once

Head = dict[str, Any]


class Malformed(Exception):
    """The other side does not speak this protocol."""


def packed(head: Head, body: bytes = b"") -> bytes:
    line = json.dumps(head, separators=(",", ":")).encode() + b"\n"
    return LENGTH.pack(len(line) + len(body)) + line + body


class Messages:
    """The messages in a stream of bytes."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def add(self, data: bytes) -> Iterator[tuple[Head, bytes]]:
        """Give the messages that are complete now. Raises Malformed."""
        self._bytes += data
        while len(self._bytes) >= LENGTH.size:
            (length,) = LENGTH.unpack_from(self._bytes)
            if length > MESSAGE_MOST:
                raise Malformed(f"a message of {length} bytes")
            if len(self._bytes) < LENGTH.size + length:
                return
            message = bytes(self._bytes[LENGTH.size : LENGTH.size + length])
            del self._bytes[: LENGTH.size + length]
            line, _, body = message.partition(b"\n")
            try:
                head = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise Malformed(str(error)) from None
            if not isinstance(head, dict):
                raise Malformed("a message without an object")
            yield head, body

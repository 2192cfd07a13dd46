"""Text of others, such as a model's answer, on a terminal: it is shown and never obeyed."""

from __future__ import annotations

import codecs
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress

# Controls but newline and tab; marks that turn the direction of the text around; halves of surrogate pairs
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

COLUMNS = 80  # of a terminal that does not say


def safe(text: str) -> str:
    """The text with each character that a terminal may obey written as Python writes it."""
    return OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """The text, cut to one line of the terminal at standard error: a longer one cannot be written over."""
    columns = COLUMNS
    with suppress(OSError):
        columns = os.get_terminal_size(2).columns or COLUMNS  # 0: a terminal that does not know it
    return text[: columns - 1]


def writer() -> Callable[[bytes], None]:
    """What writes pieces of UTF-8 to the standard output: safely to a terminal, elsewhere as they are."""
    out = sys.stdout.buffer
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a piece may end within a character
    terminal = sys.stdout.isatty()

    def write(data: bytes) -> None:
        out.write(safe(decoder.decode(data)).encode() if terminal else data)
        out.flush()

    return write

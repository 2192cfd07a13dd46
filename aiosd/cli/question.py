"""The question of aiosctl ask and aiosctl run: words of the command line, standard input, or both."""

from __future__ import annotations

import os
import select
import stat
import sys
from collections.abc import Sequence

from aiosd.client import Failed

STDIN = "-"  # as the last word: read standard input, whatever it is
SILENT_S = 2.0
MOST_BYTES = 64 << 20  # far more than a request may have


def question(words: Sequence[str]) -> str:
    """Words, an empty line, standard input. Without words standard input alone.

    With words it is read only if somebody gave it: a pipe, or a file from its beginning. A file that
    is read further is that of a loop (`while read line; do aiosctl ask …; done < file`). Words that are a
    JSON request stand alone.
    """
    wanted = not words or words[-1] == STDIN
    text = " ".join(words[:-1] if words and wanted else words)
    if not wanted and (text.lstrip().startswith("{") or not is_given()):
        return text
    given = read(told=not text)
    return f"{text}\n\n{given}" if text and given.strip() else text or given


def is_given() -> bool:
    """Whether standard input is a pipe, or a file at its beginning. A terminal, /dev/null and a socket, which
    programs that start others leave open, are not.
    """
    if sys.stdin is None:  # it is closed
        return False
    mode = os.fstat(0).st_mode
    return stat.S_ISFIFO(mode) or (stat.S_ISREG(mode) and os.lseek(0, 0, os.SEEK_CUR) == 0)


def read(told: bool) -> str:
    """Read to the end. If nothing comes for a while and nobody was told, say what is waited for."""
    if sys.stdin is None:
        return ""
    data = bytearray()
    while len(data) <= MOST_BYTES:
        if not told and not select.select([0], [], [], SILENT_S)[0]:
            print("aiosctl: the question goes on in standard input; < /dev/null ends it", file=sys.stderr)
        told = True
        if not (more := os.read(0, 1 << 16)):
            return data.decode()
        data += more
    raise Failed(f"standard input has more than {MOST_BYTES >> 20} MiB; ask about a part of it")

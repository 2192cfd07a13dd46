"""The tokens that each key has used today, for keys with an allowance per day. The day is that of UTC.

Each answer appends a line to a file, so a killed gateway forgets none. A new day begins a new file.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from pathlib import Path

from aiosd.gateway.keys import KnownKey
from aiosd.gateway.refused import HttpRefused

log = logging.getLogger("aios-gateway")

DAY_S = 86400
COMPACT_LINES = 100_000
NAME = "tokens"


class Allowances:
    def __init__(self, folder: Path | None) -> None:
        """`folder`: where the file lies; None: the counts end with the process."""
        self._path = folder / NAME if folder else None
        self._day, self._lines = today(), 0
        self._used = Counter[str]()
        self._file: int | None = None
        if self._path:
            self._used.update(read(self._path, self._day))
            self._compact(self._path)

    def check(self, key: KnownKey) -> None:
        """Raises HttpRefused: the key has used its tokens."""
        self._turn()
        most = key.tokens_per_day
        if most is not None and self._used[key.id] >= most:
            reason = f"this key has used its {most} tokens of today; the next day begins at midnight UTC"
            wait_s = (self._day + 1) * DAY_S - int(time.time())
            raise HttpRefused(429, reason, "insufficient_quota", retry_s=max(wait_s, 1))

    def count(self, key: KnownKey, tokens: int) -> None:
        if key.tokens_per_day is None or not tokens:
            return
        self._turn()
        self._used[key.id] += tokens
        self._append(f"{self._day} {key.id} {tokens}\n")

    def _append(self, line: str) -> None:
        if self._file is None or self._path is None:
            return
        try:
            os.write(self._file, line.encode())
            self._lines += 1
            if self._lines > COMPACT_LINES:
                self._compact(self._path)
        except OSError as error:  # it goes on counting in memory
            log.warning("the tokens of a key cannot be stored: %s: %s", self._path, error.strerror)

    def _turn(self) -> None:
        """Begin a new day when there is one."""
        if (day := today()) == self._day:
            return
        self._day = day
        self._used.clear()
        if self._path:
            self._compact(self._path)

    def _compact(self, path: Path) -> None:
        """Replace the file by one with a line for each key."""
        new = path.with_suffix(".new")
        try:
            with new.open("w") as file:
                file.writelines(f"{self._day} {id} {tokens}\n" for id, tokens in self._used.items())
                file.flush()
                os.fsync(file.fileno())
            new.rename(path)
            made = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        except OSError as error:
            log.warning("the tokens of keys cannot be stored: %s: %s", path, error.strerror)
            return
        if self._file is not None:
            os.close(self._file)
        self._file, self._lines = made, 0


def read(path: Path, day: int) -> Counter[str]:
    """The tokens by key. A line that is cut off or damaged counts nothing."""
    used = Counter[str]()
    try:
        lines = path.read_text("utf-8", "replace").splitlines()
    except FileNotFoundError:
        return used
    for line in lines:
        match line.split(" "):
            case [of, id, tokens] if of == str(day) and tokens.isdecimal():
                used[id] += int(tokens)
    return used


def today() -> int:
    return int(time.time()) // DAY_S

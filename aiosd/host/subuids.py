"""Whose uids are whose: /etc/subuid lends ranges of uids to users, who run processes as them (subuid(5)).

One person is one user with all uids that are lent to that person: else a bound for each uid is no bound for
people. Any thread may call.
"""

from __future__ import annotations

import os
import pwd
from bisect import bisect_right
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

FILE = Path("/etc/subuid")
BYTES_MOST = 1 << 20  # of the file; what is beyond is not read


class Range(NamedTuple):
    first: int
    last: int
    owner: int


class SubUids:
    def __init__(self, file: Path = FILE) -> None:
        self._file = file
        self._version: tuple[int, int, int] | None = None
        self._ranges: list[Range] = []
        self._known: dict[int, int] = {}  # what was counted for somebody is given back by the same

    def of(self, uid: int) -> int:
        """Return the user to whom the uid is lent; the uid itself if to nobody. It stays the same while the
        daemon runs."""
        if (known := self._known.get(uid)) is not None:
            return known
        self._refresh()
        ranges = self._ranges
        at = bisect_right(ranges, uid, key=lambda one: one.first) - 1
        found = ranges[at].owner if at >= 0 and uid <= ranges[at].last else uid
        return self._known.setdefault(uid, found)

    def _refresh(self) -> None:
        version = None
        with suppress(OSError):
            status = os.stat(self._file)
            version = (status.st_mtime_ns, status.st_size, status.st_ino)
        if version != self._version:
            self._ranges = sorted(read(self._file))
            self._version = version


def read(file: Path) -> list[Range]:
    """The ranges of the file. A line that is not one is passed over, as by newuidmap(1)."""
    found = []
    try:
        with file.open("rb") as opened:
            lines = opened.read(BYTES_MOST).split(b"\n")
    except OSError:  # nobody has any
        return []
    for line in lines:
        name, first, count = (*line.split(b":"), b"", b"")[:3]
        with suppress(ValueError):
            start, most = int(first), int(count)
            found.append(Range(start, start + most - 1, number(os.fsdecode(name), start)))
    return found


def number(name: str, otherwise: int) -> int:
    """The uid of a user by name or number. Without such a user, all uids of the range are one user's."""
    with suppress(KeyError, ValueError):
        return int(name) if name.isdecimal() else pwd.getpwnam(name).pw_uid
    return otherwise


_subuids = SubUids()


def owner(uid: int) -> int:
    return _subuids.of(uid)

"""Why system calls were refused, for the user who made them: an errno says little.

Read in refused.jsonl, and in the files called `error` (aiosd.fs.reason). Kept in memory, a bounded number for
each of a bounded number of users. Any thread may call.
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict, deque
from typing import NamedTuple

from aiosd.errors import AiosError

LINES, USERS, PATH_MAX = 32, 1000, 300


class Refusal(NamedTuple):
    time_s: float
    file: str  # from the mount, with a slash in front
    message: str


class Reasons:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_uid: OrderedDict[int, deque[Refusal]] = (
            OrderedDict()
        )  # the user refused last is the last one

    def note(self, uid: int, path: str, error: AiosError) -> None:
        with self._lock:
            refusal = Refusal(time.time(), path[:PATH_MAX], error.explanation)
            self._by_uid.setdefault(uid, deque(maxlen=LINES)).append(refusal)
            self._by_uid.move_to_end(uid)
            if len(self._by_uid) > USERS:
                self._by_uid.popitem(last=False)

    def forget(self, uid: int) -> None:
        with self._lock:
            self._by_uid.pop(uid, None)

    def last(self, uid: int, folder: str) -> Refusal:
        """Return the user's last refusal of a file directly in the folder; an empty one if there is none."""
        found = (one for one in reversed(self._of(uid)) if one.file.rpartition("/")[0] == folder)
        return next(found, Refusal(0.0, folder, ""))

    def lines(self, uid: int) -> str:
        """Return lines of JSON, the newest last."""
        return "".join(
            json.dumps({"time": round(one.time_s, 3), "file": one.file.lstrip("/"), "message": one.message})
            + "\n"
            for one in self._of(uid)
        )

    def _of(self, uid: int) -> list[Refusal]:
        with self._lock:
            return list(self._by_uid.get(uid, ()))

"""Why system calls were refused, for the user who made them: an errno says little.

Kept in memory, a bounded number for each of a bounded number of users. Any thread may call.
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict, deque

from aiosd.errors import AiosError

LINES, USERS, PATH_MAX = 32, 1000, 300


class Reasons:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_uid: OrderedDict[int, deque[str]] = OrderedDict()  # the user refused last is the last one

    def note(self, uid: int, path: str, error: AiosError) -> None:
        facts = {
            "time": round(time.time(), 3),
            "file": path.lstrip("/")[:PATH_MAX],
            "message": error.explanation,
        }
        with self._lock:
            self._by_uid.setdefault(uid, deque(maxlen=LINES)).append(json.dumps(facts) + "\n")
            self._by_uid.move_to_end(uid)
            if len(self._by_uid) > USERS:
                self._by_uid.popitem(last=False)

    def of(self, uid: int) -> str:
        """Lines of JSON, the newest last."""
        with self._lock:
            return "".join(self._by_uid.get(uid, ()))

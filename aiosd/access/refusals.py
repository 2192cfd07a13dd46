"""Log refusals: limits and a full disk as notices and warnings, all others for debugging.

A refused program may try a thousand times a second. So the log gets one line a minute for each object and
kind of error. Any thread may call.
"""

from __future__ import annotations

import logging
import threading
import time

from aiosd.errors import AiosError, Busy, OverQuota, StoreFailed, TooManyOpen
from aiosd.host.message_ids import NOTICE, Id, about

log = logging.getLogger(__name__)

BOUNDS = (Busy, OverQuota, TooManyOpen)
MACHINES = (StoreFailed,)  # the machine's trouble, not the caller's
AGAIN_S = 60.0
REMEMBERED = 1000


class Refusals:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._told_s: dict[tuple[str, type[AiosError]], float] = {}

    def log(self, path: str, error: AiosError) -> None:
        """Log a refusal. `path`: the file of the refused call, from the mount."""
        kind, parts = type(error), path.split("/")
        what = "/".join(parts[:3])
        if not isinstance(error, BOUNDS + MACHINES) or not self._is_new(what, kind):
            log.debug("%s: %s", path, error.explanation)
            return
        agent = parts[2] if parts[1:2] == ["agents"] and len(parts) > 2 else ""
        level = logging.WARNING if isinstance(error, MACHINES) else NOTICE
        extra = about(Id.LIMIT, agent=agent, path=path, limit=kind.__name__)
        log.log(level, "refused at %r: %s", path, error.explanation, extra=extra)

    def _is_new(self, what: str, kind: type[AiosError]) -> bool:
        now = time.monotonic()
        with self._lock:
            if now < self._told_s.get((what, kind), -AGAIN_S) + AGAIN_S:
                return False
            if len(self._told_s) >= REMEMBERED:  # agents come and go
                self._told_s = {k: s for k, s in self._told_s.items() if now < s + AGAIN_S}
            if len(self._told_s) >= REMEMBERED:
                return False
            self._told_s[what, kind] = now
        return True

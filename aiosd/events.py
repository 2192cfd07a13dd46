"""What happens, as it happens: the lines of events.jsonl. Bounded; who reads too slowly is told what he lost.

Any thread may emit, never with the scheduler's lock held: watchers are called at once. Who may see an event
is decided when it is read, by the modes of the object that it is about.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from dataclasses import dataclass
from itertools import islice

from aiosd import access
from aiosd.access import Caller, Permissions
from aiosd.watchers import Watchers

KEPT = 10_000


@dataclass(frozen=True, slots=True)
class Event:
    number: int
    facts: dict[str, object]
    path: str  # of the object whose readers may see it; empty: everybody
    uid: int  # whose it is; he sees it too


class Events:
    def __init__(self, permissions: Permissions) -> None:
        self._permissions = permissions
        self._lock = threading.Lock()
        self._kept: deque[Event] = deque(maxlen=KEPT)
        self._watchers = Watchers()
        self.watch = self._watchers.add
        self._next = 0

    @property
    def next(self) -> int:
        return self._next

    def emit(self, event: str, path: str = "", uid: int = 0, **facts: object) -> None:
        whole = {"time": round(time.time(), 3), "event": event, **facts}
        with self._lock:
            self._kept.append(Event(self._next, whole, path, uid))
            self._next += 1
        self._watchers.tell()

    def since(self, number: int, caller: Caller) -> tuple[str, int]:
        """Lines from that event on, and the number to ask for next."""
        with self._lock:
            first = self._kept[0].number if self._kept else self._next
            found = list(islice(reversed(self._kept), self._next - number))[::-1]
            last = self._next
        lost = json.dumps({"event": "lost", "count": first - number}) + "\n" if first > number else ""
        lines = [json.dumps(e.facts, ensure_ascii=False) + "\n" for e in found if self._sees(caller, e)]
        return lost + "".join(lines), last

    def _sees(self, caller: Caller, event: Event) -> bool:
        if not event.path or caller.uid in (0, event.uid):
            return True
        at = self._permissions.get(event.path)
        return at is not None and access.may(caller, at, access.READ | access.EXECUTE)

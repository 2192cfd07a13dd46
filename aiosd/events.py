"""Events: the lines of events.jsonl. Only the newest are kept; a slow reader learns how many he lost.

Any thread may emit, but not with the scheduler's lock held, because `emit` calls the watchers. When a reader
reads an event, the modes of the event's object decide whether he sees it.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from weakref import WeakValueDictionary

from aiosd.access.caller import Caller
from aiosd.access.permissions import EXECUTE, READ, Permission, Permissions, may
from aiosd.host.watchers import Unwatch, Watchers

KEPT = 10_000
AT_ONCE = 64  # events per read
ROOTS = Permission(0, 0, 0)
Identity = tuple[int, int, frozenset[int]]


@dataclass(slots=True, weakref_slot=True, eq=False)
class About:
    """The object that an event is about. A later object of the same name has another About."""

    path: str  # readers of this path may see the event; empty: everybody may
    ended: Permission | None = None  # the object's last permission, after its end


@dataclass(frozen=True, slots=True)
class Event:
    number: int
    facts: dict[str, object]
    about: About
    uid: int  # this user always sees the event


class Events:
    def __init__(self, permissions: Permissions) -> None:
        self._permissions = permissions
        self._lock = threading.Lock()
        self._kept: deque[Event] = deque(maxlen=KEPT)
        self._watching: dict[Identity, tuple[Caller, Watchers]] = {}
        self._about = WeakValueDictionary[str, About]()  # by path, while an event of the object is kept
        self._next = 0

    @property
    def next(self) -> int:
        return self._next

    def emit(self, event: str, path: str = "", uid: int = 0, **facts: object) -> None:
        whole = {"time": round(time.time(), 3), "event": event, **facts}
        with self._lock:
            about = self._about.get(path)
            if about is None:
                about = self._about[path] = About(path)
            new = Event(self._next, whole, about, uid)
            self._kept.append(new)
            self._next += 1
            watching = list(self._watching.values())
        for caller, watchers in watching:
            if self._sees(caller, new):
                watchers.notify()

    def watch(self, callback: Callable[[], None], caller: Caller) -> Unwatch:
        """Call back for each new event that the caller may see. Other users' events do not wake him."""
        who = caller.uid, caller.gid, caller.groups
        with self._lock:
            watching = self._watching.setdefault(who, (caller, Watchers()))
            unwatch = watching[1].add(callback)

        def end() -> None:
            with self._lock:
                unwatch()
                if not watching[1] and self._watching.get(who) is watching:
                    del self._watching[who]

        return end

    def forget(self, path: str, last: Permission = ROOTS) -> None:
        """Note that the object has ended. The owner of a later one of its name does not see its events."""
        with self._lock:
            if about := self._about.pop(path, None):
                about.ended = last

    def since(self, number: int, caller: Caller) -> tuple[str, int]:
        """Return the visible lines from event `number` on, and the number to ask for next."""
        with self._lock:
            first = self._kept[0].number if self._kept else self._next
            found = list(islice(reversed(self._kept), self._next - number))[::-1]
            last = self._next
        lost = json.dumps({"event": "lost", "count": first - number}) + "\n" if first > number else ""
        seen = list(islice((e for e in found if self._sees(caller, e)), AT_ONCE))
        if len(seen) == AT_ONCE:
            last = seen[-1].number + 1
        return lost + "".join(json.dumps(e.facts, ensure_ascii=False) + "\n" for e in seen), last

    def _sees(self, caller: Caller, event: Event) -> bool:
        about = event.about
        if not about.path or caller.uid in (0, event.uid):
            return True
        at = about.ended or self._permissions.get(about.path)
        return at is not None and may(caller, at, READ | EXECUTE)

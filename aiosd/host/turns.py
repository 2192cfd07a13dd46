"""A queue in which users take turns: who puts much into it delays only what is that user's own.

A user is one with all lent uids (aiosd.host.subuids). Any thread may put and get.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

from aiosd.host.subuids import owner

Item = TypeVar("Item")


class Turns(Generic[Item]):
    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: dict[int, deque[Item]] = {}  # by user; the first one's turn is next

    def put(self, uid: int, item: Item, most: int | None = None) -> bool:
        """False: the user has `most` items there already."""
        with self._changed:
            mine = self._waiting.setdefault(owner(uid), deque())
            if most is not None and len(mine) >= most:
                return False
            mine.append(item)
            self._changed.notify()
            return True

    def get(self) -> Item:
        """Wait for the next item."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._waiting))
            user, mine = next(iter(self._waiting.items()))
            del self._waiting[user]
            one = mine.popleft()
            if mine:
                self._waiting[user] = mine  # behind all others
            return one

"""How requests that ended reach the store, also when the disk was full for a while. Any thread may save."""

from __future__ import annotations

import logging
import threading

from aiosd.contexts import Contexts
from aiosd.errors import StoreFailed, StoreFull
from aiosd.messages import about
from aiosd.request import Request, State
from aiosd.spec import Message
from aiosd.store import Store

log = logging.getLogger(__name__)


class Saving:
    def __init__(self, store: Store, contexts: Contexts) -> None:
        self._store, self._contexts = store, contexts
        self._lock = threading.Lock()
        self._late: dict[int, Request] = {}  # ended, and not stored yet

    def find(self, id: int) -> Request | None:
        return self._late.get(id)

    def save(self, request: Request, keep: int) -> None:
        """`keep`: how many of an agent stay. What cannot be stored now goes with the next one that can."""
        with self._lock:
            self._late[request.id] = request
            for late in list(self._late.values()):
                said: list[Message] = []
                if late.state is State.DONE and self._contexts.of(late.spec):
                    said = [*late.spec.messages, *late.between, {"role": "assistant", "content": late.text}]
                try:
                    self._store.finish_request(late, said, keep)
                except (StoreFull, StoreFailed) as error:
                    extra = about(request=late.id, agent=late.agent, uid=late.uid)
                    words = late.id, error.explanation
                    log.error("request %d ended but cannot be stored: %s", *words, extra=extra)
                    return
                self._late.pop(late.id, None)

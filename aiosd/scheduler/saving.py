"""How requests that ended reach the store: at once, or a moment later with others; and when the disk was full
for a while. Any thread may save.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

from aiosd.context.contexts import Contexts
from aiosd.database import Store
from aiosd.errors import StoreFailed
from aiosd.host.message_ids import about
from aiosd.syscall import response
from aiosd.syscall.request import Request, State
from aiosd.syscall.spec import Message

log = logging.getLogger(__name__)

SOON_S = 0.01  # so much later at the most, when nobody waits for it


class Saving:
    def __init__(self, store: Store, contexts: Contexts, keep: int, ended: Callable[[Request], None]) -> None:
        """`keep`: how many of an agent stay; `ended` is called for each, soon."""
        self._store, self._contexts, self.keep, self._ended = store, contexts, keep, ended
        self._lock = threading.Lock()
        self._late: dict[int, Request] = {}  # ended, and not stored yet
        self._untold: deque[Request] = deque()
        self._some = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="saving", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stores what is left. No more may come."""
        self._stopping.set()
        self._some.set()
        if self._thread.is_alive():
            self._thread.join()

    def find(self, id: int) -> Request | None:
        return self._late.get(id)

    def add(self, request: Request) -> None:
        """It has ended, and is to be saved, now or soon."""
        self._late[request.id] = request
        self._untold.append(request)

    def soon(self) -> None:
        """Saves, off the way of who waits for an answer; what ends within the same moment goes with it."""
        if not self._some.is_set():
            self._some.set()

    def save(self) -> None:
        """What cannot be stored now goes with the next one that can."""
        with self._lock:
            for request in list(self._late.values()):
                extra = about(request=request.id, agent=request.agent, uid=request.uid)
                try:
                    response.document(request)
                    self._store.finish_request(request, self._said(request), self.keep)
                except StoreFailed as error:
                    words = request.id, error.explanation
                    log.error("request %d ended but cannot be stored: %s", *words, extra=extra)
                    return
                except Exception:  # it would not be better later, and the others are to be stored
                    log.exception("request %d", request.id, extra=extra)
                del self._late[request.id]

    def _said(self, request: Request) -> list[Message]:
        """What its conversation has grown by."""
        if request.state is not State.DONE or not self._contexts.of(request.spec):
            return []
        return [*request.spec.messages, *request.between, {"role": "assistant", "content": request.text}]

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._some.wait()
            self._stopping.wait(SOON_S)
            self._some.clear()
            self.save()
            while self._untold:
                self._ended(self._untold.popleft())

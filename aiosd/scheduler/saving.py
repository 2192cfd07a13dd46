"""Store ended requests: at once, or a moment later in a batch. What a full disk refused is stored later. Any
thread may call.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

from aiosd.context.contexts import Contexts
from aiosd.database.store import Store
from aiosd.errors import StoreFailed
from aiosd.host.message_ids import about
from aiosd.syscall import response
from aiosd.syscall.request import Request, State
from aiosd.syscall.spec import Message

log = logging.getLogger(__name__)

SOON_S = 0.01  # the delay of a batch


class Saving:
    def __init__(self, store: Store, contexts: Contexts, keep: int, ended: Callable[[Request], None]) -> None:
        """`keep`: ended requests kept per agent; the saving thread calls `ended` for each request."""
        self._store, self._contexts, self.keep, self._ended = store, contexts, keep, ended
        self._lock = threading.Lock()
        self._late: dict[int, Request] = {}  # ended requests that are not stored yet
        self._untold: deque[Request] = deque()
        self._some = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="saving", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread after it stored what is left. Nothing may be added any more."""
        self._stopping.set()
        self._some.set()
        if self._thread.is_alive():
            self._thread.join()

    def find(self, id: int) -> Request | None:
        return self._late.get(id)

    def add(self, request: Request) -> None:
        """Add an ended request, which `save` stores now or soon."""
        self._late[request.id] = request
        self._untold.append(request)

    def soon(self) -> None:
        """Wake the saving thread. It stores ended requests in one batch, so no reader waits for the disk."""
        if not self._some.is_set():
            self._some.set()

    def save(self) -> None:
        """Store all ended requests. What the disk refuses stays for the next call."""
        with self._lock:
            for request in list(self._late.values()):
                extra = about(request=request.id, agent=request.agent, uid=request.uid)
                try:
                    response.document(request)
                    self._store.finish_request(request, self._turn(request), self.keep)
                except StoreFailed as error:
                    words = request.id, error.explanation
                    log.error("request %d ended but cannot be stored: %s", *words, extra=extra)
                    return
                except Exception:  # trying again would fail again, and the others must be stored
                    log.exception("request %d", request.id, extra=extra)
                del self._late[request.id]

    def _turn(self, request: Request) -> list[Message]:
        """Return the messages by which the request's conversation grows."""
        if request.state is not State.DONE or not self._contexts.of(request.spec):
            return []
        turn = request.spec.turn(request)
        return self._new(request, turn) if any(m["role"] == "system" for m in turn) else turn

    def _new(self, request: Request, turn: list[Message]) -> list[Message]:
        """Leave out system messages that the conversation has. Some clients send theirs in each turn."""
        context = self._contexts.of(request.spec)
        known = self._contexts.messages(context) if context else []
        return [m for m in turn if m["role"] != "system" or m not in known]

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._some.wait()
            self._stopping.wait(SOON_S)
            if not self._untold:  # not after each batch: under load nobody has to wake this thread
                self._some.clear()
            self.save()
            while self._untold:
                self._ended(self._untold.popleft())

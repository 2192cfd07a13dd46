"""Delete the requests of removed agents, one after the other, on a thread of its own.

The kernel lets all who look into /aios/agents wait for a rmdir there, and all requests wait for the store. So
neither waits until megabytes of answers are overwritten. After kill -9 the next daemon goes on.
"""

from __future__ import annotations

import logging
import threading
import time
from queue import SimpleQueue

from aiosd.database.store import Store
from aiosd.errors import AiosError

log = logging.getLogger(__name__)


class Sweeping:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._gone = SimpleQueue[int]()  # agents; 0: the daemon stops
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="sweeping", daemon=True)

    def start(self) -> None:
        for agent in self._store.gone_agents():
            self.add(agent)
        self._thread.start()

    def stop(self) -> None:
        self._stopping = True
        self.add(0)
        if self._thread.ident is not None:
            self._thread.join()

    def add(self, agent: int) -> None:
        self._gone.put(agent)

    def _run(self) -> None:
        while agent := self._gone.get():
            try:
                self._sweep(agent)
            except AiosError as error:
                log.error("requests of a removed agent are deleted at the next start: %s", error.explanation)

    def _sweep(self, agent: int) -> None:
        more = True
        while more and not self._stopping:
            began = time.monotonic()
            more = self._store.sweep(agent)
            time.sleep(time.monotonic() - began)  # others get the store for as long

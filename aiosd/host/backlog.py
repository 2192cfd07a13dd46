"""Messages of the log between the threads that log them and the one that writes them.

A request never waits for a journal or a terminal that stands still. A bounded number of messages waits
instead. Later messages are dropped and counted, and the log says how many. The exit waits for the messages
that are left, as long as their place takes some. Knows nothing of that place.
"""

from __future__ import annotations

import copy
import logging
import queue
import signal
import threading
from collections.abc import Callable
from logging.handlers import QueueHandler

WAITING = 10_000  # messages: some megabytes
PATIENCE_S = 1.0  # at the exit, with a place that takes nothing
SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}  # the main thread takes them


class Backlog(QueueHandler):
    """`write` may wait as long as it likes. It raises OSError for a message that is lost."""

    def __init__(self, write: Callable[[logging.LogRecord], None], waiting: int = WAITING) -> None:
        self._messages: queue.Queue[logging.LogRecord] = queue.Queue(waiting)
        super().__init__(self._messages)
        self._write = write
        self._dropped = 0  # changed under the handler's lock
        self._failed = self._told = 0  # changed by the thread alone
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # the thread inherits it
        threading.Thread(target=self._run, name="log", daemon=True).start()
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """Format the message and the traceback now, because their objects may change; keep them apart."""
        record = copy.copy(record)
        record.msg, record.args = record.getMessage(), None
        if record.exc_info:
            record.exc_text = (self.formatter or logging.Formatter()).formatException(record.exc_info)
            record.exc_info = None
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self._messages.put_nowait(record)
        except queue.Full:
            self._dropped += 1

    @property
    def waiting(self) -> int:
        return self._messages.qsize()

    def flush(self) -> None:
        """Wait until all is written, or nothing is any more. logging.shutdown() calls this, at every exit."""
        before, messages = -1, self._messages
        with messages.all_tasks_done:
            while before != messages.unfinished_tasks:
                before = messages.unfinished_tasks
                messages.all_tasks_done.wait_for(lambda: not messages.unfinished_tasks, PATIENCE_S)

    def _run(self) -> None:
        while True:
            record = self._messages.get()
            try:
                self._write(record)
            except OSError:
                self._failed += 1
            else:
                self._tell_of_lost()
            self._messages.task_done()

    def _tell_of_lost(self) -> None:
        """Once those that waited before them are written."""
        lost = self._dropped + self._failed
        if lost == self._told or not self._messages.empty():
            return
        words = "%d messages are not in this log: it did not take them in time"
        record = logging.LogRecord("aiosd", logging.WARNING, __file__, 0, words, (lost - self._told,), None)
        try:
            self._write(record)
            self._told = lost
        except OSError:
            return  # it is told after the next message that is written

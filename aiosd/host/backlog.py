"""Messages of the log between the threads that log them and the one that writes them.

A request never waits for a journal or a terminal that stands still. A bounded number of messages waits
instead. Later messages are dropped and counted, and the log says how many. The exit waits for the messages
that are left, as long as their place takes some. Knows nothing of that place.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections import deque
from collections.abc import Callable

WAITING = 10_000  # messages: some megabytes
SOON_S = 0.01  # the delay of a batch: waking the thread for each message would cost more than the message
PATIENCE_S = 1.0  # at the exit, with a place that takes nothing
SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}  # the main thread takes them


class Backlog(logging.Handler):
    """`write` may wait as long as it likes. It raises OSError for a message that is lost."""

    def __init__(self, write: Callable[[logging.LogRecord], None], waiting: int = WAITING) -> None:
        self._messages = deque[logging.LogRecord]()  # the first one is being written
        super().__init__()
        self._waiting, self._some = waiting, threading.Event()
        self._write = write
        self._dropped = 0  # changed under the handler's lock
        self._failed = self._told = 0  # changed by the thread alone
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # the thread inherits it
        threading.Thread(target=self._run, name="log", daemon=True).start()
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def emit(self, record: logging.LogRecord) -> None:
        if len(self._messages) >= self._waiting:
            self._dropped += 1
            return
        try:
            self._settle(record)
        except (TypeError, ValueError):  # the words of the call do not fit its values
            self.handleError(record)
            return
        self._messages.append(record)
        if not self._some.is_set():
            self._some.set()

    def _settle(self, record: logging.LogRecord) -> None:
        """Format the message and the traceback now, because their objects may change."""
        record.msg, record.args = record.getMessage(), None
        if record.exc_info:
            record.exc_text = (self.formatter or logging.Formatter()).formatException(record.exc_info)
            record.exc_info = None

    def flush(self) -> None:
        """Wait until all is written, or nothing is any more. logging.shutdown() calls this, at every exit."""
        left, until = len(self._messages), time.monotonic() + PATIENCE_S
        while self._messages and time.monotonic() < until:
            time.sleep(0.001)
            if len(self._messages) < left:
                left, until = len(self._messages), time.monotonic() + PATIENCE_S

    def _run(self) -> None:
        while True:
            self._some.wait()
            time.sleep(SOON_S)
            if not self._messages:  # not after each batch: under load nobody has to wake this thread
                self._some.clear()
            while self._messages:
                self._write_first()

    def _write_first(self) -> None:
        try:
            self._write(self._messages[0])
        except OSError:
            self._failed += 1
        else:
            self._tell_of_lost()
        finally:
            self._messages.popleft()

    def _tell_of_lost(self) -> None:
        """Once those that waited before them are written."""
        lost = self._dropped + self._failed
        if lost == self._told or len(self._messages) > 1:
            return
        words = "%d messages are not in this log: it did not take them in time"
        record = logging.LogRecord("aiosd", logging.WARNING, __file__, 0, words, (lost - self._told,), None)
        try:
            self._write(record)
            self._told = lost
        except OSError:
            return  # it is told after the next message that is written

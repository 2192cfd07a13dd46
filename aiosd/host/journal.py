"""Where the log goes: to the systemd journal, with fields, when standard error is a stream of it; else there.

`journalctl AIOS_AGENT=ada` finds what an agent did. Any thread may log, and none waits for the journal or for
the reader of standard error: a thread of aiosd.host.backlog does.
"""

from __future__ import annotations

import logging
import os
import stat
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from aiosd.errors import shown
from aiosd.host.backlog import Backlog
from aiosd.host.message_ids import NOTICE
from aiosd.host.notify import asked

SOCKET = "/run/systemd/journal/socket"
RETRY_S = 0.1
PRIORITIES = (  # of syslog(3)
    (logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (NOTICE, 5), (logging.INFO, 6),
)  # fmt: skip
REMEDY = (
    "and a service manager hears nothing; install Debian's python3-systemd, or for a checkout libsystemd-dev"
    " and pkg-config and run ./setup again"
)
Sendv = Callable[..., None]  # systemd.journal.sendv


class Plain(logging.Formatter):
    """A message is one line, and nothing in it is obeyed by a terminal: it may quote what a user wrote."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = shown(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        return "\n".join(map(shown, super().formatException(ei).split("\n")))


LINE = Plain("%(levelname)s %(name)s: %(message)s")


def begin(level: str, name: str = "aiosd") -> None:
    """Set up the log of this process; `name` is its SYSLOG_IDENTIFIER. No other thread may run yet."""
    logging.logProcesses = logging.logMultiprocessing = False  # looked up for each message, and not in any
    write, missing = to_standard_error, ""
    journal = is_journal(sys.stderr.fileno())
    if journal or asked():
        try:
            sendv = open_journal()
            write = partial(to_journal, sendv, name) if journal else write
        except ImportError as error:
            missing = f"systemd-python is missing ({error}): the log goes to standard error, {REMEDY}"
        except OSError as error:
            missing = f"libsystemd's socket cannot be used ({error}): the log goes to standard error"
    root = logging.getLogger()
    root.setLevel(level.upper())
    backlog = Backlog(write)
    backlog.setFormatter(LINE)
    root.addHandler(backlog)
    if missing:
        logging.getLogger(name).warning("%s", missing)


def is_journal(descriptor: int) -> bool:
    """Whether the service manager has connected it to the journal (systemd.exec(5), JOURNAL_STREAM)."""
    status = os.fstat(descriptor)
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}" and os.path.exists(SOCKET)


def to_standard_error(record: logging.LogRecord) -> None:
    """Not by sys.stderr: it would be locked while its reader stands still, and the daemon could not exit."""
    os.write(2, f"{LINE.format(record)}\n".encode(errors="backslashreplace"))


def open_journal() -> Sendv:
    """Return systemd.journal.sendv, made to raise BlockingIOError where it would wait for the journal.

    sendv keeps Python's global lock while it waits, so one entry for a journald that stands still would stop
    every thread of the daemon. libsystemd sends all entries through one socket, which it opens for the first
    entry and does not hand out. The kernel gives a new descriptor the lowest free number, and it refuses a
    message of more than 1,024 parts (sendmsg(2), EMSGSIZE): the call here opens the socket and sends nothing.
    Raises ImportError and OSError.
    """
    from systemd.journal import sendv

    number = os.dup(2)
    os.close(number)
    with suppress(OSError):
        sendv(*["AIOS_OPEN=1"] * 1025)
    if not stat.S_ISSOCK(os.fstat(number).st_mode):
        raise OSError(f"descriptor {number} is another file")
    os.set_blocking(number, False)
    send: Sendv = sendv
    return send


def to_journal(sendv: Sendv, name: str, record: logging.LogRecord) -> None:
    entry = {"SYSLOG_IDENTIFIER": name, **fields(record)}
    lines = [f"{key}={value}".encode(errors="backslashreplace") for key, value in entry.items()]
    wait_s = 0.001  # journald is busy, or stands still, and nothing tells when it reads again
    while True:
        with suppress(BlockingIOError):
            return sendv(*lines)
        time.sleep(wait_s)
        wait_s = min(2 * wait_s, RETRY_S)


def fields(record: logging.LogRecord) -> dict[str, object]:
    """The names of fields are in capitals, as those of `extra` that are meant for here."""
    return {
        "MESSAGE": "\n".join(filter(None, (shown(record.getMessage()), record.exc_text))),
        "PRIORITY": next((p for level, p in PRIORITIES if record.levelno >= level), 7),
        "LOGGER": record.name,
        "CODE_FILE": record.pathname,
        "CODE_LINE": record.lineno,
        "CODE_FUNC": record.funcName,
        "THREAD_NAME": record.threadName,
        **{key: value for key, value in vars(record).items() if key.isupper()},
    }

"""Where the log goes: to the systemd journal, with fields, when standard error is a stream of it; else there.

`journalctl AIOS_AGENT=ada` finds what an agent did. An entry is one datagram of the journal's native protocol
(systemd.io/JOURNAL_NATIVE_PROTOCOL), or a sealed memory file when it is too long for one, so that nothing of
systemd is needed. Any thread may log.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from aiosd.errors import shown
from aiosd.host.message_ids import NOTICE

SOCKET = "/run/systemd/journal/socket"
PATIENCE_S = 1.0  # for a journal that is busy: then an entry is lost, and no request waits
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
FORMAT = "%(levelname)s %(name)s: %(message)s"
PRIORITIES = (  # of syslog(3)
    (logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (NOTICE, 5), (logging.INFO, 6),
)  # fmt: skip


def begin(level: str, name: str = "aiosd") -> None:
    """From here on what is logged goes where it belongs; there `name` is who says it."""
    logging.logProcesses = logging.logMultiprocessing = False  # looked up each time, and not told
    handler = Handler(name) if is_journal(sys.stderr.fileno()) else logging.StreamHandler(sys.stderr)
    handler.setFormatter(Plain(FORMAT))
    logging.basicConfig(level=level.upper(), handlers=[handler])


def is_journal(descriptor: int) -> bool:
    """Whether the service manager has connected it to the journal (systemd.exec(5), JOURNAL_STREAM)."""
    status = os.fstat(descriptor)
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}" and os.path.exists(SOCKET)


class Plain(logging.Formatter):
    """A message is one line, and nothing in it is obeyed by a terminal: it may quote what a user wrote."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = shown(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        return "\n".join(map(shown, super().formatException(ei).split("\n")))


class Handler(logging.Handler):
    def __init__(self, name: str) -> None:
        super().__init__()
        self._who = name
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(PATIENCE_S)

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):  # there is nowhere left to tell it
            self._send(encode({"SYSLOG_IDENTIFIER": self._who, **fields(record)}))

    def _send(self, entry: bytes) -> None:
        try:
            self._socket.sendto(entry, SOCKET)
        except OSError as error:
            if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                raise
            file = os.memfd_create("aiosd-log", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
            try:
                with open(file, "wb", closefd=False) as out:
                    out.write(entry)
                fcntl.fcntl(file, fcntl.F_ADD_SEALS, SEALS)
                rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, file.to_bytes(4, sys.byteorder))
                self._socket.sendmsg([b""], [rights], 0, SOCKET)
            finally:
                os.close(file)


def fields(record: logging.LogRecord) -> dict[str, object]:
    """The names of fields are in capitals, as those of `extra` that are meant for here."""
    message = shown(record.getMessage())
    if record.exc_info:
        message += "\n" + Plain().formatException(record.exc_info)
    return {
        "MESSAGE": message,
        "PRIORITY": next((p for level, p in PRIORITIES if record.levelno >= level), 7),
        "LOGGER": record.name,
        "CODE_FILE": record.pathname,
        "CODE_LINE": record.lineno,
        "CODE_FUNC": record.funcName,
        "THREAD_NAME": record.threadName,
        **{key: value for key, value in vars(record).items() if key.isupper()},
    }


def encode(entry: Mapping[str, object]) -> bytes:
    """A value with a newline is told with its length: what a user wrote cannot become a field."""
    lines = bytearray()
    for key, value in entry.items():
        data = str(value).encode("utf-8", "backslashreplace")  # \udce9 for the byte 0xe9 of a name
        if b"\n" in data:
            lines += key.encode() + b"\n" + len(data).to_bytes(8, "little") + data + b"\n"
        else:
            lines += key.encode() + b"=" + data + b"\n"
    return bytes(lines)

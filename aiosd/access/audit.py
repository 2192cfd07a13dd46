"""The audit log: who called which tool, who decided about it, how it ended. Lines are only appended.

Each line holds the SHA-256 of the line before, so `aiosctl audit verify` finds a changed or missing line. A
file that has grown large gets a number, audit-000001.jsonl, and the next file continues its chain. The oldest
go.
Arguments and results may be secret, so the log holds only their digests. A call that cannot be logged does
not run. Each line is also a message of the daemon's log, which journalctl finds by its fields. Any thread may
call.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from aiosd.access.caller import Caller
from aiosd.config.config import LimitsConfig
from aiosd.errors import StoreFailed, StoreFull
from aiosd.host import disk, processes
from aiosd.host.hashchain import CONTINUED, FIRST, digest, is_whole
from aiosd.host.message_ids import NOTICE, Id, about
from aiosd.syscall.request import Request, State
from aiosd.syscall.toolcall import ToolCall, outcome

log = logging.getLogger(__name__)

LINE_BYTES = 1 << 20  # longer than any line
TAIL_BYTES = 4 << 20  # the part of the log that a start looks through
ENDS = (State.DONE, State.FAILED, State.CANCELLED)
# the fields that the log message shows
SAID = ("tool", "key", "agent", "request", "uid", "decision", "rule", "by", "why")


class Audit:
    def __init__(self, file: Path, limits: LimitsConfig) -> None:
        self.file, self.limits = file, limits
        self._lock = threading.Lock()
        self._fd = self._open()
        tail = self._tail(LINE_BYTES)
        self._size = os.fstat(self._fd).st_size
        self._cut = self._size > 0 and not tail.endswith(b"\n")  # a crash or a full disk left half a line
        lines = [line for line in tail.splitlines() if is_whole(line)]
        self._last = digest(lines[-1]) if lines else FIRST

    def close(self) -> None:
        with self._lock:
            fd, self._fd = self._fd, -1  # a late write must not reach another file
            if fd >= 0:
                os.close(fd)

    def called(self, request: Request) -> None:
        """Log a new call. Raises StoreFailed: then the call must not run."""
        how = outcome(request)
        why = {"decision": how.decision, "rule": how.rule} if how.decision else {}
        self._write("called", request, pid=request.pid, exe=exe(request.pid), **why)

    def unended(self) -> list[int]:
        """Those of the last calls that have no end here: a daemon was killed before it wrote one."""
        with self._lock:
            tail = self._tail(TAIL_BYTES)
        open_calls: dict[int, None] = {}
        for line in filter(is_whole, tail.split(b"\n")):
            facts = json.loads(line)
            if facts["what"] == "called":
                open_calls[facts["request"]] = None
            elif facts["what"] in ENDS:
                open_calls.pop(facts["request"], None)
        return list(open_calls)

    def decided(self, request: Request, decision: str, by: Caller) -> None:
        self._write(decision, request, by=who(by))

    def granted(self, what: str, by: Caller, **facts: object) -> None:
        """Log a grant, complete, before it takes effect. Raises StoreFailed."""
        self._append(what, {**facts, "by": who(by)})

    def noted(self, what: str, by: Caller | None, **facts: object) -> None:
        """Log what holds already, and holds also where it cannot be logged. `by` None: the daemon."""
        try:
            self._append(what, {**facts, "by": who(by)} if by else facts)
        except StoreFailed as error:
            log.error("%s: this is not in the audit log: %s", what, error.explanation)

    def ended(self, request: Request) -> None:
        how = outcome(request)
        facts: dict[str, object] = {
            "exit_status": how.exit_status,
            "result_sha256": digest(request.text.encode()),
        }
        if how.spent:
            facts |= {"cpu_seconds": how.spent.cpu_s, "memory_bytes": how.spent.memory_bytes}
        try:
            self._write(str(request.state), request, why=request.error, **facts)
        except StoreFailed as error:
            extra = about(request=request.id, agent=request.agent, uid=request.uid)
            words = request.id, error.explanation
            log.error("the end of request %d is not in the audit log: %s", *words, extra=extra)

    def _write(self, what: str, request: Request, **facts: object) -> None:
        call = request.spec
        assert isinstance(call, ToolCall)
        line = {"request": request.id, "parent": request.parent, "uid": request.uid, "agent": request.agent}
        line |= {"tool": call.tool, "arguments_sha256": digest(call.arguments.encode())}
        self._append(what, {**line, **facts})

    def _append(self, what: str, facts: dict[str, object]) -> None:
        with self._lock:
            try:
                if self._is_gone():
                    log.warning(
                        "%s was removed or replaced; the audit log goes on in the file of that name",
                        self.file,
                    )
                    self._begin()
                if self._size >= self.limits.audit_bytes:
                    self._rotate()
                if not self._size and (earlier := self._earlier()):
                    self._write_line(CONTINUED, {"after": earlier[-1].name})
                self._write_line(what, facts)
            except OSError as error:
                raise disk.failed(self.file, error) from None
        log_line(what, facts)

    def _write_line(self, what: str, facts: dict[str, object]) -> None:
        """Raises OSError, StoreFull."""
        line = {"time": round(time.time(), 3), "what": what, **facts, "before": self._last}
        data = json.dumps(line).encode()
        whole = b"\n" * self._cut + data + b"\n"
        written = os.write(self._fd, whole)
        self._size += written
        self._cut = written < len(whole)
        if self._cut:
            raise StoreFull(f"{self.file}: the disk is full", "free some space there")
        self._last = digest(data)

    # several files

    def _open(self) -> int:
        return os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def _earlier(self) -> list[Path]:
        """The files before this one, the oldest first."""
        return sorted(self.file.parent.glob(f"{self.file.stem}-[0-9]*{self.file.suffix}"), key=number)

    def _rotate(self) -> None:
        """Give the file a number and begin another. Remove the oldest. Raises OSError."""
        earlier = self._earlier()
        next_number = number(earlier[-1]) + 1 if earlier else 1
        os.rename(self.file, self.file.with_stem(f"{self.file.stem}-{next_number:06}"))
        self._begin()
        for old in self._earlier()[: -self.limits.audit_files]:
            old.unlink()

    def _begin(self) -> None:
        """Go on in the file that has the log's name now. Raises OSError."""
        before, self._fd = self._fd, self._open()
        os.close(before)
        self._size, self._cut = os.fstat(self._fd).st_size, end_of(self._fd, 1) not in (b"", b"\n")

    def _is_gone(self) -> bool:
        """Whether somebody removed or replaced the file, so that its lines would be lost. Raises OSError."""
        try:
            return not os.path.samestat(os.stat(self.file), os.fstat(self._fd))
        except FileNotFoundError:
            return True

    def _tail(self, size: int) -> bytes:
        """The end of the log, with that of the file before if this one is shorter. Raises OSError."""
        own = end_of(self._fd, size)
        if len(own) == size or not (earlier := self._earlier()):
            return own
        with earlier[-1].open("rb") as file:
            return end_of(file.fileno(), size) + b"\n" + own


def number(file: Path) -> int:
    digits = file.stem.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else 0


def end_of(fd: int, size: int) -> bytes:
    return os.pread(fd, size, max(0, os.fstat(fd).st_size - size))


def log_line(what: str, facts: Mapping[str, object]) -> None:
    """Repeat an audit line in the daemon's log: calls, decisions and failures as notices, good ends as
    info.
    """
    named = {key: text(value) for key, value in facts.items() if value or key in ("uid", "exit_status")}
    said = " ".join(f"{key}={named[key]}" for key in SAID if key in named)
    denied = what == "denied" or facts.get("decision") == "deny"
    id = Id.DENIED if denied else Id.REQUEST_FAILED if what == "failed" else Id.AUDIT
    level = logging.INFO if what in ("done", "cancelled") else NOTICE
    log.log(level, "%s %s", what, said, extra=about(id, what=what, **named))


def text(value: object) -> str:
    """Render a value for the log. A list or a dictionary becomes its values, separated by spaces."""
    if isinstance(value, dict):
        return " ".join(str(part) for part in value.values())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def who(caller: Caller) -> dict[str, object]:
    return {"uid": caller.uid, "pid": caller.pid, "exe": exe(caller.pid)}


def exe(pid: int) -> str:
    """Return the process's program; empty: it cannot be seen, or a step of an agent's loop has no process."""
    return processes.program(pid) if pid else ""

"""The audit log: who called which tool, who decided what, how it ended. Appended to, never changed.

Each line holds the SHA-256 of the one before it, so that a line cannot be changed or taken out without all
later ones telling (`aiosctl audit verify`). Arguments and results are there as digests only: they may be
secret. A call that cannot be written down is not run. Each line is a message of the daemon's log too, so that
the journal finds it by its facts. Any thread may write.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from aiosd.access.caller import Caller
from aiosd.errors import StoreFull
from aiosd.host import processes
from aiosd.host.message_ids import NOTICE, Id, about
from aiosd.syscall.request import Request

log = logging.getLogger(__name__)

FIRST = "0" * 64
LINE_BYTES = 1 << 20  # more than any has
SAID = ("tool", "agent", "request", "uid", "decision", "rule", "by", "why")  # in the message itself


class Audit:
    def __init__(self, file: Path) -> None:
        self.file = file
        self._lock = threading.Lock()
        self._fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        end = os.fstat(self._fd).st_size
        tail = os.pread(self._fd, LINE_BYTES, max(0, end - LINE_BYTES))
        self._cut = bool(tail) and not tail.endswith(b"\n")  # by a crash or a full disk, inside a line
        lines = [line for line in tail.splitlines() if is_whole(line)]
        self._last = digest(lines[-1]) if lines else FIRST

    def close(self) -> None:
        with self._lock:
            fd, self._fd = self._fd, -1  # never the number of another file
            if fd >= 0:
                os.close(fd)

    def called(self, request: Request) -> None:
        """Raises StoreFull: then it is not to run."""
        rule = request.rule
        why = {"decision": rule.decision, "rule": rule.place} if rule else {}
        self._write("called", request, pid=request.pid, exe=exe(request.pid), **why)

    def decided(self, request: Request, decision: str, by: Caller) -> None:
        self._write(decision, request, by=who(by))

    def granted(self, what: str, by: Caller, **facts: object) -> None:
        """Before it takes effect: all that holds from then on. Raises StoreFull."""
        self._append(what, {**facts, "by": who(by)})

    def ended(self, request: Request) -> None:
        facts: dict[str, object] = {
            "exit_status": request.exit_status,
            "result_sha256": digest(request.answer.text.encode()),
        }
        if request.took:
            facts |= {"cpu_seconds": request.took.cpu_s, "memory_bytes": request.took.memory_bytes}
        try:
            self._write(str(request.state), request, why=request.error, **facts)
        except StoreFull as error:
            extra = about(request=request.id, agent=request.agent, uid=request.uid)
            words = request.id, error.explanation
            log.error("the end of request %d is not in the audit log: %s", *words, extra=extra)

    def _write(self, what: str, request: Request, **facts: object) -> None:
        said = "".join(m["content"] for m in request.spec.messages)
        line = {"request": request.id, "parent": request.parent, "uid": request.uid, "agent": request.agent}
        line |= {"tool": request.spec.model.removeprefix("tools/"), "arguments_sha256": digest(said.encode())}
        self._append(what, {**line, **facts})

    def _append(self, what: str, facts: dict[str, object]) -> None:
        line = {"time": round(time.time(), 3), "what": what, **facts}
        with self._lock:
            data = json.dumps({**line, "before": self._last}).encode()
            whole = b"\n" * self._cut + data + b"\n"
            try:
                written = os.write(self._fd, whole)
            except OSError as error:
                raise StoreFull(f"{self.file}: {error.strerror}", "free some space there") from None
            self._cut = written < len(whole)
            if self._cut:
                raise StoreFull(f"{self.file}: the disk is full", "free some space there")
            self._last = digest(data)
        tell(what, facts)


def verify(lines: Iterable[bytes]) -> tuple[int, list[str]]:
    """How many lines there are, and what is wrong with them."""
    count, last, wrong = 0, FIRST, list[str]()
    for raw in lines:
        count, line = count + 1, raw.rstrip(b"\n")
        if not is_whole(line):
            wrong.append(f"line {count} is cut: a crash, or a full disk")
            continue
        if json.loads(line).get("before") != last:
            wrong.append(f"line {count} does not follow the line before it: one was changed or taken out")
        last = digest(line)
    return count, wrong


def is_whole(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tell(what: str, facts: Mapping[str, object]) -> None:
    """In the log: acts and refusals are worth a look, that a call came to a good end is not."""
    named = {key: text(value) for key, value in facts.items() if value or key in ("uid", "exit_status")}
    said = " ".join(f"{key}={named[key]}" for key in SAID if key in named)
    denied = what == "denied" or facts.get("decision") == "deny"
    id = Id.DENIED if denied else Id.REQUEST_FAILED if what == "failed" else Id.AUDIT
    level = logging.INFO if what in ("done", "cancelled") else NOTICE
    log.log(level, "%s %s", what, said, extra=about(id, what=what, **named))


def text(value: object) -> str:
    """A list is its words; of a caller its uid and program."""
    if isinstance(value, dict):
        return " ".join(str(part) for part in value.values())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def who(caller: Caller) -> dict[str, object]:
    return {"uid": caller.uid, "pid": caller.pid, "exe": exe(caller.pid)}


def exe(pid: int) -> str:
    """What runs there; empty when that cannot be seen. Of a step of an agent's loop there is no process."""
    return processes.program(pid) if pid else ""

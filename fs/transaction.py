"""Transaction files (aios-transaction(7)): what happens between open, write, read and close of a request.

Knows no FUSE and no errno. A handle may be called from several threads at once; it never blocks: a read
that would returns None, and the caller waits on `watch`.
"""

from __future__ import annotations

import codecs
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from aiosd.access.caller import Caller
from aiosd.errors import AiosError, BadRequest, Busy, TooBig
from aiosd.fs.files import File, Handle, Opening
from aiosd.host import processes
from aiosd.host.watchers import Unwatch
from aiosd.scheduler.admission import Admission
from aiosd.scheduler.handler import Source
from aiosd.syscall import judging
from aiosd.syscall.foreign import NotJson
from aiosd.syscall.request import Request

SUBMITTING_S = 0.02  # that a write waits for it: the kernel holds all other writes to the file back meanwhile
Utf8 = codecs.getincrementaldecoder("utf-8")


@dataclass(slots=True)
class Transaction(File):
    """syscall/llm and its like (aios-transaction(7)): write a request, read its answer."""

    mode: int = 0o600
    admission: Admission = field(default=None)  # type: ignore[assignment]  # always given
    source: Source = field(default=None)  # type: ignore[assignment]
    id: int | None = None  # requests/ID/request: the request was allocated before

    @property
    def asks_groups(self) -> bool:
        return self.admission.asks_groups(self.source)

    def open(self, opening: Opening) -> Handle:
        return TransactionHandle(self, opening)


class TransactionHandle(Handle):
    """One open transaction file. A read-write one is a private conversation of request and answer."""

    def __init__(self, file: Transaction, opening: Opening) -> None:
        self._admission, self._source, self._id = file.admission, file.source, file.id
        self._opening = opening
        self._lock = threading.Lock()
        reads = opening.reads
        self._private = reads and opening.writes
        self._draft = Draft(file.admission, file.source, opening.caller, once=not reads)
        self._mine = False  # written through this open file; else the newest when it was opened
        self._wrote = False  # something, which may have been refused
        # file positions: where the answer begins, where the last read ended, and what that one counted from
        self._start = self._next = self._base = 0
        known, uid, only = self._admission.newest, opening.caller.uid, reads and not self._private
        self._newest = newest = known.of(self._source, uid) if only else None
        self._refusal = known.refusal(self._source, uid) if only and self._id is None else None
        self._request: Request | None = None if newest is None else self._admission.find(newest)

    # writing

    def write(self, data: bytes, offset: int) -> None:
        if not self._lock.acquire(timeout=SUBMITTING_S):
            raise Busy("another thread submits what was written", "write when it has ended")
        try:
            self._wrote = True
            if self._unread():
                raise Busy("the answer to the request before is not complete", "read it to its end first")
            try:
                self._draft.add(data)
            except AiosError as error:
                self.refused(error)
                raise
            self._request = self._newest = self._refusal = None
            self._start = self._next = self._base = offset + len(data)
        finally:
            self._lock.release()

    def refused(self, error: AiosError) -> None:
        """A read that follows must not take an older answer for the new one: through this descriptor or, if
        that is not private, through another one of this user."""
        self._wrote = True
        if self._private:
            self._refusal = None if isinstance(error, Busy) else error
        elif self._id is None:
            self._admission.newest.refuse(self._source, self._opening.caller.uid, error)

    def flush(self, pid: int) -> None:
        """Submits when the opener closes its last descriptor: the shell's `>` dups, and closes twice.

        A program that wrote nothing, such as `cat` of an empty file, asked an empty question. Its reader must
        not get the answer to the question before.
        """
        with self._lock:
            if self._opening.reads or (self._wrote and not self._draft.body):
                return
            opener = self._opening.caller.pid
            # unknown counts as no: at worst it is submitted at its first close instead of its last
            if same_process(pid, opener) and not processes.holds(opener, self._opening.path):
                try:
                    if not self._wrote:
                        self.refused(error := empty())
                        raise error
                    self._submit()
                except AiosError:  # close(2) says so: `release` is not to submit it after all
                    self._draft.drop()
                    raise

    def release(self) -> None:
        with self._lock:
            if self._draft.body:
                try:
                    if not self._private:
                        self._submit()
                finally:
                    self._draft.drop()
            if self._request and self._unread() and not self._request.answer.ended:  # else it is parked
                self._admission.abandon(self._request)

    def _unread(self) -> bool:
        """A private request of this open file goes on: nobody else can read its answer here."""
        request = self._request
        return self._private and self._mine and request is not None and not request.state.final

    def _submit(self) -> None:
        body, caller = bytes(self._draft.body), self._opening.caller
        try:
            with judging.of(caller.uid):
                self._request = self._admission.submit(caller, self._source, body, self._id)
        except AiosError as error:
            self.refused(error)
            raise
        self._draft.taken()  # not before: what could not be submitted can be tried again
        self._mine, self._id = True, None

    # reading

    def read(self, size: int, offset: int) -> bytes | None:
        refusal = self._refusal
        if self._private:  # it is told once
            self._refusal = None
        self._draft.check()
        if refusal:
            raise refusal.again()
        if self._private and not self._wrote:
            raise empty()
        request = self._answering()
        if request is None:
            return b""
        if offset != self._next:  # pread(2), or lseek(2), also of a shell that has read ahead of a line
            self._base = self._start if offset >= self._start else 0
        data = request.answer.read(size, offset - self._base)
        self._next = offset + len(data or b"")
        return data

    def watch(self, callback: Callable[[], None]) -> Unwatch:
        request = self._answering()
        return request.answer.watch(callback) if request else lambda: None

    def readable(self) -> bool:
        request = self._answering()
        return (
            request is None
            or (self._draft.refused or self._refusal) is not None
            or request.answer.ready(self._next - self._base)
        )

    def _answering(self) -> Request | None:
        """The request this open file reads: the one written to it, else the newest when it was opened."""
        with self._lock:
            if self._private and self._draft.body:
                self._submit()
            if self._request is None and self._newest is not None:
                self._request, self._mine = self._admission.get(self._newest), False
                self.held = self._request.ended_bytes
            return self._request


class Draft:
    """The bytes of a request until it is submitted, refused as soon as they are known to be wrong.

    What comes after a refusal is the rest of what was refused, not a request: until a read has said so, where
    a write before was taken, and for ever in a file that is written `once`, as by the shell's `>`.
    """

    def __init__(self, admission: Admission, source: Source, caller: Caller, once: bool) -> None:
        self._admission, self._source, self._caller, self._once = admission, source, caller, once
        self.body = bytearray()
        self._decoder = Utf8()
        self.refused: AiosError | None = None
        self._judged = 0  # bytes of JSON that were looked at and not complete

    def add(self, data: bytes) -> None:
        if self.refused:
            raise self.refused.again()
        if not self.body:
            with judging.of(self._caller.uid):
                self._admission.check(self._caller, self._source, len(data))
            if not data.strip():
                raise empty()
        begun, decoded = bool(self.body), self._decoder.getstate()
        try:
            self._check_bytes(data)
            self._admission.reserve(self._caller, len(data))
            self.body += data
            if data.endswith((b"}", b"\n")) and self._admission.is_json(self._source, self.body):
                self._check_json()
        except Busy:  # what was written stays, and this may be written again
            self._decoder.setstate(decoded)
            raise
        except AiosError as error:
            if begun or self._once:
                self.refused = error.again()
            self.drop()
            raise

    def check(self) -> None:
        """Tells who reads, once, that what he wrote was refused: a write of very much that is refused at its
        end has said nothing but how much of it was taken."""
        refused, self.refused = self.refused, None
        if refused:
            raise refused

    def drop(self) -> None:
        if self.body:
            self._admission.reserve(self._caller, -len(self.body))
        self.taken()

    def taken(self) -> None:
        """Its bytes are a request's now."""
        self.body = bytearray()
        self._judged = 0
        self._decoder.reset()

    def _check_bytes(self, data: bytes) -> None:
        most = self._admission.request_bytes
        if len(self.body) + len(data) > most:
            raise TooBig(f"a request has at most {most} bytes", "raise limits.request_bytes in aiosd.toml")
        try:
            text = self._decoder.decode(data)
        except UnicodeDecodeError as error:
            raise BadRequest(f"byte {len(self.body) + error.start} is not UTF-8 text") from None
        if "\0" in text:
            raise BadRequest("the request holds a NUL byte", "write text or JSON")

    def _check_json(self) -> None:
        """A JSON request that seems complete is judged by the write() that completes it."""
        if len(self.body) < 2 * self._judged:  # else one byte at a time would cost the square of its length
            return
        try:
            self._admission.look(self._caller, self._source, bytes(self.body))
        except NotJson as error:
            self._judged = len(self.body)
            if not error.incomplete:
                raise


def empty() -> BadRequest:
    return BadRequest("the request is empty", "write a question")


def same_process(task: int, opener: int) -> bool:
    """FUSE names the calling thread; any thread of the opener closes for it."""
    return task == opener or Path(f"/proc/{opener}/task/{task}").exists()

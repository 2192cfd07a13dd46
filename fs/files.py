"""The kinds of file: one class each, and what happens between open and close of it.

Knows no FUSE and no errno: methods raise domain errors, a read that would block returns None, and the
caller waits on `watch`. Every open file is a Handle; FUSE may call one from several threads at once.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from aiosd.access.caller import Caller
from aiosd.errors import AiosError, BadValue, NotAllowed, TooBig
from aiosd.host.watchers import Unwatch
from aiosd.syscall.request import Request

CTL_BYTES_MAX = 64 << 10
SHARED_S = 0.003  # of a processor
COMMANDS_MAX = 64  # of one write


@dataclass(frozen=True, slots=True)
class Opening:
    """One open(2): who, how, and which path."""

    caller: Caller
    flags: int
    path: str

    @property
    def reads(self) -> bool:
        return self.flags & os.O_ACCMODE in (os.O_RDONLY, os.O_RDWR)

    @property
    def writes(self) -> bool:
        return self.flags & os.O_ACCMODE in (os.O_WRONLY, os.O_RDWR)


class Handle:
    """An open file. The default is one that nothing can be done with."""

    held = 0  # bytes of memory, which count for its user

    def read(self, size: int, offset: int) -> bytes | None:
        """None: nothing there yet, wait for a change."""
        raise NotAllowed("this file is write-only")

    def write(self, data: bytes, offset: int) -> None:
        raise NotAllowed("this file is read-only")

    def refused(self, error: AiosError) -> None:
        """A write was refused before it came here."""

    def watch(self, callback: Callable[[], None]) -> Unwatch:
        return lambda: None

    def readable(self) -> bool:
        """For poll(2): a read would not block. Asking for it submits what was written, as reading does."""
        return True

    def flush(self, pid: int) -> None:
        """A descriptor of this open file was closed by `pid`."""

    def release(self) -> None:
        """The last one was."""


@dataclass(slots=True)
class File:
    """A name in the tree; `mode` is the default until somebody chmods it."""

    mode: int = 0o444
    gid: int | None = field(default=None, kw_only=True)  # None: as the nearest object above

    @property
    def asks_groups(self) -> bool:
        """Whether it matters of which groups the opener is."""
        return True

    def open(self, opening: Opening) -> Handle:
        raise NotImplementedError

    def truncate(self) -> None:
        """`>` of the shell; most files have nothing to cut."""

    @property
    def size(self) -> int:
        return 0


def encoded(text: str) -> bytes:
    """A name may hold a byte that is not UTF-8: then `\\udce9` stands for 0xe9, also in JSON."""
    return text.encode("utf-8", "backslashreplace")


class Snapshot(Handle):
    """Text as it was at open: a reader that comes in pieces sees one state."""

    def __init__(self, data: bytes) -> None:
        self._data, self.held = data, len(data)

    def read(self, size: int, offset: int) -> bytes:
        return self._data[offset : offset + size]


@dataclass(slots=True)
class Stored(File):
    """A file of the state folder, to be read; it may grow meanwhile."""

    path: Path = Path()

    @property
    def asks_groups(self) -> bool:
        return False

    def open(self, opening: Opening) -> Handle:
        return StoredHandle(self.path)

    @property
    def size(self) -> int:
        return self.path.stat().st_size


class StoredHandle(Handle):
    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, size: int, offset: int) -> bytes:
        return os.pread(self._fd, size, offset)

    def release(self) -> None:
        os.close(self._fd)


@dataclass(slots=True)
class TextForUser(File):
    """A text that is another one for each user."""

    render: Callable[[int], str] = str

    @property
    def asks_groups(self) -> bool:
        return False

    def open(self, opening: Opening) -> Handle:
        return Snapshot(self.render(opening.caller.uid).encode())


@dataclass(slots=True)
class Text(File):
    render: Callable[[], str] = str

    @property
    def asks_groups(self) -> bool:
        return False

    def open(self, opening: Opening) -> Handle:
        return Snapshot(encoded(self.render()))


@dataclass(slots=True)
class Shared(Text):
    """What may take long to render. Then who opens it soon after another gets the same: all of its readers
    together take a twentieth of a processor at the most."""

    _lock: threading.Lock = field(default_factory=threading.Lock)
    _data: bytes = b""
    _until_s: float = 0.0

    def open(self, opening: Opening) -> Handle:
        with self._lock:
            if time.monotonic() < self._until_s:
                return Snapshot(self._data)
            began = time.thread_time()
            data = encoded(self.render())
            took_s = time.thread_time() - began
            self._data = data if took_s > SHARED_S else b""
            self._until_s = time.monotonic() + 20 * took_s if self._data else 0.0
        return Snapshot(data)


@dataclass(slots=True)
class Value(File):
    """One value and a newline. Each write() is a whole value, and is refused when it is a bad one.

    With `prose` writes of one open file add up, and `>>` continues what is there. `most`: bytes.
    """

    mode: int = 0o644
    get: Callable[[], str] = str
    set: Callable[[Caller, str], None] = lambda caller, text: None
    prose: bool = False
    most: int = CTL_BYTES_MAX

    def open(self, opening: Opening) -> Handle:
        return ValueHandle(self, opening)


class ValueHandle(Snapshot):
    def __init__(self, file: Value, opening: Opening) -> None:
        now = file.get()
        super().__init__(encoded(now) + b"\n")
        self._file, self._opening = file, opening
        self._written = bytearray()
        if file.prose and opening.flags & os.O_APPEND and now:
            self._written += encoded(now) + b"\n"

    def write(self, data: bytes, offset: int) -> None:
        written = (self._written if self._file.prose else bytearray()) + data
        if len(written) > self._file.most:
            raise TooBig(f"a value has at most {self._file.most} bytes")
        self._written, self.held = written, len(self._data) + len(written)
        try:
            text = self._written.decode()
        except UnicodeDecodeError as error:
            raise BadValue(f"byte {error.start} is not UTF-8 text") from None
        self._file.set(self._opening.caller, text.rstrip("\n") if self._file.prose else text.strip())


@dataclass(slots=True)
class Control(File):
    """Write-only; one command a line: `run(caller, verb, argument)`."""

    mode: int = 0o200
    run: Callable[[Caller, str, str], None] = lambda caller, verb, argument: None

    def open(self, opening: Opening) -> Handle:
        return ControlHandle(self, opening.caller)


class ControlHandle(Handle):
    def __init__(self, file: Control, caller: Caller) -> None:
        self._file, self._caller = file, caller

    def write(self, data: bytes, offset: int) -> None:
        try:
            lines = data.decode().split("\n")
        except UnicodeDecodeError:
            raise BadValue("a command is UTF-8 text") from None
        commands = [line.split(maxsplit=1) for line in lines if line.strip()]
        if not commands:
            raise BadValue("no command")
        if len(commands) > COMMANDS_MAX:
            raise TooBig(f"a write has at most {COMMANDS_MAX} commands")
        for verb, *argument in commands:
            self._file.run(self._caller, verb, argument[0].strip() if argument else "")


@dataclass(slots=True)
class Lines(File):
    """JSON lines: reading shows all, writing appends whole lines, `>` empties it first."""

    mode: int = 0o644
    get: Callable[[], str] = str
    append: Callable[[str], None] = lambda text: None
    clear: Callable[[], None] = lambda: None
    bytes: Callable[[], int] = int

    def open(self, opening: Opening) -> Handle:
        return LinesHandle(self)

    def truncate(self) -> None:
        self.clear()

    @property
    def size(self) -> int:
        return self.bytes()


class LinesHandle(Snapshot):
    def __init__(self, file: Lines) -> None:
        super().__init__(encoded(file.get()))
        self._append = file.append
        self._rest = b""  # of a line whose end has not been written yet

    def write(self, data: bytes, offset: int) -> None:
        whole, newline, rest = (self._rest + data).rpartition(b"\n")
        if len(rest) > CTL_BYTES_MAX * 16:
            raise TooBig("a line has no end")
        if newline:
            self._append(self._text(whole))
        self._rest, self.held = rest, len(self._data) + len(rest)

    def flush(self, pid: int) -> None:
        rest, self._rest, self.held = self._rest, b"", len(self._data)
        if rest.strip():
            self._append(self._text(rest))

    @staticmethod
    def _text(data: bytes) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise BadValue("not UTF-8 text") from None


@dataclass(slots=True)
class Stream(File):
    """Lines that come while it is open: `since(position, caller)` gives text and the next position."""

    mode: int = 0o444
    next: Callable[[], int] = int
    since: Callable[[int, Caller], tuple[str, int]] = lambda position, caller: ("", position)
    subscribe: Callable[[Callable[[], None], Caller], Unwatch] = lambda callback, caller: lambda: None

    def open(self, opening: Opening) -> Handle:
        return StreamHandle(self, opening.caller)


class StreamHandle(Handle):
    """Each read gives what has come since the one before.

    Only the bytes of the last read can be read again: a shell reads ahead, takes one line and seeks back.
    """

    def __init__(self, file: Stream, caller: Caller) -> None:
        self._file, self._caller = file, caller
        self._lock = threading.Lock()
        self._position = file.next()
        self._unread = self._last = b""
        self._last_at = 0  # its file position

    def read(self, size: int, offset: int) -> bytes | None:
        with self._lock:
            if self._last_at <= offset < self._last_at + len(self._last):
                return self._last[offset - self._last_at :][:size]
            self._fetch()
            data, self._unread = self._unread[:size], self._unread[size:]
            if data:
                self._last, self._last_at = data, offset
            self.held = len(self._unread) + len(self._last)
        return data or None

    def watch(self, callback: Callable[[], None]) -> Unwatch:
        return self._file.subscribe(callback, self._caller)

    def readable(self) -> bool:
        with self._lock:
            self._fetch()
            return bool(self._unread)

    def _fetch(self) -> None:
        if not self._unread:
            text, self._position = self._file.since(self._position, self._caller)
            self._unread = encoded(text)
            self.held = len(self._unread) + len(self._last)


@dataclass(slots=True)
class AnswerFile(File):
    """The text a request's readers get, while it is made and after."""

    mode: int = 0o400
    request: Request | None = None

    def open(self, opening: Opening) -> Handle:
        return AnswerHandle(self.request)

    @property
    def size(self) -> int:
        return self.request.answer.size if self.request and self.request.answer.ended else 0


class AnswerHandle(Handle):
    def __init__(self, request: Request | None) -> None:
        self._request = request
        self._next = 0  # where poll(2) expects the next read
        self.held = request.ended_bytes if request else 0

    def read(self, size: int, offset: int) -> bytes | None:
        data = self._request.answer.read(size, offset) if self._request else b""
        self._next = offset + len(data or b"")
        return data

    def watch(self, callback: Callable[[], None]) -> Unwatch:
        return self._request.answer.watch(callback) if self._request else lambda: None

    def readable(self) -> bool:
        return self._request is None or self._request.answer.ready(self._next)

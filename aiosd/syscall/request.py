"""One request (a syscall): what was asked, how far it is, and the text that grows for its readers.

Knows no files, store or workers. A `Request` is changed only by the scheduler under its lock; its
`Answer` is appended by the scheduler and read by any FUSE thread.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from aiosd.config.config import UNBOUNDED
from aiosd.errors import AiosError
from aiosd.host.watchers import Watchers
from aiosd.syscall.spec import Spec


class State(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    PREEMPTED = "preempted"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        return self in (State.DONE, State.FAILED, State.CANCELLED)


class Answer:
    """Bytes that grow until they end. Reading never consumes: any number of readers, any offset."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes = bytearray()
        self._watchers = Watchers()
        self.watch = self._watchers.add
        self.ended = False
        self.error: AiosError | None = None

    def append(self, data: bytes, last: bool = False) -> None:
        """Append bytes and wake the readers. With `last`, `end()` follows and wakes them once."""
        with self._lock:
            if not data or self.ended:  # a worker's last words may cross a cancel
                return
            self._bytes += data
        if not last:
            self._watchers.notify()

    def end(self, data: bytes = b"", error: AiosError | None = None) -> None:
        """Append the last bytes, and let readers reach the end or the error."""
        with self._lock:
            if not self.ended:
                self._bytes += data
            self.ended, self.error = True, error
        self._watchers.notify()

    def read(self, size: int, offset: int) -> bytes | None:
        """None: nothing there yet. Raises the error of a failed request once its text is read."""
        with self._lock:
            data = bytes(self._bytes[offset : offset + size])
            if data:
                return data
            if not self.ended:
                return None
            if self.error is not None:
                raise self.error.again()
            return b""

    def ready(self, offset: int) -> bool:
        return self.ended or len(self._bytes) > offset

    @property
    def ends_line(self) -> bool:
        return self._bytes.endswith(b"\n")

    @property
    def size(self) -> int:
        return len(self._bytes)

    @property
    def text(self) -> str:
        return bytes(self._bytes).decode("utf-8", "replace")


@dataclass(slots=True)
class Usage:
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def add(self, other: Usage) -> None:
        self.prompt_tokens += other.prompt_tokens
        self.cached_tokens += other.cached_tokens
        self.completion_tokens += other.completion_tokens


@dataclass(slots=True, weakref_slot=True, eq=False)
class Request:
    """What requests of all kinds share; `own` is what one kind needs beside it (Spec.state)."""

    id: int
    uid: int
    agent: str  # empty: written to a file of models/NAME or tools/NAME
    file: str  # path of the transaction file; "the newest request of that file" is found by it
    spec: Spec
    agent_id: int = 0
    size_bytes: int = 0  # as written; counts against the user's pending bytes until the request has ended
    pid: int = 0  # of the process that submitted it, for the audit log
    parent: int = 0  # the request that it is a step of (aiosd.handlers.loop)
    submitted_s: float = field(default_factory=time.time)
    state: State = State.QUEUED
    tokens: list[int] = field(default_factory=list)
    parked: str = ""  # what an earlier daemon had of its answer (aiosd.scheduler.parking), until it goes on
    text: str = ""
    logprobs: list[Any] = field(default_factory=list)
    finish_reason: str = ""
    error: str = ""
    usage: Usage = field(default_factory=Usage)
    started_s: float | None = None
    finished_s: float | None = None
    arrived_s: float = field(default_factory=time.monotonic)
    queued_s: float = field(default_factory=time.monotonic)
    slice_start: int = 0  # number of tokens when it was last put on a worker
    preemptions: int = 0
    worker_visits: int = 0
    computing: bool = False  # its worker has begun with it
    worker_deaths: int = 0
    worker: int | None = None
    running_most: tuple[int, int] = (UNBOUNDED, UNBOUNDED)  # of its user and of its agent, at once
    leaving: bool = False  # its worker was told to let it go, and has not answered yet
    decide_by_s: float | None = None  # a person has to allow it first, and has time until then
    document: str = ""  # response.json, once it has ended
    own: object = None
    answer: Answer = field(default_factory=Answer)

    def __post_init__(self) -> None:
        if self.own is None:
            self.own = self.spec.state()

    @property
    def queue(self) -> str:
        return self.spec.queue

    @property
    def spent(self) -> Usage:
        """The tokens that it is charged for: steps of a loop are charged for themselves."""
        return self.usage if self.spec.computes else Usage()

    @property
    def alone(self) -> bool:
        """No turn of a conversation, no step of a loop and no act: its answer can be made again."""
        return self.spec.computes and not (self.spec.context_name or self.parent or self.spec.acts)

    @property
    def slice_tokens(self) -> int:
        return len(self.tokens) - self.slice_start

    @property
    def deadline(self) -> float | None:
        """On the monotonic clock, as queued_s is."""
        return None if self.spec.deadline_s is None else self.arrived_s + self.spec.deadline_s

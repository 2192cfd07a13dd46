"""One request (a syscall): its specification, its progress, and the answer that grows for its readers.

Knows no files, store or workers. The scheduler changes a `Request` under its lock and appends to its
`Answer`. Any FUSE thread reads the answer.
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
    """Bytes that grow until the end. Reading removes nothing, so any number of readers may read any
    offset."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes = bytearray()
        self._watchers = Watchers()
        self.watch = self._watchers.add
        self.whole = False  # nothing but the end is missing
        self.ended = False
        self.error: AiosError | None = None

    def append(self, data: bytes, last: bool = False) -> None:
        """Append bytes and wake the readers. With `last`, `end()` follows and wakes them once."""
        with self._lock:
            self.whole = self.whole or last
            if not data or self.ended:  # a worker's last tokens may come after a cancel
                return
            self._bytes += data
        if not last:
            self._watchers.notify()

    def end(self, data: bytes = b"", error: AiosError | None = None) -> None:
        """Append the last bytes. From here on readers reach the end or the error."""
        with self._lock:
            if not self.ended:
                self._bytes += data
            self.ended, self.error = True, error
        self._watchers.notify()

    def read(self, size: int, offset: int) -> bytes | None:
        """Return bytes; b"" at the end; None if there is nothing to read yet. After the text of a failed
        request, raise its error.
        """
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
    """The state that requests of all kinds share. `own` is the extra state of one kind (Spec.state)."""

    id: int
    uid: int
    agent: str  # empty: written to a file of models/NAME or tools/NAME
    file: str  # path of the transaction file, the key of "the newest request of that file"
    spec: Spec
    agent_id: int = 0
    size_bytes: int = 0  # memory of what was written; counts as the user's pending bytes until the end
    pid: int = 0  # the process that submitted it, for the audit log
    parent: int = 0  # the loop of which it is a step (aiosd.handlers.loop); 0: none
    submitted_s: float = field(default_factory=time.time)
    state: State = State.QUEUED
    tokens: list[int] = field(default_factory=list)
    parked: str = ""  # an earlier daemon's partial answer (aiosd.scheduler.parking), until the start
    text: str = ""
    read: int = 0  # characters of `text` that were rendered for readers
    family: str = ""  # of the model that answers (aiosd.syscall.families); its answer is parsed by it
    logprobs: list[Any] = field(default_factory=list)
    finish_reason: str = ""
    stopped: str = ""  # the text of `stop` that ended the answer
    error: str = ""
    error_code: str = ""  # of AiosError; only `document` keeps it
    usage: Usage = field(default_factory=Usage)
    started_s: float | None = None
    finished_s: float | None = None
    arrived_s: float = field(default_factory=time.monotonic)
    queued_s: float = field(default_factory=time.monotonic)
    slice_start: int = 0  # number of tokens when its worker last started it
    preemptions: int = 0
    worker_visits: int = 0
    computing: bool = False  # its worker has begun it
    worker_deaths: int = 0
    worker: int | None = None
    # how many may run at once, of its user and of its agent
    running_most: tuple[int, int] = (UNBOUNDED, UNBOUNDED)
    leaving: bool = False  # its worker was ordered to stop it, and has not answered yet
    decide_by_s: float | None = None  # not None: a person must allow it, until this time
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
        """Return the tokens that it is charged for: none for a loop, whose steps are charged themselves."""
        return self.usage if self.spec.computes else Usage()

    @property
    def alone(self) -> bool:
        """Whether the answer can be recomputed: no turn of a conversation, no step of a loop, no act."""
        return self.spec.computes and not (self.spec.context_name or self.parent or self.spec.acts)

    @property
    def ended_bytes(self) -> int:
        """Return the memory of an ended request, which is read from the store for who opens its answer."""
        if not self.answer.ended:
            return 0
        return self.size_bytes + len(self.text) + len(self.document) + self.answer.size

    @property
    def slice_tokens(self) -> int:
        return len(self.tokens) - self.slice_start

    @property
    def deadline(self) -> float | None:
        """Return the deadline on the monotonic clock, as queued_s."""
        return None if self.spec.deadline_s is None else self.arrived_s + self.spec.deadline_s

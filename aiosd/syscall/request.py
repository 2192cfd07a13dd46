"""One request (a syscall): its spec, its state, and the growing answer for its readers.

Knows no files, store or workers. Only the scheduler changes a `Request`, under its lock. The scheduler
appends to the `Answer`, and any FUSE thread reads it.
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
        self.ended = False
        self.error: AiosError | None = None

    def append(self, data: bytes, last: bool = False) -> None:
        """Append bytes and wake the readers. With `last`, `end()` follows and wakes them once."""
        with self._lock:
            if not data or self.ended:  # text may arrive after a cancel
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
        """Return bytes, b"" at the end, or None if nothing is there yet. Raises the error of a failed request
        after its text."""
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
    """The state that requests of all kinds have. `own` is the further state of one kind (Spec.state)."""

    id: int
    uid: int
    agent: str  # empty: written to a file of models/NAME or tools/NAME
    file: str  # path of the transaction file; finds "the newest request of that file"
    spec: Spec
    agent_id: int = 0
    size_bytes: int = 0  # as written; counts against the user's pending bytes until the request has ended
    pid: int = 0  # the process that submitted it, for the audit log
    parent: int = 0  # the request that it is a step of (aiosd.handlers.loop)
    submitted_s: float = field(default_factory=time.time)
    state: State = State.QUEUED
    tokens: list[int] = field(default_factory=list)
    parked: str = ""  # partial answer from an earlier daemon (aiosd.scheduler.parking), until it continues
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
    computing: bool = False  # whether its worker has started it
    worker_deaths: int = 0
    worker: int | None = None
    running_most: tuple[int, int] = (UNBOUNDED, UNBOUNDED)  # most running requests of its user, of its agent
    leaving: bool = False  # its worker was told to remove it, and has not answered yet
    decide_by_s: float | None = None  # a person must allow it before this time; None: no decision needed
    document: str = ""  # response.json, after the end
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
        """The tokens that count for its user. A loop has none: its steps count."""
        return self.usage if self.spec.computes else Usage()

    @property
    def alone(self) -> bool:
        """Whether its answer can be computed again: no conversation, no loop's step, no tool call."""
        return self.spec.computes and not (self.spec.context_name or self.parent or self.spec.acts)

    @property
    def slice_tokens(self) -> int:
        return len(self.tokens) - self.slice_start

    @property
    def deadline(self) -> float | None:
        """On the monotonic clock, like queued_s."""
        return None if self.spec.deadline_s is None else self.arrived_s + self.spec.deadline_s

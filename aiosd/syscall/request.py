"""One request (a syscall): what was asked, how far it is, and the text that grows for its readers.

Knows no files, store or workers. A `Request` is changed only by the scheduler under its lock; its
`Answer` is appended by the scheduler and read by any FUSE thread.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from aiosd.errors import AiosError
from aiosd.host.watchers import Watchers
from aiosd.scheduler.quota import UNBOUNDED
from aiosd.syscall.spec import Message, Spec

if TYPE_CHECKING:
    from aiosd.access.rules import Rule
    from aiosd.host.usage import Spent

LOOPS = "loops"


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
        """Of the `last` of them its end is to tell."""
        with self._lock:
            if not data or self.ended:  # a worker's last words may cross a cancel
                return
            self._bytes += data
        if not last:
            self._watchers.tell()

    def end(self, data: bytes = b"", error: AiosError | None = None) -> None:
        """With the last of its bytes."""
        with self._lock:
            if not self.ended:
                self._bytes += data
            self.ended, self.error = True, error
        self._watchers.tell()

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
    id: int
    uid: int
    agent: str  # empty: written to models/NAME/llm
    file: str  # path of the transaction file; "the newest request of that file" is found by it
    spec: Spec
    agent_id: int = 0
    size_bytes: int = 0  # as written; counts against the user's pending bytes until it has ended
    pid: int = 0  # of who submitted it, for the audit log
    parent: int = 0  # the request that it is a step of (aiosd.agents.steps)
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
    running_most: tuple[int, int] = (UNBOUNDED, UNBOUNDED)  # of its user's and of its agent's, at once
    leaving: bool = False  # its worker was told to let it go, and has not answered yet
    document: str = ""  # response.json, once it has ended
    rule: Rule | None = None  # of access, that fits this call of a tool
    decide_by_s: float | None = None  # it waits for a decision, so long at the most
    between: list[Message] = field(default_factory=list)  # of a loop: calls and results before the answer
    stderr: str = ""  # of a tool call
    exit_status: int | None = None
    took: Spent | None = None
    answer: Answer = field(default_factory=Answer)

    @property
    def queue(self) -> str:
        """Where it waits: for a model, a tool, or, as an agent's loop, for nothing of its own."""
        return LOOPS if self.spec.steps else self.spec.model

    @property
    def spent(self) -> Usage:
        """What is to be accounted for: the steps of a loop are accounted for themselves."""
        return Usage() if self.spec.steps else self.usage

    @property
    def slice_tokens(self) -> int:
        return len(self.tokens) - self.slice_start

    @property
    def deadline(self) -> float | None:
        """On the monotonic clock, as queued_s is."""
        return None if self.spec.deadline_s is None else self.arrived_s + self.spec.deadline_s

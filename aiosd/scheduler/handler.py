"""The interface of a kind of syscall to admission and the scheduler. aiosd.handlers has one class per kind.

Admission calls the first group on FUSE threads. The scheduler calls the others, on any thread that changes
the queue; `free`, `closing` and `account` with its lock held.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass
from typing import ClassVar

from aiosd.access.caller import Caller
from aiosd.agents.agents import Agent
from aiosd.cores.pool import Worker
from aiosd.syscall.request import Request
from aiosd.syscall.spec import Spec


@dataclass(frozen=True, slots=True)
class Source:
    """The transaction file that a request comes through."""

    file: str  # its path, the key of "the newest request of that file"
    agent: Agent | None = None
    kind: str = "llm"  # the handler that judges what is written there
    target: str = ""  # the model or tool that the file belongs to; empty: the request or the agent names it


class Handler:
    """One kind of syscall. A kind overrides the methods that it needs; the others do nothing."""

    takes_text: ClassVar[bool] = True  # False: a request is JSON, whatever it begins with
    on_worker: ClassVar[bool] = False  # its requests run on workers of a model
    ranked: ClassVar[bool] = True  # the policy chooses the next request; False: the oldest is next
    span: ClassVar[str]  # the first span of its requests in scheduler/trace.json

    # admission

    def asks_groups(self, source: Source) -> bool:
        """Whether the caller's supplementary groups matter for requests through this file."""
        return False

    def check(self, caller: Caller, source: Source) -> None:
        """Refuse what can be refused before the request is complete. Raises AiosError."""

    def judge(self, caller: Caller, source: Source, body: bytes) -> Spec:
        """Turn a complete request into a Spec. Raises BadRequest, NotFound, Denied, OverQuota."""
        raise NotImplementedError

    def check_names(self, caller: Caller, source: Source, spec: Spec) -> None:
        """Check again that the caller may use what a judged request names. All admissions wait meanwhile.
        Raises NotFound, Denied, OverQuota.
        """

    def misunderstood(self, source: Source, body: bytes) -> Spec:
        """Return the Spec of a request that `judge` refused, which ends as failed."""
        raise NotImplementedError

    def begin(self, caller: Caller, request: Request) -> int:
        """Prepare a request before it is queued. Return the bytes that it needs beside the written ones."""
        return 0

    def forbid(self, request: Request) -> str:
        """Return why the request must not run; empty: it may. Set its decide_by_s if a person has
        to decide.
        """
        return ""

    def record(self, request: Request) -> None:
        """Record the request in the audit log before it can start. Raises StoreFull."""

    def queued(self, request: Request) -> None:
        """React: the request is stored and waits."""

    def lost(self, request: Request) -> str:
        """Return why a request of an earlier daemon cannot go on; empty: it can."""
        return ""

    def orphaned(self, request: Request) -> str:
        """Return why nothing can run the request after an object was removed; empty: it can run."""
        return ""

    # running

    def free(self, queue: str, running: Iterable[Request]) -> bool:
        """Whether one more request of this queue may start beside the running ones."""
        return True

    def crowding(self, queue: str, running: Iterable[Request]) -> Set[int]:
        """Return the users who may have no more of this queue's places."""
        return frozenset()

    def start(self, request: Request, worker: Worker | None) -> None:
        """Start the request. An error ends only this request."""
        raise NotImplementedError

    # the end

    def closing(self, request: Request) -> None:
        """Stop whatever runs for the request, which ends now. The scheduler's lock is held."""

    def account(self, request: Request) -> None:
        """Add an ended request to the sums of its object. The scheduler's lock is held."""

    def ended(self, request: Request) -> None:
        """React: the request has ended. Its readers see the end next."""

    def told(self, request: Request) -> None:
        """React: the request has ended, and its readers have seen it."""

    # steps, for kinds whose requests make requests themselves

    def child_said(self, request: Request, child: Request) -> None:
        """React: a step of the request has more text."""

    def child_ended(self, request: Request, child: Request) -> None:
        """React: a step of the request has ended."""

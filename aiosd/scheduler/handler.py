"""What the scheduler and admission ask of a kind of syscall; aiosd.handlers has one for each kind.

Admission calls the first group on FUSE threads. The scheduler calls `free` with its lock held, and the rest
without it, on whatever thread changes the queue.
"""

from __future__ import annotations

from collections.abc import Iterable
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

    file: str  # its path, by which "the newest request of that file" is found
    agent: Agent | None = None
    kind: str = "llm"  # the handler that judges what is written there
    target: str = ""  # the model or tool that the file belongs to; empty: the request or the agent names it


class Handler:
    """One kind of syscall. The methods that a kind does not need do nothing."""

    on_worker: ClassVar[bool] = False  # it waits for a place on a worker of its model
    ranked: ClassVar[bool] = True  # the policy says which one starts next; else the oldest does
    span: ClassVar[str]  # its first span in scheduler/trace.json

    # admission

    def asks_groups(self, source: Source) -> bool:
        """Whether the caller's supplementary groups matter for requests through this file."""
        return False

    def check(self, caller: Caller, source: Source) -> None:
        """Refuse what can be refused before the request is whole. Raises AiosError."""

    def judge(self, caller: Caller, source: Source, body: bytes) -> Spec:
        """Turn a whole request into a Spec. Raises BadRequest, NotFound, Denied, OverQuota."""
        raise NotImplementedError

    def misunderstood(self, source: Source, body: bytes) -> Spec:
        """The Spec of a request that `judge` refused: it ends as failed, with the reason."""
        raise NotImplementedError

    def begin(self, caller: Caller, request: Request) -> int:
        """Prepare a request before it is queued. Return the bytes it takes beside what was written."""
        return 0

    def forbid(self, request: Request) -> str:
        """Why the request must not run; empty: it may. Sets decide_by_s where a person decides."""
        return ""

    def record(self, request: Request) -> None:
        """Write down that the request comes, before it can start. Raises StoreFull."""

    def queued(self, request: Request) -> None:
        """The request is stored and waits."""

    def lost(self, request: Request) -> str:
        """Why a request that an earlier daemon accepted cannot go on; empty: it can."""
        return ""

    def orphaned(self, request: Request) -> str:
        """Why nothing can run the request any more, as its object was removed; empty: it can run."""
        return ""

    # running

    def free(self, queue: str, running: Iterable[Request]) -> bool:
        """Whether one more request of a queue may start beside those that run."""
        return True

    def start(self, request: Request, worker: Worker | None) -> None:
        """Begin. An error ends this request alone."""
        raise NotImplementedError

    # the end

    def closing(self, request: Request) -> None:
        """The request ends now: order that whatever runs for it stops. The scheduler's lock is held."""

    def account(self, request: Request) -> None:
        """Add an ended request to the sums of its object; the scheduler's lock is held."""

    def ended(self, request: Request) -> None:
        """The request has ended and is stored; its readers hear of it next."""

    def told(self, request: Request) -> None:
        """The request has ended, and its readers have heard of it."""

    # steps, for kinds whose requests have requests of their own

    def child_said(self, request: Request, child: Request) -> None:
        """A step of the request has more text."""

    def child_ended(self, request: Request, child: Request) -> None:
        """A step of the request has ended."""

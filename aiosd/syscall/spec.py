"""The parsed and checked content of a request: the base class for all kinds of syscall.

Each kind (llm, loop, embed, tokenize, tool) has a subclass, which also renders the answers, and a handler in
aiosd.handlers. Pure: knows no files, store or workers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self

if TYPE_CHECKING:
    from aiosd.syscall.request import Request

Message = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """A validated request: enough to run it again after a crash."""

    kind: ClassVar[str]
    computes: ClassVar[bool] = True  # False: its steps are requests, and only they use tokens
    acts: ClassVar[bool] = False  # True: it has effects outside, so it must never run twice
    keeps_text: ClassVar[bool] = True  # False: the store keeps only the document
    documents_failure: ClassVar[bool] = False  # True: a failed request has a document of this kind too

    nice: int = 0
    deadline_s: float | None = None  # seconds after submission
    json: bool = False  # the answer is a JSON document instead of text

    @property
    def queue(self) -> str:
        """The queue in which it waits."""
        return self.target

    @property
    def target(self) -> str:
        """The model's name, or tools/NAME. Tables and logs show it."""
        raise NotImplementedError

    @property
    def context_name(self) -> str:
        """The name of its conversation; empty: none."""
        return ""

    @property
    def turn_of(self) -> int:
        """The id of its conversation; 0: none."""
        return 0

    @property
    def understood(self) -> bool:
        """False: the text could not be parsed, and the request can only fail."""
        return True

    def state(self) -> object:
        """The further state of a new request of this kind (Request.own)."""
        return None

    def text(self) -> str:
        """The request as its user wrote it, for requests/ID/request and for digests."""
        raise NotImplementedError

    def part(self, request: Request, text: str, logprobs: list[Any]) -> bytes:
        """The bytes that readers get for new text while the request runs."""
        return b"" if self.json else text.encode()

    def rest(self, request: Request) -> str | None:
        """The text that completes a streamed answer. None: the document is the answer."""
        return None

    def ends_line(self) -> bool:
        """Whether a text answer gets a newline at its end when it lacks one."""
        return False

    def document(self, request: Request) -> str:
        """response.json of an ended request: one JSON document and a newline."""
        raise NotImplementedError

    def turn(self, request: Request) -> list[Message]:
        """The messages that a finished request adds to its conversation."""
        return []

    def measured(self, request: Request) -> dict[str, object]:
        """More lines of requests/ID/usage."""
        return {}

    def dump(self) -> str:
        return ENCODER.encode({"kind": self.kind, **{f.name: getattr(self, f.name) for f in fields(self)}})

    @classmethod
    def load(cls, raw: dict[str, Any]) -> Self:
        """The inverse of dump, without the kind."""
        return cls(**with_tuples(raw))


def with_tuples(raw: dict[str, Any]) -> dict[str, Any]:
    """Fields of a frozen dataclass from JSON, with tuples in place of lists."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in raw.items()}


def plain(value: Any) -> dict[str, Any]:
    """A dataclass as a dictionary, without copies of the values."""
    return {f.name: getattr(value, f.name) for f in fields(value)}


ENCODER = json.JSONEncoder(default=plain)

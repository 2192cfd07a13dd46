"""What a request asks for, judged: the part that every kind of syscall shares.

Each kind (llm, loop, embed, tokenize, tool) has a subclass of its own, which also renders its answers, and a
handler in aiosd.handlers. Pure: knows no files, store or workers.
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
    computes: ClassVar[bool] = True  # False: its steps are requests of their own, and only they are charged
    acts: ClassVar[bool] = False  # it changes the world, so that it is never run twice
    keeps_text: ClassVar[bool] = True  # False: the document alone is stored
    documents_failure: ClassVar[bool] = False  # a failed request has a document of its own shape

    nice: int = 0
    deadline_s: float | None = None  # seconds after submission
    json: bool = False  # the answer is a JSON document instead of text
    refused: str = ""  # the text that was written, if it could not be understood

    @property
    def queue(self) -> str:
        """The queue in which it waits."""
        return self.target

    @property
    def target(self) -> str:
        """What runs it, for tables and logs: the name of a model, or tools/NAME."""
        raise NotImplementedError

    @property
    def context_name(self) -> str:
        """The conversation that it continues; empty: it stands alone."""
        return ""

    @property
    def turn_of(self) -> int:
        """The id of that conversation; 0: it stands alone."""
        return 0

    @property
    def understood(self) -> bool:
        """False: the request fails, and never runs."""
        return not self.refused

    def shown(self) -> str:
        """requests/ID/request."""
        return self.refused.rstrip("\n") + "\n" if self.refused else self.text()

    def state(self) -> object:
        """What a request of this kind needs beside the fields that all requests have."""
        return None

    def text(self) -> str:
        """The request in the words of its user."""
        raise NotImplementedError

    def part(self, request: Request, text: str, logprobs: list[Any]) -> bytes:
        """The bytes that readers see for new text while the request goes on."""
        return b"" if self.json else text.encode()

    def rest(self, request: Request) -> str | None:
        """The bytes that complete a streamed answer; None: the document does."""
        return None

    def ends_line(self) -> bool:
        """Whether a text answer gets a newline at its end when it lacks one."""
        return False

    def document(self, request: Request) -> str:
        """response.json: one JSON document and a newline, once the request has ended."""
        raise NotImplementedError

    def turn(self, request: Request) -> list[Message]:
        """The messages by which a finished request extends its conversation."""
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
    """The fields of a frozen dataclass as JSON has them, with tuples for its lists."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in raw.items()}


def plain(value: Any) -> dict[str, Any]:
    """A nested dataclass as a dictionary, without copies of what it holds."""
    return {f.name: getattr(value, f.name) for f in fields(value)}


ENCODER = json.JSONEncoder(default=plain)

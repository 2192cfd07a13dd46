"""The specification of a request, parsed and checked: the part that all kinds of syscall share.

Each kind (llm, loop, embed, tokenize, tool) has a subclass, which also renders its answers, and a handler in
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
    computes: ClassVar[bool] = True  # False: its steps are requests too, and only the steps are charged
    acts: ClassVar[bool] = False  # it changes the world, so it never runs twice
    keeps_text: ClassVar[bool] = True  # False: only the document is stored
    documents_failure: ClassVar[bool] = False  # a failed request has this kind's document too

    nice: int = 0
    deadline_s: float | None = None  # seconds after submission
    keep_alive_s: float | None = None  # how long its model stays after it; None: as the model says
    json: bool = False  # the answer is a JSON document instead of text
    refused: str = ""  # the text that was written, if it could not be understood

    @property
    def queue(self) -> str:
        """Return the queue in which the request waits."""
        return self.target

    @property
    def target(self) -> str:
        """Return what runs the request: the name of a model, or tools/NAME."""
        raise NotImplementedError

    @property
    def context_name(self) -> str:
        """Return the name of the context that the request continues; empty: none."""
        return ""

    @property
    def turn_of(self) -> int:
        """Return the id of the context that the request continues; 0: none."""
        return 0

    @property
    def understood(self) -> bool:
        """False: the request fails, and never runs."""
        return not self.refused

    def shown(self) -> str:
        """requests/ID/request."""
        return self.refused.rstrip("\n") + "\n" if self.refused else self.text()

    def state(self) -> object:
        """Return the initial extra state of a request of this kind (Request.own)."""
        return None

    def text(self) -> str:
        """The request in the words of its user."""
        raise NotImplementedError

    def part(self, request: Request, text: str, logprobs: list[Any]) -> bytes:
        """Return the bytes that readers see for new text before the end."""
        return b"" if self.json else text.encode()

    def left(self, request: Request) -> bytes:
        """Return the bytes of a text answer that `part` held back until the end."""
        return b""

    def rest(self, request: Request) -> str | None:
        """Return the text that completes a streamed answer; None: the document completes it."""
        return None

    @property
    def judged(self) -> bool:
        """Whether `judge` must be called before the request ends."""
        return False

    def judge(self, request: Request) -> None:
        """Judge the whole answer. May take seconds."""

    def ends_line(self) -> bool:
        """Whether a text answer gets a final newline if it has none."""
        return False

    def document(self, request: Request) -> str:
        """Return response.json of an ended request: one JSON document and a newline."""
        raise NotImplementedError

    def turn(self, request: Request) -> list[Message]:
        """Return the messages by which a finished request extends its conversation."""
        return []

    def measured(self, request: Request) -> dict[str, object]:
        """Return more lines for requests/ID/usage."""
        return {}

    def dump(self) -> str:
        return ENCODER.encode({"kind": self.kind, **{f.name: getattr(self, f.name) for f in fields(self)}})

    @classmethod
    def load(cls, raw: dict[str, Any]) -> Self:
        """Invert dump. `raw` has no kind."""
        return cls(**with_tuples(raw))


def with_tuples(raw: dict[str, Any]) -> dict[str, Any]:
    """Turn the lists of a dataclass's JSON fields into tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in raw.items()}


def plain(value: Any) -> dict[str, Any]:
    """Return a nested dataclass as a dictionary, without copying its values."""
    return {f.name: getattr(value, f.name) for f in fields(value)}


ENCODER = json.JSONEncoder(default=plain)

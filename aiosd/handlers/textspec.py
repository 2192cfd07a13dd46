"""Requests with one text for one model: embed and tokenize. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from aiosd.errors import BadRequest
from aiosd.syscall.foreign import checked, decode, is_object, prose, read_json
from aiosd.syscall.spec import Spec


@dataclass(frozen=True, slots=True)
class TextSpec(Spec):
    keeps_text: ClassVar[bool] = False

    input: str
    model: str

    @property
    def target(self) -> str:
        return self.model

    @property
    def understood(self) -> bool:
        return bool(self.input)

    def text(self) -> str:
        return self.input + "\n" if self.input else ""

    @classmethod
    def parse(cls, body: bytes, model: str) -> Self:
        """Parse plain text, or the API's JSON if the first character is `{`. Raises BadRequest."""
        text = decode(body)
        given = checked(input_of(read_json(text), model)) if is_object(body) else prose(text)
        return cls(given, model, json=True)


def input_of(raw: dict[str, Any], model: str) -> str:
    """The text of the API's JSON. Raises BadRequest."""
    given = set(raw) - {"model"}
    if given not in ({"input"}, {"prompt"}):
        raise BadRequest("the keys are not input and model", 'write {"input":"…"}')
    if raw.get("model", model) != model:
        raise BadRequest(f"this file belongs to model {model}", "write to the file of the other model")
    text = raw[given.pop()]
    if not isinstance(text, str):
        raise BadRequest("input must be one string", "write a request for each text")
    return text

"""The common part of embed and tokenize: a request with one text for one model. Pure."""

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
        return not self.refused and bool(self.input)

    def text(self) -> str:
        return self.input + "\n" if self.input else ""

    @classmethod
    def parse(cls, body: bytes, model: str) -> Self:
        """Parse a plain text, or the API's JSON if the first byte is `{`. Raises BadRequest."""
        text = decode(body)
        return cls.of_json(read_json(text), model) if is_object(body) else cls(prose(text), model, json=True)

    @classmethod
    def of_json(cls, raw: dict[str, Any], model: str) -> Self:
        return cls(checked(input_of(raw, model)), model, json=True)


def input_of(raw: dict[str, Any], model: str) -> str:
    """Return the text in the API's JSON. Raises BadRequest."""
    given = set(raw) - {"model"}
    if given not in ({"input"}, {"prompt"}):
        raise BadRequest("the keys must be input or prompt, and no other but model")
    check_target(raw, model)
    text = raw[given.pop()]
    if not isinstance(text, str):
        raise BadRequest("input must be one string", "write one request for each text")
    return text


def check_target(raw: dict[str, Any], model: str) -> None:
    """Raises BadRequest if a request names another model than that of its file."""
    if raw.get("model", model) != model:
        raise BadRequest(
            f"this file belongs to model {model}", "leave model out, or write to the other model's file"
        )

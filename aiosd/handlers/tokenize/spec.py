"""A request for the tokens of a text or of a conversation, and its answer. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from aiosd.handlers.textspec import TextSpec, check_target, input_of
from aiosd.syscall.foreign import checked
from aiosd.syscall.keys import only
from aiosd.syscall.messages import messages, tools
from aiosd.syscall.response import line
from aiosd.syscall.spec import Message
from aiosd.syscall.template import TEMPLATE_KEYS, variables

if TYPE_CHECKING:
    from aiosd.syscall.request import Request

KEYS = ("messages", "model", "tools", "tool_choice", *TEMPLATE_KEYS)


@dataclass(frozen=True, slots=True)
class Tokenize(TextSpec):
    kind: ClassVar[str] = "tokenize"

    messages: tuple[Message, ...] = ()  # in place of `input`: the tokens are those of the whole prompt
    tools: tuple[Message, ...] = ()
    template: Message = field(default_factory=dict)

    @property
    def understood(self) -> bool:
        return not self.refused and bool(self.input or self.messages)

    def text(self) -> str:
        if not self.messages:
            return self.input + "\n" if self.input else ""
        asked = {"messages": self.messages, "tools": self.tools, "chat_template_kwargs": self.template}
        return json.dumps(asked, ensure_ascii=False) + "\n"

    @classmethod
    def of_json(cls, raw: dict[str, Any], model: str) -> Self:
        if "messages" not in raw:
            return cls(checked(input_of(raw, model)), model, json=True)
        only(raw, "", *KEYS)
        check_target(raw, model)
        said, offered, more = messages(raw), tools(raw), variables(raw, {})
        return cls("", model, messages=said, tools=offered, template=more, json=True)

    def document(self, request: Request) -> str:
        tokens = json.loads(request.text)
        return line({"count": len(tokens), "tokens": tokens, "model": self.model})

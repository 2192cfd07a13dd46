"""A model's answer as its readers get it: thinking, text and calls, as it grows and when it has ended.

A request keeps everything that the model said, with its marks. Pure, except that a request's `Heard` changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aiosd.syscall.reading import Reading
from aiosd.syscall.spec import Message
from aiosd.syscall.toolcalls import NOTHING, Offer, ParsedAnswer, offer, parse

if TYPE_CHECKING:
    from aiosd.syscall.chat import Chat
    from aiosd.syscall.request import Request


@dataclass(slots=True, eq=False)
class Heard:
    """The extra state of a request for a model's answer."""

    reading: Reading | None = None  # made with the first text, when the model's family is known
    quarrel: str = ""  # why the answer does not fit its schema, where that was judged


def said(request: Request, chat: Chat) -> ParsedAnswer:
    assert isinstance(request.own, Heard)
    seen = request.own.reading
    if seen and seen.plain and request.read == len(request.text):
        return ParsedAnswer("", request.text, [])
    return parse(request.text, request.family, offered(chat))


def message(request: Request, chat: Chat) -> Message:
    """Return the answer as a message in OpenAI's shape."""
    whole = chat.said(request)
    made: dict[str, Any] = {"role": "assistant", "content": whole.content}
    if whole.reasoning:
        made["reasoning_content"] = whole.reasoning
    if whole.calls:
        made["content"] = whole.content or None
        made["tool_calls"] = [
            {
                "id": f"call_{request.id}_{i}",
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for i, call in enumerate(whole.calls)
        ]
    return made


def quarrel(request: Request) -> str:
    return request.own.quarrel if isinstance(request.own, Heard) else ""


def offered(chat: Chat) -> Offer:
    """Return the tools whose calls are part of the answer. A reader of text gets calls as text."""
    return offer(chat.tools, one=not chat.parallel) if chat.tools and chat.json else NOTHING


def grown(request: Request, chat: Chat, text: str) -> tuple[str, str]:
    """Return the new thinking and the new text that `text` adds for certain."""
    return reading(request, chat).push(text)


def held(request: Request, chat: Chat) -> tuple[str, str]:
    """Return the thinking and the text that readers do not have yet."""
    seen = reading(request, chat)
    if seen.plain and request.read == len(request.text):
        rest, seen.answered = request.text[seen.answered :], len(request.text)
        return "", rest
    whole = said(request, chat)
    thought, answer = whole.reasoning[seen.thought :], whole.content[seen.answered :]
    seen.thought, seen.answered = len(whole.reasoning), len(whole.content)
    return thought, answer


def reading(request: Request, chat: Chat) -> Reading:
    assert isinstance(request.own, Heard)
    if request.own.reading is None:
        request.own.reading = Reading(request.family, bool(chat.tools) and chat.json)
    return request.own.reading


def turn(request: Request, chat: Chat, between: list[Message] | None = None) -> list[Message]:
    """Return the messages by which the conversation grows. Later turns do not see what the model thought."""
    answer = message(request, chat)
    answer["content"] = answer["content"] or ""
    turn = [*chat.messages, *(between or []), answer]
    return [{key: value for key, value in one.items() if key != "reasoning_content"} for one in turn]

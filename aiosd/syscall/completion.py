"""Answers in OpenAI's chat-completion shape, whole or chunk by chunk. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aiosd.syscall import toolcalls
from aiosd.syscall.response import line

if TYPE_CHECKING:
    from aiosd.syscall.chat import Chat
    from aiosd.syscall.request import Request


def whole(request: Request, chat: Chat) -> str:
    """One `chat.completion` document and a newline."""
    content, calls = tool_calls(request, chat)
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = calls
    choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": finish_reason(request, calls)}
    if chat.sampling.logprobs is not None:
        choice["logprobs"] = {"content": request.logprobs}
    return line({**header(request, chat, "chat.completion"), "choices": [choice], "usage": usage(request)})


def chunk(request: Request, chat: Chat, text: str, logprobs: list[Any]) -> str:
    delta = {"role": "assistant", "content": text}
    choice: dict[str, Any] = {"index": 0, "delta": delta, "finish_reason": None}
    if logprobs:
        choice["logprobs"] = {"content": logprobs}
    return line({**header(request, chat, "chat.completion.chunk"), "choices": [choice]})


def rest(request: Request, chat: Chat) -> str:
    """The last chunks of a stream: the text held back so far, the calls, the finish reason, the usage."""
    content, calls = tool_calls(request, chat)
    held_back = chunk(request, chat, content, []) if chat.calls_are_answers and content else ""
    choice = {
        "index": 0,
        "delta": {"tool_calls": calls} if calls else {},
        "finish_reason": finish_reason(request, calls),
    }
    end = {**header(request, chat, "chat.completion.chunk"), "choices": [choice], "usage": usage(request)}
    return held_back + line(end)


def finish_reason(request: Request, calls: list[dict[str, Any]]) -> str:
    return "tool_calls" if calls else request.finish_reason


def tool_calls(request: Request, chat: Chat) -> tuple[str | None, list[dict[str, Any]]]:
    """Split an answer into (text, calls). A call that is not valid JSON stays in the text."""
    if not chat.calls_are_answers:
        return request.text, []
    prose, found = toolcalls.parse(request.text)
    if not found:
        return request.text, []
    calls = []
    for i, call in enumerate(found):
        function = {"name": call.name, "arguments": call.arguments}
        calls.append({"id": f"call_{request.id}_{i}", "type": "function", "function": function})
    return prose or None, calls


def header(request: Request, chat: Chat, kind: str) -> dict[str, Any]:
    created = int(request.submitted_s)
    return {"id": f"aios-{request.id}", "object": kind, "created": created, "model": chat.model}


def usage(request: Request) -> dict[str, Any]:
    u = request.usage
    return {
        "prompt_tokens": u.prompt_tokens,
        "completion_tokens": u.completion_tokens,
        "total_tokens": u.prompt_tokens + u.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": u.cached_tokens},
    }

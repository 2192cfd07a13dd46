"""Answers in OpenAI's chat-completion shape, whole or chunk by chunk. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aiosd.syscall import answers
from aiosd.syscall.response import line

if TYPE_CHECKING:
    from aiosd.syscall.chat import Chat
    from aiosd.syscall.request import Request


def whole(request: Request, chat: Chat) -> str:
    """Return one `chat.completion` document and a newline."""
    message = answers.message(request, chat)
    calls = message.get("tool_calls", [])
    choice: dict[str, Any] = {"index": 0, "message": message, **finish(request, calls)}
    if chat.sampling.logprobs is not None:
        choice["logprobs"] = {"content": request.logprobs}
    return line({**header(request, chat, "chat.completion"), "choices": [choice], "usage": usage(request)})


def chunk(request: Request, chat: Chat, thought: str, answer: str, logprobs: list[Any]) -> str:
    delta = {"role": "assistant"} | ({"reasoning_content": thought} if thought else {})
    delta |= {"content": answer} if answer or not thought else {}
    choice: dict[str, Any] = {"index": 0, "delta": delta, "finish_reason": None}
    if logprobs:
        choice["logprobs"] = {"content": logprobs}
    return line({**header(request, chat, "chat.completion.chunk"), "choices": [choice]})


def rest(request: Request, chat: Chat) -> str:
    """Return the last chunks of a stream: text held back, the calls, the finish reason and the usage."""
    thought, answer = chat.held(request)
    held_back = chunk(request, chat, thought, answer, []) if thought or answer else ""
    calls = answers.message(request, chat).get("tool_calls", [])
    numbered = [{"index": i, **call} for i, call in enumerate(calls)]
    delta = {"role": "assistant", "tool_calls": numbered} if calls else {}
    choice = {"index": 0, "delta": delta, **finish(request, calls)}
    end = {**header(request, chat, "chat.completion.chunk"), "choices": [choice], "usage": usage(request)}
    return held_back + line(end)


def finish(request: Request, calls: list[dict[str, Any]]) -> dict[str, str]:
    quarrel = answers.quarrel(request)
    why = {"schema_error": quarrel} if quarrel else {}
    if calls:
        return {"finish_reason": "tool_calls", **why}
    by = {"stop_reason": request.stopped} if request.stopped else {}
    return {"finish_reason": request.finish_reason, **by, **why}


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

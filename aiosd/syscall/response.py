"""What a request's readers get: text, or the OpenAI chat-completion shape, whole or chunk by chunk.

`grow` and `end` write to the request's Answer; the rest is pure. Called by the scheduler alone.
"""

from __future__ import annotations

import json
from typing import Any

from aiosd.errors import RequestFailed
from aiosd.syscall import toolcalls
from aiosd.syscall.request import Request, State
from aiosd.tools.catalog import QUEUE

ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def grow(request: Request, text: str, logprobs: list[Any], last: bool = False) -> None:
    """New text arrived; it may lag behind its tokens. After the `last` the request is ended at once."""
    data = part(request, text, logprobs)
    if last and not request.spec.json and not request.text.endswith("\n"):
        data += b"\n"
    request.answer.append(data, last)


def end(request: Request) -> None:
    """The request is over."""
    done = request.state is State.DONE
    if not request.spec.json:
        lacks = done and request.spec.operation == "llm" and not request.answer.ends_line
        reason = f"request {request.id} {request.state}: {request.error}"
        request.answer.end(b"\n" if lacks else b"", None if done else RequestFailed(reason))
        return
    whole = document(request)
    if request.spec.stream and done:
        content, _ = tool_calls(request)
        held = request.spec.tools and not request.spec.steps
        held_back = chunk(request, content, []) if held and content else ""
        whole = held_back + last_chunk(request)
    request.answer.end(whole.encode())


def part(request: Request, text: str, logprobs: list[Any]) -> bytes:
    """What a reader sees of it while the request goes on."""
    spec = request.spec
    if not spec.json:
        return text.encode()
    if (
        spec.stream and (text or logprobs) and (spec.steps or not spec.tools)
    ):  # with tools it may become a call: at the end
        return chunk(request, text, logprobs).encode()
    return b""


def document(request: Request) -> str:
    """Of one that has ended; made once, when it is first asked for."""
    if not request.document and request.state.final:
        makers = {"llm": completion, "embed": embedding, "tokenize": tokenization, "tool": result}
        operation = request.spec.operation
        failed = request.state is not State.DONE and operation != "tool"
        request.document = (failure if failed else makers[operation])(request)
    return request.document


def embedding(request: Request) -> str:
    """The list of one embedding that /v1/embeddings gives; a unit vector."""
    data = [{"object": "embedding", "index": 0, "embedding": json.loads(request.text)}]
    used = dict.fromkeys(("prompt_tokens", "total_tokens"), request.usage.prompt_tokens)
    return line({"object": "list", "data": data, "model": request.spec.model, "usage": used})


def tokenization(request: Request) -> str:
    tokens = json.loads(request.text)
    return line({"count": len(tokens), "tokens": tokens, "model": request.spec.model})


def result(request: Request) -> str:
    """How a tool call went, also one that failed."""
    facts: dict[str, object] = {
        "tool": request.spec.model.removeprefix(QUEUE),
        "exit_status": request.exit_status,
    }
    facts |= {"output": request.text, "stderr": request.stderr, "error": request.error}
    if request.took:
        facts |= {"cpu_seconds": request.took.cpu_s, "memory_bytes": request.took.memory_bytes or None}
    return line({**facts, "request": request.id})


def completion(request: Request) -> str:
    """One `chat.completion` document and a newline."""
    content, calls = tool_calls(request)
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = calls
    choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": finish_reason(request, calls)}
    if request.spec.sampling.logprobs is not None:
        choice["logprobs"] = {"content": request.logprobs}
    return line({**header(request, "chat.completion"), "choices": [choice], "usage": usage(request)})


def chunk(request: Request, text: str, logprobs: list[Any]) -> str:
    delta = {"role": "assistant", "content": text}
    choice: dict[str, Any] = {"index": 0, "delta": delta, "finish_reason": None}
    if logprobs:
        choice["logprobs"] = {"content": logprobs}
    return line({**header(request, "chat.completion.chunk"), "choices": [choice]})


def last_chunk(request: Request) -> str:
    _, calls = tool_calls(request)
    choice = {
        "index": 0,
        "delta": {"tool_calls": calls} if calls else {},
        "finish_reason": finish_reason(request, calls),
    }
    return line({**header(request, "chat.completion.chunk"), "choices": [choice], "usage": usage(request)})


def failure(request: Request) -> str:
    return line({"error": {"message": request.error, "type": str(request.state), "request": request.id}})


def finish_reason(request: Request, calls: list[dict[str, Any]]) -> str:
    return "tool_calls" if calls else request.finish_reason


def tool_calls(request: Request) -> tuple[str | None, list[dict[str, Any]]]:
    """(text, calls) of an answer. A call that is not valid JSON stays text: the client sees what was said."""
    if not request.spec.tools or request.spec.steps:  # of a loop they were run
        return request.text, []
    prose, found = toolcalls.parse(request.text)
    if not found:
        return request.text, []
    calls = []
    for i, call in enumerate(found):
        function = {"name": call.name, "arguments": call.arguments}
        calls.append({"id": f"call_{request.id}_{i}", "type": "function", "function": function})
    return prose or None, calls


def header(request: Request, kind: str) -> dict[str, Any]:
    return {
        "id": f"aios-{request.id}",
        "object": kind,
        "created": int(request.submitted_s),
        "model": request.spec.model,
    }


def usage(request: Request) -> dict[str, Any]:
    u = request.usage
    return {
        "prompt_tokens": u.prompt_tokens,
        "completion_tokens": u.completion_tokens,
        "total_tokens": u.prompt_tokens + u.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": u.cached_tokens},
    }


def line(document: dict[str, Any]) -> str:
    text = ENCODER.encode(document) + "\n"
    return text.encode("utf-8", "replace").decode()  # a model may say half a surrogate pair in a call

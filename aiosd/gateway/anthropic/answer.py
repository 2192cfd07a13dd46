"""An answer of the files as Anthropic's message, whole or as server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable
from typing import Any

from aiosd.gateway.anthropic.errors import shape
from aiosd.gateway.client import nothing, together
from aiosd.gateway.dialect import failed
from aiosd.gateway.openai_chat import usable
from aiosd.gateway.refused import HttpRefused

SIGNATURE = "aios"  # clients want one, and nobody checks it
REASONS = {"tool_calls": "tool_use", "length": "max_tokens"}
START: dict[str, Any] = {
    "text": {"type": "text", "text": ""},
    "thinking": {"type": "thinking", "thinking": "", "signature": ""},
}

Json = dict[str, Any]


class MessageShape:
    """What a request says about the shape of its answer."""

    def __init__(self, model: str, thinks: bool, most: int) -> None:
        self.model, self.thinks, self.most = model, thinks, most

    def message(self, id: str) -> Json:
        """A message without content."""
        return {
            "id": f"msg_{id}", "type": "message", "role": "assistant", "model": self.model, "content": [],
            "stop_reason": None, "stop_sequence": None, "usage": used({}),
        }  # fmt: skip

    def end(self, choice: Json, usage: Json) -> Json:
        """Why the answer ended."""
        reason, stopped = choice["finish_reason"], choice.get("stop_reason")
        if stopped is not None:
            return {"stop_reason": "stop_sequence", "stop_sequence": stopped}
        if reason == "length" and usage.get("completion_tokens", 0) < self.most:
            return {"stop_reason": "model_context_window_exceeded", "stop_sequence": None}
        return {"stop_reason": REASONS.get(reason, "end_turn"), "stop_sequence": None}


def used(usage: Json) -> Json:
    cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
    return {
        "input_tokens": usage.get("prompt_tokens", 0) - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage.get("completion_tokens", 0),
    }


def whole(document: Json, asked: MessageShape) -> Json:
    choice, usage = document["choices"][0], document["usage"]
    said, content = choice["message"], list[Json]()
    if asked.thinks and said.get("reasoning_content"):
        thought = {"thinking": said["reasoning_content"], "signature": SIGNATURE}
        content.append({"type": "thinking"} | thought)
    if said["content"]:
        content.append({"type": "text", "text": said["content"]})
    content += [
        call(one) | {"input": json.loads(one["function"]["arguments"])} for one in said.get("tool_calls", ())
    ]
    return (
        asked.message(document["id"])
        | {"content": content or [START["text"]], "usage": used(usage)}
        | asked.end(choice, usage)
    )


def call(one: Json) -> Json:
    """The beginning of a call of a tool."""
    return {"type": "tool_use", "id": one["id"], "name": one["function"]["name"], "input": {}}


class Content:
    """The blocks of a message that is streamed, one after the other."""

    def __init__(self) -> None:
        self._index, self._kind = -1, ""

    def events(self, delta: Json, thinks: bool) -> bytes:
        """What a delta of the files adds."""
        made = b""
        if thinks and (thought := delta.get("reasoning_content")):
            made += self._to("thinking") + self._add({"type": "thinking_delta", "thinking": thought})
        if said := delta.get("content"):
            made += self._to("text") + self._add({"type": "text_delta", "text": said})
        for one in delta.get("tool_calls", ()):
            made += self._begin("tool_use", call(one))
            made += self._add({"type": "input_json_delta", "partial_json": one["function"]["arguments"]})
        return made

    def end(self) -> bytes:
        return (b"" if self._index >= 0 else self._to("text")) + self._close()

    def _to(self, kind: str) -> bytes:
        return b"" if self._kind == kind else self._begin(kind, START[kind])

    def _begin(self, kind: str, block: Json) -> bytes:
        made = self._close()
        self._index, self._kind = self._index + 1, kind
        return made + event("content_block_start", index=self._index, content_block=block)

    def _add(self, delta: Json) -> bytes:
        return event("content_block_delta", index=self._index, delta=delta)

    def _close(self) -> bytes:
        signed = {"type": "signature_delta", "signature": SIGNATURE}
        made = self._add(signed) if self._kind == "thinking" else b""
        kind, self._kind = self._kind, ""
        return made + (event("content_block_stop", index=self._index) if kind else b"")


def event(kind: str, **more: object) -> bytes:
    data = json.dumps({"type": kind, **more}, ensure_ascii=False, separators=(",", ":"))
    return f"event: {kind}\ndata: {data}\n\n".encode("utf-8", "replace")


async def events(
    coming: Awaitable[bytes], lines: AsyncIterator[bytes], id: str, asked: MessageShape
) -> AsyncIterator[bytes]:
    """The events of a message. `coming` is the first line."""
    yield event("message_start", message=asked.message(id)) + event("ping")
    try:
        async for made in told(usable(await coming), lines, asked):
            yield made
    except HttpRefused as refused:
        yield event("error", error=shape(refused)["error"])


async def told(first: bytes, lines: AsyncIterator[bytes], asked: MessageShape) -> AsyncIterator[bytes]:
    """Raises HttpRefused."""
    content = Content()
    async for _, line in together(first, [lines]):
        chunk = json.loads(line)
        if "error" in chunk:
            raise failed(chunk)
        choice = chunk["choices"][0]
        if made := content.events(choice["delta"], asked.thinks):
            yield made
        if choice["finish_reason"]:
            usage = chunk["usage"]
            end = event("message_delta", delta=asked.end(choice, usage), usage=used(usage))
            yield content.end() + end + event("message_stop")
            return
    nothing()

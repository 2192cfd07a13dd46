"""A model's answer as a response of OpenAI's Responses API: the object, and the events as it grows. Pure."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from typing import Any

Json = dict[str, Any]

ECHOED: Json = {  # what a response repeats of its request, and what it says where that says nothing
    "instructions": None, "max_output_tokens": None, "max_tool_calls": None, "metadata": {}, "model": "",
    "parallel_tool_calls": True, "previous_response_id": None, "prompt_cache_key": None,
    "safety_identifier": None, "service_tier": "default", "temperature": None, "tool_choice": "auto",
    "tools": [], "top_logprobs": 0, "top_p": None, "truncation": "disabled", "user": None,
}  # fmt: skip


def begun(id: str, body: Json, stored: bool) -> Json:
    """The response object as it begins."""
    echoed = {key: default if body.get(key) is None else body[key] for key, default in ECHOED.items()}
    reasoning = {"effort": None, "summary": None} | (body.get("reasoning") or {})
    text = {"format": {"type": "text"}} | {k: v for k, v in (body.get("text") or {}).items() if v is not None}
    return {
        "id": id, "object": "response", "created_at": int(time.time()), "status": "in_progress",
        "background": False, "error": None, "incomplete_details": None, "output": [], "usage": None,
        "store": stored, "conversation": body.get("conversation"), "reasoning": reasoning, "text": text,
        **echoed,
    }  # fmt: skip


def usage_of(usage: Json) -> Json:
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }


def named(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(16)}"


class GrowingResponse:
    """A response that grows. Its methods give the events of that, in their order."""

    def __init__(self, response: Json) -> None:
        self.response = response
        self._number = 0
        self._item: Json | None = None  # thinking or text that goes on
        self._part: Json = {}

    def begin(self) -> Iterator[bytes]:
        yield self._event("response.created", response=self.response)
        yield self._event("response.in_progress", response=self.response)

    def push(self, choice: Json) -> Iterator[bytes]:
        """A choice of the chat API, with a `delta` or a whole `message`."""
        delta = choice.get("delta") or choice.get("message") or {}
        if thought := delta.get("reasoning_content"):
            yield from self._open("reasoning")
            self._part["text"] += thought
            yield self._of_part("response.reasoning_text.delta", delta=thought)
        logprobs = (choice.get("logprobs") or {}).get("content") or []
        if (text := delta.get("content")) or logprobs:
            yield from self._open("message")
            self._part["text"] += text or ""
            self._part["logprobs"] += logprobs
            yield self._of_part("response.output_text.delta", delta=text or "", logprobs=logprobs)
        for call in delta.get("tool_calls") or []:
            yield from self._close("completed")
            yield from self._call(call)

    def end(self, finish: str, usage: Json) -> Iterator[bytes]:
        """Complete the object. `last` gives the event that says so."""
        whole = finish != "length"
        if not self.response["output"] and self._item is None:  # the model said nothing
            yield from self._open("message")
        yield from self._close("completed" if whole else "incomplete")
        self.response |= {"status": "completed" if whole else "incomplete", "usage": usage_of(usage)}
        self.response["completed_at"] = int(time.time())
        if not whole:
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}

    def fail(self, reason: str) -> None:
        error = {"code": "server_error", "message": reason}
        self.response |= {"status": "failed", "error": error}

    def last(self) -> bytes:
        return self._event(f"response.{self.response['status']}", response=self.response)

    def _open(self, kind: str) -> Iterator[bytes]:
        if self._item and self._item["type"] == kind:
            return
        yield from self._close("completed")
        if kind == "reasoning":
            item: Json = {"id": named("rs"), "type": kind, "summary": [], "content": []}
            part: Json = {"type": "reasoning_text", "text": ""}
        else:
            item = {"id": named("msg"), "type": kind, "role": "assistant", "content": []}
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item["status"] = "in_progress"
        self._item, self._part = item, part
        yield self._of_item("response.output_item.added", item=item)
        yield self._of_part("response.content_part.added", part=part)

    def _close(self, status: str) -> Iterator[bytes]:
        if (item := self._item) is None:
            return
        text = self._part["text"]
        if item["type"] == "reasoning":
            yield self._of_part("response.reasoning_text.done", text=text)
        else:
            yield self._of_part("response.output_text.done", text=text, logprobs=self._part["logprobs"])
        yield self._of_part("response.content_part.done", part=self._part)
        item |= {"status": status, "content": [self._part]}
        yield self._of_item("response.output_item.done", item=item)
        self.response["output"].append(item)
        self._item = None

    def _call(self, call: Json) -> Iterator[bytes]:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        item = {"id": named("fc"), "type": "function_call", "call_id": call["id"], "name": name}
        start = item | {"arguments": "", "status": "in_progress"}
        yield self._of_item("response.output_item.added", item=start)
        at = {"item_id": item["id"], "output_index": len(self.response["output"])}
        yield self._event("response.function_call_arguments.delta", **at, delta=arguments)
        yield self._event("response.function_call_arguments.done", **at, name=name, arguments=arguments)
        done = item | {"arguments": arguments, "status": "completed"}
        yield self._of_item("response.output_item.done", item=done)
        self.response["output"].append(done)

    def _of_item(self, kind: str, item: Json) -> bytes:
        return self._event(kind, output_index=len(self.response["output"]), item=item)

    def _of_part(self, kind: str, **facts: object) -> bytes:
        assert self._item
        at = {"item_id": self._item["id"], "output_index": len(self.response["output"]), "content_index": 0}
        return self._event(kind, **at, **facts)

    def _event(self, kind: str, **facts: object) -> bytes:
        event = {"type": kind, "sequence_number": self._number, **facts}
        self._number += 1
        return b"event: " + kind.encode() + b"\ndata: " + json.dumps(event).encode() + b"\n\n"

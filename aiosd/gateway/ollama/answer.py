"""The answers of the files as Ollama's objects: parts, and a last one with counts and times. Pure."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any

from aiosd.gateway.dialect import failed

Json = dict[str, Any]


def moment(seconds: float | None = None) -> str:
    """RFC 3339. None: now."""
    when = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return when.isoformat().replace("+00:00", "Z")


def of_chat(content: str, thought: str, calls: list[Json]) -> Json:
    message: Json = {"role": "assistant", "content": content}
    message |= ({"thinking": thought} if thought else {}) | ({"tool_calls": calls} if calls else {})
    return {"message": message}


def of_generate(content: str, thought: str, _: list[Json]) -> Json:
    return {"response": content} | ({"thinking": thought} if thought else {})


Shape = Callable[[str, str, list[Json]], Json]


class Telling:
    """One answer. The counts and the times are for its last object."""

    def __init__(self, model: str, shape: Shape) -> None:
        self._model, self._shape = model, shape
        self._began_ns, self._first_ns = time.monotonic_ns(), 0
        self._calls = dict[int, Json]()
        self._finish, self._usage = "stop", Json()

    def part(self, line: bytes) -> Json | None:
        """What one chunk of the files adds; None: nothing to see. Raises HttpRefused."""
        chunk = json.loads(line)
        if "error" in chunk:
            raise failed(chunk)
        self._first_ns = self._first_ns or time.monotonic_ns()
        self._usage = chunk.get("usage") or self._usage
        choice = chunk["choices"][0]
        self._finish = choice["finish_reason"] or self._finish
        delta = choice["delta"]
        for call in delta.get("tool_calls") or []:
            self._collect(call)
        content, thought = delta.get("content") or "", delta.get("reasoning_content") or ""
        logprobs = (choice.get("logprobs") or {}).get("content")
        if not (content or thought or logprobs):
            return None
        return self._frame(content, thought, [], False) | ({"logprobs": logprobs} if logprobs else {})

    def rest(self) -> list[Json]:
        """The calls, if there are some, and the last object."""
        calls = [called(self._calls[i], i) for i in sorted(self._calls)]
        return [self._frame("", "", calls, False)] * bool(calls) + [self._last()]

    def _collect(self, call: Json) -> None:
        """A call may come in pieces."""
        function = call.get("function") or {}
        known = self._calls.setdefault(call.get("index", len(self._calls)), {"name": "", "arguments": ""})
        known["id"] = call.get("id") or known.get("id")
        known["name"] += function.get("name") or ""
        known["arguments"] += function.get("arguments") or ""

    def _frame(self, content: str, thought: str, calls: list[Json], done: bool) -> Json:
        head = {"model": self._model, "created_at": moment()}
        return head | self._shape(content, thought, calls) | {"done": done}

    def _last(self) -> Json:
        """Waiting and loading count as time of the prompt."""
        ended_ns = time.monotonic_ns()
        first_ns = self._first_ns or ended_ns
        return self._frame("", "", [], True) | {
            "done_reason": "length" if self._finish == "length" else "stop",
            "total_duration": ended_ns - self._began_ns,
            "load_duration": 0,
            "prompt_eval_count": self._usage.get("prompt_tokens", 0),
            "prompt_eval_duration": first_ns - self._began_ns,
            "eval_count": self._usage.get("completion_tokens", 0),
            "eval_duration": max(1, ended_ns - first_ns),
        }


def called(call: Json, i: int) -> Json:
    function = {"index": i, "name": call["name"], "arguments": json.loads(call["arguments"] or "{}")}
    return {"id": call["id"], "function": function}


async def merged(answer: AsyncIterator[Json]) -> Json:
    """All objects of an answer as one. Raises HttpRefused."""
    texts: dict[str, list[str]] = {"content": [], "response": [], "thinking": []}
    lists: dict[str, list[Json]] = {"tool_calls": [], "logprobs": []}
    last: Json = {}
    async for last in answer:
        said = last.get("message", last)
        for key, found in texts.items():
            found.append(said.get(key, ""))
        lists["tool_calls"] += said.get("tool_calls", [])
        lists["logprobs"] += last.get("logprobs", [])
    said = last.get("message", last)
    said |= {key: whole for key, found in texts.items() if (whole := "".join(found)) or key in said}
    said |= {"tool_calls": lists["tool_calls"]} if lists["tool_calls"] else {}
    return last | ({"logprobs": lists["logprobs"]} if lists["logprobs"] else {})


async def parts(telling: Telling, first: bytes, lines: AsyncIterator[bytes]) -> AsyncIterator[Json]:
    """Raises HttpRefused."""
    if (part := telling.part(first)) is not None:
        yield part
    async for line in lines:
        if (part := telling.part(line)) is not None:
            yield part
    for part in telling.rest():
        yield part

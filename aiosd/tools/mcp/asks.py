"""What a server asks during a call: for words of the user, for an answer of his model, for his folders.

The first two go to the daemon as {"ask": N, "of": the call, "what": "elicit" or "sample", ...} and come back
as {"ask": N, "answer": ...}; {"withdrawn": N} says that nobody waits for it any more.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import anyio
from mcp import types
from mcp.client.session import ClientRequestContext
from pydantic import FileUrl

from aiosd.tools.mcp import mend
from aiosd.tools.mcp.content import Shown, add
from aiosd.tools.mcp.lines import say

REFUSED = types.INVALID_REQUEST


class Asks:
    def __init__(self, roots: list[str], calls: Mapping[int, object]) -> None:
        self._roots, self._calls = roots, calls
        self._numbers = itertools.count(1)
        self._waiting: dict[int, tuple[anyio.Event, list[Any]]] = {}

    def answer(self, number: int, answer: Any) -> None:
        if waiting := self._waiting.get(number):
            waiting[1].append(answer)
            waiting[0].set()

    async def _ask(self, what: str, **facts: Any) -> Any:
        """The daemon's answer; a text is why there is none. A server does not say for which of its running
        calls it asks: it is taken to be the last."""
        if not self._calls:
            return "no call is running that this could be asked for"
        number, event, answers = next(self._numbers), anyio.Event(), list[Any]()
        self._waiting[number] = event, answers
        try:
            say({"ask": number, "of": max(self._calls), "what": what, **mend.clean(facts)})
            await event.wait()
            return answers[0]
        finally:
            del self._waiting[number]
            if not answers:
                say({"withdrawn": number})

    async def elicit(
        self, context: ClientRequestContext, params: types.ElicitRequestParams
    ) -> types.ElicitResult | types.ErrorData:
        del context
        if isinstance(params, types.ElicitRequestFormParams):
            facts: dict[str, Any] = {"schema": params.requested_schema}
        else:
            facts = {"url": params.url}
        answer = await self._ask("elicit", message=params.message, **facts)
        if isinstance(answer, str):
            return types.ErrorData(code=REFUSED, message=answer)
        content = answer.get("content") if "schema" in facts else None
        return types.ElicitResult(action=answer["action"], content=content)

    async def sample(
        self, context: ClientRequestContext, params: types.CreateMessageRequestParams
    ) -> types.CreateMessageResult | types.ErrorData:
        del context
        if params.tools:
            return types.ErrorData(code=REFUSED, message="sampling with tools is not done here")
        body: dict[str, Any] = {
            "messages": [message(one) for one in params.messages],
            "max_tokens": params.max_tokens,
        }
        if params.system_prompt:
            body["messages"].insert(0, {"role": "system", "content": params.system_prompt})
        if params.temperature is not None:
            body["temperature"] = params.temperature
        if params.stop_sequences:
            body["stop"] = params.stop_sequences
        answer = await self._ask("sample", body=body)
        if isinstance(answer, str):
            return types.ErrorData(code=REFUSED, message=answer)
        return types.CreateMessageResult(
            role="assistant",
            content=types.TextContent(text=answer["text"]),
            model=answer["model"],
            stop_reason="maxTokens" if answer["finish_reason"] == "length" else "endTurn",
        )

    async def list_roots(self, context: ClientRequestContext) -> types.ListRootsResult:
        del context
        return types.ListRootsResult(
            roots=[types.Root(uri=FileUrl(f"file://{path}")) for path in self._roots]
        )


def message(one: types.SamplingMessage) -> dict[str, str]:
    shown = Shown()
    for part in one.content if isinstance(one.content, list) else [one.content]:
        add(shown, part.model_dump(by_alias=True, mode="json", exclude_none=True))
    return {"role": one.role, "content": shown.text.rstrip("\n")}

"""OpenAI's legacy completions: prompts that models continue as they are, without a chat template."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable
from typing import Any

from starlette.responses import JSONResponse, Response, StreamingResponse

from aiosd.gateway.client import first_of, together
from aiosd.gateway.dialect import HttpCall, failed, model_file
from aiosd.gateway.openai_chat import defaults, event_of, how_many, usable, wants_usage, written
from aiosd.gateway.openai_errors import shape
from aiosd.gateway.refused import HttpRefused

PROMPTS_MOST = 16  # with n: choices
TOKENS = 16  # OpenAI's default
TOP_MOST = 5

Json = dict[str, Any]


async def completions(call: HttpCall) -> Response:
    """One request of the files for each choice."""
    body = call.json()
    path, given, n, include_usage = (
        model_file(call.client, body.get("model"), "llm"), prompts(body), how_many(body), wants_usage(body),
    )  # fmt: skip
    if len(given) * n > PROMPTS_MOST:
        raise HttpRefused(
            400, f"a request has at most {PROMPTS_MOST} choices: prompts times n", param="prompt"
        )
    asked = asked_of(body, n)
    echo, top = given if body.get("echo") else [""] * len(given), asked.get("top_logprobs")
    bodies = [written(asked | {"prompt": prompt}, i) for prompt in given for i in range(n)]
    replies = [await call.client.ask(path, one) for one in bodies]
    texts = [Choice(i, echo[i // n], top) for i in range(len(bodies))]
    if not asked.get("stream"):
        return JSONResponse(whole([await reply.document() for reply in replies], texts, n))
    streams = [reply.lines() for reply in replies]
    first = await first_of(streams[0])
    if first.done():
        usable(first.result())
    sent = events(first, streams, texts, n, include_usage)
    return StreamingResponse(sent, media_type="text/event-stream")


def prompts(body: Json) -> list[str]:
    given = body.get("prompt")
    found = [given] if isinstance(given, str) else given
    if not isinstance(found, list) or not found:
        raise HttpRefused(400, "prompt must be a text or a list of texts", param="prompt")
    if not all(isinstance(text, str) for text in found):
        raise HttpRefused(400, "prompt has tokens in place of texts: send texts", param="prompt")
    return found


def asked_of(body: Json, n: int) -> Json:
    """The request for the file, without the prompt. Raises HttpRefused."""
    own = ("model", "prompt", "n", "stream_options", "echo", "suffix", "best_of", "logprobs")
    asked = {key: value for key, value in body.items() if key not in own and value is not None}
    logprobs, echo = body.get("logprobs"), body.get("echo")
    if not isinstance(echo, bool | None):
        raise HttpRefused(400, "echo must be true or false", param="echo")
    if body.get("suffix"):
        reason = "suffix: models here only continue a text; put what comes before and after into prompt"
        raise HttpRefused(400, reason, "unsupported_parameter", "suffix")
    if body.get("best_of") not in (None, n):
        reason = "best_of: answers are not compared here; ask for n with logprobs, and choose"
        raise HttpRefused(400, reason, "unsupported_parameter", "best_of")
    if logprobs is not None:
        if isinstance(logprobs, bool) or not isinstance(logprobs, int) or not 0 <= logprobs <= TOP_MOST:
            raise HttpRefused(400, f"logprobs is a number from 0 to {TOP_MOST}", param="logprobs")
        if echo:
            reason = "logprobs are of the answer's tokens, not of the prompt's: leave echo out"
            raise HttpRefused(400, reason, "unsupported_parameter", "logprobs")
        asked |= {"logprobs": True, "top_logprobs": logprobs}
    return {"max_tokens": TOKENS, "raw": True} | asked | defaults(asked | {"max_tokens": 1})


class Choice:
    """One text as it grows. `top`: how many likeliest tokens it tells with each token; None: no logprobs."""

    def __init__(self, index: int, echo: str, top: int | None) -> None:
        self._index, self._echo, self._top = index, echo, top
        self._offset = len(echo)

    def of(self, choice: Json) -> Json:
        """A choice of the chat API in the shape of this one."""
        said = choice.get("delta") or choice.get("message") or {}
        text, self._echo = self._echo + (said.get("content") or ""), ""
        logprobs = (choice.get("logprobs") or {}).get("content") or []
        return {
            "text": text,
            "index": self._index,
            "logprobs": None if self._top is None else self._told(logprobs),
            "finish_reason": choice.get("finish_reason"),
        }

    def _told(self, content: list[Json]) -> Json:
        offsets = list[int]()
        for one in content:
            offsets.append(self._offset)
            self._offset += len(one["token"])
        return {
            "tokens": [one["token"] for one in content],
            "token_logprobs": [one["logprob"] for one in content],
            "top_logprobs": [{t["token"]: t["logprob"] for t in one["top_logprobs"]} for one in content],
            "text_offset": offsets,
        }


def counted(usages: list[Json], n: int) -> Json:
    """A prompt counts once for its n choices."""
    prompt = sum(usage["prompt_tokens"] for usage in usages[::n])
    completion = sum(usage["completion_tokens"] for usage in usages)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def whole(documents: list[Json], texts: list[Choice], n: int) -> Json:
    for document in documents:
        if "error" in document:
            raise failed(document)
    choices = [text.of(document["choices"][0]) for document, text in zip(documents, texts, strict=True)]
    usage = counted([document["usage"] for document in documents], n)
    return documents[0] | {"object": "text_completion", "choices": choices, "usage": usage}


async def events(
    coming: Awaitable[bytes],
    streams: list[AsyncIterator[bytes]],
    texts: list[Choice],
    n: int,
    include_usage: bool,
) -> AsyncIterator[bytes]:
    usages = dict[int, Json]()
    try:
        first = usable(await coming)
        begun = json.loads(first)
        frame = {key: begun[key] for key in ("id", "created", "model")} | {"object": "text_completion"}
        async for i, line in together(first, streams):
            chunk = json.loads(line)
            if "error" in chunk:
                raise failed(chunk)
            if usage := chunk.get("usage"):
                usages[i] = usage
            yield event_of(frame | {"choices": [texts[i].of(choice) for choice in chunk["choices"]]})
        if include_usage:
            usage = counted([usages[i] for i in range(len(streams))], n)
            yield event_of(frame | {"choices": [], "usage": usage})
    except HttpRefused as refused:
        yield event_of({"error": shape(refused)})
    yield b"data: [DONE]\n\n"

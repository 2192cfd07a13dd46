"""OpenAI's chat completions. The JSON of the files is of this shape already, and its chunks too."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Awaitable
from typing import Any

from starlette.responses import JSONResponse, Response, StreamingResponse

from aiosd.gateway.client import Client, first_of, nothing, together
from aiosd.gateway.dialect import AGENT, HttpCall, chat_file, failed
from aiosd.gateway.openai_errors import shape
from aiosd.gateway.refused import HttpRefused

N_MOST = 16
SEEDS = 1 << 31
ENDLESS = 1 << 24  # tokens: until the model ends, or its context is full
IGNORED = "x-aios-ignored"  # header: what of the request had no effect

Json = dict[str, Any]


async def chat_completions(call: HttpCall) -> Response:
    body = call.json()
    path = chat_file(call.client, body.get("model"))
    asked = {key: value for key, value in body.items() if key not in ("model", "n", "stream_options")}
    asked |= {} if path.startswith("agents/") else defaults(asked)  # an agent has its own
    several, include_usage = how_many(body), wants_usage(body)
    replies = [await call.client.ask(path, written(asked, i)) for i in range(several)]
    if not asked.get("stream"):
        documents = [await reply.document() for reply in replies]
        return JSONResponse(one(documents), headers=await ignored(call.client, body))
    streams = [reply.lines() for reply in replies]
    first = await first_of(streams[0])
    if first.done():
        usable(first.result())
    headers = await ignored(call.client, body)
    return StreamingResponse(events(first, streams, include_usage), 200, headers, "text/event-stream")


def usable(first: bytes) -> bytes:
    """The first line of a stream, if it is a chunk. Raises HttpRefused."""
    if "error" in (chunk := json.loads(first or nothing())):
        raise failed(chunk)
    return first


async def ignored(client: Client, body: Json) -> dict[str, str]:
    """A header that names what the model's chat template does not know."""
    if body.get("reasoning_effort") is None:
        return {}
    try:
        model = str(body["model"])
        if model.startswith(AGENT):
            model = (await client.read(f"agents/{model.removeprefix(AGENT)}/model")).decode().strip()
        knows = json.loads(await client.read(f"models/{model}/info.json")).get("template_knows")
    except HttpRefused:  # it may ask the model, but not look at it
        return {}
    return {} if knows is None or "reasoning_effort" in knows else {IGNORED: "reasoning_effort"}


def how_many(body: Json) -> int:
    n = body.get("n")
    if n is None:
        return 1
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= N_MOST:
        raise HttpRefused(400, f"n is a number from 1 to {N_MOST}", param="n")
    return n


def wants_usage(body: Json) -> bool:
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise HttpRefused(400, "stream_options is an object", param="stream_options")
    return bool(options.get("include_usage"))


def defaults(asked: Json) -> Json:
    """OpenAI's, where those of the files are others."""
    limited = (asked.get("max_completion_tokens"), asked.get("max_tokens")) != (None, None)
    seed = {"seed": secrets.randbelow(SEEDS)} if asked.get("seed") is None else {}
    return seed if limited else seed | {"max_tokens": ENDLESS}


def written(asked: Json, i: int) -> bytes:
    """The request for the choice with number i: the same with the next seed."""
    seed = asked.get("seed") or 0
    if i and isinstance(seed, int):
        asked = asked | {"seed": seed + i}
    return json.dumps(asked).encode() + b"\n"


def one(documents: list[Json]) -> Json:
    """The answers to one request with n choices."""
    for document in documents:
        if "error" in document:
            raise failed(document)
    whole = documents[0]
    for i, document in enumerate(documents[1:], 1):
        whole["choices"] += [choice | {"index": i} for choice in document["choices"]]
        whole["usage"] = added(whole["usage"], document["usage"])
    return whole


def added(usage: Json, more: Json) -> Json:
    """The same prompt was asked each time, and counts once."""
    completion = usage["completion_tokens"] + more["completion_tokens"]
    return usage | {"completion_tokens": completion, "total_tokens": usage["prompt_tokens"] + completion}


async def events(
    coming: Awaitable[bytes], streams: list[AsyncIterator[bytes]], include_usage: bool
) -> AsyncIterator[bytes]:
    """The chunks as server-sent events. Usage comes in a chunk of its own, to whom asked for it."""
    usage: Json = {}
    try:
        first = usable(await coming)
        frame = {key: value for key, value in json.loads(first).items() if key not in ("choices", "usage")}
        async for i, line in together(first, streams):
            if i == 0 and b'"usage"' not in line and not line.startswith(b'{"error"'):
                yield b"data: " + line + b"\n"
                continue
            chunk = json.loads(line)
            if "error" in chunk:
                raise failed(chunk)
            if said := chunk.pop("usage", None):
                usage = added(usage, said) if usage else said
            choices = [choice | {"index": i} for choice in chunk["choices"]]
            yield event_of(chunk | {"id": frame["id"], "choices": choices})
        if include_usage:
            yield event_of(frame | {"choices": [], "usage": usage})
    except HttpRefused as refused:
        yield event_of({"error": shape(refused)})
    yield b"data: [DONE]\n\n"


def event_of(chunk: Json) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"

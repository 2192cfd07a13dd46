"""Ollama's /api/chat and /api/generate."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import Response, StreamingResponse

from aiosd.gateway.client import nothing
from aiosd.gateway.dialect import AGENT, HttpCall, chat_file, failed
from aiosd.gateway.ollama import names, request
from aiosd.gateway.ollama.answer import Shape, Telling, merged, moment, of_chat, of_generate, parts
from aiosd.gateway.refused import HttpRefused

NDJSON = "application/x-ndjson"
UNLOADED = ("absent", "failed", "pulling")
Json = dict[str, Any]


async def chat(call: HttpCall) -> Response:
    return await answered(call, request.chat, of_chat)


async def generate(call: HttpCall) -> Response:
    return await answered(call, request.generate, of_generate)


async def answered(call: HttpCall, translate: Callable[[Json, bool], Json], shape: Shape) -> Response:
    body = call.json()
    name, stream = names.given(body), request.flag(body, "stream", True)
    model = names.local(name)
    path, of_agent = chat_file(call.client, model), str(call.client.meant(model)).startswith(AGENT)
    if request.loads(body):
        reason = await loaded(call, path, request.load(body, of_agent))
        done = {"model": name, "created_at": moment(), **shape("", "", []), "done": True}
        return one(done | {"done_reason": reason}, stream)
    telling = Telling(name, shape)
    reply = await call.client.ask(path, request.written(translate(body, of_agent)).encode() + b"\n")
    lines = reply.lines()
    first = await anext(lines, b"") or nothing()
    if "error" in (chunk := json.loads(first)):
        raise failed(chunk)
    answer = parts(telling, first, lines)
    if stream:
        return StreamingResponse(streamed(answer), media_type=NDJSON)
    return one(await merged(answer), False)


async def loaded(call: HttpCall, path: str, asked: Json) -> str:
    """Load the model, or let it go. Return Ollama's word for it."""
    unload = asked.get("keep_alive") == 0
    if unload and path.startswith("models/"):
        state = (await call.client.read(path.removesuffix("llm") + "state")).decode()
        if state.startswith(UNLOADED):
            return "unload"
    document = await (await call.client.ask(path, request.written(asked).encode() + b"\n")).document()
    if "error" in document:
        raise failed(document)
    return "unload" if unload else "load"


def one(found: Json, stream: bool) -> Response:
    """The only object of an answer."""
    return Response(line(found), media_type=NDJSON if stream else "application/json")


async def streamed(answer: AsyncIterator[Json]) -> AsyncIterator[bytes]:
    try:
        async for part in answer:
            yield line(part)
    except HttpRefused as refused:
        yield line({"error": refused.reason})


def line(found: Json) -> bytes:
    return json.dumps(found).encode() + b"\n"

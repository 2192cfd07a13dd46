"""The dialect of OpenAI: its paths, and the list of models."""

from __future__ import annotations

import pwd
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import JSONResponse, Response

from aiosd.gateway import openai_conversations, openai_responses
from aiosd.gateway.client import Client, Listed
from aiosd.gateway.dialect import AGENT, Dialect, Endpoint, HttpCall, unknown
from aiosd.gateway.openai_chat import chat_completions
from aiosd.gateway.openai_completions import completions
from aiosd.gateway.openai_errors import refusal
from aiosd.gateway.openai_text import embeddings
from aiosd.gateway.refused import HttpRefused

Json = dict[str, Any]


async def models(call: HttpCall) -> Response:
    return JSONResponse({"object": "list", "data": [card async for card in cards(call.client)]})


async def model(call: HttpCall) -> Response:
    async for card in cards(call.client):
        if card["id"] == call.parts["model"]:
            return JSONResponse(card)
    raise unknown(call.parts["model"])


async def cards(client: Client) -> AsyncIterator[Json]:
    """The models and agents that the client may use."""
    if not client.agent:
        for entry in await client.list("models"):
            if entry.open:
                yield card(entry.name, entry)
    try:
        agents = await client.list("agents")
    except HttpRefused:  # who is not in the group aios cannot list them
        return
    for entry in agents:
        if entry.open and client.agent in ("", entry.name):
            yield card(AGENT + entry.name, entry)


def card(name: str, entry: Listed) -> Json:
    try:
        owner = pwd.getpwuid(entry.uid).pw_name
    except KeyError:
        owner = str(entry.uid)
    return {"id": name, "object": "model", "created": entry.changed_s, "owned_by": owner}


DIALECT = Dialect(
    "openai",
    (
        Endpoint("POST", "/v1/chat/completions", chat_completions),
        Endpoint("POST", "/v1/completions", completions),
        Endpoint("POST", "/v1/embeddings", embeddings),
        Endpoint("GET", "/v1/models", models),
        Endpoint("GET", "/v1/models/{model:path}", model),
        *openai_responses.ENDPOINTS,
        *openai_conversations.ENDPOINTS,
    ),
    refusal,
)

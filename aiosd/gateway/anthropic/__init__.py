"""The dialect of Anthropic's Messages API: its paths, and the list of models."""

from __future__ import annotations

import json
import secrets
from datetime import UTC, datetime
from typing import Any

from starlette.responses import Response, StreamingResponse

from aiosd.gateway.anthropic.answer import MessageShape, events, whole
from aiosd.gateway.anthropic.errors import header, refusal, request_id
from aiosd.gateway.anthropic.messages import wrong
from aiosd.gateway.anthropic.request import prompt, request, thinks, written
from aiosd.gateway.client import first_of
from aiosd.gateway.dialect import AGENT, Dialect, Endpoint, HttpCall, chat_file, failed, model_file, unknown
from aiosd.gateway.openai import cards
from aiosd.gateway.openai_chat import usable

VERSION = "anthropic-version"  # the header by which a client of Anthropic's is known
PAGE, PAGE_MOST = 20, 1000  # models

Json = dict[str, Any]


async def messages(call: HttpCall) -> Response:
    body = call.json()
    path = chat_file(call.client, body.get("model"))
    made = request(body, path.startswith("agents/"))
    asked = MessageShape(body["model"], thinks(body), made["max_tokens"])
    reply = await call.client.ask(path, written(made))
    if not made["stream"]:
        document = await reply.document()
        if "error" in document:
            raise failed(document)
        return documented(whole(document, asked), document["id"])
    lines = reply.lines()
    first = await first_of(lines)
    id = json.loads(usable(first.result()))["id"] if first.done() else secrets.token_hex(12)
    told = header(request_id(id))
    return StreamingResponse(events(first, lines, id, asked), 200, told, "text/event-stream")


async def count_tokens(call: HttpCall) -> Response:
    """How many tokens the model would read. The files count them with its chat template."""
    body = call.json()
    meant = call.client.meant(body.get("model"))
    if str(meant).startswith(AGENT):
        raise wrong("model", "must be a model: nobody counts for an agent, which has a conversation")
    path = model_file(call.client, meant, "tokenize")
    asked = {key: value for key, value in prompt(body, agent=False).items() if key != "parallel_tool_calls"}
    document = await (await call.client.ask(path, written(asked))).document()
    if "error" in document:
        raise failed(document)
    return documented({"input_tokens": document["count"]})


async def models(call: HttpCall) -> Response:
    found = [card(one) async for one in cards(call.client)]
    ids, query = [one["id"] for one in found], call.query
    limit = query.get("limit") or str(PAGE)
    if not limit.isdecimal() or not 1 <= int(limit[:6]) <= PAGE_MOST:
        raise wrong("limit", f"must be a number from 1 to {PAGE_MOST}")
    size, before, after = int(limit), query.get("before_id"), query.get("after_id")
    if before in ids:
        left = found[: ids.index(before)]
        page = left[-size:]
    else:
        left = found[ids.index(after) + 1 :] if after in ids else found
        page = left[:size]
    ends = (
        {"first_id": page[0]["id"], "last_id": page[-1]["id"]}
        if page
        else {"first_id": None, "last_id": None}
    )
    return documented({"data": page, "has_more": len(left) > len(page), **ends})


async def model(call: HttpCall) -> Response:
    wanted = call.client.meant(call.parts["model"])
    async for one in cards(call.client):
        if one["id"] == wanted:
            return documented(card(one))
    raise unknown(call.parts["model"])


def card(known: Json) -> Json:
    """A model as Anthropic shows it, from OpenAI's card."""
    created = datetime.fromtimestamp(known["created"], UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    id = known["id"]
    return {"type": "model", "id": id, "display_name": id, "created_at": created, "lifecycle": "active"}


def documented(document: Json, id: str = "") -> Response:
    headers = header(request_id(id or secrets.token_hex(12)))
    return Response(json.dumps(document), headers=headers, media_type="application/json")


DIALECT = Dialect(
    "anthropic",
    (
        Endpoint("POST", "/v1/messages", messages),
        Endpoint("POST", "/v1/messages/count_tokens", count_tokens),
        Endpoint("GET", "/v1/models", models, VERSION),
        Endpoint("GET", "/v1/models/{model:path}", model, VERSION),
    ),
    refusal,
)

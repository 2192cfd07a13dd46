"""OpenAI's Conversations API: a conversation is a context of the user, whichever way it was made."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

from starlette.datastructures import QueryParams
from starlette.responses import JSONResponse, Response

from aiosd.gateway.client import Client
from aiosd.gateway.dialect import NAME, Endpoint, HttpCall
from aiosd.gateway.openai_input import items_of, messages, metadata
from aiosd.gateway.refused import HttpRefused

ITEMS_MOST = 100  # of one page

Json = dict[str, Any]


def context_name(client: Client, given: object, status: int = 400) -> str:
    """The context that a request names. Raises HttpRefused."""
    name = given.get("id") if isinstance(given, dict) else given
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise HttpRefused(status, "a conversation is the name of one of your contexts", param="conversation")
    if client.agent:
        raise HttpRefused(403, "this key may use only its agent's conversation", param="conversation")
    return name


async def create(call: HttpCall) -> Response:
    body = call.json() if call.body else {}
    metadata(body)
    said = messages(body["items"]) if body.get("items") else []
    id = context_name(call.client, f"conv_{secrets.token_hex(20)}")
    await call.client.make(f"contexts/{id}")
    await append(call.client, id, said)
    return await noted(
        call.client, id, {"created_at": int(time.time()), "metadata": body.get("metadata") or {}}
    )


async def retrieve(call: HttpCall) -> Response:
    id = context_name(call.client, call.parts["id"], 404)
    return JSONResponse(shown(id, await note_of(call.client, id)))


async def update(call: HttpCall) -> Response:
    body, id = call.json(), context_name(call.client, call.parts["id"], 404)
    metadata(body)
    note = await note_of(call.client, id)
    return await noted(call.client, id, note | {"metadata": body.get("metadata") or {}})


async def delete(call: HttpCall) -> Response:
    id = context_name(call.client, call.parts["id"], 404)
    await call.client.remove(f"contexts/{id}")
    return JSONResponse({"id": id, "object": "conversation.deleted", "deleted": True})


async def list_items(call: HttpCall) -> Response:
    id = context_name(call.client, call.parts["id"], 404)
    return page(items_of(await said_in(call.client, id), id), call.query)


async def add_items(call: HttpCall) -> Response:
    id, said = context_name(call.client, call.parts["id"], 404), messages(call.json().get("items"))
    before = len(items_of(await said_in(call.client, id), id))
    await append(call.client, id, said)
    added = items_of(await said_in(call.client, id), id)[before:]
    return page(added, QueryParams(order="asc", limit=str(ITEMS_MOST)))


async def note_of(client: Client, id: str) -> Json:
    """What the API keeps of a conversation. The context may have another note, or none."""
    try:
        found = json.loads(await client.read(f"contexts/{id}/note"))
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}


async def noted(client: Client, id: str, note: Json) -> Response:
    await client.write(f"contexts/{id}/note", json.dumps(note).encode())
    return JSONResponse(shown(id, note))


def shown(id: str, note: Json) -> Json:
    facts = {"created_at": note.get("created_at", 0), "metadata": note.get("metadata", {})}
    return {"id": id, "object": "conversation", **facts}


async def append(client: Client, id: str, said: list[Json]) -> None:
    if said:
        lines = "".join(json.dumps(one) + "\n" for one in said)
        await client.write(f"contexts/{id}/messages.jsonl", lines.encode())


async def said_in(client: Client, id: str) -> list[Json]:
    return [json.loads(line) for line in (await client.read(f"contexts/{id}/messages.jsonl")).splitlines()]


def page(items: list[Json], query: QueryParams) -> Response:
    """A part of a list as `order`, `after` and `limit` ask for it."""
    if query.get("order", "desc") == "desc":
        items = items[::-1]
    ids, after, limit = [one["id"] for one in items], query.get("after"), query.get("limit", "")
    start = ids.index(after) + 1 if after in ids else 0
    most = min(int(limit), ITEMS_MOST) if limit.isascii() and limit.isdecimal() and len(limit) < 9 else 20
    part = items[start : start + most]
    ends = {"first_id": part[0]["id"], "last_id": part[-1]["id"]} if part else {}
    more = start + len(part) < len(items)
    return JSONResponse({"object": "list", "data": part, "has_more": more, **ends})


ENDPOINTS = (
    Endpoint("POST", "/v1/conversations", create),
    Endpoint("GET", "/v1/conversations/{id}", retrieve),
    Endpoint("POST", "/v1/conversations/{id}", update),
    Endpoint("DELETE", "/v1/conversations/{id}", delete),
    Endpoint("GET", "/v1/conversations/{id}/items", list_items),
    Endpoint("POST", "/v1/conversations/{id}/items", add_items),
)

"""OpenAI's Responses API: requests whose conversation is kept. The model's answer comes from a chat file."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import JSONResponse, Response, StreamingResponse

from aiosd.gateway import openai_stored
from aiosd.gateway.client import Client, Reply, nothing
from aiosd.gateway.dialect import NAME, HttpCall, chat_file, failed
from aiosd.gateway.openai_chat import defaults
from aiosd.gateway.openai_input import chat_of, items_of, typed
from aiosd.gateway.openai_output import GrowingResponse, begun
from aiosd.gateway.openai_stored import new_id
from aiosd.gateway.refused import HttpRefused

ITEMS_MOST = 100

Json = dict[str, Any]


async def create(call: HttpCall) -> Response:
    body = call.json()
    path = chat_file(call.client, body.get("model"))
    asked = chat_of(body)
    asked |= {} if path.startswith("agents/") else defaults(asked)  # an agent has its own
    turn = Turn(call.client, path, body)
    call.client.at_end(turn.end)
    await turn.begin()
    reply = await call.client.ask(path, json.dumps(asked | turn.context).encode() + b"\n")
    growing = GrowingResponse(begun(turn.id, body, turn.stored))
    if not asked.get("stream"):
        await answered(turn, reply, growing)
        return JSONResponse(growing.response)
    lines = reply.lines()
    first = json.loads(await anext(lines, b"") or nothing())
    if "error" in first:
        raise failed(first)
    return StreamingResponse(events(turn, growing, first, lines), media_type="text/event-stream")


class Turn:
    """The place of one response in its conversation."""

    def __init__(self, client: Client, path: str, body: Json) -> None:
        self._client, self._path, self._body = client, path, body
        self._made = False  # it has a context of its own, which is not wanted yet
        self.id, self.stored = new_id(), False
        self.context: Json = {}  # of the request

    async def begin(self) -> None:
        """Make the context, where there is something to keep or to continue. Raises HttpRefused."""
        wanted, previous = typed(self._body, "store", bool), typed(self._body, "previous_response_id", str)
        if self._body.get("conversation"):
            if previous:
                reason = "conversation and previous_response_id are two ways to say the same"
                raise HttpRefused(400, reason, param="conversation")
            self.context = {"context": conversation(self._client, self._body["conversation"])}
            return
        if previous:
            await openai_stored.find(self._client, previous, 400)
        elif wanted is False or await self._has_context():
            return
        self._made = True
        try:
            await openai_stored.begin(self._client, self.id, previous or None)
        except HttpRefused as refused:
            self._made = False
            if refused.status != 403 or previous or wanted:
                raise
            return  # who may make no contexts still gets answers
        self.stored, self.context = wanted is not False, {"context": self.id}

    async def _has_context(self) -> bool:
        """Whether the agent keeps a conversation of its own."""
        folder, _, _ = self._path.partition("/syscall/")
        if not folder.startswith("agents/"):
            return False
        try:
            return bool((await self._client.read(f"{folder}/context")).strip())
        except HttpRefused as refused:
            if refused.status != 403:
                raise
            return False

    async def keep(self, response: Json) -> None:
        """Store the complete response, if that is wanted."""
        if self.stored:
            response["store"] = await openai_stored.keep(self._client, response)
            self._made = not response["store"]

    def end(self) -> None:
        """Leave nothing of a response that was not kept."""
        if self._made:
            self._made = False
            openai_stored.drop(self._client, self.id)


def conversation(client: Client, given: object) -> str:
    """The name of the context that a request names. Raises HttpRefused."""
    name = given.get("id") if isinstance(given, dict) else given
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise HttpRefused(400, "conversation is the name of one of your contexts", param="conversation")
    if client.agent:
        raise HttpRefused(403, "this key may use only its agent's conversation", param="conversation")
    return name


async def answered(turn: Turn, reply: Reply, growing: GrowingResponse) -> None:
    document = await reply.document()
    if "error" in document:
        raise failed(document)
    choice = document["choices"][0]
    for _ in (*growing.push(choice), *growing.end(choice["finish_reason"], document["usage"])):
        pass
    await turn.keep(growing.response)


async def events(
    turn: Turn, growing: GrowingResponse, first: Json, lines: AsyncIterator[bytes]
) -> AsyncIterator[bytes]:
    try:
        for event in growing.begin():
            yield event
        chunk, finish, usage = first, "", None
        while True:
            for choice in chunk["choices"]:
                for event in growing.push(choice):
                    yield event
                finish = choice.get("finish_reason") or finish
            usage = chunk.get("usage") or usage
            if not (line := await anext(lines, b"")):
                break
            chunk = json.loads(line)
            if "error" in chunk:
                raise failed(chunk)
        for event in growing.end(finish, usage or nothing()):
            yield event
        await turn.keep(growing.response)
    except HttpRefused as refused:
        growing.fail(refused.reason)
    yield growing.last()


async def retrieve(call: HttpCall) -> Response:
    return JSONResponse(await openai_stored.find(call.client, call.parts["id"]))


async def delete(call: HttpCall) -> Response:
    found = await openai_stored.find(call.client, call.parts["id"])
    await call.client.remove(f"contexts/{call.parts['id']}")
    return JSONResponse({"id": found["id"], "object": "response", "deleted": True})


async def input_items(call: HttpCall) -> Response:
    """The conversation before the answer."""
    id = call.parts["id"]
    await openai_stored.find(call.client, id)
    said = (await call.client.read(f"contexts/{id}/messages.jsonl")).splitlines()
    items = items_of([json.loads(line) for line in said[:-1]], id)
    if call.query.get("order", "desc") == "desc":
        items.reverse()
    ids, after, most = [one["id"] for one in items], call.query.get("after"), call.query.get("limit", "20")
    start = ids.index(after) + 1 if after in ids else 0
    page = items[start : start + min(int(most) if most.isdecimal() else 20, ITEMS_MOST)]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {}
    more = start + len(page) < len(items)
    return JSONResponse({"object": "list", "data": page, "has_more": more, **ends})

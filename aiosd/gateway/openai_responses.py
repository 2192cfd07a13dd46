"""OpenAI's Responses API: requests whose conversation is kept. The model's answer comes from a chat file."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable
from typing import Any

from starlette.responses import JSONResponse, Response, StreamingResponse

from aiosd.gateway import openai_stored
from aiosd.gateway.client import Client, Reply, first_of, nothing
from aiosd.gateway.dialect import Endpoint, HttpCall, chat_file, failed
from aiosd.gateway.openai_chat import defaults, usable
from aiosd.gateway.openai_conversations import context_name, page, said_in
from aiosd.gateway.openai_input import chat_of, items_of, typed
from aiosd.gateway.openai_output import GrowingResponse, begun
from aiosd.gateway.openai_stored import new_id
from aiosd.gateway.refused import HttpRefused

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
    first = await first_of(lines)
    if first.done():
        usable(first.result())
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
            self.context = {"context": context_name(self._client, self._body["conversation"])}
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


async def answered(turn: Turn, reply: Reply, growing: GrowingResponse) -> None:
    document = await reply.document()
    if "error" in document:
        raise failed(document)
    choice = document["choices"][0]
    for _ in (*growing.push(choice), *growing.end(choice["finish_reason"], document["usage"])):
        pass
    await turn.keep(growing.response)


async def events(
    turn: Turn, growing: GrowingResponse, coming: Awaitable[bytes], lines: AsyncIterator[bytes]
) -> AsyncIterator[bytes]:
    try:
        for event in growing.begin():
            yield event
        line, finish = await coming, ""
        usage: Json = {}
        while line:
            chunk = json.loads(usable(line))
            for choice in chunk["choices"]:
                for event in growing.push(choice):
                    yield event
                finish = choice.get("finish_reason") or finish
            usage = chunk.get("usage") or usage
            line = await anext(lines, b"")
        for event in growing.end(finish, usage or nothing()):
            yield event
        await turn.keep(growing.response)
    except HttpRefused as refused:
        growing.fail(refused.reason)
    yield growing.last()


async def retrieve(call: HttpCall) -> Response:
    return JSONResponse(await openai_stored.find(call.client, call.parts["id"]))


async def delete(call: HttpCall) -> Response:
    id = call.parts["id"]
    await openai_stored.find(call.client, id)
    await call.client.remove(f"contexts/{id}")
    return JSONResponse({"id": id, "object": "response", "deleted": True})


async def input_items(call: HttpCall) -> Response:
    """The conversation before the answer."""
    id = call.parts["id"]
    await openai_stored.find(call.client, id)
    return page(items_of((await said_in(call.client, id))[:-1], id), call.query)


ENDPOINTS = (
    Endpoint("POST", "/v1/responses", create),
    Endpoint("GET", "/v1/responses/{id}", retrieve),
    Endpoint("DELETE", "/v1/responses/{id}", delete),
    Endpoint("GET", "/v1/responses/{id}/input_items", input_items),
)

"""Ollama's /api/pull: a pull of the model store, by the user's own rights, told as it goes on."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import JSONResponse, Response, StreamingResponse

from aiosd.gateway.client import Client
from aiosd.gateway.dialect import HttpCall, model_file
from aiosd.gateway.ollama import names, request
from aiosd.gateway.ollama.completions import NDJSON, streamed
from aiosd.gateway.refused import HttpRefused

LOOK_S = 0.2
MB = 10**6
Json = dict[str, Any]
CANCELLING = set[asyncio.Task[None]]()


async def pull(call: HttpCall) -> Response:
    body = call.json()
    name, stream = names.given(body), request.flag(body, "stream", True)
    source, model = names.source(name), names.local(name)
    model_file(call.client, model, "ctl")
    made = await begun(call.client, model, source)
    lines = progress(call.client, model, source, made)
    if stream:
        return StreamingResponse(streamed(lines), media_type=NDJSON)
    return JSONResponse([line async for line in lines][-1])


async def begun(client: Client, model: str, source: str) -> bool:
    """Begin the pull, or refuse it. Return whether the model is new."""
    folder, made = f"models/{model}", False
    try:
        info = await information(client, model)
    except HttpRefused as refused:
        if refused.status != 404:
            raise
        await client.make(folder)
        made = True
    else:
        if info.get("source") != source and info.get("path") != ".":
            reason = f"model {model} is there already, from {info.get('source') or 'this machine'}"
            raise HttpRefused(409, f"{reason}; DELETE /api/delete removes it") from None
    try:
        await client.write(f"{folder}/ctl", f"pull {source}\n".encode())
    except HttpRefused:
        if made:
            await client.remove(folder)
        raise
    return made


async def progress(client: Client, model: str, source: str, made: bool) -> AsyncIterator[Json]:
    """Follow the pull to its end. When the program goes away, the pull is cancelled, and can go on later."""
    shown, ended = Json(), False
    yield {"status": "pulling manifest"}
    try:
        while "pulling" in (info := await information(client, model)):
            if (line := step(str(info["pulling"]), source)) != shown:
                shown = line
                yield line
            await asyncio.sleep(LOOK_S)
        ended = True
    finally:
        if not ended:
            task = asyncio.create_task(cancelled(client, model))
            CANCELLING.add(task)
            task.add_done_callback(CANCELLING.discard)
    if info.get("error") and info.get("state") != "ready":
        if made and not info.get("files"):  # there is nothing with which another pull could go on
            await client.remove(f"models/{model}")
        raise HttpRefused(500, str(info["error"]))
    yield {"status": "success"}


async def information(client: Client, model: str) -> Json:
    found: Json = json.loads(await client.read(f"models/{model}/info.json"))
    return found


async def cancelled(client: Client, model: str) -> None:
    try:
        await client.write(f"models/{model}/ctl", b"cancel\n")
    except HttpRefused:  # it has ended, or is removed
        return


def step(said: str, source: str) -> Json:
    """12/94 MB, or "unpacks 12/98 MB", or "checks", as a line of Ollama's."""
    found = re.fullmatch(r"(?:(\w+) )?(\d+)/(\d+) MB", said)
    if found is None:
        return {"status": "verifying sha256 digest" if said == "checks" else "pulling manifest"}
    digest = "sha256:" + hashlib.sha256(f"{source} {found[1] or ''}".encode()).hexdigest()  # one for each bar
    status = f"pulling {digest[7:19]}" if found[1] is None else f"{found[1]} {digest[7:19]}"
    return {"status": status, "digest": digest, "total": int(found[3]) * MB, "completed": int(found[2]) * MB}

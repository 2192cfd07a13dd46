"""Stored responses: contexts of the user in the tree, each with its response object as the note.

A response has a context of its own, which is named by its id and ends with its answer. What continues a
response forks its context. So any number of responses may continue the same one.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from aiosd.gateway.client import Client
from aiosd.gateway.refused import HttpRefused

Json = dict[str, Any]

ID = re.compile(r"resp_[0-9a-f]{40}")
KEPT_MOST = 1000  # of one user
KEPT_S = 30 * 86400
SWEPT_EACH = 32  # stored responses, on average
SWEPT_MOST = 500  # at once


def new_id() -> str:
    """An id begins with its time, so that the oldest come first in the order of names."""
    return f"resp_{int(time.time()):08x}{secrets.token_hex(16)}"


async def find(client: Client, id: object, status: int = 404) -> Json:
    """The response object. Whatever the user may not see does not exist. Raises HttpRefused."""
    if isinstance(id, str) and ID.fullmatch(id):
        with suppress(ValueError):
            try:
                found = json.loads(await client.read(f"contexts/{id}/note"))
            except HttpRefused as refused:
                if refused.status not in (403, 404):
                    raise
                found = None
            if isinstance(found, dict):
                return found
    shown = str(id)[:60]
    code, param = ("previous_response_not_found", "previous_response_id") if status == 400 else (None, None)
    raise HttpRefused(status, f"there is no response {shown}", code, param)


async def begin(client: Client, id: str, previous: str | None) -> None:
    """Make the context of a new response. Raises HttpRefused."""
    if previous is None:
        await client.make(f"contexts/{id}")
    else:
        await client.write(f"contexts/{previous}/ctl", f"fork {id}\n".encode())


async def keep(client: Client, response: Json) -> bool:
    """Store a complete response. False: the daemon does not take it."""
    try:
        await client.write(f"contexts/{response['id']}/note", json.dumps(response).encode())
    except HttpRefused:
        return False
    if secrets.randbelow(SWEPT_EACH) == 0:
        meanwhile(sweep(client))
    return True


def drop(client: Client, id: str) -> None:
    """Remove the context of a response that nobody will ask for. The request may have been cancelled."""
    meanwhile(client.remove(f"contexts/{id}"))


async def sweep(client: Client) -> None:
    """Remove the user's responses that are too old or too many."""
    entries = await client.list("contexts")
    mine = sorted((e.name for e in entries if e.uid == client.uid and ID.fullmatch(e.name)), reverse=True)
    oldest = f"resp_{int(time.time() - KEPT_S):08x}"
    doomed = [name for i, name in enumerate(mine) if i >= KEPT_MOST or name < oldest]
    for name in doomed[-SWEPT_MOST:]:
        await client.remove(f"contexts/{name}")


RUNNING = set[asyncio.Task[None]]()


def meanwhile(work: Coroutine[Any, Any, None]) -> None:
    """Do it although the request ends now. A failure leaves what a later sweep removes."""

    async def quietly() -> None:
        with suppress(HttpRefused):
            await work

    task = asyncio.get_running_loop().create_task(quietly())
    RUNNING.add(task)
    task.add_done_callback(RUNNING.discard)

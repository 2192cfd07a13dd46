"""What a server has: its tools, resources and prompts, as the daemon keeps them."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from mcp import Client, MCPError

from aiosd.tools.mcp import mend

PAGES = 100
MOST = 256  # of each


async def catalogue(client: Client) -> dict[str, Any]:
    """A server need not have resources or prompts, and the tools count without them."""
    has = client.server_capabilities
    found: dict[str, Any] = {"tools": await pages(client.list_tools, "tools", tool)}
    for key, there, ask, make in (
        ("resources", has.resources, client.list_resources, resource),
        ("prompts", has.prompts, client.list_prompts, prompt),
    ):
        found[key] = []
        if there is not None:
            with suppress(MCPError):
                found[key] = await pages(ask, key, make)
    return found


async def pages(
    ask: Callable[..., Awaitable[Any]], key: str, make: Callable[[dict[str, Any]], dict[str, Any]]
) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    cursor = None
    for _ in range(PAGES):
        page = await ask(cursor=cursor)
        found += [make(mend.said(one)) for one in getattr(page, key)]
        cursor = page.next_cursor
        if cursor is None or len(found) > MOST:
            break
    return found[:MOST]


def tool(raw: dict[str, Any]) -> dict[str, Any]:
    hints, runs = (raw[key] if isinstance(raw.get(key), dict) else {} for key in ("annotations", "execution"))
    found = {
        "name": raw.get("name"),
        "description": raw.get("description") or raw.get("title") or raw.get("name"),
        "schema": json.dumps(raw.get("inputSchema") or {"type": "object"}),
        "read_only": hints.get("readOnlyHint") is True,
        "destructive": hints.get("destructiveHint") is not False,
        "as_task": runs.get("taskSupport") == "required",
    }
    output = raw.get("outputSchema")
    return {**found, "output": json.dumps(output)} if isinstance(output, dict) else found


def resource(raw: dict[str, Any]) -> dict[str, Any]:
    named = {key: text(raw.get(key)) for key in ("uri", "name", "description")}
    return {**named, "type": text(raw.get("mimeType"))}


def prompt(raw: dict[str, Any]) -> dict[str, Any]:
    given = raw.get("arguments")
    arguments = [
        {
            "name": text(one.get("name")),
            "description": text(one.get("description")),
            "required": one.get("required") is True,
        }
        for one in (given if isinstance(given, list) else [])
        if isinstance(one, dict)
    ]
    about = text(raw.get("description") or raw.get("title") or raw.get("name"))
    return {"name": text(raw.get("name")), "description": about, "arguments": arguments}


def text(value: object) -> str:
    return value if isinstance(value, str) else ""

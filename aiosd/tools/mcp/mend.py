"""What a server says, made fit for the SDK, which refuses a whole answer for one mistake in it.

Lists and results go through the SDK as hulls that it accepts; what the server really said is in their
`_meta`, and is read from there piece by piece. Pure.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from mcp import types
from mcp.shared.message import SessionMessage
from pydantic import ValidationError

SAID = "aiosd/said"  # the key in `_meta`
CAPABILITIES = ("tools", "resources", "prompts", "logging", "completions")


def message(item: Any) -> Any:
    """A message of the transport, or the exception that it made of a line, as the SDK can use it."""
    if isinstance(item, Exception):
        item = reread(item)
    if isinstance(item, SessionMessage) and isinstance(item.message, types.JSONRPCResponse):
        item.message.result = hull(item.message.result)
    return item


def said(hulled: Any) -> dict[str, Any]:
    """What the server said of a tool, a result and the like."""
    meta = hulled.meta or {}
    return dict(meta.get(SAID) or {})


def reread(error: Exception) -> Any:
    """A line that Python can read as JSON although it is none (half a character); or an answer that is not in
    the form of the protocol, which fails its request instead of leaving it without an end."""
    if not isinstance(error, ValidationError):
        return error
    line = error.errors()[0]["input"]
    try:
        raw = json.loads(line) if isinstance(line, str) else line
    except (ValueError, RecursionError):
        return error
    if not isinstance(raw, dict):
        return error
    try:
        return SessionMessage(types.jsonrpc_message_adapter.validate_python(clean(raw), by_name=False))
    except ValidationError:
        id = raw.get("id")
        if "method" in raw or isinstance(id, bool) or not isinstance(id, (int, str)):
            return error
        why = types.ErrorData(code=types.PARSE_ERROR, message="the server's answer is not in the form of MCP")
        return SessionMessage(types.JSONRPCError(jsonrpc="2.0", id=id, error=why))


def line_of(error: Exception) -> str:
    """The line that is no message, for people."""
    line = error.errors()[0]["input"] if isinstance(error, ValidationError) else str(error)
    return "".join(c if c.isprintable() else " " for c in str(line)).strip()


def clean(value: Any) -> Any:
    """Without what JSON or UTF-8 cannot say: NaN and infinities are null, half characters are `?`."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [clean(one) for one in value]
    if isinstance(value, dict):
        return {clean(key): clean(one) for key, one in value.items()}
    return value


def hull(result: Mapping[str, Any]) -> dict[str, Any]:
    """The result of a request, by its shape."""
    found: dict[str, Any] = clean(dict(result))
    if "protocolVersion" in found:
        return found | greeting(found)
    if "inputRequests" in found:
        return found
    kept = {"_meta": {SAID: found}, **({"resultType": found["resultType"]} if "resultType" in found else {})}
    if "content" in found or "structuredContent" in found:
        # the SDK does not judge an error by the tool's output schema; whether it is one is in what was said
        return {"content": [], "isError": True, **kept}
    if "messages" in found:
        return {"messages": [], **kept}
    for key, make in LISTED.items():
        if isinstance(found.get(key), list):
            found[key] = [make(one) | {"_meta": {SAID: one}} for one in found[key] if isinstance(one, dict)]
    return found


def greeting(raw: dict[str, Any]) -> dict[str, Any]:
    given, server = raw.get("capabilities"), raw.get("serverInfo")
    given = given if isinstance(given, dict) else {}
    server = server if isinstance(server, dict) else {}
    named = {key: str(server.get(key) or "?")[:200] for key in ("name", "version")}
    offered = {key: flags(given[key]) for key in CAPABILITIES if isinstance(given.get(key), dict)}
    return {"capabilities": offered, "serverInfo": named, "instructions": ""}


def flags(raw: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if isinstance(value, bool)}


def tool(raw: dict[str, Any]) -> dict[str, Any]:
    schema = raw.get("inputSchema")
    mirrored = isinstance(schema, dict) and "x-mcp-header" in json.dumps(schema)
    return {"name": str(raw.get("name")), "inputSchema": schema if mirrored else {"type": "object"}}


def resource(raw: dict[str, Any]) -> dict[str, Any]:
    return {"name": str(raw.get("name")), "uri": str(raw.get("uri"))}


def template(raw: dict[str, Any]) -> dict[str, Any]:
    return {"name": str(raw.get("name")), "uriTemplate": str(raw.get("uriTemplate"))}


def prompt(raw: dict[str, Any]) -> dict[str, Any]:
    return {"name": str(raw.get("name"))}


def contents(raw: dict[str, Any]) -> dict[str, Any]:
    return {"uri": str(raw.get("uri") or "?"), "text": ""}


LISTED: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "tools": tool,
    "resources": resource,
    "resourceTemplates": template,
    "prompts": prompt,
    "contents": contents,
}

"""MCP servers, as [mcp.NAME] of the configuration says: what they are, and what their sessions may.

Pure: starts and asks nothing. Sessions are in aiosd.tools.mcp.sessions, their tools in
aiosd.tools.mcp.listing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

NAME = r"^[A-Za-z0-9_-]{1,32}$"  # no dot: SERVER.TOOL is read one way
PORTS = {"http": 80, "https": 443}
TEXT = {"type": "string"}
PATHS = {"type": "array", "items": {"type": "string", "pattern": "^/"}}
SECONDS = {"type": "number", "exclusiveMinimum": 0, "maximum": 86400}
COUNT = {"type": "integer", "minimum": 1}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "command": {"type": "array", "items": TEXT, "minItems": 1},
        "env": {"type": "object", "additionalProperties": TEXT},
        "url": {"type": "string", "pattern": r"^https?://[^/?#@\s]+"},
        "headers": {
            "type": "object",
            "propertyNames": {"pattern": r"^[A-Za-z0-9-]+$"},
            "additionalProperties": {"type": "string", "pattern": r"^[ -~]*$"},
        },
        "token_command": {"type": "array", "items": TEXT, "minItems": 1},
        "credentials": {
            "type": "array",
            "items": {"type": "string", "pattern": r"^(?!\.)[A-Za-z0-9._-]{1,64}$"},
        },
        "read": PATHS,
        "write": PATHS,
        "network": {"type": "array", "items": TEXT},
        "start_s": SECONDS,
        "timeout_s": SECONDS,
        "idle_s": SECONDS,
        "limit": COUNT,
        "memory_bytes": COUNT,
        "irreversible": {"type": ["boolean", "array"], "items": TEXT},
    },
}


@dataclass(frozen=True)
class Server:
    name: str
    command: tuple[str, ...] = ()  # of a stdio server
    env: tuple[tuple[str, str], ...] = ()
    url: str = ""  # of one that is reached by streamable HTTP
    headers: tuple[tuple[str, str], ...] = ()  # of each request there; ${NAME} is a credential
    token_command: tuple[str, ...] = ()  # prints the bearer token
    credentials: tuple[str, ...] = ()  # names of secrets that its sessions are given
    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    network: tuple[str, ...] = ()  # "host:port"
    start_s: float = 60.0  # until it answers for the first time
    timeout_s: float = 60.0  # of a call
    idle_s: float = 300.0  # a session that was not used for so long ends
    limit: int = 4  # calls of one tool at once
    memory_bytes: int = 1 << 30  # of a session
    irreversible: bool | tuple[str, ...] | None = None  # None: as the server's annotations say

    @property
    def reached(self) -> tuple[str, ...]:
        """What its sessions may connect to."""
        return (*self.network, address(self.url)) if self.url else self.network


def address(url: str) -> str:
    """ "host:port" of it. Raises ValueError."""
    parts = urlsplit(url)
    return f"{parts.hostname}:{parts.port or PORTS[parts.scheme]}"


def server(name: str, table: Mapping[str, Any]) -> Server:
    """Of a table that fits SCHEMA. Raises ValueError."""
    if ("command" in table) == ("url" in table):
        raise ValueError("a server has either a command or a url")
    if "url" in table:
        address(table["url"])
        if "token_command" not in table and table.keys() & {"env", "read", "write"}:
            raise ValueError("env, read and write are of a server with a command or a token_command")
    elif wrong := table.keys() & {"headers", "token_command"}:
        raise ValueError(f"{min(wrong)} is of a server with a url")
    named = set(re.findall(r"\$\{([^}]*)\}", " ".join(table.get("headers", {}).values())))
    if unknown := named - set(table.get("credentials", ())):
        raise ValueError(f"headers name the credential {min(unknown)!r}, which credentials does not list")
    facts: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in table.items()
    }
    for key in ("env", "headers"):
        facts[key] = tuple(sorted(table.get(key, {}).items()))
    return Server(name, **facts)

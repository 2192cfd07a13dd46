"""The names of AIOS in the tree. There an author and a slash stand before the names of agents and tools.

In the tree the names of agents belong to the whole machine, and in AIOS to one program. So an agent of
another user never counts, even if it is open: its owner would read what this user asks.
"""

from __future__ import annotations

import re

from aiosd.gateway.aios_errors import wrong
from aiosd.gateway.client import Client
from aiosd.gateway.dialect import AGENT, NAME, another
from aiosd.gateway.refused import HttpRefused

CUT = 53  # characters of a name, with a dot and a uid behind
STRANGE = re.compile(r"[^A-Za-z0-9._-]")


def flat(name: str) -> str:
    return name.replace("/", "__")


async def agent_of(client: Client, name: object) -> str:
    """The user's own agent for a name of AIOS; it is made where there is none. Raises HttpRefused."""
    if not isinstance(name, str) or not name:
        raise wrong("agent_name", "the name of the agent is missing")
    if name.startswith(AGENT):  # this very agent, though it may be another user's
        made = name.removeprefix(AGENT)
    else:
        made = STRANGE.sub("_", flat(name))
    if not NAME.fullmatch(made):
        raise wrong("agent_name", "a name has 1 to 64 characters and does not begin with a dot")
    if client.agent:
        if made != client.agent:
            raise another(client)
        return made
    if name.startswith(AGENT):
        return made
    for own in (made, f"{made[:CUT]}.{client.uid}"):
        if await owned(client, own):
            return own
    raise HttpRefused(403, f"agents/{made} and agents/{own} belong to other users: take another agent_name")


async def owned(client: Client, name: str) -> bool:
    """Whether this agent is the user's, after an attempt to make it."""
    path = f"agents/{name}"
    try:
        return await client.owner(path) == client.uid
    except HttpRefused as refused:
        if refused.status != 404:
            raise
    try:
        await client.make(path)
    except HttpRefused as refused:
        if refused.status != 409:  # somebody made it in this moment
            raise
        return await client.owner(path) == client.uid
    return True


async def check_tool(client: Client, agent: str, tool: str) -> None:
    """A key for one agent reaches only the tools that this agent has. Raises HttpRefused."""
    if client.agent and tool not in (await client.read(f"agents/{agent}/tools")).decode().split():
        raise HttpRefused(403, f"this key may use only the tools in agents/{agent}/tools")

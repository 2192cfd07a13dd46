"""AIOS's submitted agents. Here they are tools: programs in a sandbox, as the user who submits them.

The daemon runs the program, keeps its end and its output, and knows whose it is. The number of an execution
is that of its request. So nothing of it is in the gateway, and nothing is lost when the gateway ends.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any
from weakref import WeakValueDictionary

from starlette.responses import Response

from aiosd.gateway.aios_errors import AsciiResponse, parsed, wrong
from aiosd.gateway.aios_names import agent_of, check_tool, flat
from aiosd.gateway.aios_query import written
from aiosd.gateway.client import Client
from aiosd.gateway.dialect import NAME, HttpCall
from aiosd.gateway.refused import HttpRefused

SHOWN_MOST = 256
ENDED = ("done", "failed", "cancelled")
Json = dict[str, Any]

submitting = WeakValueDictionary[tuple[int, str], asyncio.Lock]()


async def submit(call: HttpCall) -> Response:
    body, client = call.json(), call.client
    name, config = body.get("agent_id"), body.get("agent_config")
    if not isinstance(name, str):
        raise wrong("agent_id", "a text is missing")
    if not isinstance(config, dict) or not isinstance(config.get("task"), str):
        raise wrong("agent_config.task", "a text is missing")
    program = flat(name)
    if not NAME.fullmatch(program) or not await exists(client, f"tools/{program}"):
        reason = (
            "there is no program of this agent. Agents of AIOS's hub and folders are not started here: "
            "make the tool AUTHOR__NAME with mkdir in /aios/tools, see aios-tool(5) and aios-gateway(8)"
        )
        raise HttpRefused(404, reason)
    agent = await agent_of(client, name)
    await check_tool(client, agent, program)
    asked = written({"name": program, "arguments": {"task": config["task"]}})
    number = await begun(client, agent, asked)
    said = f"Agent {name} submitted for execution"
    return AsciiResponse({"status": "success", "execution_id": number, "message": said})


async def exists(client: Client, path: str) -> bool:
    try:
        await client.owner(path)
    except HttpRefused as refused:
        if refused.status == 404:
            return False
        raise
    return True


async def begun(client: Client, agent: str, asked: bytes) -> int:
    """The number of a call that goes on without a descriptor: the new request that is this call."""
    async with submitting.setdefault((client.uid, agent), asyncio.Lock()):
        before = await numbers(client, agent)
        await client.write(f"agents/{agent}/syscall/tool", asked)
        for number in sorted(await numbers(client, agent) - before):
            if (await asked_of(client, f"agents/{agent}/requests/{number}")) == json.loads(asked):
                return number
    raise HttpRefused(503, f"the agent runs, but its number is lost: ls /aios/agents/{agent}/requests")


async def numbers(client: Client, agent: str) -> set[int]:
    entries = await client.list(f"agents/{agent}/requests")
    return {int(entry.name) for entry in entries if entry.name.isdecimal()}


async def asked_of(client: Client, folder: str) -> Json:
    """The call of a tool that a request is; empty: it is none, or has gone."""
    try:
        found = parsed((await client.read(f"{folder}/request")).decode())
    except (HttpRefused, ValueError):
        return {}
    return found if isinstance(found, dict) and {"name", "arguments"} <= found.keys() else {}


def requests_of(client: Client) -> str:
    """The folder of the client's requests. The session of a key for one agent sees no other."""
    return f"agents/{client.agent}/requests" if client.agent else "requests"


async def status(call: HttpCall) -> Response:
    number, client = call.parts["id"], call.client
    if not number.isdecimal() or len(number) > 18:
        raise wrong("id", "the number of an execution")
    folder = f"{requests_of(client)}/{int(number)}"
    state = (await client.read(f"{folder}/state")).decode().split()[0]
    asked = await asked_of(client, folder)
    if not asked:
        raise HttpRefused(404, "this is no execution of an agent")
    found: Json = {"execution_id": int(number)}
    if state not in ENDED:
        return AsciiResponse(found | {"status": "running", "message": f"Execution in progress: {state}"})
    if state != "done":
        why = (await client.read(f"{folder}/error")).decode("utf-8", "replace").strip()
        raise HttpRefused(500, f"the agent has {state}: {why}")
    output = (await client.read(f"{folder}/response")).decode("utf-8", "replace")
    return AsciiResponse(found | {"status": "completed", "result": result(output)})


def result(output: str) -> Any:
    """AIOS's agents return an object. So a program may print it as JSON."""
    try:
        found = parsed(output)
    except ValueError:
        return output
    return found if isinstance(found, dict) else output


async def processes(call: HttpCall) -> Response:
    """The executions that have not ended."""
    client, found = call.client, list[Json]()
    folder = requests_of(client)
    mine = {int(entry.name) for entry in await client.list(folder) if entry.open and entry.name.isdecimal()}
    for number in sorted(mine)[-SHOWN_MOST:]:
        asked = await asked_of(client, f"{folder}/{number}")
        state = (await client.read(f"{folder}/{number}/state")).decode().split()[0] if asked else ""
        if asked and state not in ENDED and "task" in asked["arguments"]:
            found.append({
                "agent_id": asked["name"].replace("__", "/"), "execution_id": number, "status": "running",
                "config": asked["arguments"], "task": asked["arguments"]["task"],
            })  # fmt: skip
    return AsciiResponse({"status": "success", "processes": found})

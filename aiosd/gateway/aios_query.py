"""AIOS's POST /query: a system call of an agent. Ours goes through the agent's files."""

from __future__ import annotations

import json
import secrets
from typing import Any

from starlette.responses import Response

from aiosd.gateway.aios_errors import AsciiResponse, failure, parsed, wrong
from aiosd.gateway.aios_names import agent_of, check_tool, flat
from aiosd.gateway.client import Client
from aiosd.gateway.dialect import NAME, HttpCall, failed
from aiosd.gateway.refused import HttpRefused

ACTIONS = ("chat", "chat_with_json_output", "chat_with_tool_call_output", "call_tool", "operate_file")
OLDER = {"tool_use": "call_tool"}  # in version 0.0.3 of the SDK
SEEDS = 1 << 31
# The settings that an entry of `llms` may have
SAMPLING = ("temperature", "max_tokens", "top_p", "frequency_penalty", "presence_penalty")
EMPTY_TIMES: dict[str, list[float]] = {
    "start_times": [],
    "end_times": [],
    "waiting_times": [],
    "turnaround_times": [],
}
ABSENT = "aiosd has no manager of {} yet: keep such data in files of your program"

Json = dict[str, Any]


async def query(call: HttpCall) -> Response:
    body = call.json()
    kind, asked = body.get("query_type"), body.get("query_data")
    if kind not in ("llm", "tool", "memory", "storage"):
        raise wrong("query_type", "one of llm, tool, memory and storage")
    if not isinstance(asked, dict):
        raise wrong("query_data", "an object is missing")
    if asked.get("query_class") not in (None, kind):
        raise wrong("query_data.query_class", f"it is not {kind}, as query_type is")
    if kind == "llm":
        return AsciiResponse(await llm(call.client, body, read_llm(asked)))
    if kind == "tool":
        return AsciiResponse(enveloped(await tool(call.client, body, read_calls(asked.get("tool_calls")))))
    return AsciiResponse(enveloped(failure(kind, HttpRefused(501, ABSENT.format(kind)))))


def enveloped(response: Json) -> Json:
    return {"response": response, **EMPTY_TIMES}


def read_llm(asked: Json) -> Json:
    """The query with its defaults. Raises HttpRefused where its form is wrong; the daemon judges the rest."""
    action = asked.get("action_type") or "chat"
    action = OLDER.get(action, action) if isinstance(action, str) else action
    if action not in ACTIONS:
        raise wrong("query_data.action_type", f"one of {', '.join(ACTIONS)}")
    if not isinstance(asked.get("messages"), list):
        raise wrong("query_data.messages", "a list of messages is missing")
    for key in ("tools", "llms"):
        entries = asked.get(key) or []
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise wrong(f"query_data.{key}", "a list of objects")
    if not all(isinstance(entry.get("name"), str) for entry in asked.get("llms") or []):
        raise wrong("query_data.llms", "each has a name, which is a text")
    if asked.get("message_return_type") not in (None, "text", "json"):
        raise wrong("query_data.message_return_type", "text or json")
    return asked | {"action_type": action, "tools": [function(tool) for tool in asked.get("tools") or []]}


def function(tool: Json) -> Json:
    """A tool as the files take it: `name` may stand outside of `function`."""
    inner = tool.get("function") if "function" in tool else tool
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise wrong("query_data.tools", "each has a function with a name, which is a text")
    return dict(inner)


def read_calls(given: object) -> list[Json]:
    if not isinstance(given, list) or not all(isinstance(call, dict) for call in given):
        raise wrong("query_data.tool_calls", "a list of calls is missing")
    for call in given:
        if not isinstance(call.get("name"), str):
            raise wrong("query_data.tool_calls", "each has a name, which is a text")
    return given


async def llm(client: Client, body: Json, asked: Json) -> Json:
    """Its five actions. call_tool answers as a tool does."""
    try:
        if asked["action_type"] == "operate_file":
            raise HttpRefused(501, ABSENT.format("storage"))
        agent = await agent_of(client, body.get("agent_name"))
        answer = said(await first_model(client, agent, asked), asked["tools"])
    except HttpRefused as refused:
        if refused.status == 422:
            raise
        return enveloped(failure("llm", refused))
    if asked["action_type"] != "call_tool":
        return enveloped(answer)
    if answer["tool_calls"]:
        return enveloped(await tool(client, body, answer["tool_calls"]))
    none = tool_response("No tool was called by LLM", finished=False)
    return none | enveloped(none)  # AIOS sends it bare here, and its agents look for the response


async def first_model(client: Client, agent: str, asked: Json) -> Json:
    """Ask the first model of `llms` that there is, else the agent's own."""
    llms = asked.get("llms") or []
    if llms and client.agent:
        raise HttpRefused(403, f"this key may use only the model of agents/{client.agent}: leave out llms")
    path = f"agents/{agent}/syscall/llm"
    for i, entry in enumerate(llms or [{}], 1):
        try:
            reply = await client.ask(path, written(request(asked, entry)))
            document = await reply.document()
        except HttpRefused as refused:
            if refused.status == 404 and llms and i < len(llms):
                continue
            raise
        if "error" in document:
            raise failed(document)
        return document
    raise AssertionError


def request(asked: Json, entry: Json) -> Json:
    """The query as JSON of the files. AIOS has no seed; each answer is another one."""
    found: Json = {"messages": asked["messages"], "seed": secrets.randbelow(SEEDS)}
    found |= {"temperature": asked.get("temperature"), "max_tokens": asked.get("max_new_tokens")}
    found |= {key: entry[key] for key in SAMPLING if entry.get(key) is not None}
    if entry:
        found["model"] = entry["name"]
    if asked["tools"]:
        named = [tool | {"name": flat(tool["name"])} for tool in asked["tools"]]
        found["tools"] = [{"type": "function", "function": tool} for tool in named]
    if asked.get("response_format"):
        found["response_format"] = asked["response_format"]
    elif asked.get("message_return_type") == "json" or asked["action_type"] == "chat_with_json_output":
        found["response_format"] = {"type": "json_object"}
    return {key: value for key, value in found.items() if value is not None}


def said(document: Json, tools: list[Json]) -> Json:
    """The answer of a model in AIOS's shape. With tools there is always a list of calls."""
    message = document["choices"][0]["message"]
    names = {flat(tool["name"]): tool["name"] for tool in tools}
    calls = [
        {
            "name": names.get(call["function"]["name"], call["function"]["name"]),
            "parameters": arguments(call["function"]["arguments"]),
            "id": call["id"],
        }
        for call in message.get("tool_calls") or []
    ]
    return {
        "response_class": "llm", "response_message": message.get("content"),
        "tool_calls": calls if tools or calls else None, "finished": True, "error": None, "status_code": 200,
    }  # fmt: skip


def arguments(text: str) -> Any:
    try:
        return parsed(text)
    except ValueError:  # as the model wrote it
        return text


async def tool(client: Client, body: Json, calls: list[Json]) -> Json:
    """Run the calls one after the other, as the agent's."""
    try:
        if not calls:
            return tool_response("There is no tool to call", finished=False)
        agent = await agent_of(client, body.get("agent_name"))
        outputs = [await ran(client, agent, call) for call in calls]
    except HttpRefused as refused:
        if refused.status == 422:
            raise
        return failure("tool", refused)
    return tool_response("\n".join(output.removesuffix("\n") for output in outputs), finished=True)


def tool_response(text: str, finished: bool) -> Json:
    return {
        "response_class": "tool", "response_message": text, "finished": finished, "error": None,
        "status_code": 200,
    }  # fmt: skip


async def ran(client: Client, agent: str, call: Json) -> str:
    """The output of a call. Raises HttpRefused with the daemon's reason."""
    name, folder = flat(call["name"]), f"agents/{agent}/syscall"
    if not NAME.fullmatch(name):
        raise HttpRefused(404, "there is no tool of that name; ls /aios/tools shows what there is")
    await check_tool(client, agent, name)
    asked = {"name": name, "arguments": call.get("parameters") or {}}
    reply = await client.ask(f"{folder}/tool", written(asked))
    try:
        return (await reply.whole()).decode("utf-8", "replace")
    except HttpRefused as refused:
        why = (await client.read(f"{folder}/error")).decode("utf-8", "replace").strip()
        raise HttpRefused(500, why or refused.reason) from None


def written(asked: Json) -> bytes:
    try:
        return json.dumps(asked).encode() + b"\n"
    except RecursionError:
        raise HttpRefused(400, "the request is nested too deep") from None

"""A request of Anthropic's Messages API as the JSON of the files. Raises HttpRefused."""

from __future__ import annotations

import json
import secrets
from typing import Any

from aiosd.gateway.anthropic.errors import NO_THREADS
from aiosd.gateway.anthropic.messages import conversation, string, wrong
from aiosd.gateway.refused import HttpRefused

SEEDS = 1 << 31
SAMPLING = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "stop_sequences": "stop"}
READ = {
    "model", "messages", "system", "max_tokens", "stream", "tools", "tool_choice", "thinking",
    "output_config", "output_format", *SAMPLING,
}  # fmt: skip
NO_EFFECT = {  # what clients tell Anthropic, and what does not change what they may expect of an answer
    "metadata", "service_tier", "cache_control", "inference_geo", "speed", "context_management", "betas",
    "diagnostics", "user_profile_id", "workspace_id", "billing_policy", "fallbacks", "fallback_credit_token",
}  # fmt: skip
CHOICES = {"auto": "auto", "any": "required", "none": "none"}
EFFORTS = {"low": "low", "medium": "medium", "high": "high", "xhigh": "xhigh", "max": "xhigh"}

Json = dict[str, Any]


def request(body: Json, agent: bool) -> Json:
    """What is written to the file. An agent has its own settings where the client says nothing."""
    most = body.get("max_tokens")
    if type(most) is not int or most < 1:
        raise wrong("max_tokens", "is required, and is a number from 1")
    made: Json = prompt(body, agent) | {"max_tokens": most, "stream": streams(body)}
    made |= {ours: body[theirs] for theirs, ours in SAMPLING.items() if body.get(theirs) not in (None, [])}
    made |= {} if agent else {"seed": secrets.randbelow(SEEDS)}
    if form := answer_format(body):
        made["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": form}}
    return made


def prompt(body: Json, agent: bool) -> Json:
    """The part of a request that decides what the model reads."""
    if body.get("thread") is not None:
        raise HttpRefused(400, "thread: nothing is kept here between requests", NO_THREADS, "thread")
    for key in body.keys() - READ - NO_EFFECT:
        if body[key] not in (None, [], {}):
            raise wrong(key[:40], "is not known here: leave it out")
    made: Json = {"messages": conversation(body)}
    if body.get("tools") is not None:
        made["tools"] = tools(body["tools"])
    made |= choice(body.get("tool_choice"))
    if body.get("thinking") is not None or not agent:
        made["enable_thinking"] = thinks(body)
    effort = part(body, "output_config").get("effort")
    if effort is not None:
        if not isinstance(effort, str) or effort not in EFFORTS:
            raise wrong("output_config.effort", f"must be one of {', '.join(EFFORTS)}")
        made["reasoning_effort"] = EFFORTS[effort]
    return made


def streams(body: Json) -> bool:
    if not isinstance(found := body.get("stream") or False, bool):
        raise wrong("stream", "must be true or false")
    return found


def thinks(body: Json) -> bool:
    """Whether the client asks for thinking. Nobody counts budget_tokens."""
    thinking = part(body, "thinking")
    kind, budget = thinking.get("type", "disabled"), thinking.get("budget_tokens", 1)
    if kind not in ("enabled", "disabled", "adaptive", "between_tools"):
        raise wrong("thinking.type", "must be enabled, disabled, adaptive or between_tools")
    if type(budget) is not int or budget < 1:
        raise wrong("thinking.budget_tokens", "must be a number from 1")
    return bool(kind != "disabled")


def tools(given: object) -> list[Json]:
    if not isinstance(given, list):
        raise wrong("tools", "must be a list")
    return [tool(one, f"tools.{i}") for i, one in enumerate(given)]


def tool(given: object, where: str) -> Json:
    if not isinstance(given, dict):
        raise wrong(where, "must be an object")
    if given.get("type") not in (None, "custom"):
        raise wrong(f"{where}.type", "is a tool that only Anthropic has: give one with name and input_schema")
    if not isinstance(given.get("input_schema"), dict):
        raise wrong(f"{where}.input_schema", "must be an object")
    function = {"name": string(given, "name", where), "parameters": given["input_schema"]}
    if given.get("description") is not None:
        function["description"] = string(given, "description", where)
    return {"type": "function", "function": function}


def choice(given: object) -> Json:
    if given is None:
        return {}
    kind = given.get("type") if isinstance(given, dict) else None
    if not isinstance(given, dict) or kind not in (*CHOICES, "tool"):
        raise wrong("tool_choice.type", "must be auto, any, tool or none")
    name = string(given, "name", "tool_choice") if kind == "tool" else ""
    made: Json = {"tool_choice": {"type": "function", "function": {"name": name}} if name else CHOICES[kind]}
    if given.get("disable_parallel_tool_use"):
        made["parallel_tool_calls"] = False
    return made


def answer_format(body: Json) -> Json:
    """The schema that the answer fits; empty: none."""
    form = part(body, "output_config").get("format") or part(body, "output_format")
    if not form:
        return {}
    if (
        not isinstance(form, dict)
        or form.get("type") != "json_schema"
        or not isinstance(form.get("schema"), dict)
    ):
        raise wrong("output_config.format", 'must be {"type": "json_schema", "schema": {...}}')
    schema: Json = form["schema"]
    return schema


def part(body: Json, key: str) -> Json:
    found = body.get(key)
    if found is not None and not isinstance(found, dict):
        raise wrong(key, "must be an object")
    return found or {}


def written(asked: Json) -> bytes:
    try:
        return json.dumps(asked).encode() + b"\n"
    except RecursionError:
        raise wrong("body", "is nested too deeply") from None

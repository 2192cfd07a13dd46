"""Ollama's lists of models, and what one is like. /api/copy and /api/delete, where the store can."""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import Any

from starlette.responses import JSONResponse, Response

from aiosd.gateway.client import Client
from aiosd.gateway.dialect import AGENT, HttpCall, another, model_file
from aiosd.gateway.ollama import names
from aiosd.gateway.ollama.answer import moment
from aiosd.gateway.openai import cards
from aiosd.gateway.refused import HttpRefused

NEVER = "2318-01-01T00:00:00Z"  # when a model goes that stays
LOADED = ("ready", "leaving", "draining")
Json = dict[str, Any]


async def tags(call: HttpCall) -> Response:
    """The models and agents that the user may use."""
    found = [card async for card in cards(call.client)]
    infos = await asyncio.gather(*(information(call.client, card["id"]) for card in found))
    both = zip(found, infos, strict=True)
    return JSONResponse({"models": [entry(card["id"], card["created"], info) for card, info in both]})


async def loaded(call: HttpCall) -> Response:
    found = [card["id"] async for card in cards(call.client) if not card["id"].startswith(AGENT)]
    infos = await asyncio.gather(*(information(call.client, name) for name in found))
    here = [(name, info) for name, info in zip(found, infos, strict=True) if info.get("state") in LOADED]
    return JSONResponse({"models": [resident(name, info) for name, info in here]})


async def show(call: HttpCall) -> Response:
    body = call.json()
    name = names.given(body)
    model = names.local(name)
    async for card in cards(call.client):
        if card["id"] == model:
            info = await information(call.client, model)
            return JSONResponse(description(info) | {"modified_at": moment(card["created"])})
    raise names.not_found(name)


async def information(client: Client, name: str) -> Json:
    """info.json of a model; of an agent that of its model, where the user may see it; else nothing."""
    try:
        if name.startswith(AGENT):
            name = (await client.read(f"agents/{name.removeprefix(AGENT)}/model")).decode().strip()
        if not name:  # the agent has the default model
            return {}
        found: Json = json.loads(await client.read(f"models/{name}/info.json"))
    except HttpRefused:  # it went meanwhile, or is not for this user
        return {}
    return found


async def copied(call: HttpCall) -> Response:
    body = call.json()
    old = names.local(names.given(body, "source"))
    new = names.local(names.given(body, "destination"))
    control = model_file(call.client, new, "ctl")
    model_file(call.client, old, "ctl")
    await call.client.make(f"models/{new}")
    try:
        await call.client.write(control, f"copy {old}\n".encode())
    except HttpRefused:
        await call.client.remove(f"models/{new}")
        raise
    return Response()


async def deleted(call: HttpCall) -> Response:
    model = names.local(names.given(call.json()))
    if model.startswith(AGENT):
        raise HttpRefused(400, "agents are not deleted here: rmdir /aios/agents/NAME does it", param="model")
    if call.client.agent:
        raise another(call.client)
    await call.client.remove(f"models/{model}")
    return Response()


# their shapes


def entry(name: str, changed_s: float, info: Json) -> Json:
    name = names.tagged(name)
    return {
        "name": name, "model": name, "modified_at": moment(changed_s), "size": size(info),
        "digest": digest(name, info), "details": details(info),
    }  # fmt: skip


def resident(name: str, info: Json) -> Json:
    bytes_ = info.get("rss_bytes") or info.get("estimated_bytes") or size(info)
    on_gpu = any(device != "cpu" for device in info.get("devices") or [])
    until = info.get("until")
    shown = entry(name, 0, info) | {
        "size": bytes_, "size_vram": bytes_ if on_gpu else 0,
        "expires_at": moment(until) if isinstance(until, (int, float)) else NEVER,
        "context_length": info.get("context_length", 0),
    }  # fmt: skip
    del shown["modified_at"]
    return shown


def details(info: Json) -> Json:
    architecture, parameters = family(info), info.get("parameters")
    return {
        "parent_model": "",
        "format": "gguf" if str(info.get("path", "")).endswith(".gguf") else "safetensors",
        "family": architecture,
        "families": [architecture] if architecture else None,
        "parameter_size": short(parameters) if isinstance(parameters, int) else "",
        "quantization_level": quantization(info),
    }


def description(info: Json) -> Json:
    architecture = family(info)
    known = {
        "general.architecture": architecture,
        "general.parameter_count": info.get("parameters"),
        f"{architecture}.context_length": info.get("context_length"),
    }
    return {
        "license": info.get("licence") or "",
        "modelfile": f"FROM {info.get('source') or info.get('name') or ''}\n",
        "parameters": "",
        "template": str(info.get("template") or ""),
        "details": details(info),
        "model_info": {key: value for key, value in known.items() if architecture and value},
        "capabilities": capabilities(info),
    }


def capabilities(info: Json) -> list[str]:
    """A model that is not loaded yet is taken for one that calls tools."""
    tools = ["tools"] if info.get("tool_calls") != "unknown" else []
    return ["completion", *tools, *(["thinking"] if info.get("thinking") else [])]


def family(info: Json) -> str:
    """LlamaForCausalLM → llama, as GGUF files say"""
    return str(info.get("architecture") or "").removesuffix("ForCausalLM").lower()


def quantization(info: Json) -> str:
    found = info.get("quantization")
    return str(info.get("dtype") or "") if found in (None, "", "none") else str(found)


def size(info: Json) -> int:
    return int(info.get("size_bytes") or info.get("estimated_bytes") or 0)


def digest(name: str, info: Json) -> str:
    """Of the model's files; where they are not known, of its name."""
    files = [[file["name"], file["sha256"]] for file in info.get("files") or []]
    return hashlib.sha256(json.dumps(files or name).encode()).hexdigest()


def short(count: int) -> str:
    """134515008 → 134.5M"""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= unit:
            return f"{count / unit:.1f}{name}"
    return str(count)

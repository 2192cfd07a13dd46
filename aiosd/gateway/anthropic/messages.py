"""The messages of Anthropic's API as those of the files. Raises HttpRefused.

A message of Anthropic has blocks. Results of tools become messages of their own. Messages of one role that
follow each other become one, as at Anthropic.
"""

from __future__ import annotations

import json
from typing import Any

from aiosd.gateway.refused import HttpRefused

BILLING = "x-anthropic-billing-header:"  # Claude Code's note to Anthropic, another one in each request
SENSES = {"image": "an image", "document": "a file"}

Json = dict[str, Any]


def wrong(where: str, why: str) -> HttpRefused:
    return HttpRefused(400, f"{where}: {why}", param=where)


def conversation(body: Json) -> list[Json]:
    """The system prompt and the messages."""
    given = body.get("messages")
    if not isinstance(given, list) or not given:
        raise wrong("messages", "must be a list of at least one message")
    names = dict[str, str]()  # of the tools, by the ids of their calls
    found = system(body.get("system"))
    for i, one in enumerate(given):
        where = f"messages.{i}"
        role = one.get("role") if isinstance(one, dict) else None
        if role == "user":
            found += of_user(one.get("content"), f"{where}.content", names)
        elif role == "assistant":
            found.append(of_assistant(one.get("content"), f"{where}.content", names))
        elif role == "system":
            found.append({"role": "system", "content": text(one.get("content"), f"{where}.content")})
        else:
            raise wrong(f"{where}.role", "must be user, assistant or system")
    if found[-1]["role"] == "assistant":
        raise wrong("messages", "the last one must be the user's: an answer cannot be continued here")
    return joined(found)


def system(given: object) -> list[Json]:
    if given is None:
        return []
    if isinstance(given, list):
        given = [one for one in given if not is_billing(one)]
    said = text(given, "system")
    return [{"role": "system", "content": said}] if said else []


def is_billing(block: object) -> bool:
    said = block.get("text") if isinstance(block, dict) else None
    return isinstance(said, str) and said.startswith(BILLING)


def of_user(content: object, where: str, names: dict[str, str]) -> list[Json]:
    """The texts, and each result of a tool as a message of its own, in their order."""
    found = list[Json]()
    for at, block in blocks(content, where):
        if block["type"] == "tool_result":
            found.append(result(block, at, names))
        else:
            found.append({"role": "user", "content": text_of(block, at)})
    return found


def result(block: Json, where: str, names: dict[str, str]) -> Json:
    id = string(block, "tool_use_id", where)
    if id not in names:
        raise wrong(f"{where}.tool_use_id", "there is no tool_use with this id before")
    said = "" if block.get("content") is None else text(block["content"], f"{where}.content")
    if block.get("is_error"):
        said = f"Error: {said}"
    return {"role": "tool", "tool_call_id": id, "name": names[id], "content": said}


def of_assistant(content: object, where: str, names: dict[str, str]) -> Json:
    texts, thoughts, calls = list[str](), list[str](), list[Json]()
    for at, block in blocks(content, where):
        if block["type"] == "tool_use":
            calls.append(call(block, at))
            names[calls[-1]["id"]] = calls[-1]["function"]["name"]
        elif block["type"] == "thinking":
            thoughts.append(string(block, "thinking", at))
        elif block["type"] != "redacted_thinking":
            texts.append(text_of(block, at))
    made: Json = {"role": "assistant", "content": "\n".join(texts)}
    made |= {"reasoning_content": "\n".join(thoughts)} if thoughts else {}
    return made | ({"tool_calls": calls} if calls else {})


def call(block: Json, where: str) -> Json:
    if not isinstance(block.get("input"), dict):
        raise wrong(f"{where}.input", "must be an object")
    function = {"name": string(block, "name", where), "arguments": json.dumps(block["input"])}
    return {"id": string(block, "id", where), "type": "function", "function": function}


def blocks(content: object, where: str) -> list[tuple[str, Json]]:
    """The blocks of a content with their places. A text is one block."""
    if isinstance(content, str):
        return [(where, {"type": "text", "text": content})]
    if not isinstance(content, list) or not content:
        raise wrong(where, "must be text, or a list of at least one block")
    found = list[tuple[str, Json]]()
    for i, block in enumerate(content):
        at = f"{where}.{i}"
        if not isinstance(block, dict) or not isinstance(block.get("type"), str):
            raise wrong(at, "must be a block with a type")
        found.append((at, block))
    return found


def text(content: object, where: str) -> str:
    return "\n".join(text_of(block, at) for at, block in blocks(content, where)) if content != [] else ""


def text_of(block: Json, where: str) -> str:
    kind, source = block["type"], block.get("source")
    if kind == "text":
        return string(block, "text", where)
    if kind == "document" and isinstance(source, dict) and source.get("type") == "text":
        return string(source, "data", f"{where}.source")
    if kind in SENSES:
        raise wrong(where, f"is {SENSES[kind]}, and models here read only text: leave it out")
    raise wrong(f"{where}.type", f"{kind[:40]} has no place here")


def string(block: Json, key: str, where: str) -> str:
    if not isinstance(found := block.get(key), str):
        raise wrong(f"{where}.{key}", "must be text")
    return found


def joined(messages: list[Json]) -> list[Json]:
    """Messages of one role that follow each other are one message."""
    found = list[Json]()
    for one in messages:
        if not found or one["role"] == "tool" or found[-1]["role"] != one["role"]:
            found.append(one)
            continue
        last = found[-1]
        for key in ("content", "reasoning_content"):
            if parts := [said[key] for said in (last, one) if said.get(key)]:
                last[key] = "\n".join(parts)
        if calls := [*last.get("tool_calls", ()), *one.get("tool_calls", ())]:
            last["tool_calls"] = calls
    return found

"""The messages and tools of a request, in the shape of the OpenAI chat-completion API. Pure.

Nothing is dropped without a word. A key is obeyed, refused, or carried on to the model's chat template, as
TAKEN says. A key whose value is null or empty says nothing: programs send back the messages that they got.
"""

from __future__ import annotations

from typing import Any

from aiosd.errors import BadRequest
from aiosd.syscall import grammar
from aiosd.syscall.keys import only, string
from aiosd.syscall.spec import Message

ROLES = ("system", "user", "assistant", "tool", "developer")
# The keys of the objects in messages, tools and tool_choice. What a function says goes to the template whole.
TAKEN = {
    "message": ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning"),
    "part": ("type", "text"),
    "call": ("id", "type", "index", "function"),
    "called": ("name", "arguments"),
    "tool": ("type", "function"),
    "choice": ("type", "function"),
    "chosen": ("name",),
}
SENSES = {  # parts of a content that are no text
    "image_url": "an image",
    "image": "an image",
    "input_image": "an image",
    "input_audio": "audio",
    "audio_url": "audio",
    "video_url": "a video",
    "file": "a file",
    "input_file": "a file",
}
FUNCTION_HINT = '{"type":"function","function":{"name":…}}'


def messages(raw: Message) -> tuple[Message, ...]:
    if "prompt" in raw and "messages" not in raw:
        return ({"role": "user", "content": string(raw, "prompt", "")},)
    given = raw.get("messages")
    if not isinstance(given, list) or not given:
        raise BadRequest("messages is missing or empty", '{"messages":[{"role":"user","content":"…"}]}')
    if raw.get("prompt"):
        raise BadRequest("prompt and messages are two ways to say the same", "leave prompt out")
    return tuple(message(one, f"messages[{i}]") for i, one in enumerate(given))


def message(raw: object, where: str) -> Message:
    """Check one chat message. A list of text parts becomes one text."""
    if not isinstance(raw, dict) or raw.get("role") not in ROLES:
        raise BadRequest(f"{where} needs a role, one of {', '.join(ROLES)}")
    only(raw, where, *TAKEN["message"])
    content = raw.get("content")
    if isinstance(content, list):
        content = "".join(part(one, f"{where}.content[{i}]") for i, one in enumerate(content))
    if not isinstance(content, str) and not (content is None and raw.get("tool_calls")):
        raise BadRequest(f"{where}: content must be text")
    clean = {"role": raw["role"], "content": content or ""}
    if raw["role"] == "developer":  # OpenAI's newer name of role system
        clean["role"] = "system"
    said = {**raw, "reasoning_content": raw.get("reasoning_content") or raw.get("reasoning")}
    for key in ("tool_call_id", "name", "reasoning_content"):
        if said.get(key) is not None:
            clean[key] = string(said, key, "")
    if calls := raw.get("tool_calls"):
        if not isinstance(calls, list):
            raise BadRequest(f"{where}: tool_calls must be a list")
        clean["tool_calls"] = [call(one, f"{where}.tool_calls[{i}]") for i, one in enumerate(calls)]
    return clean


def part(raw: object, where: str) -> str:
    kind = raw.get("type", "text") if isinstance(raw, dict) else None
    if isinstance(kind, str) and kind in SENSES:
        raise BadRequest(f"{where} is {SENSES[kind]}, and models here read only text", "leave the part out")
    if not isinstance(raw, dict) or kind != "text" or not isinstance(raw.get("text"), str):
        raise BadRequest(f"{where}: content may only have text parts", '{"type":"text","text":…}')
    only(raw, where, *TAKEN["part"])
    return str(raw["text"])


def call(raw: object, where: str) -> Message:
    if not isinstance(raw, dict):
        raise BadRequest(f"{where} must be an object", FUNCTION_HINT)
    only(raw, where, *TAKEN["call"])
    if isinstance(function := raw.get("function"), dict):
        only(function, f"{where}.function", *TAKEN["called"])
    return {key: value for key, value in raw.items() if key != "index"}  # the place in a stream


def tools(raw: Message) -> tuple[Message, ...]:
    """Return the tools that a request offers; none if it chooses none."""
    given = raw.get("tools") or []
    if not isinstance(given, list):
        raise BadRequest("tools must be a list of functions", f"[{FUNCTION_HINT}]")
    for i, one in enumerate(given):
        function = one.get("function") if isinstance(one, dict) else None
        named = isinstance(function, dict) and isinstance(function.get("name"), str)
        if not named or one.get("type", "function") != "function":
            raise BadRequest(f"tools[{i}] must be a function with a name", FUNCTION_HINT)
        only(one, f"tools[{i}]", *TAKEN["tool"])
    return () if raw.get("tool_choice") == "none" else tuple(given)


def tool_choice(raw: Message, offered: tuple[Message, ...]) -> str:
    wanted: Any = raw.get("tool_choice")
    if wanted in (None, "auto", "none"):
        return "auto"
    if not offered:
        raise BadRequest("tool_choice needs tools", "name some in tools")
    if wanted == "required":
        return "required"
    function = wanted.get("function") if isinstance(wanted, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not any(tool["function"]["name"] == name for tool in offered):
        raise BadRequest("tool_choice must be auto, none, required or one of tools", FUNCTION_HINT)
    only(wanted, "tool_choice", *TAKEN["choice"])
    only(wanted["function"], "tool_choice.function", *TAKEN["chosen"])
    return f"{grammar.FUNCTION}{name}"

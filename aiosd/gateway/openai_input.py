"""A request of OpenAI's Responses API as the JSON of the files. Pure. Raises HttpRefused.

A key that changes the answer and cannot be honoured is refused. The daemon judges the values that it gets
under the same name, and refuses them itself.
"""

from __future__ import annotations

from typing import Any

from aiosd.gateway.refused import HttpRefused

Json = dict[str, Any]

SAME = (  # mean in the files what they mean here; those of the second line are not OpenAI's
    "parallel_tool_calls", "stream", "temperature", "top_p", "truncation",
    "chat_template_kwargs", "deadline_s", "enable_thinking", "frequency_penalty", "ignore_eos", "keep_alive",
    "logit_bias", "min_p", "min_tokens", "nice", "presence_penalty", "repetition_penalty", "seed", "stop",
    "top_k",
)  # fmt: skip
TRANSLATED = (
    "include", "input", "instructions", "max_output_tokens", "reasoning", "text", "tool_choice", "tools",
    "top_logprobs",
)  # fmt: skip
STATE = ("conversation", "metadata", "model", "previous_response_id", "store")
NO_EFFECT = (
    "max_tool_calls", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier",
    "stream_options", "user",
)  # fmt: skip
REFUSED = {
    "background": "background: a request lives as long as its connection; leave it out, and set stream",
    "prompt": "prompt: no templates are kept here; send instructions and input",
    "context_management": "context_management: truncation auto is what there is",
}
KEYS = frozenset((*SAME, *TRANSLATED, *STATE, *NO_EFFECT, *REFUSED))
LOGPROBS = "message.output_text.logprobs"
INCLUDED = (  # the others are of tools that do not exist here
    LOGPROBS, "code_interpreter_call.outputs", "computer_call_output.output.image_url",
    "file_search_call.results", "message.input_image.image_url", "reasoning.encrypted_content",
    "web_search_call.action.sources", "web_search_call.results",
)  # fmt: skip
TEXTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")
METADATA_MOST = 16


def chat_of(body: Json) -> Json:
    """The request for a transaction file, without what concerns the conversation."""
    for key in body:
        if key not in KEYS:
            raise HttpRefused(400, f"unknown key {key[:40]!r}", "unknown_parameter", key[:40])
    for key, why in REFUSED.items():
        if body.get(key):
            raise HttpRefused(400, why, "unsupported_parameter", key)
    metadata(body)
    chat: Json = {key: body[key] for key in SAME if body.get(key) is not None}
    chat["messages"] = messages(body.get("input"))
    if body.get("instructions") is not None:
        chat["system"] = typed(body, "instructions", str)
    if body.get("max_output_tokens") is not None:
        chat["max_tokens"] = body["max_output_tokens"]
    if body.get("tools"):
        chat["tools"] = [tool(one, f"tools[{i}]") for i, one in enumerate(typed(body, "tools", list))]
    if (choice := body.get("tool_choice")) is not None:
        chat["tool_choice"] = chosen(choice)
    effort = (typed(body, "reasoning", dict) or {}).get("effort")
    form = (typed(body, "text", dict) or {}).get("format")
    return chat | ({"reasoning_effort": effort} if effort else {}) | formed(form) | logprobs(body)


def typed(body: Json, key: str, kind: type) -> Any:
    """The value, or None. Raises HttpRefused if it is of another type."""
    value = body.get(key)
    if value is not None and not isinstance(value, kind):
        name = {str: "a text", list: "a list", dict: "an object", bool: "true or false"}[kind]
        raise HttpRefused(400, f"{key} must be {name}", "invalid_type", key)
    return value


def metadata(body: Json) -> None:
    given = typed(body, "metadata", dict) or {}
    right = all(
        len(key) <= 64 and isinstance(value, str) and len(value) <= 512 for key, value in given.items()
    )
    if len(given) > METADATA_MOST or not right:
        reason = f"metadata is at most {METADATA_MOST} texts of 512 characters, with names of 64"
        raise HttpRefused(400, reason, param="metadata")


def formed(form: object) -> Json:
    if form is None:
        return {}
    if not isinstance(form, dict):
        raise HttpRefused(400, "text.format must be an object", param="text.format")
    if form.get("type") == "json_schema":
        inner = {key: value for key, value in form.items() if key != "type" and value is not None}
        return {"response_format": {"type": "json_schema", "json_schema": inner}}
    return {"response_format": form}


def logprobs(body: Json) -> Json:
    include = typed(body, "include", list) or []
    for one in include:
        if one not in INCLUDED:
            raise HttpRefused(400, f"include may have {', '.join(INCLUDED)}", param="include")
    if LOGPROBS not in include and not body.get("top_logprobs"):
        return {}
    return {"logprobs": True, "top_logprobs": body.get("top_logprobs") or 0}


def tool(one: object, where: str) -> Json:
    kind = one.get("type") if isinstance(one, dict) else None
    if not isinstance(one, dict) or kind != "function" or not isinstance(one.get("name"), str):
        reason = f"{where} must be a function with a name: the service's own tools do not exist here"
        raise HttpRefused(400, reason, "unsupported_tool", "tools")
    said = {key: one[key] for key in ("name", "description", "parameters") if one.get(key) is not None}
    return {"type": "function", "function": said}


def chosen(choice: object) -> object:
    if isinstance(choice, str):
        return choice
    if not isinstance(choice, dict) or choice.get("type") != "function":
        reason = 'tool_choice is auto, none, required or {"type":"function","name":…}'
        raise HttpRefused(400, reason, param="tool_choice")
    return {"type": "function", "function": {"name": choice.get("name")}}


def messages(given: object) -> list[Json]:
    """Items as messages. A model's thinking, text and calls that follow each other are one message."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise HttpRefused(400, "input must be a text or a list of items", "missing_input", "input")
    made = list[Json]()
    for i, item in enumerate(given):
        add(made, item, f"input[{i}]")
    return [one for one in made if set(one) != {"role", "content", "reasoning_content"} or one["content"]]


def add(made: list[Json], item: object, where: str) -> None:
    kind = item.get("type", "message") if isinstance(item, dict) else None
    if not isinstance(item, dict) or not isinstance(kind, str) or kind not in ITEMS:
        reason = f"{where}: an item is one of {', '.join(ITEMS)}"
        raise HttpRefused(400, reason, "unsupported_item", where)
    if kind == "message":
        message = {"role": item.get("role"), "content": content(item.get("content"), where)}
        if message["role"] != "assistant":
            made.append(message)
        else:
            one = answering(made)
            one["content"] += message["content"]
    elif kind == "function_call_output":
        said = content(item.get("output"), where)
        made.append({"role": "tool", "tool_call_id": text_of(item, "call_id", where), "content": said})
    elif kind == "function_call":
        function = {key: text_of(item, key, where) for key in ("name", "arguments")}
        call = {"id": text_of(item, "call_id", where), "type": "function", "function": function}
        answering(made).setdefault("tool_calls", []).append(call)
    else:
        thought = content(item.get("content") or item.get("summary") or "", where)
        answering(made)["reasoning_content"] = thought


ITEMS = ("message", "function_call", "function_call_output", "reasoning")


def answering(made: list[Json]) -> Json:
    """The model's message that is not over yet."""
    if not made or made[-1]["role"] != "assistant":
        made.append({"role": "assistant", "content": ""})
    return made[-1]


def content(given: object, where: str) -> str:
    if isinstance(given, str):
        return given
    if not isinstance(given, list):
        raise HttpRefused(400, f"{where}: content must be a text or a list of parts", param=where)
    return "".join(part(one, f"{where}.content[{i}]") for i, one in enumerate(given))


def part(one: object, where: str) -> str:
    kind = one.get("type") if isinstance(one, dict) else None
    if isinstance(one, dict) and kind == "refusal":
        return text_of(one, "refusal", where)
    if not isinstance(one, dict) or kind not in TEXTS:
        shown = f" {kind[:40]}" if isinstance(kind, str) else ""
        raise HttpRefused(400, f"{where}: models here read only text, and not{shown or ' this'}", param=where)
    return text_of(one, "text", where)


def text_of(item: Json, key: str, where: str) -> str:
    value = item.get(key)
    if not isinstance(value, str):
        raise HttpRefused(400, f"{where}: {key} must be a text", "invalid_type", where)
    return value


def items_of(said: list[Json], id: str) -> list[Json]:
    """Messages of a conversation as items."""
    made = list[Json]()
    for one in said:
        if one["role"] == "tool":
            call = one.get("tool_call_id", "")
            made.append({"type": "function_call_output", "call_id": call, "output": one["content"]})
        elif one["content"] or not one.get("tool_calls"):
            answer = one["role"] == "assistant"
            part = {"type": "output_text", "text": one["content"], "annotations": [], "logprobs": []}
            part = part if answer else {"type": "input_text", "text": one["content"]}
            made.append({"type": "message", "role": one["role"], "content": [part]})
        for call in one.get("tool_calls") or []:  # its user may have written anything
            function = call.get("function") if isinstance(call.get("function"), dict) else {}
            called = {key: function.get(key, "") for key in ("name", "arguments")}
            made.append({"type": "function_call", "call_id": call.get("id", ""), **called})
    return [{"id": f"item_{i}_{id[-24:]}", "status": "completed", **one} for i, one in enumerate(made)]

"""Ollama's requests in the JSON of the files. Pure. Raises HttpRefused throughout.

What would change the answer and cannot be done is refused. Settings of the computer, such as num_gpu, have no
effect: the administrator decides about them.
"""

from __future__ import annotations

import json
import math
import re
import secrets
from typing import Any

from aiosd.gateway.refused import HttpRefused

Json = dict[str, Any]

SEEDS = 1 << 31
ENDLESS = 1 << 24  # tokens: until the model ends, or its context is full
LONGEST_S = 365 * 86400  # that a request may keep a model
DEFAULTS = {"temperature": 0.8, "top_k": 40, "top_p": 0.9}  # Ollama's
SAMPLING = {
    "temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
    "repeat_penalty": "repetition_penalty", "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty", "stop": "stop",
}  # fmt: skip
NEUTRAL = {"mirostat": 0, "tfs_z": 1, "typical_p": 1}  # other values cannot be honoured
EFFORTS = ("low", "medium", "high")
DURATION = re.compile(r"(\d{1,9}(?:\.\d{0,9})?)(ns|us|µs|ms|s|m|h)", re.ASCII)  # as Go has it
UNITS_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "h": 3600}


def chat(body: Json, of_agent: bool) -> Json:
    """What /api/chat asks for."""
    asked = common(body, of_agent) | {"messages": messages(body["messages"])}
    if tools := body.get("tools"):
        asked["tools"] = tools
    return asked


def generate(body: Json, of_agent: bool) -> Json:
    """What /api/generate asks for."""
    prompt, system = text(body, "prompt"), text(body, "system")
    if text(body, "suffix"):
        raise HttpRefused(400, "suffix: models here do not insert text; leave it out", param="suffix")
    if text(body, "template"):
        reason = "template: the model's own is used; with raw true the prompt goes to the model as it is"
        raise HttpRefused(400, reason, param="template")
    no_images(body)
    asked = common(body, of_agent)
    if flag(body, "raw"):
        return asked | {"prompt": prompt, "raw": True}
    first = [{"role": "system", "content": system}] if system else []
    return asked | {"messages": [*first, {"role": "user", "content": prompt}]}


def load(body: Json, of_agent: bool) -> Json:
    """The smallest request: it loads the model, and says how long it stays. An agent's context is spared."""
    asked = {"prompt": ".", "max_tokens": 1, **keep_alive(body)}
    return asked | {"context": ""} if of_agent else asked


def loads(body: Json) -> bool:
    """Whether the request only loads or unloads the model."""
    return not (body.get("prompt") or body.get("messages") or body.get("suffix"))


def common(body: Json, of_agent: bool) -> Json:
    """The files always stream: so the times of the first token and of the rest are known."""
    asked = sampling(body.get("options"), of_agent) | format_of(body.get("format")) | thinking(body)
    asked |= keep_alive(body) | {key: body[key] for key in ("logprobs", "top_logprobs") if body.get(key)}
    if body.get("truncate") is not False:
        asked["truncation"] = "auto"
    return asked | {"stream": True}


def sampling(options: object, of_agent: bool) -> Json:
    """An agent has its own defaults."""
    if options is None:
        options = {}
    if not isinstance(options, dict):
        raise HttpRefused(400, "options is an object", param="options")
    for key, neutral in NEUTRAL.items():
        if options.get(key) not in (None, neutral):
            raise HttpRefused(400, f"options: {key} is not offered here; leave it out", param=key)
    said = {ours: options[key] for key, ours in SAMPLING.items() if options.get(key) is not None}
    if options.get("repeat_last_n") == 0:  # Ollama's word for: no penalty
        said.pop("repetition_penalty", None)
    if isinstance(top_k := said.get("top_k"), int) and top_k < 0:
        said["top_k"] = 0
    most, seed = whole(options, "num_predict"), whole(options, "seed")
    if most is not None or not of_agent:
        said["max_tokens"] = min(most, ENDLESS) if most and most > 0 else ENDLESS
    if seed is not None and seed >= 0:
        said["seed"] = seed
    elif not of_agent:
        said["seed"] = secrets.randbelow(SEEDS)
    return said if of_agent else DEFAULTS | said


def format_of(wanted: object) -> Json:
    """Ollama passes over the words of a schema that cannot guide an answer. So does this."""
    if wanted in (None, "", {}):
        return {}
    if wanted == "json":
        return {"response_format": {"type": "json_object"}}
    if not isinstance(wanted, dict):
        raise HttpRefused(400, 'format is "json" or a JSON schema', param="format")
    named = {"name": "format", "schema": wanted, "strict": False}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def thinking(body: Json) -> Json:
    wanted = body.get("think")
    if wanted is None:
        return {}
    if isinstance(wanted, bool):
        return {"enable_thinking": wanted}
    if wanted in EFFORTS:
        return {"enable_thinking": True, "reasoning_effort": wanted}
    raise HttpRefused(400, f"think is true, false, {', '.join(EFFORTS)}", param="think")


def keep_alive(body: Json) -> Json:
    wanted = body.get("keep_alive")
    if wanted is None or wanted == "":
        return {}
    seconds = seconds_of(wanted)
    kept_s = LONGEST_S if seconds < 0 else min(seconds, LONGEST_S)  # negative: for ever
    return {"keep_alive": round(kept_s, 3)}


def seconds_of(wanted: object) -> float:
    """Seconds, or Go's text of a duration, such as 1h30m or -1s."""
    if isinstance(wanted, (int, float)) and not isinstance(wanted, bool) and not math.isnan(wanted):
        return wanted
    if isinstance(wanted, str) and len(wanted) <= 64:
        sign, digits = (-1, wanted[1:]) if wanted.startswith("-") else (1, wanted.removeprefix("+"))
        if re.fullmatch(r"\d{1,9}", digits, re.ASCII):
            return sign * int(digits)
        if re.fullmatch(f"(?:{DURATION.pattern})+", digits, re.ASCII):
            return sign * sum(float(count) * UNITS_S[unit] for count, unit in DURATION.findall(digits))
    raise HttpRefused(
        400, 'keep_alive is seconds or a duration: 300, "5m", "1h30m", 0 or -1', param="keep_alive"
    )


def messages(given: object) -> list[Json]:
    """A call of Ollama's has its arguments as an object and needs no id. Results follow their calls."""
    if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
        raise HttpRefused(400, "messages is a list of objects", param="messages")
    made, open_calls = list[Json](), list[tuple[str, str]]()
    for i, one in enumerate(given):
        no_images(one, f"messages[{i}].")
        message = {"role": one.get("role"), "content": one.get("content") or ""}
        if one.get("thinking"):
            message["reasoning_content"] = one["thinking"]
        if one.get("tool_calls"):
            message["tool_calls"] = calls(one["tool_calls"], i)
            open_calls = [(call["id"], call["function"]["name"]) for call in message["tool_calls"]]
        if one.get("role") == "tool":
            message |= answered(one, open_calls)
        made.append(message)
    return made


def calls(given: object, i: int) -> list[Json]:
    made = []
    for k, one in enumerate(given if isinstance(given, list) else [None]):
        function = one.get("function") if isinstance(one, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            reason = f"messages[{i}].tool_calls is a list of calls with function.name and function.arguments"
            raise HttpRefused(400, reason, param="messages")
        arguments = function.get("arguments") or {}
        called = {"name": function["name"], "arguments": written(arguments)}
        made.append({"id": one.get("id") or f"call_{i}_{k}", "type": "function", "function": called})
    return made


def answered(result: Json, open_calls: list[tuple[str, str]]) -> Json:
    """Which call a result belongs to: the one with its id, the first of its tool, or the first."""
    name, number = result.get("tool_name") or result.get("name"), result.get("tool_call_id")
    same = [call for call in open_calls if number == call[0]] or [
        call for call in open_calls if number is None and name in (None, call[1])
    ]
    if same:
        number, name = same[0]
        open_calls.remove(same[0])
    found = {"tool_call_id": number, "name": name}
    return {key: value for key, value in found.items() if value is not None}


def written(value: object) -> str:
    """As one line of JSON. A text is JSON already."""
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value)
    except RecursionError:
        raise HttpRefused(400, "the request is nested too deeply") from None


def no_images(of: Json, where: str = "") -> None:
    if of.get("images"):
        reason = f"{where}images: models here read only text; leave the images out"
        raise HttpRefused(400, reason, param="images")


def text(body: Json, key: str) -> str:
    value = body.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise HttpRefused(400, f"{key} is a text", param=key)
    return value


def flag(body: Json, key: str, default: bool = False) -> bool:
    value = body.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise HttpRefused(400, f"{key} is true or false", param=key)
    return value


def whole(options: Json, key: str) -> int | None:
    value = options.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise HttpRefused(400, f"options: {key} is a whole number", param=key)
    return value

"""What a user asked for, judged: the bytes of a request become a `Spec`, or a BadRequest says why not.

Text is one user message; a JSON object follows the OpenAI chat-completion API. Pure: knows no files,
store or workers; called where bytes arrive (aiosd.fs.files) and when a stored request is read back.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from aiosd.errors import BadRequest
from aiosd.syscall import grammar
from aiosd.syscall.keys import boolean, choice, integer, number, string
from aiosd.syscall.sampling import Sampling

Message = dict[str, Any]
GREEDY = Sampling()
DEPTH_MAX = 64
STEPS_MAX = 64
REFUSED = "refused"  # the role of a text that was written and is no request


@dataclass(frozen=True, slots=True)
class Spec:
    """What was asked, after validation: enough to run it again after a crash."""

    messages: tuple[Message, ...]
    sampling: Sampling
    model: str
    context: str = ""  # empty: the request stands alone
    context_id: int = 0  # of that context and no later one of its name
    system: str = ""
    tools: tuple[Message, ...] = ()
    decoded: tuple[str, ...] = ()  # of each what its arguments are decoded by
    tool_choice: str = "auto"  # or required, or grammar.FUNCTION and the name of one
    schema: str = ""  # JSON Schema of the answer, as JSON; empty: it may be any text
    nice: int = 0
    deadline_s: float | None = None  # seconds after submission
    json: bool = False  # answer as a JSON document instead of text
    stream: bool = False  # JSON only: one chunk a line as it is made
    operation: str = "llm"  # or embed, tokenize: of a model's files of these names; tool: a call of one
    steps: int = (
        0  # how often the model may be asked, the calls of its answers being run (aiosd.agents.steps)
    )
    resume: bool = False  # JSON only: goes on with the unfinished answer that came with its context's kv
    groups: tuple[int, ...] = ()  # of who calls a tool, his gid first: the tool has them too

    @property
    def refused(self) -> bool:
        """It is no request: all it has is what was written."""
        return not self.messages or self.messages[0]["role"] == REFUSED

    def dump(self) -> str:
        return ENCODER.encode({name: getattr(self, name) for name in SPEC_KEYS})

    @staticmethod
    def load(text: str) -> Spec:
        raw = json.loads(text)
        sampling = raw.pop("sampling")
        return Spec(
            **{
                **raw,
                "messages": tuple(raw["messages"]),
                "tools": tuple(raw["tools"]),
                "decoded": tuple(raw.get("decoded", ())),
                "groups": tuple(raw.get("groups", ())),
                "sampling": Sampling(**{**sampling, "stop": tuple(sampling["stop"])}),
            }
        )


SPEC_KEYS = tuple(f.name for f in fields(Spec))
ROLES = ("system", "user", "assistant", "tool", "developer")
SAMPLING_KEYS = tuple(f.name for f in fields(Sampling))
ENCODER = json.JSONEncoder(default=lambda sampling: {key: getattr(sampling, key) for key in SAMPLING_KEYS})
KEYS = {
    "messages",
    "model",
    "tools",
    "context",
    "nice",
    "deadline_s",
    "stream",
    "resume",
    "n",
    "user",
    "steps",
} | ({*SAMPLING_KEYS} | {"max_completion_tokens", "top_logprobs", "tool_choice", "response_format", "prompt"})


@dataclass(frozen=True, slots=True)
class Defaults:
    """The agent's settings a request starts from."""

    model: str
    context: str = ""
    system: str = ""
    nice: int = 0
    sampling: Sampling = GREEDY
    operation: str = "llm"
    tools: tuple[Message, ...] = ()
    decoded: tuple[str, ...] = ()
    steps: int = 0


def parse(body: bytes, defaults: Defaults) -> Spec:
    """Text, or a JSON object when the first byte is `{`. Raises BadRequest."""
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise BadRequest(f"byte {error.start} is not UTF-8 text") from None
    if body[:1] == b"{" and defaults.operation == "llm":
        return parse_json(text, begin(defaults))
    if body[:1] == b"{":
        text = input_of(read_json(text), defaults.model)
    else:
        text = text.rstrip("\n")
    if "\0" in text:
        raise BadRequest("the request holds a NUL byte", "write text or JSON")
    if not text.strip():
        raise BadRequest("the request is empty", "write a question")
    return begin(defaults, {"role": "user", "content": text})


def begin(d: Defaults, *messages: Message) -> Spec:
    """What is asked when nothing else is said."""
    return Spec(
        messages, d.sampling, d.model, d.context,
        system=d.system, nice=d.nice, json=d.operation != "llm", operation=d.operation,
        tools=d.tools, decoded=d.decoded, steps=d.steps if d.tools else 0,
    )  # fmt: skip


def input_of(raw: dict[str, Any], model: str) -> str:
    """The text to embed or tokenize, in the API's JSON."""
    given = set(raw) - {"model"}
    if given not in ({"input"}, {"prompt"}):
        raise BadRequest("one key is needed, input or prompt, and no other but model")
    if raw.get("model", model) != model:
        raise BadRequest(f"this is a file of model {model}", "write to that of the other")
    text = raw[given.pop()]
    if not isinstance(text, str):
        raise BadRequest("input is one string", "write a request for each text")
    return text


def read_json(text: str) -> Any:
    """JSON from a stranger: what later code could choke on is refused here. Raises NotJson."""
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of too many digits
        raise NotJson(f"not JSON: {error}", incomplete=unfinished(text, error)) from None
    if depth(raw) > DEPTH_MAX:
        raise NotJson(f"nested deeper than {DEPTH_MAX}", incomplete=False)
    try:
        json.dumps(raw, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise NotJson(
            "half a surrogate pair (\\ud800 to \\udfff) is no character", incomplete=False
        ) from None
    return raw


def depth(value: object) -> int:
    """Without recursion: how deep is what is asked."""
    level, deepest = [value], 0
    while level and deepest <= DEPTH_MAX:
        deepest += 1
        level = [
            child
            for parent in level
            if isinstance(parent, (dict, list))
            for child in (parent.values() if isinstance(parent, dict) else parent)
        ]
    return deepest


class NotJson(BadRequest):
    """`incomplete`: more bytes could make it JSON."""

    def __init__(self, reason: str, incomplete: bool = False) -> None:
        super().__init__(reason)
        self.incomplete = incomplete


def unfinished(text: str, error: Exception) -> bool:
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")


def parse_json(text: str, base: Spec) -> Spec:
    raw = read_json(text)
    assert isinstance(raw, dict)  # its first byte is {
    for key in raw:
        if key not in KEYS:
            raise BadRequest(f"unknown key {key!r}", f"keys are {', '.join(sorted(KEYS))}")
    if raw.get("n") not in (None, 1):
        raise BadRequest("n is 1 here", "write one request for each answer")
    resume = boolean(raw, "resume", False)
    if resume and (said := {"messages", "prompt", "tools", "tool_choice", "response_format"} & raw.keys()):
        raise BadRequest(f"resume goes on with what was asked: no {min(said)}")
    own, given = tools(raw), raw.get("tools") is not None or raw.get("tool_choice") == "none"
    offered = own if given else base.tools
    nice = integer(raw, "nice", base.nice, -20, 19)
    deadline_s = number(raw, "deadline_s", base.deadline_s, 0, 1e9)
    return replace(
        base,
        messages=() if resume else messages(raw),
        tools=offered,
        decoded=tuple(grammar.arguments(grammar.parameters(f)) for f in own) if given else base.decoded,
        tool_choice=tool_choice(raw, offered),
        schema=schema(raw),
        steps=0 if given or resume or not base.tools else integer(raw, "steps", base.steps, 0, STEPS_MAX),
        sampling=sampling(raw, base.sampling),
        model=string(raw, "model", base.model),
        context=string(raw, "context", base.context),
        nice=nice,
        deadline_s=deadline_s,
        json=True,
        stream=boolean(raw, "stream", False),
        resume=resume,
    )


def as_asked(spec: Spec) -> Message:
    """The request again in the shape of the API: `parse` of it gives an equal spec."""
    asked: Message = {"messages": list(spec.messages), **asdict(spec.sampling)}
    asked["stop"] = list(spec.sampling.stop)
    if spec.tools:
        asked["tools"] = list(spec.tools)
    if spec.tool_choice.startswith(grammar.FUNCTION):
        function = {"name": spec.tool_choice.removeprefix(grammar.FUNCTION)}
        asked["tool_choice"] = {"type": "function", "function": function}
    elif spec.tool_choice != "auto":
        asked["tool_choice"] = spec.tool_choice
    if spec.schema:
        wanted = {"name": "answer", "schema": json.loads(spec.schema)}
        asked["response_format"] = {"type": "json_schema", "json_schema": wanted}
    return asked


def messages(raw: Message) -> tuple[Message, ...]:
    if "prompt" in raw and "messages" not in raw:
        return ({"role": "user", "content": string(raw, "prompt", "")},)
    given = raw.get("messages")
    if not isinstance(given, list) or not given:
        raise BadRequest("messages is missing or empty", '{"messages":[{"role":"user","content":"…"}]}')
    return tuple(message(one, f"messages[{i}]") for i, one in enumerate(given))


def message(raw: object, where: str) -> Message:
    """One chat message; content may be a list of text parts, which become one text."""
    if not isinstance(raw, dict) or raw.get("role") not in ROLES:
        raise BadRequest(f"{where} needs a role out of {', '.join(ROLES)}")
    content = raw.get("content")
    if isinstance(content, list):
        if not all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            raise BadRequest(f"{where}: only text parts are understood")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str) and not (content is None and raw.get("tool_calls")):
        raise BadRequest(f"{where}: content is to be text")
    clean = {"role": raw["role"], "content": content or ""}
    if raw["role"] == "developer":  # OpenAI's newer name of the same thing
        clean["role"] = "system"
    for key in ("tool_calls", "tool_call_id", "name"):
        if raw.get(key) is not None:
            clean[key] = raw[key]
    if not isinstance(clean.get("tool_calls", []), list):
        raise BadRequest(f"{where}: tool_calls is to be a list")
    return clean


def tools(raw: Message) -> tuple[Message, ...]:
    given = raw.get("tools") or []
    named = isinstance(given, list) and all(
        isinstance(t, dict)
        and isinstance(t.get("function"), dict)
        and isinstance(t["function"].get("name"), str)
        for t in given
    )
    if not named:
        raise BadRequest(
            "tools is to be a list of OpenAI functions", '[{"type":"function","function":{"name":…}}]'
        )
    return () if raw.get("tool_choice") == "none" else tuple(given)


def tool_choice(raw: Message, offered: tuple[Message, ...]) -> str:
    wanted = raw.get("tool_choice")
    if wanted in (None, "auto", "none"):
        return "auto"
    if not offered:
        raise BadRequest("tool_choice needs tools", "name some in tools")
    if wanted == "required":
        return "required"
    function = wanted.get("function") if isinstance(wanted, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not any(tool["function"]["name"] == name for tool in offered):
        raise BadRequest(
            "tool_choice is auto, none, required or one of tools", '{"type":"function","function":{"name":…}}'
        )
    return f"{grammar.FUNCTION}{name}"


def schema(raw: Message) -> str:
    """That of response_format."""
    wanted = raw.get("response_format")
    kind = wanted.get("type") if isinstance(wanted, dict) else "text" if wanted is None else None
    if kind == "text":
        return ""
    if kind == "json_object":
        return '{"type": "object"}'
    named = wanted.get("json_schema") if isinstance(wanted, dict) and kind == "json_schema" else None
    if not isinstance(named, dict) or not isinstance(named.get("schema"), dict):
        raise BadRequest(
            "response_format is of type text, json_object or json_schema",
            '{"type":"json_schema","json_schema":{"name":…,"schema":{…}}}',
        )
    text = json.dumps(named["schema"])
    try:
        grammar.check(text)
    except BadRequest as error:
        raise BadRequest(f"response_format: {error}", error.hint) from None
    return text


def sampling(raw: Message, base: Sampling) -> Sampling:
    """The sampling keys of a request, or of an agent's params.json."""
    stop = raw.get("stop", base.stop)
    stop = (stop,) if isinstance(stop, str) else stop or ()
    if (
        not isinstance(stop, (list, tuple))
        or len(stop) > 16
        or not all(isinstance(s, str) and 0 < len(s) <= 256 for s in stop)
    ):
        raise BadRequest("stop is to be up to 16 texts of 1 to 256 characters")
    most = "max_completion_tokens" if "max_completion_tokens" in raw else "max_tokens"
    return Sampling(
        temperature=number(raw, "temperature", base.temperature, 0, 100) or 0.0,
        top_k=integer(raw, "top_k", base.top_k, 0, 1 << 30),
        top_p=number(raw, "top_p", base.top_p, 0, 1) or 0.0,
        seed=integer(raw, "seed", base.seed, -(1 << 63), (1 << 63) - 1),
        max_tokens=integer(raw, most, base.max_tokens, 1, 1 << 24),
        min_tokens=integer(raw, "min_tokens", base.min_tokens, 0, 1 << 24),
        ignore_eos=boolean(raw, "ignore_eos", base.ignore_eos),
        stop=tuple(stop),
        logprobs=logprobs(raw, base.logprobs),
        truncation=choice(raw, "truncation", base.truncation, "disabled", "auto"),
    )


def logprobs(raw: Message, base: int | None) -> int | None:
    if "logprobs" not in raw and "top_logprobs" not in raw:
        return base
    wanted = raw.get("logprobs", True)
    if wanted is False or wanted is None:
        return None
    if isinstance(wanted, bool):
        return integer(raw, "top_logprobs", 0, 0, 20)
    return integer(raw, "logprobs", 0, 0, 20)

"""A request for a model's answer (kind llm), as plain text or JSON of the OpenAI chat-completion API.

A text is one user message. Pure: parse bytes into a `Chat`, or raise BadRequest; and turn a stored `Chat`
back into the API's shape. This module is not with its handler, because conversations and agents use the same
messages.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self

from aiosd.config import duration
from aiosd.config.config import STEPS_MAX
from aiosd.errors import BadRequest, BadValue
from aiosd.syscall import answers, completion, fitting, grammar
from aiosd.syscall.decodable import LOOSE
from aiosd.syscall.foreign import decode, is_object, prose, read_json
from aiosd.syscall.keys import boolean, integer, number, only, string
from aiosd.syscall.messages import messages, tool_choice, tools
from aiosd.syscall.openai_keys import NO_EFFECT, refuse
from aiosd.syscall.sampling import SAMPLING_KEYS, Sampling, sampling
from aiosd.syscall.spec import Message, Spec, with_tuples
from aiosd.syscall.template import TEMPLATE_KEYS, variables
from aiosd.syscall.toolcalls import ParsedAnswer

if TYPE_CHECKING:
    from aiosd.syscall.request import Request

GREEDY = Sampling()


@dataclass(frozen=True, slots=True)
class Chat(Spec):
    kind: ClassVar[str] = "llm"

    messages: tuple[Message, ...]
    sampling: Sampling
    model: str
    context: str = ""  # empty: the request stands alone
    context_id: int = 0  # the id of that context; no later context of its name has it
    system: str = ""
    leads: bool = False  # the request itself gave `system`: it comes first, whatever the messages have
    raw: bool = False  # the only message is the prompt as it is: no chat template, and no thinking or calls
    tools: tuple[Message, ...] = ()
    decoded: tuple[str, ...] = ()  # for each tool, the grammar that decodes its arguments
    tool_choice: str = "auto"  # auto, required, or grammar.FUNCTION + the name of a tool
    parallel: bool = True  # False: an answer has at most one call
    template: Message = field(default_factory=dict)  # more variables for the model's chat template
    schema: str = ""  # JSON Schema of the answer, as JSON; empty: the answer may be any text
    stream: bool = False  # JSON only: each chunk is a line, sent when it is made
    resume: bool = False  # JSON only: continue the unfinished answer of the context's kv file

    @property
    def target(self) -> str:
        return self.model

    @property
    def context_name(self) -> str:
        return self.context

    @property
    def turn_of(self) -> int:
        return self.context_id

    @property
    def understood(self) -> bool:
        return not self.refused and bool(self.messages)

    def state(self) -> object:
        return answers.Heard()

    def said(self, request: Request) -> ParsedAnswer:
        """Return the thinking, the text and the calls of everything that the model has said."""
        if self.raw:
            return ParsedAnswer("", request.text, [])
        return answers.said(request, self)

    def grown(self, request: Request, text: str) -> tuple[str, str]:
        """Return the thinking and the text that are new to readers."""
        if self.raw:
            return "", text
        return answers.grown(request, self, text)

    def held(self, request: Request) -> tuple[str, str]:
        """Return the thinking and the text that were held back until the end."""
        if self.raw:
            return "", ""
        return answers.held(request, self)

    @property
    def judged(self) -> bool:
        """Whether the schema was weakened to decode by it, so that the whole answer is judged at its end."""
        return bool(self.schema) and json.loads(self.schema).get(LOOSE) is True

    def judge(self, request: Request) -> None:
        if request.finish_reason == "stop" and isinstance(request.own, answers.Heard):
            request.own.quarrel = fitting.quarrel(self.schema, self.said(request).content)

    def text(self) -> str:
        if self.json or len(self.messages) > 1:  # a step of an agent's loop has many messages
            return json.dumps(asdict(self), ensure_ascii=False) + "\n"
        return "".join(m["content"] + "\n" for m in self.messages)

    def ends_line(self) -> bool:
        return True

    def part(self, request: Request, text: str, logprobs: list[Any]) -> bytes:
        thought, answer = self.grown(request, text)
        if not self.json:
            return answer.encode()
        if self.stream and (thought or answer or logprobs):
            return completion.chunk(request, self, thought, answer, logprobs).encode()
        return b""

    def left(self, request: Request) -> bytes:
        return self.held(request)[1].encode()

    def rest(self, request: Request) -> str | None:
        return completion.rest(request, self) if self.stream else None

    def document(self, request: Request) -> str:
        return completion.whole(request, self)

    def turn(self, request: Request) -> list[Message]:
        return answers.turn(request, self)

    @classmethod
    def load(cls, raw: dict[str, Any]) -> Self:
        sampling = raw.pop("sampling")
        return cls(**with_tuples(raw), sampling=Sampling(**with_tuples(sampling)))


@dataclass(frozen=True, slots=True)
class Loop(Chat):
    """A request whose tool calls the daemon runs. Each use of the model or a tool is a request itself."""

    kind: ClassVar[str] = "loop"
    computes: ClassVar[bool] = False

    steps: int = 0  # how often the loop may ask the model
    groups: tuple[int, ...] = ()  # the caller's groups, his gid first: tools run with them

    @property
    def queue(self) -> str:
        return LOOPS

    def state(self) -> object:
        return Between()

    def said(self, request: Request) -> ParsedAnswer:
        """Return the text as it is: it was parsed step by step."""
        return ParsedAnswer("", request.text, [])

    def grown(self, request: Request, text: str) -> tuple[str, str]:
        return "", text

    def held(self, request: Request) -> tuple[str, str]:
        return "", ""

    def turn(self, request: Request) -> list[Message]:
        return answers.turn(request, self, between(request))


@dataclass(slots=True, eq=False)
class Between:
    """The tool calls and results of a finished loop, before its answer."""

    messages: list[Message] = field(default_factory=list)


def between(request: Request) -> list[Message]:
    assert isinstance(request.own, Between)
    return request.own.messages


LOOPS = "loops"  # the queue of all loops, which start at once
KEYS = {
    "messages",
    "model",
    "tools",
    "context",
    "nice",
    "deadline_s",
    "keep_alive",
    "raw",
    "stream",
    "resume",
    "steps",
    "system",
    "parallel_tool_calls",
    *TEMPLATE_KEYS,
    *NO_EFFECT,
} | ({*SAMPLING_KEYS} | {"max_completion_tokens", "top_logprobs", "tool_choice", "response_format", "prompt"})

ALONE = ("messages", "system", "context", "tools", "tool_choice")  # what a raw prompt stands without
FORMATS: dict[str, tuple[str, ...]] = {  # the keys beside `type` of response_format
    "text": (),
    "json_object": ("schema",),
    "json_schema": ("json_schema",),
}
FORMAT_HINT = '{"type":"json_schema","json_schema":{"name":…,"schema":{…}}}'


@dataclass(frozen=True, slots=True)
class Defaults:
    """The settings that a request starts from, of its agent or of its file."""

    model: str
    context: str = ""
    system: str = ""
    nice: int = 0
    sampling: Sampling = GREEDY
    tools: tuple[Message, ...] = ()
    decoded: tuple[str, ...] = ()
    parallel: bool = True
    template: Message = field(default_factory=dict)
    steps: int = 0


def parse(body: bytes, defaults: Defaults) -> Chat:
    """Text, or a JSON object (foreign.is_object). Raises BadRequest."""
    text = decode(body)
    if is_object(body):
        return parse_json(text, defaults)
    return begin(defaults, {"role": "user", "content": prose(text)})


def begin(d: Defaults, *messages: Message) -> Chat:
    """Return a request with these messages and otherwise the defaults."""
    chat = Chat(
        messages, d.sampling, d.model, d.context,
        system=d.system, nice=d.nice, tools=d.tools, decoded=d.decoded,
        parallel=d.parallel, template=d.template,
    )  # fmt: skip
    return looping(chat, d.steps if d.tools else 0)


def looping(chat: Chat, steps: int) -> Chat:
    """Return the request as a Loop of that many steps; with 0 steps, unchanged."""
    return Loop(**{f.name: getattr(chat, f.name) for f in fields(Chat)}, steps=steps) if steps else chat


def parse_json(text: str, d: Defaults) -> Chat:
    raw = read_json(text)
    assert isinstance(raw, dict)  # it begins with {
    refuse(raw)
    only(raw, "", *KEYS)
    resume = boolean(raw, "resume", False)
    if resume and (said := {"messages", "prompt", "tools", "tool_choice", "response_format"} & raw.keys()):
        raise BadRequest(f"resume takes no {min(said)}", "the unfinished answer has its own; leave it out")
    plain = boolean(raw, "raw", False)
    if plain and (beside := [key for key in ALONE if raw.get(key)]):
        raise BadRequest(f"raw takes no {beside[0]}", "a raw prompt is all that the model gets; leave it out")
    if plain and not raw.get("prompt"):
        raise BadRequest("raw: prompt is missing or empty", '{"raw":true,"prompt":"…"}')
    own, given = tools(raw), raw.get("tools") is not None or raw.get("tool_choice") == "none" or plain
    offered = own if given else d.tools
    nice = integer(raw, "nice", d.nice, -20, 19)
    deadline_s = number(raw, "deadline_s", None, 0, 1e9)
    chat = Chat(
        messages=() if resume else messages(raw),
        tools=offered,
        decoded=tuple(grammar.arguments(grammar.parameters(f)) for f in own) if given else d.decoded,
        tool_choice=tool_choice(raw, offered),
        parallel=boolean(raw, "parallel_tool_calls", d.parallel),
        template=variables(raw, d.template),
        schema=schema(raw),
        sampling=sampling(raw, d.sampling),
        model=string(raw, "model", d.model),
        context="" if plain else string(raw, "context", d.context),
        system="" if plain else string(raw, "system", d.system),
        leads=bool(raw.get("system")),
        raw=plain,
        nice=nice,
        deadline_s=deadline_s,
        keep_alive_s=keep_alive(raw),
        json=True,
        stream=boolean(raw, "stream", False),
        resume=resume,
    )
    runs = not given and not resume and d.tools
    return looping(chat, integer(raw, "steps", d.steps, 0, STEPS_MAX) if runs else 0)


def as_asked(spec: Chat) -> Message:
    """Return the request in the API's shape. `parse` turns it back into an equal spec."""
    asked: Message = {"messages": list(spec.messages), **asdict(spec.sampling)}
    asked["stop"] = list(spec.sampling.stop)
    if spec.tools:
        asked["tools"] = list(spec.tools)
    if spec.tool_choice.startswith(grammar.FUNCTION):
        function = {"name": spec.tool_choice.removeprefix(grammar.FUNCTION)}
        asked["tool_choice"] = {"type": "function", "function": function}
    elif spec.tool_choice != "auto":
        asked["tool_choice"] = spec.tool_choice
    if not spec.parallel:
        asked["parallel_tool_calls"] = False
    if spec.template:
        asked["chat_template_kwargs"] = spec.template
    if spec.leads:
        asked["system"] = spec.system
    if spec.schema:
        wanted = {"name": "answer", "schema": json.loads(spec.schema)}
        asked["response_format"] = {"type": "json_schema", "json_schema": wanted}
    return asked


def schema(raw: Message) -> str:
    """Return the JSON Schema of response_format."""
    wanted = raw.get("response_format")
    if wanted is None:
        return ""
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if not isinstance(kind, str) or kind not in FORMATS:
        raise BadRequest("response_format must be of type text, json_object or json_schema", FORMAT_HINT)
    only(wanted, "response_format", "type", *FORMATS[kind])
    if kind == "text":
        return ""
    named = wanted.get("json_schema") if kind == "json_schema" else wanted
    if not isinstance(named, dict):
        raise BadRequest("response_format: json_schema must be an object", FORMAT_HINT)
    if kind == "json_schema":
        only(named, "response_format.json_schema", "name", "description", "schema", "strict")
    given = named.get("schema")
    if kind == "json_object" and given in (None, {}):
        return '{"type": "object"}'
    if not isinstance(given, dict):
        raise BadRequest("response_format: schema must be an object", FORMAT_HINT)
    loose = {LOOSE: True} if not boolean(named, "strict", True) else {}
    text = json.dumps({**given, **loose})
    try:
        grammar.check(text)
    except BadRequest as error:
        raise BadRequest(f"response_format: {error}", error.hint) from None
    return text


def keep_alive(raw: Message) -> float | None:
    """Return how many seconds the model stays after the request. None: as the model says."""
    asked = raw.get("keep_alive")
    if asked is None:
        return None
    if isinstance(asked, bool) or not isinstance(asked, (int, float, str)):
        raise BadRequest("keep_alive must be seconds or text", duration.HINT)
    try:
        seconds = duration.seconds(f"{asked:g}" if isinstance(asked, float) else str(asked))
    except BadValue as error:
        raise BadRequest(f"keep_alive: {error}", 'write 90, "30s", "5m", "2h" or "0"') from None
    if seconds == duration.ALWAYS:
        hint = "keep_alive always > models/NAME/ctl does, by an administrator"
        raise BadRequest("a request cannot keep a model for always", hint)
    return seconds

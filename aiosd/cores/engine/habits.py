"""What a chat template does with the kinds of messages that not every template knows.

When a model is loaded, its template prints a probe of each kind. Where it fails, or drops what it was given,
requests are put into a form that it takes: all system messages become one at the beginning, or a part of the
first user message; tools become a part of the system message. Knows templates by what they print alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from aiosd.errors import BadRequest
from aiosd.syscall.families import UNKNOWN, Family
from aiosd.syscall.toolcalls import Offer, parse

Message = dict[str, Any]
Print = Callable[[list[Message], list[Message] | None], str]

USER: Message = {"role": "user", "content": "probe-user"}
SYSTEM: Message = {"role": "system", "content": "probe-system"}
LATE: Message = {"role": "system", "content": "probe-late"}
ANSWER: Message = {"role": "assistant", "content": "probe-answer"}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
ARGUMENTS = {"city": "Oslo 1.10", "days": 3}
TOOL: Message = {
    "type": "function",
    "function": {"name": "probe_tool", "description": "probe-description", "parameters": PARAMETERS},
}
TOOLS_TOLD = """\
You may call these functions. To call one, answer with a line for each call and nothing else:
<tool_call>{"name": NAME, "arguments": {...}}</tool_call>
"""


@dataclass(frozen=True, slots=True)
class Habits:
    """Which kinds of messages a template takes as they are."""

    family: Family
    system: bool = True  # a system message at the beginning
    systems: bool = True  # several, at any place
    calls: bool = True  # calls of the assistant, and their results
    texts: bool = False  # the arguments of a call are JSON in a text, and no object
    tools: bool = True
    reads_back: bool = True  # the call that it prints is read as that call

    @property
    def lacks(self) -> list[str]:
        """What the template does not take as it is, for a model's info.json."""
        kinds = {
            "system messages": self.system,
            "several system messages": self.systems,
            "calls and results": self.calls,
            "tools": self.tools,
            "calls that are read as they were": self.reads_back or self.family.name == UNKNOWN,
        }
        return [name for name, there in kinds.items() if not there]

    def normal(
        self, messages: list[Message], tools: list[Message] | None
    ) -> tuple[list[Message], list[Message] | None]:
        """The same conversation in the form that the template takes."""
        said = [self._message(one) for one in self._numbered(messages)]
        if tools and not self.tools:
            told = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
            said, tools = [{"role": "system", "content": TOOLS_TOLD + told}, *said], None
            said = _merged(said)
        if not self.calls:
            said = [_as_text(one) for one in said]
        if not self.systems or not self.system:
            said = _merged(said)
        return (said if self.system else _without_system(said)), tools

    def _message(self, message: Message) -> Message:
        made = {**message, "content": message.get("content") or ""}
        if message.get("tool_calls"):
            made["tool_calls"] = [self._call(call) for call in message["tool_calls"]]
        return made

    def _call(self, call: Any) -> Any:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            return call
        given = function.get("arguments")
        value = given if given not in (None, "") else {}
        if isinstance(value, str):
            value = _decoded(value)
        if self.texts and not isinstance(value, str):
            value = json.dumps(value, ensure_ascii=False)
        return {"type": "function", **call, "function": {**function, "arguments": value}}

    def _numbered(self, messages: list[Message]) -> list[Message]:
        """With the ids of calls in the form that the family's templates insist on."""
        if not self.family.call_id:
            return messages
        made, new, n = list[Message](), dict[str, str](), 0
        for message in messages:
            calls = list[Any]()
            for call in message.get("tool_calls") or []:
                if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
                    calls.append(call)
                    continue
                id = self.family.call_id.format(name=call["function"].get("name", ""), n=n)
                new[str(call.get("id"))], n = id, n + 1
                calls.append({**call, "id": id})
            one = {**message, "tool_calls": calls} if calls else message
            if "tool_call_id" in one:
                one = {**one, "tool_call_id": new.get(str(one["tool_call_id"]), f"{0:09d}")}
            made.append(one)
        return made


def probe(print_: Print, family: Family) -> Habits:
    """Print a probe of each kind. Raises BadRequest where the template cannot even print a user's message."""
    print_([USER], None)
    base = Habits(family)
    shown = _prints(print_, base, [SYSTEM, USER], "probe-system")
    several = _prints(print_, base, [SYSTEM, LATE, USER], "probe-system", "probe-late")
    late = _prints(print_, base, [SYSTEM, USER, ANSWER, LATE, USER], "probe-system", "probe-late")
    found = replace(base, system=shown, systems=several and late)
    found = replace(found, tools=_prints(print_, found, [USER], "probe_tool", tools=[TOOL]))
    for texts in (False, True):
        tried = replace(found, texts=texts)
        if _prints(print_, tried, _called(), "probe_tool", "Oslo 1.10", "probe-result", tools=[TOOL]):
            return replace(tried, reads_back=_reads_back(print_, tried))
    return replace(found, calls=False)


def _called() -> list[Message]:
    function = {"name": "probe_tool", "arguments": json.dumps(ARGUMENTS)}
    call = {"id": "call_1_0", "type": "function", "function": function}
    result = {"role": "tool", "name": "probe_tool", "tool_call_id": "call_1_0", "content": "probe-result"}
    return [USER, {"role": "assistant", "content": "", "tool_calls": [call]}, result]


def _prints(
    print_: Print, habits: Habits, messages: list[Message], *words: str, tools: list[Message] | None = None
) -> bool:
    """Whether the template prints these messages and all of the words."""
    try:
        text = print_(*habits.normal(messages, tools))
    except BadRequest:
        return False
    return all(word in text for word in words)


def _reads_back(print_: Print, habits: Habits) -> bool:
    """Whether the call that the template prints is read as that call."""
    if habits.family.name == UNKNOWN:
        return False
    text = print_(*habits.normal(_called(), [TOOL]))
    printed = text[text.index("probe-user") + len("probe-user") : text.rindex("probe-result")]
    begins = [at for mark in habits.family.marks if (at := printed.find(mark)) >= 0]
    bare = printed.find("probe_tool") if habits.family.bare else -1
    if bare >= 0 and not begins:
        begins = [bare, printed.rfind("{", 0, bare), printed.rfind("[", 0, bare)]
    offered = Offer({"probe_tool": PARAMETERS})
    for at in sorted(begins):
        for end in _ends(printed):
            said = parse(printed[max(0, at) : end], habits.family.name, offered)
            if len(said.calls) == 1 and json.loads(said.calls[0].arguments) == ARGUMENTS:
                return True
    return False


def _ends(printed: str) -> list[int]:
    """Where the printed call may end: with the text, or before any mark of the next turn."""
    return [len(printed), *(i for i, c in enumerate(printed) if c in "<[\n")]


def _decoded(text: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def _merged(messages: list[Message]) -> list[Message]:
    """All system messages as one at the beginning; one that was said before is not said again."""
    texts = dict.fromkeys(one["content"] for one in messages if one["role"] == "system" and one["content"])
    rest = [one for one in messages if one["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join(texts)}, *rest] if texts else rest


def _without_system(messages: list[Message]) -> list[Message]:
    """The system message as the beginning of the first user's message."""
    if not messages or messages[0]["role"] != "system":
        return messages
    system, rest = messages[0]["content"], messages[1:]
    at = next((i for i, one in enumerate(rest) if one["role"] == "user"), None)
    if at is None:
        return [{"role": "user", "content": system}, *rest]
    return [*rest[:at], {**rest[at], "content": f"{system}\n\n{rest[at]['content']}"}, *rest[at + 1 :]]


def _as_text(message: Message) -> Message:
    """Calls and results for a template that knows neither."""
    if message["role"] == "tool":
        return {
            "role": "user",
            "content": f"Result of {message.get('name') or 'the tool'}: {message['content']}",
        }
    calls = [call["function"] for call in message.get("tool_calls") or [] if isinstance(call, dict)]
    said = "\n".join(f"<tool_call>{json.dumps(one, ensure_ascii=False)}</tool_call>" for one in calls)
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**rest, "content": "\n".join(filter(None, (message["content"], said)))}

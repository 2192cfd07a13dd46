"""A conversation with a model by files of /aios: `models/NAME/llm`, and `contexts/NAME` once it is saved.

Until then it is in the memory of this program. So nothing of it is left when the program ends.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

from aiosd.client import Failed, Files
from aiosd.errors import BadRequest
from aiosd.syscall import chat
from aiosd.syscall.sampling import SAMPLING_KEYS
from aiosd.syscall.template import TEMPLATE_KEYS

DEFAULTS = {"max_tokens": 1024, "truncation": "auto"}  # a person reads along and can stop it
SETTINGS = (
    *sorted(set(SAMPLING_KEYS) - {"logprobs"}),
    *sorted(TEMPLATE_KEYS), "nice", "response_format",
)  # fmt: skip
Message = dict[str, Any]


@dataclass
class Conversation:
    files: Files
    model: str
    settings: dict[str, Any] = field(default_factory=lambda: dict(DEFAULTS))
    system: str = ""
    context: str = ""  # which has the messages; empty: `messages` has them
    messages: list[Message] = field(default_factory=list)  # without the system message
    finish_reason: str = ""  # of the last answer
    usage: dict[str, Any] = field(default_factory=dict)

    def ask(self, text: str, waiting: Callable[[], None]) -> Generator[tuple[str, bool]]:
        """Ask, and give each piece of the answer with whether it is only thinking. A question and its answer
        become a part of the conversation when the answer has ended. Closing the iterator cancels it.
        """
        question = {"role": "user", "content": text}
        body = {**self.settings, "messages": [*self._before(), question], "stream": True}
        if self.context:
            body["context"] = self.context
        answer = ""
        for line in lines(self._answer(json.dumps(body, ensure_ascii=False), waiting)):
            said = json.loads(line)
            if "error" in said:
                raise Failed(said["error"]["message"])
            choice = said["choices"][0]
            if thought := choice["delta"].get("reasoning_content"):
                yield thought, True
            if more := choice["delta"].get("content"):
                answer += more
                yield more, False
            if choice["finish_reason"]:
                self.finish_reason, self.usage = choice["finish_reason"], said["usage"]
        if self.context:
            self.system = ""  # the context has it now
        else:
            self.messages += [question, {"role": "assistant", "content": answer}]

    def _answer(self, body: str, waiting: Callable[[], None]) -> Iterator[bytes]:
        return self.files.answer(f"models/{self.model}/llm", body, waiting)

    def _before(self) -> list[Message]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.messages]

    def set(self, name: str, text: str) -> None:
        """Set one thing for the answers that follow; with an empty text to the default. Raises Failed."""
        if name == "system":
            self.system = text
            return
        if name not in SETTINGS:
            raise Failed(f"nothing is called {name!r}; there are system, {', '.join(SETTINGS)}")
        changed = {key: value for key, value in self.settings.items() if key != name}
        if text or name in DEFAULTS:
            changed[name] = value_of(text) if text else DEFAULTS[name]
        try:
            chat.parse_json(json.dumps({**changed, "prompt": "?"}), chat.Defaults(self.model))
        except BadRequest as error:
            raise Failed(error.explanation) from None
        self.settings = changed

    def save(self, name: str) -> None:
        """Keep the conversation as a new context, which it continues from now on."""
        if (self.files.root / "contexts" / name).exists():
            raise Failed(
                f"context {name} is there already; /load {name} continues it, or choose another name"
            )
        if self.context:
            self.files.write(f"contexts/{self.context}/ctl", f"fork {name}")
        else:
            self.files.make(f"contexts/{name}")
            if messages := self._before():
                text = "\n".join(json.dumps(one, ensure_ascii=False) for one in messages)
                self.files.write(f"contexts/{name}/messages.jsonl", text)
        self.context, self.messages, self.system = name, [], ""

    def load(self, name: str) -> int:
        """Continue a context, in place of this conversation. Return the number of its messages."""
        count = len(self.files.read(f"contexts/{name}/messages.jsonl").splitlines())
        self.context, self.messages, self.system = name, [], ""
        return count

    def clear(self) -> None:
        self.context, self.messages = "", []


def lines(pieces: Iterator[bytes]) -> Iterator[bytes]:
    rest = b""
    for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        yield from whole


def value_of(text: str) -> Any:
    """JSON, else the text itself: 0.7, true, ["a","b"], auto."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def waits_for(files: Files, before: set[str]) -> str:
    """What a request of this user that was not there `before` waits for, in words; empty: for nothing."""
    for id in files.names("requests"):
        place = files.root / "requests" / id
        if id not in before and place.stat().st_uid == os.getuid():
            state, *facts = (place / "state").read_text().strip().split(" ", 3)
            if state in ("queued", "preempted") and facts:
                return facts[2] if len(facts) > 2 else f"{facts[0]} requests start before it, in {facts[1]} s"
    return ""

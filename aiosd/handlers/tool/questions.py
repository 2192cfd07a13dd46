"""Questions of MCP servers to the caller of a tool (elicitation). A question waits in access/pending.

Only the caller answers: with `allow`, with the JSON that the server asks for, or with `deny`. When the time
is over there is no answer. Tools that run for the caller cannot answer, because they do not see access/. Any
thread may call.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import jsonschema
from jsonschema.exceptions import best_match

from aiosd.access.audit import Audit
from aiosd.access.caller import Caller
from aiosd.config.config import Config
from aiosd.errors import BadValue, NotFound, StoreFailed
from aiosd.handlers.tool.sampled import Sampled
from aiosd.host.message_ids import NOTICE, about
from aiosd.scheduler.notices import Notices
from aiosd.syscall import schemas
from aiosd.syscall.foreign import read_json
from aiosd.syscall.request import Request
from aiosd.syscall.toolcall import QUEUE
from aiosd.tools.mcp.calling import Question, Withdrawn, unheard
from aiosd.tools.run.toolrunner import ToolRunner

log = logging.getLogger(__name__)

SHOWN = 4096  # characters of a message


@dataclass(frozen=True, slots=True)
class Elicited:
    """A question that waits. A call may have several; access/pending shows the first."""

    request: Request
    question: Question
    until_s: float

    @property
    def schema(self) -> dict[str, Any]:
        given = self.question.facts.get("schema")
        return given if isinstance(given, dict) else {}

    def shown(self) -> str:
        """Its request.json."""
        facts: dict[str, Any] = {
            "request": self.request.id,
            "uid": self.request.uid,
            "agent": self.request.agent,
            "tool": self.request.spec.target.removeprefix(QUEUE),
            "question": str(self.question.facts.get("message", ""))[:SHOWN],
        }
        if "url" in self.question.facts:
            facts["url"] = str(self.question.facts["url"])
        elif self.schema:
            facts["answer"] = self.schema
        return json.dumps(facts, ensure_ascii=False, indent=2) + "\n"


class Questions:
    def __init__(self, runner: ToolRunner, notices: Notices, audit: Audit, sampled: Sampled) -> None:
        self._runner, self._notices, self._audit, self._sampled = runner, notices, audit, sampled
        self._pending_s = 0.0  # how long a question waits
        self._lock = threading.Lock()
        self._waiting: dict[int, list[Elicited]] = {}  # by request

    def configure(self, config: Config) -> None:
        self._pending_s = config.tools.pending_s

    def ids(self) -> list[int]:
        return list(self._waiting)

    def find(self, id: int) -> Elicited | None:
        waiting = self._waiting.get(id)
        return waiting[0] if waiting else None

    def heard(self, request: Request, news: Question | Withdrawn) -> None:
        """Take what a server asks during a call."""
        match news:
            case Question(what="elicit"):
                self._add(request, news)
            case Question(what="sample"):
                self._sampled.ask(request, news)
            case Withdrawn(number):
                self._sampled.withdraw(request.id, number)
                self._remove(request.id, number)
            case _:
                unheard(news)

    def _add(self, request: Request, question: Question) -> None:
        new = Elicited(request, question, time.time() + self._pending_s)
        with self._lock:
            self._waiting.setdefault(request.id, []).append(new)
        self._runner.later(self._pending_s, partial(self._expire, request.id, question.number))
        tool, how = request.spec.target, f"access/pending/{request.id}"
        log.log(
            NOTICE,
            "call %d of %s asks user %d: cat %s/request.json, then echo to %s/decision",
            request.id, tool, request.uid, how, how,
            extra=about(request=request.id, agent=request.agent, uid=request.uid),
        )  # fmt: skip
        self._notices.decided(request, "pending")

    def _remove(self, id: int, number: int) -> Elicited | None:
        with self._lock:
            waiting = self._waiting.get(id, [])
            found = next((one for one in waiting if one.question.number == number), None)
            if found:
                waiting.remove(found)
            if not waiting:
                self._waiting.pop(id, None)
        return found

    def _expire(self, id: int, number: int) -> None:
        if found := self._remove(id, number):
            found.question.reply({"action": "cancel"})
            self._notices.decided(found.request, "denied")

    def decide(self, caller: Caller, id: int, text: str) -> None:
        """Raises NotFound, BadValue, StoreFailed."""
        found = self.find(id)
        if found is None:
            raise NotFound(f"{id} does not wait any more")
        reply: dict[str, Any] = {"action": "decline"}
        if text != "deny":
            reply = {"action": "accept", "content": content(found.schema, text)}
        state = "denied" if text == "deny" else "allowed"
        with suppress(StoreFailed) if text == "deny" else nullcontext():  # a no is heeded in any case
            self._audit.decided(found.request, state, caller)
        if self._remove(id, found.question.number) is None:
            raise NotFound(f"{id} does not wait any more")
        found.question.reply(reply)
        self._notices.decided(found.request, state)


def content(schema: dict[str, Any], text: str) -> dict[str, Any]:
    """Read the answer to a question. Raises BadValue."""
    known = schema.get("properties")
    names = ", ".join(known) if known and isinstance(known, dict) else "nothing"
    hint = f'deny, or {{"NAME": …}} with {names}' if schema else "allow or deny"
    said = read_json("{}" if text == "allow" else text) if text[:1] == "{" or text == "allow" else None
    if not isinstance(said, dict):
        raise BadValue(f"{text[:40]!r} is no answer", hint)
    try:
        judge = schemas.reduced(schema) if schema else {"maxProperties": 0}
    except ValueError as error:
        raise BadValue(f"the server's schema of the answer is wrong: {error}", "deny") from None
    if wrong := best_match(islice(jsonschema.Draft202012Validator(judge).iter_errors(said), schemas.ERRORS)):
        raise BadValue(f"{schemas.place(wrong.absolute_path)}{wrong.message[:200]}", hint)
    return said

"""A request to run a tool (kind tool), and the outcome of the call. Pure.

This module is not in aiosd.handlers, because the audit log reads it too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from aiosd.syscall.response import line
from aiosd.syscall.spec import Spec

if TYPE_CHECKING:
    from aiosd.host.usage import Spent
    from aiosd.syscall.request import Request

QUEUE = "tools/"  # "tools/NAME" is the queue of a tool's calls


@dataclass(slots=True, eq=False)
class Outcome:
    """The further state of a tool call."""

    decision: str = ""  # of the rule that fits: allow, ask or deny
    rule: str = ""  # place of that rule
    why: str = ""  # the rule's reason
    by: str = ""  # the group that decides; empty: the caller
    exit_status: int | None = None
    stderr: str = ""
    spent: Spent | None = None


@dataclass(frozen=True, slots=True)
class ToolCall(Spec):
    kind: ClassVar[str] = "tool"
    acts: ClassVar[bool] = True
    documents_failure: ClassVar[bool] = True

    tool: str
    arguments: str = ""  # JSON that fits the tool's schema; empty: the request could not be parsed
    groups: tuple[int, ...] = ()  # the caller's gid, then the other groups; the tool gets them

    @property
    def target(self) -> str:
        return QUEUE + self.tool

    @property
    def understood(self) -> bool:
        return bool(self.arguments and self.groups)

    def state(self) -> object:
        return Outcome()

    def text(self) -> str:
        return f'{{"name": "{self.tool}", "arguments": {self.arguments}}}\n' if self.arguments else ""

    def measured(self, request: Request) -> dict[str, object]:
        facts = json.loads(request.document or "{}")
        return {key: facts[key] for key in ("cpu_seconds", "memory_bytes") if facts.get(key) is not None}

    def document(self, request: Request) -> str:
        """The outcome of a call, also of a failed one."""
        how = outcome(request)
        facts: dict[str, object] = {
            "tool": self.tool,
            "exit_status": how.exit_status,
            "output": request.text,
            "stderr": how.stderr,
            "error": request.error,
        }
        if how.spent:
            facts |= {"cpu_seconds": how.spent.cpu_s, "memory_bytes": how.spent.memory_bytes or None}
        return line({**facts, "request": request.id})


def outcome(request: Request) -> Outcome:
    assert isinstance(request.own, Outcome)
    return request.own

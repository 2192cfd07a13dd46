"""A request to run a tool (kind tool), and the outcome of the call. Pure.

This module is not with its handler, because the audit log and the approvals read it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from aiosd.syscall.response import line
from aiosd.syscall.spec import Spec

if TYPE_CHECKING:
    from aiosd.host.usage import Spent
    from aiosd.syscall.request import Request

QUEUE = "tools/"  # QUEUE + a tool's name: the queue of its calls


@dataclass(slots=True, eq=False)
class Outcome:
    """The extra state of a call."""

    decision: str = ""  # of the rule that fits the call: allow, ask or deny
    rule: str = ""  # file and number of that rule
    why: str = ""  # the rule's reason
    by: str = ""  # the group that decides; empty: the caller
    exit_status: int | None = None
    stderr: str = ""
    spent: Spent | None = None
    files: tuple[dict[str, str], ...] = ()  # that came with the text: name, type and base64 of each
    structured: dict[str, Any] | None = None  # the result as an object, if the tool gave it as one


@dataclass(frozen=True, slots=True)
class ToolCall(Spec):
    kind: ClassVar[str] = "tool"
    acts: ClassVar[bool] = True
    documents_failure: ClassVar[bool] = True

    tool: str
    arguments: str = ""  # JSON, checked by the tool's schema; empty: they could not be parsed
    groups: tuple[int, ...] = ()  # the caller's groups, his gid first: the tool runs with them

    @property
    def target(self) -> str:
        return QUEUE + self.tool

    @property
    def understood(self) -> bool:
        return not self.refused and bool(self.arguments and self.groups)

    def state(self) -> object:
        return Outcome()

    def text(self) -> str:
        return f'{{"name": "{self.tool}", "arguments": {self.arguments}}}\n' if self.arguments else ""

    def measured(self, request: Request) -> dict[str, object]:
        facts = json.loads(request.document or "{}")
        return {key: facts[key] for key in ("cpu_seconds", "memory_bytes") if facts.get(key) is not None}

    def document(self, request: Request) -> str:
        """Return the outcome of the call, also of a failed one."""
        how = outcome(request)
        facts: dict[str, object] = {
            "tool": self.tool,
            "exit_status": how.exit_status,
            "output": request.text,
            "stderr": how.stderr,
            "error": request.error,
        }
        if how.files:
            facts["files"] = how.files
        if how.structured is not None:
            facts["structured"] = how.structured
        if how.spent:
            facts |= {"cpu_seconds": how.spent.cpu_s, "memory_bytes": how.spent.memory_bytes or None}
        return line({**facts, "request": request.id})


def outcome(request: Request) -> Outcome:
    assert isinstance(request.own, Outcome)
    return request.own

"""What a model said, taken apart: its thinking, the text of its answer, and its tool calls.

Thinking comes off first: a model does not do what it only thinks of. A call counts when it is printed in the
way of the model's family, names a tool that was offered, and is not quoted (aiosd.syscall.quotation). One
broken call makes all of them text: a call that a broken one quotes, from a web page or a file that it was to
write, must not become a call of its own. What is no call stays text. Linear in the text. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from aiosd.syscall import argument_types, families
from aiosd.syscall.call_syntax import Reader, Spoken
from aiosd.syscall.families import THINKING, Family
from aiosd.syscall.quotation import Quotation

CALLS_MAX = 64  # a model that says more than these goes in circles


@dataclass(frozen=True, slots=True)
class ParsedCall:
    name: str
    arguments: str  # JSON of an object, as it was said


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    reasoning: str
    content: str  # the text of the answer without thinking and calls
    calls: list[ParsedCall]


@dataclass(frozen=True, slots=True)
class Offer:
    """The tools that a model was offered: names, and the JSON Schema of the parameters of each."""

    tools: Mapping[str, Any] = field(default_factory=dict)
    any_name: bool = False  # a marked call of another tool counts too: its caller answers that there is none
    one: bool = False  # the first call counts alone


def offer(functions: Iterable[dict[str, Any]], *, any_name: bool = False, one: bool = False) -> Offer:
    """`functions`: in OpenAI's shape."""
    named = (one["function"] for one in functions)
    return Offer({f["name"]: f.get("parameters") for f in named}, any_name, one)


NOTHING = Offer()


def parse(text: str, family: str, offered: Offer) -> ParsedAnswer:
    """`family`: the name in aiosd.syscall.families. Without an offer nothing is a call."""
    scan = Scan(text, families.of(family), offered)
    if offered.tools or offered.any_name:
        try:
            return scan.run()
        except (ValueError, RecursionError):  # a call is broken, or nested deeper than the decoder goes
            pass
    return Scan(text, scan.family, NOTHING).run()


class Scan:
    """One way through a text. `at` is the place up to which it is taken apart."""

    def __init__(self, text: str, family: Family, offered: Offer) -> None:
        self.text, self.family, self.offered = text, family, offered
        self.at = 0
        self.quotation = Quotation(text)
        self.prose = list[str]()
        self.thoughts = list[str]()
        self.calls = list[ParsedCall]()
        self.blank = True  # the answer has no text so far
        self.dropped = False  # something was taken out of the text
        self.doubtful = 0  # before this place a mark that is not the family's opened thinking

    def run(self) -> ParsedAnswer:
        self._begin()
        marks = marks_of(self.family)
        mark = marks.search(self.text, self.at)
        while mark:
            self.at = self._meet(mark)
            mark = marks.search(self.text, self.at)
        self._keep(len(self.text))
        return self._said()

    def _said(self) -> ParsedAnswer:
        content = "".join(self.prose)
        if self.calls or self.dropped:
            content = content.rstrip()
        reasoning = "\n".join(filter(None, (thought.strip() for thought in self.thoughts)))
        return ParsedAnswer(reasoning, content, self.calls[:1] if self.offered.one else self.calls)

    def _begin(self) -> None:
        """An answer may begin with anybody's mark of thinking, or with a call that has no mark."""
        begin = len(self.text) - len(self.text.lstrip())
        for one in THINKING:
            if self.text.startswith(one.opening, begin):
                self._think(begin + len(one.opening), one.closing)
                begin = self.at
                break
        if self.family.bare and self.offered is not NOTHING:
            self._bare(self.family.bare, begin)

    def _bare(self, read: Reader, begin: int) -> None:
        """Calls without a mark, when the text is nothing else."""
        try:
            found, end = read(self.text, begin)
        except (ValueError, RecursionError):
            return
        calls = [self._call(one) for one in found]
        rest = self.text[end:].strip("; \t\r\n")
        if calls and not rest and all(call.name in self.offered.tools for call in calls):
            self._add(calls)
            self.at = len(self.text)

    def _meet(self, mark: re.Match[str]) -> int:
        """What a mark means; gives the place behind it."""
        begin, end = mark.span()
        code = self.quotation.code(begin)
        if code:
            return self._keep(max(code, end))
        if mark.lastgroup == "dropped":
            self._keep(begin)
            self.dropped = True
            self.at = end
            self.quotation.leave_out(end)
            return end
        if closing := _closing(self.family, mark[0]):
            self._keep(begin)
            return self._think(end, closing)
        if mark.lastgroup == "closing":
            if self.calls:
                raise ValueError("a call stands in thinking")
            return self._keep(end)
        if mark.lastgroup == "foreign":
            if begin >= self.doubtful:
                self.doubtful = self._closed(mark[0], end)
            return self._keep(end)
        return self._act(mark)

    def _act(self, mark: re.Match[str]) -> int:
        """What stands behind a mark that opens calls."""
        begin, end = mark.span()
        if self.offered is NOTHING:
            return self._keep(end)
        read = dict(self.family.by_mark).get(mark[0], self.family.read)
        found, behind = read(self.text, end)
        if not found:
            return self._keep(max(behind, end))
        calls = [self._call(one) for one in found]
        known = self.offered.any_name or all(call.name in self.offered.tools for call in calls)
        if not known or begin < self.doubtful or self.quotation.quoted(begin, behind):
            self.quotation.leave_out(behind)
            return self._keep(behind)
        self._keep(begin)
        self._add(calls)
        self.at = behind
        self.quotation.leave_out(behind)
        return behind

    def _call(self, said: Spoken) -> ParsedCall:
        return ParsedCall(said.name, argument_types.arguments(said, self.offered.tools.get(said.name)))

    def _add(self, calls: list[ParsedCall]) -> None:
        self.calls += calls
        if len(self.calls) > CALLS_MAX:
            raise ValueError("too many calls")

    def _think(self, begin: int, closing: str) -> int:
        """Take out thinking up to its mark or the text's end; at the beginning with the blanks behind it."""
        end = self.text.find(closing, begin)
        self.thoughts.append(self.text[begin : end if end >= 0 else len(self.text)])
        self.at = end + len(closing) if end >= 0 else len(self.text)
        if self.blank:
            self.prose.clear()
            rest = re.compile(r"\s*").match(self.text, self.at)
            self.at = rest.end() if rest else self.at
        self.dropped = True
        self.quotation.leave_out(self.at)
        return self.at

    def _closed(self, opening: str, begin: int) -> int:
        closing = next(one.closing for one in THINKING if one.opening == opening)
        end = self.text.find(closing, begin)
        return end if end >= 0 else len(self.text)

    def _keep(self, end: int) -> int:
        """The text up to this place is part of the answer."""
        new = self.text[self.at : end]
        self.prose.append(new)
        self.blank = self.blank and not new.strip()
        self.at = max(self.at, end)
        return self.at


def _closing(family: Family, mark: str) -> str:
    return next((one.closing for one in family.thinking if one.opening == mark), "")


@cache
def marks_of(family: Family) -> re.Pattern[str]:
    """What in a text is not simply text. The group of a match tells what the mark does."""
    own = [one.opening for one in family.thinking]
    foreign = [one.opening for one in THINKING if one.opening not in own]
    closing = [one.closing for one in family.thinking]
    groups = {"own": own, "call": family.marks, "closing": closing, "foreign": foreign}
    parts = [f"(?P<{name}>{_any(literals)})" for name, literals in groups.items() if literals]
    if family.dropped:
        parts.insert(2, f"(?P<dropped>{family.dropped})")
    return re.compile("|".join(parts))


def _any(literals: Iterable[str]) -> str:
    return "|".join(map(re.escape, sorted(literals, key=len, reverse=True)))

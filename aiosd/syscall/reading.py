"""An answer as it grows: which of its text is surely thinking, and which surely part of the answer.

What push() gives is the beginning of what aiosd.syscall.toolcalls finds in the whole text. Whatever may still
become a call, or thinking in the middle of the answer, is left to the end. Pure.
"""

from __future__ import annotations

import re
from enum import Enum, auto
from functools import cache

from aiosd.syscall import families
from aiosd.syscall.families import THINKING, Family
from aiosd.syscall.toolcalls import marks_of

LONGEST = 96  # characters of a mark
OPENINGS = tuple(one.opening for one in THINKING)
DROPPED = "<[>"  # the first characters of the marks that are no part of the text
BEGINNINGS = {opening[0] for opening in OPENINGS}


class Stage(Enum):
    BEGINNING = auto()  # nothing was said but blanks, or part of a mark
    THINKING = auto()
    ANSWERING = auto()
    HELD = auto()  # the rest is for the end


class Reading:
    """`calls`: whether the model was offered tools."""

    def __init__(self, family: str, calls: bool) -> None:
        self._family, self._calls = families.of(family), calls
        self._marks = marks_of(self._family)
        self._openings, self._starts = awaited(self._family, calls)
        self._taken_out = False  # a mark, or thinking
        self._stage = Stage.BEGINNING
        self._rest = ""  # not given yet
        self._closing = ""  # the mark that ends the thinking that goes on
        self._trim = True  # leave out the blanks that come next
        self._unmarked = calls and self._family.bare is not None  # the answer may be a call without a mark
        self.thought, self.answered = 0, 0  # characters given

    @property
    def plain(self) -> bool:
        """Whether all that was pushed is the answer as it stands, also what was not given yet."""
        begun = self._stage is Stage.ANSWERING and (self.answered > 0 or not self._unmarked)
        return begun and not self._taken_out

    def push(self, text: str) -> tuple[str, str]:
        """The thinking and the answer that are new."""
        if self._goes_on(text):
            self.answered += len(text)
            return "", text
        self._rest += text
        thought, answer, stage = "", "", None
        while stage is not self._stage:
            stage = self._stage
            match stage:
                case Stage.BEGINNING:
                    self._begin()
                case Stage.THINKING:
                    thought += self._think()
                case Stage.ANSWERING:
                    answer += self._answer()
        self.thought += len(thought)
        return thought, answer

    def _goes_on(self, text: str) -> bool:
        """Whether all of the text is answer: for most tokens, and the cheapest way to see it."""
        begun = self._stage is Stage.ANSWERING and self.answered and not self._rest
        return bool(begun and text and not text[-1].isspace() and not self._starts.search(text))

    def _begin(self) -> None:
        said = self._rest.lstrip()
        if said.startswith(OPENINGS):
            found = next(one for one in THINKING if said.startswith(one.opening))
            self._open(len(self._rest) - len(said) + len(found.opening), found.closing)
        elif said and not (said[0] in BEGINNINGS and any(one.startswith(said) for one in OPENINGS)):
            self._stage, self._trim = Stage.ANSWERING, False

    def _open(self, at: int, closing: str) -> None:
        self._rest, self._closing, self._trim = self._rest[at:], closing, True
        self._stage, self._taken_out = Stage.THINKING, True

    def _think(self) -> str:
        end = self._rest.find(self._closing)
        if end < 0:
            return self._give(len(self._rest) - _overlap(self._rest, self._closing))
        new = self._give(end)
        self._rest = self._rest[self._rest.index(self._closing) + len(self._closing) :]
        self._stage, self._trim = Stage.ANSWERING, True
        return new

    def _answer(self) -> str:
        if not self.answered and self._bare():
            return ""
        found = self._marks.search(self._rest)
        while found and (found.lastgroup == "closing" or (found.lastgroup == "call" and not self._calls)):
            found = self._marks.search(self._rest, found.end())
        if found and not self.answered and not self._rest[: found.start()].strip() and self._passed(found):
            return self._answer() if self._stage is Stage.ANSWERING else ""
        if found:
            self._stage = Stage.HELD
        new = self._give(found.start() if found else self._sure())
        self.answered += len(new)
        return new

    def _passed(self, mark: re.Match[str]) -> bool:
        """Go behind a mark that the answer begins with; False: the mark means something else."""
        own = next((one for one in self._family.thinking if one.opening == mark[0]), None)
        if own:
            self._open(mark.end(), own.closing)
        elif mark.lastgroup == "dropped":
            self._rest, self._unmarked, self._taken_out = self._rest[mark.end() :], False, True
        return bool(own) or mark.lastgroup == "dropped"

    def _bare(self) -> bool:
        said = self._rest.lstrip()
        if not (self._unmarked and re.match(self._family.bare_begins, said)):
            return False
        found = self._marks.match(self._rest, len(self._rest) - len(said))
        return found is None or found.lastgroup != "dropped"

    def _sure(self) -> int:
        """How much cannot become part of a mark."""
        start = self._starts.search(self._rest, max(0, len(self._rest) - LONGEST))
        while start:
            tail = self._rest[start.start() :]
            if (self._family.dropped and tail[0] in DROPPED) or any(
                o.startswith(tail) for o in self._openings
            ):
                return start.start()
            start = self._starts.search(self._rest, start.end())
        return len(self._rest)

    def _give(self, end: int) -> str:
        """The text up to `end` without the blanks at its end, which stay."""
        text = self._rest[:end].rstrip()
        self._rest = self._rest[len(text) :]
        if self._trim:
            text = text.lstrip()
        self._trim = self._trim and not text
        return text


@cache
def awaited(family: Family, calls: bool) -> tuple[tuple[str, ...], re.Pattern[str]]:
    """Return the marks that an answer may turn into, and a pattern of their first characters."""
    openings = OPENINGS + (family.marks if calls else ())
    first = {opening[0] for opening in openings} | set(DROPPED if family.dropped else "")
    return openings, re.compile(f"[{re.escape(''.join(sorted(first)))}]")


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of the text that the mark begins with."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)

"""Which places of a text only quote: code fences, code spans, quoted lines, quotation marks.

A call that a model quotes is no call. A reader goes through a text once, from its beginning to its end, and
leaves out what is not prose, such as thinking and the arguments of calls. Linear in the text. Pure.
"""

from __future__ import annotations

import re

SPAN_MAX = 8  # backticks that open a code span
PARAGRAPH_END = re.compile(r"\n[ \t]*\n|\Z")
SEEN = re.compile(
    r"(?m:^[ ]{0,3}(?:>[ ]?)*[ ]{0,3}(?P<fence>`{3,}|~{3,}))|(?P<span>`+)|(?P<paragraph>\n[ \t]*\n)"
    r"|(?P<quote>[\"“”„«»])"
)
CLOSES = {"“": "”", "„": "”“", "«": "»", '"': '"'}
AROUND = {"'": "'", "‘": "’", "`": "`", "‚": "‘"}


class Quotation:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0  # all prose before this place has been looked at
        self._code_end = 0  # code that was found goes on to this place
        self._open = ""  # quotation mark that the paragraph has opened and not closed
        self._paragraph_end = -1
        self._unclosed = set[int]()  # lengths of backticks that no more such run of the paragraph follows

    def leave_out(self, end: int) -> None:
        """What stands before `end` and was not looked at is no prose."""
        self._at = max(self._at, end)

    def code(self, at: int) -> int:
        """The end of the code in which that place is; 0: it is in none. Places come in their order."""
        self._look(at)
        return self._code_end if at < self._code_end else 0

    def quoted(self, begin: int, end: int) -> bool:
        """Whether that part is quoted by its line, or by quotation marks around it; call code() first."""
        line = self._text.rfind("\n", max(0, begin - 256), begin) + 1
        if self._text[line:begin].lstrip().startswith(">"):
            return True
        before, after = self._text[begin - 1 : begin], self._text[end : end + 1]
        if before in AROUND and after and after == AROUND[before]:
            return True
        if not self._open:
            return False
        last = PARAGRAPH_END.search(self._text, end)
        rest = self._text[end : last.start() if last else len(self._text)]
        return any(mark in rest for mark in CLOSES[self._open])

    def _look(self, to: int) -> None:
        while self._at < to:
            found = SEEN.search(self._text, self._at, to)
            if found is None:
                self._at = max(self._at, to)
                return
            self._at = found.end()
            if found["fence"]:
                self._code(self._fence_end(found["fence"]))
            elif found["span"]:
                self._code(self._span_end(len(found["span"])))
            elif found["quote"]:
                self._quote(found["quote"])
            else:
                self._open, self._at = "", found.end() - 1
                self._unclosed.clear()

    def _code(self, end: int) -> None:
        if end:
            self._code_end, self._at = end, end

    def _fence_end(self, fence: str) -> int:
        closing = re.compile(rf"(?m:^[ ]{{0,3}}(?:>[ ]?)*[ ]{{0,3}}{fence[0]}{{{len(fence)},}}[ \t]*$)")
        found = closing.search(self._text, self._at)
        return found.end() if found else len(self._text)

    def _span_end(self, length: int) -> int:
        """Where a code span ends that begins here; 0: these backticks open none."""
        if length > SPAN_MAX or length in self._unclosed:
            return 0
        if self._paragraph_end < self._at:
            last = PARAGRAPH_END.search(self._text, self._at)
            self._paragraph_end = last.start() if last else len(self._text)
        found = re.compile(rf"(?<!`)`{{{length}}}(?!`)").search(self._text, self._at, self._paragraph_end)
        if found is None:
            self._unclosed.add(length)
        return found.end() if found else 0

    def _quote(self, mark: str) -> None:
        if self._open and mark in CLOSES[self._open]:
            self._open = ""
        elif not self._open and mark in CLOSES:
            self._open = mark

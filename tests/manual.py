"""Read the man pages for tests: sections, terms of definition lists, fenced blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MAN = Path(__file__).parent.parent / "man"
PAGES = sorted(page.name.removesuffix(".md") for page in MAN.glob("*.md"))
MARKS = re.compile(r"(?<!\\)(\*\*|\*|`|(?<=[*])_|(?<=\w)_(?!\w))")  # of bold, italic, code


@dataclass(frozen=True)
class Block:
    """A fenced block. `language` is its info string: sh is run, toml is loaded, text is only read."""

    page: str
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"man/{self.page}.md:{self.line}"


def source(page: str) -> str:
    return (MAN / f"{page}.md").read_text()


def plain(line: str) -> str:
    return MARKS.sub("", line).replace("\\", "")


def sections(page: str) -> list[str]:
    return [line[3:] for line in source(page).splitlines() if line.startswith("## ")]


def terms(page: str, section: str = "") -> Iterator[tuple[str, str]]:
    """(subsection, term) of each definition, of one section or of all."""
    lines = source(page).splitlines()
    now = subsection = ""
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("## "):
            now, subsection = line[3:], ""
        elif line.startswith("### "):
            subsection = plain(line[4:])
        elif following.startswith(": ") and section in ("", now):
            yield subsection, plain(line)


def blocks(page: str, language: str) -> Iterator[Block]:
    lines: list[str] | None = None
    for number, line in enumerate(source(page).splitlines(), 1):
        if lines is None and line.startswith("```"):
            kind, lines, first = line[3:], [], number + 1
        elif lines is not None and line == "```":
            if kind == language:
                yield Block(page, first, kind, "".join(f"{one}\n" for one in lines))
            lines = None
        elif lines is not None:
            lines.append(line)

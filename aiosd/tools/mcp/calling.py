"""A call of a session as who made it sees it: what is asked, whose it is, and what is heard of it on the
way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aiosd.config.mcp import Server
from aiosd.tools.catalog import shorten
from aiosd.tools.run.spawn import RunEvents

FILE_KEYS = ("name", "type", "data")


@dataclass(frozen=True, slots=True)
class Progress:
    done: float
    total: float | None
    message: str  # on one line, and printable

    @property
    def text(self) -> str:
        """One line of requests/ID/state."""
        of = f"/{self.total:g}" if self.total else ""
        return f"{self.done:g}{of}" + (f" {self.message}" if self.message else "")


@dataclass(frozen=True, slots=True)
class Attached:
    """What came beside the text of a result. `files`: of each its name, type and base64."""

    files: tuple[dict[str, str], ...] = ()
    structured: dict[str, Any] | None = None
    quarrel: str = ""  # how the result does not fit what the server said of the tool


@dataclass(frozen=True, slots=True)
class Question:
    """A server wants words of the user (`what` is elicit) or an answer of his model (sample). `reply`
    takes the answer, or a text that says why there is none; from any thread, once."""

    number: int
    what: str
    facts: dict[str, Any]
    reply: Callable[[dict[str, Any] | str], None]


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """Nobody waits for the answer to that question any more."""

    number: int


News = Progress | Attached | Question | Withdrawn


def unheard(news: News) -> None:
    if isinstance(news, Question):
        news.reply("nobody is there who could answer")


@dataclass(frozen=True, slots=True)
class Asked:
    """A call of a method of MCP, or (method empty) for the list of all that a server has."""

    id: int
    method: str
    params: dict[str, Any]
    events: RunEvents
    output: dict[str, Any] | None = None  # the JSON Schema of a tool's structured result
    news: Callable[[News], None] = field(default=unheard)


@dataclass(frozen=True, slots=True)
class User:
    uid: int
    groups: tuple[int, ...]  # gid first
    folder: str  # of his work folders; empty: none
    sees_aios: bool


def work_folder(server: Server) -> str:
    """The name of the folder that its sessions have of each user."""
    return f"mcp-{server.name}"


def attached(raw: dict[Any, Any]) -> Attached:
    """What a host says beside the text of a result, as far as it is what one says."""
    files = raw.get("files")
    kept = [
        {key: one[key] for key in FILE_KEYS}
        for one in (files if isinstance(files, list) else [])
        if isinstance(one, dict) and all(isinstance(one.get(key), str) for key in FILE_KEYS)
    ]
    structured, quarrel = raw.get("structured"), raw.get("quarrel")
    return Attached(
        tuple(kept),
        structured if isinstance(structured, dict) else None,
        shorten(quarrel) if isinstance(quarrel, str) else "",
    )

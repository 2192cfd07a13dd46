"""What a server's result says, as text and files. Reads what was said piece by piece: one that is wrong
is shown as it is, and spoils no other. Pure."""

from __future__ import annotations

import base64
import binascii
import json
import mimetypes
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

UNKNOWN = "application/octet-stream"


@dataclass(slots=True)
class Shown:
    """`files`: of each its name, type and base64."""

    lines: list[str] = field(default_factory=list)
    files: list[dict[str, str]] = field(default_factory=list)
    structured: dict[str, Any] | None = None

    @property
    def size(self) -> int:
        beside = json.dumps(self.structured) if self.structured else ""
        return len(self.text.encode()) + len(beside) + sum(len(file["data"]) for file in self.files)

    @property
    def text(self) -> str:
        return "".join(line if line.endswith("\n") else line + "\n" for line in self.lines)


def result(said: dict[str, Any]) -> Shown:
    """Of a tool. Structured content is shown where there is no text."""
    found, content = Shown(), said.get("content")
    for one in content if isinstance(content, list) else [] if content is None else [content]:
        add(found, one)
    structured = said.get("structuredContent")
    found.structured = structured if isinstance(structured, dict) else None
    if structured is not None and not any(is_text(one) for one in listed(content)):
        found.lines.append(json.dumps(structured, ensure_ascii=False))
    return found


def resource(contents: Iterable[Any]) -> Shown:
    """The parts of one that was read."""
    found = Shown()
    for one in contents:
        add(found, {"type": "resource", "resource": one})
    return found


def messages(said: object) -> list[dict[str, str]]:
    """Of a prompt, in the shape of the chat API; what is no text is named."""
    found = []
    for one in listed(said):
        shown = Shown()
        content = one.get("content") if isinstance(one, dict) else one
        for part in content if isinstance(content, list) else [content]:
            add(shown, part)
        role = one.get("role") if isinstance(one, dict) else None
        found.append({"role": role if role == "assistant" else "user", "content": shown.text.rstrip("\n")})
    return found


def add(found: Shown, one: Any) -> None:
    match one:
        case str() | {"type": "text", "text": str()}:
            found.lines.append(one if isinstance(one, str) else one["text"])
        case {"type": "image" | "audio" as kind, "data": str(data)}:
            keep(found, kind, str(one.get("mimeType") or UNKNOWN), data)
        case {"type": "resource_link", "uri": str(uri)}:
            found.lines.append(f"[resource: {uri}, {one.get('mimeType') or 'of an unknown type'}]")
        case {"type": "resource", "resource": {"text": str(text)}}:
            found.lines.append(text)
        case {"type": "resource", "resource": {"blob": str(data), **about}}:
            kind = str(about.get("mimeType") or UNKNOWN)
            keep(found, f"resource: {about.get('uri', '')}".rstrip(": "), kind, data)
        case _:
            found.lines.append(json.dumps(one, ensure_ascii=False))


def keep(found: Shown, kind: str, type: str, data: str) -> None:
    try:
        size = len(base64.b64decode(data))
    except (ValueError, binascii.Error):
        found.lines.append(f"[{kind}: {type}, not base64]")
        return
    name = f"{len(found.files) + 1}{mimetypes.guess_extension(type) or ''}"
    found.files.append({"name": name, "type": type, "data": data})
    found.lines.append(f"[{kind}: {type}, {size} bytes, file {name}]")


def is_text(one: Any) -> bool:
    return isinstance(one, str) or (isinstance(one, dict) and one.get("type") == "text")


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []

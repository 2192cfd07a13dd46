"""Files that come with results of MCP servers: images and sounds of a call, and the resources of a server."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from aiosd.fs.files import AnswerHandle, File, Handle, Opening, Snapshot
from aiosd.fs.tree import Factory, Folder, Table
from aiosd.kernel import Kernel
from aiosd.scheduler.admission import Admission
from aiosd.scheduler.handler import Source
from aiosd.syscall import response
from aiosd.syscall.request import Request
from aiosd.syscall.toolcall import ToolCall, outcome
from aiosd.tools.catalog import Tool
from aiosd.tools.manifest import Resource


@dataclass(slots=True)
class Data(File):
    """Bytes that do not change."""

    mode: int = 0o400
    data: str = ""  # base64

    def open(self, opening: Opening) -> Handle:
        return Snapshot(base64.b64decode(self.data))

    @property
    def size(self) -> int:
        return len(self.data.rstrip("=")) * 3 // 4


def files_of(request: Request) -> list[dict[str, str]]:
    """The files that came with the result of an ended call."""
    if not isinstance(request.spec, ToolCall) or '"files":' not in (text := response.document(request)):
        return []
    facts: dict[str, Any] = json.loads(text)
    return list(facts.get("files", []))


def files_folder(request: Request) -> Folder:
    def made(one: dict[str, str]) -> Factory:
        return lambda: Data(data=one["data"])

    return Table({one["name"]: made(one) for one in files_of(request)}, 0o700)


@dataclass(slots=True)
class ResourceFile(File):
    """Who opens it asks the server for the resource, in his own session, and reads the answer to that."""

    mode: int = 0o444
    kernel: Kernel = field(default=None)  # type: ignore[assignment]  # always given
    tool: Tool = field(default=None)  # type: ignore[assignment]  # likewise
    resource: Resource = field(default=None)  # type: ignore[assignment]  # likewise

    @property
    def asks_groups(self) -> bool:
        return self.kernel.admission.asks_groups(self._source)

    @property
    def _source(self) -> Source:
        name = self.tool.name
        return Source(f"/tools/{name}/resources/{self.resource.file}", kind="tool", target=name)

    def open(self, opening: Opening) -> Handle:
        admission, body = self.kernel.admission, json.dumps({"uri": self.resource.uri})
        admission.check(opening.caller, self._source, len(body))
        return ResourceHandle(admission, admission.submit(opening.caller, self._source, body.encode()))


class ResourceHandle(AnswerHandle):
    """What is no text is given as its bytes."""

    def __init__(self, admission: Admission, request: Request) -> None:
        super().__init__(request)
        self._admission, self._asked = admission, request

    def read(self, size: int, offset: int) -> bytes | None:
        files = outcome(self._asked).files
        if files and self._asked.answer.ended:
            return base64.b64decode(files[0]["data"])[offset : offset + size]
        return None if files else super().read(size, offset)

    def release(self) -> None:
        if not self._asked.answer.ended:
            self._admission.abandon(self._asked)


def resources_folder(kernel: Kernel, tool: Tool) -> Folder:
    served = tool.manifest.served
    assert served
    return Table({one.file: partial(ResourceFile, 0o444, kernel, tool, one) for one in served.resources})

"""tools/NAME: the description of a tool, the file that calls it, and the files of a user's own tool."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict

from aiosd.access.caller import Caller
from aiosd.errors import AiosError, BadValue, TooBig
from aiosd.fs.files import File, Handle, Opening, Snapshot, StoredHandle, Text, Value
from aiosd.fs.reason import Reason
from aiosd.fs.results import resources_folder
from aiosd.fs.text import table
from aiosd.fs.transaction import Transaction, same_process
from aiosd.fs.tree import Factory, Folder, Table
from aiosd.kernel import Kernel
from aiosd.scheduler.handler import Source
from aiosd.syscall import judging
from aiosd.syscall.number import whole
from aiosd.tools.catalog import Tool
from aiosd.tools.manifest import FILE, OWN_BYTES, PROGRAM, Incomplete

NOT_SHOWN = ("parameters", "env", "judge", "notes", "served", "verdict")
SHORT = 4096  # bytes of a manifest that each write judges; else a long one in lines would cost the square
OF_SERVER = ("name", "description", "server", "timeout_s", "limit", "irreversible")  # an MCP server's tool


def tool_folder(kernel: Kernel, name: str) -> Folder | None:
    tool = kernel.tools.find(name)
    if tool is None:
        return None
    source = Source(f"/tools/{name}/call", kind="tool", target=name)

    def set_limit(caller: Caller, text: str) -> None:
        tool.limit = whole(text, 1, tool.limit_max, "limit")
        kernel.scheduler.stir()

    users = None if tool.own else kernel.group
    mode = 0o777 if users is None else 0o770
    files: dict[str, Factory] = {
        "schema.json": lambda: Text(render=lambda: json.dumps(tool.function, indent=2) + "\n"),
        "info": lambda: Text(render=lambda: info(tool)),
        "call": lambda: Transaction(mode, kernel.admission, source, gid=users),
        "error": lambda: Reason(kernel, f"/tools/{name}", [source]),
        "limit": lambda: Value(get=lambda: str(tool.limit), set=set_limit),
        "stats": lambda: Text(
            render=lambda: table(calls=tool.calls, failed=tool.failed, busy_s=round(tool.busy_s, 3))
        ),
    }
    if tool.own:
        files["manifest"] = lambda: Part(kernel, tool, FILE)
        files["program"] = lambda: Part(kernel, tool, PROGRAM)
    if tool.manifest.served and tool.manifest.served.resources:
        files["resources"] = lambda: resources_folder(kernel, tool)
    return Table(files)


def info(tool: Tool) -> str:
    m = tool.manifest
    facts = {key: value for key, value in asdict(m).items() if key not in NOT_SHOWN}
    if m.server:
        facts = {key: facts[key] for key in OF_SERVER}
    else:
        facts |= {"folder": str(m.folder), "env": sorted(m.env)}
    if tool.alias:
        facts["alias"] = tool.alias
    if notes := [*m.notes, *([tool.note] if tool.note else [])]:
        facts["notes"] = notes
    return json.dumps({**facts, "error": tool.error} if tool.error else facts, indent=2) + "\n"


class Part(File):
    """The manifest or the program of a user's own tool. Closing the written file replaces it as a whole."""

    def __init__(self, kernel: Kernel, tool: Tool, name: str) -> None:
        super().__init__(0o644)
        self.kernel, self.tool, self.name = kernel, tool, name
        self._path = tool.manifest.folder / name

    def open(self, opening: Opening) -> Handle:
        if opening.writes:
            return PartWriting(self, opening.caller)
        return StoredHandle(self._path) if self._path.exists() else Snapshot(b"")

    @property
    def size(self) -> int:
        return self._path.stat().st_size if self._path.exists() else 0


class PartWriting(Handle):
    def __init__(self, part: Part, caller: Caller) -> None:
        self._part, self._caller = part, caller
        self._most = OWN_BYTES[part.name]
        self._data = bytearray()
        self._changed = False
        self._judged = 0  # bytes of a manifest that were judged and not complete
        self._wrong: BadValue | None = None  # why no more bytes can make it right

    def write(self, data: bytes, offset: int) -> None:
        self._check()
        if offset != len(self._data):
            raise BadValue(f"{self._part.name} must be written from beginning to end", "use cp or cat")
        if offset + len(data) > self._most:
            raise TooBig(f"{self._part.name} has at most {self._most} bytes")
        self._part.kernel.limits.reserve(self._caller, len(data))
        self._data += data
        self._changed = True
        size = len(self._data)
        if self._part.name == FILE and (size <= SHORT or size >= 2 * self._judged):
            self._judge()

    def _judge(self) -> None:
        try:
            with judging.of(self._caller.uid):
                self._part.tool.judge(bytes(self._data))
        except Incomplete:  # the next write may bring the rest: bash's echo writes line by line
            self._judged = len(self._data)
        except BadValue as error:
            self._wrong = error
            raise

    def _check(self) -> None:
        if self._wrong:
            raise self._wrong.again()

    def _keep(self) -> None:
        if self._changed:
            self._check()
            with judging.of(self._caller.uid):
                self._part.kernel.tool_objects.keep(self._part.tool, self._part.name, bytes(self._data))
            self._changed = False

    def flush(self, pid: int) -> None:
        if same_process(pid, self._caller.pid):
            self._keep()

    def release(self) -> None:
        with suppress(AiosError):  # no system call is left to fail; `info` shows the error
            self._keep()
        self._part.kernel.limits.reserve(self._caller, -len(self._data))

"""tools/NAME: what a tool is, and the file that calls it."""

from __future__ import annotations

import json
from dataclasses import asdict

from aiosd.access import Caller
from aiosd.admission import Source
from aiosd.errors import BadValue
from aiosd.fs.files import Text, Value
from aiosd.fs.text import table
from aiosd.fs.transaction import Transaction
from aiosd.fs.tree import Folder, Table
from aiosd.kernel import Kernel

LIMIT_MAX = 1024


def tool_folder(kernel: Kernel, name: str) -> Folder | None:
    tool = kernel.tools.find(name)
    if tool is None:
        return None
    source = Source(f"/tools/{name}/call", operation="tool", tool=name)

    def set_limit(caller: Caller, text: str) -> None:
        if not text.isdecimal() or not 1 <= int(text) <= LIMIT_MAX:
            raise BadValue(f"limit is a number of calls at once, 1 to {LIMIT_MAX}")
        tool.limit = int(text)
        kernel.scheduler.stir()

    def info() -> str:
        m = tool.manifest
        facts = {key: value for key, value in asdict(m).items() if key not in ("parameters", "env")}
        return json.dumps({**facts, "folder": str(m.folder), "env": sorted(m.env)}, indent=2) + "\n"

    return Table(
        {
            "schema.json": lambda: Text(render=lambda: json.dumps(tool.manifest.function, indent=2) + "\n"),
            "info": lambda: Text(render=info),
            "call": lambda: Transaction(0o777, kernel.admission, source),
            "limit": lambda: Value(get=lambda: str(tool.limit), set=set_limit),
            "stats": lambda: Text(
                render=lambda: table(calls=tool.calls, failed=tool.failed, busy_s=round(tool.busy_s, 3))
            ),
        }
    )

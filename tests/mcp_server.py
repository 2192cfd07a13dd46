"""A real MCP server, by the official SDK, for tests/t5_mcp.py: over stdio, or `http PORT` on the loopback."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import anyio
from mcp import types
from mcp.server.mcpserver import Context, Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError

READ = types.ToolAnnotations(read_only_hint=True)
ADDS = types.ToolAnnotations(destructive_hint=False)
HERE = Path(sys.argv[1])  # a folder that it shares with the test
PROCESS = os.urandom(8).hex()
server = MCPServer("proof")


@server.tool(annotations=READ, structured_output=False)
def add(a: int, b: int) -> str:
    """Adds two numbers."""
    return str(a + b)


@server.tool(annotations=READ)
def pair(a: int) -> dict[str, int]:
    return {"a": a, "twice": 2 * a}


@server.tool(annotations=READ)
def picture() -> Image:
    return Image(data=b"\x89PNG" * 25, format="png")


@server.tool(annotations=READ, structured_output=False)
def who() -> str:
    """The uid and pid of this process."""
    return f"{os.getuid()} {os.getgroups()} {PROCESS} {os.environ.get('KEY')}"


@server.tool(annotations=ADDS, structured_output=False)
def keep(text: str) -> str:
    with open("kept", "a") as file:
        file.write(text + "\n")
    return Path("kept").read_text()


@server.tool(structured_output=False)
def destroy() -> str:
    return "destroyed"


@server.tool(annotations=READ, structured_output=False)
def fail(text: str) -> str:
    print("on stderr", file=sys.stderr, flush=True)
    raise ToolError(text)


@server.tool(annotations=READ, structured_output=False)
async def wait(name: str) -> str:
    """Wait until the call is cancelled."""
    (HERE / name).write_text("begun")
    try:
        await anyio.sleep(60)
    except anyio.get_cancelled_exc_class():
        (HERE / name).write_text("cancelled")
        raise
    return "waited"


@server.tool(annotations=READ, structured_output=False)
async def hang(name: str) -> str:
    """Stop answering."""
    (HERE / name).write_text("begun")
    time.sleep(60)
    return "hung"


@server.tool(annotations=READ, structured_output=False)
def children(count: int) -> str:
    for _ in range(count):
        subprocess.Popen(["/bin/sleep", "1234"], start_new_session=True)
    return "started"


@server.tool(annotations=READ, structured_output=False)
def long(count: int) -> str:
    return "x" * count


@server.tool(annotations=READ, structured_output=False)
def hold(count: int) -> str:
    """Use so many bytes in each of two child processes."""
    held = f"held = b'x' * {count}; import time; time.sleep(60)"
    for process in [subprocess.Popen([sys.executable, "-c", held]) for _ in range(2)]:
        process.wait()
    return "held"


@server.tool(annotations=READ, structured_output=False)
def shout(text: str, count: int) -> str:
    """Write to standard output past the SDK."""
    with open(f"/proc/{os.getpid()}/fd/{os.dup(OUT)}", "wb", buffering=0) as out:
        for _ in range(count):
            out.write(text.encode())
    return "shouted"


@server.tool(annotations=READ, structured_output=False)
async def change(context: Context[Any, Any]) -> str:
    """Add a tool."""
    (HERE / "more").touch()
    offer_more()
    await context.notify_tools_changed()
    return "changed"


@server.tool(annotations=READ, structured_output=False)
async def steps(name: str, context: Context[Any, Any]) -> str:
    """Tells how far it is, and goes on when the file is there."""
    await context.report_progress(1, 3, "half\nway")
    while not (HERE / name).exists():
        await anyio.sleep(0.02)
    return "done"


@server.resource("proof://whose", name="whose")
def whose() -> str:
    return str(os.getuid())


@server.resource("proof://logo", name="logo", mime_type="image/png")
def logo() -> bytes:
    return b"\x89PNG" * 25


@server.resource("proof://of/{name}", name="of")
def of(name: str) -> str:
    return f"of {name}"


@server.prompt()
def greet(name: str) -> str:
    """Greets somebody."""
    return f"Greet {name}."


@server.tool(name="no/file", annotations=READ)
def unnamed() -> str:
    return ""


def offer_more() -> None:
    if (HERE / "more").exists():
        server.add_tool(more, annotations=READ, structured_output=False)


def more() -> str:
    return "more"


if __name__ == "__main__":
    OUT = os.dup(1)
    offer_more()
    if sys.argv[2:3] == ["http"]:
        server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[3]))
    else:
        server.run()

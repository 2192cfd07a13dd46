"""The host of one MCP session, in its cage: an MCP client on one side, the daemon on the other.

The daemon (aiosd.tools.mcp.sessions) writes JSON lines on its standard input: first what the server is, then
calls {"id", "tool", "arguments"}, {"cancel": ID} and {"list": true}. It answers with {"id", "text", "error"},
{"tools"} or {"tools": null, "error"}, and says {"ready": true} and {"changed": true}. It ends when its input
or the server does.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio
from mcp import Client, MCPError, StdioServerParameters, stdio_client, types
from mcp.client.streamable_http import streamable_http_client
from mcp.client.subscriptions import ListenNotSupportedError, SubscriptionLost

LINE_BYTES = 64 << 20
PAGES = 100
TOOLS = 256
ALIVE_S = 3.0  # for an answer to whether it still answers
GARBAGE = 1000  # lines that are no MCP, of one session


class Gone(Exception):
    """The server is; `str` says why, or is empty where the server's own last words do."""


class Host:
    def __init__(self, about: dict[str, Any]) -> None:
        self._most, self._remote = about["output_bytes"], "url" in about
        self._scopes: dict[int, anyio.CancelScope] = {}
        self._garbage = 0
        self.gone = anyio.Event()
        self.why = ""
        if self._remote:
            transport = streamable_http_client(about["url"])
        else:
            program, *rest = about["command"]
            env = {**os.environ, **about["env"]}
            transport = stdio_client(
                StdioServerParameters(command=program, args=rest, env=env, cwd=os.getcwd())
            )
        self._client = Client(self._watched(transport), message_handler=self._heed, cache=None)

    async def run(self, lines: asyncio.StreamReader) -> None:
        async with self._client, anyio.create_task_group() as tasks:
            tasks.start_soon(self._end_with_server, tasks)
            await tasks.start(self._listen)
            say({"ready": True})
            while line := await lines.readline():
                order = json.loads(line)
                if "cancel" in order:
                    tasks.start_soon(self._cancel, order["cancel"])
                elif "list" in order:
                    tasks.start_soon(self._list)
                else:
                    tasks.start_soon(self._call, order["id"], order["tool"], order["arguments"])
            tasks.cancel_scope.cancel()

    async def _end_with_server(self, tasks: anyio.abc.TaskGroup) -> None:
        await self.gone.wait()
        tasks.cancel_scope.cancel()

    def _end(self, why: str = "") -> None:
        self.why = self.why or why
        self.gone.set()

    @asynccontextmanager
    async def _watched(self, transport: Any) -> AsyncIterator[Any]:
        """The same transport; that its server has closed it is seen also when nothing is asked."""
        async with transport as (read, write), anyio.create_task_group() as tasks:
            sender, receiver = anyio.create_memory_object_stream[Any](0)

            async def forward() -> None:
                async with sender:
                    async for message in read:
                        await sender.send(message)
                    self._end()  # before those who wait hear of it

            tasks.start_soon(forward)
            yield receiver, write
            tasks.cancel_scope.cancel()

    async def _heed(self, message: object) -> None:
        if isinstance(message, Exception):
            self._garbage += 1
            if self._garbage > GARBAGE:
                self._end("it prints what is no MCP")
        elif isinstance(message, types.ToolListChangedNotification):
            say({"changed": True})

    async def _listen(self, task_status: anyio.abc.TaskStatus[None]) -> None:
        """For changes, of a server that is to be asked for them; others say them anyhow."""
        with suppress(ListenNotSupportedError, SubscriptionLost, MCPError):
            async with self._client.listen(tools_list_changed=True) as events:
                task_status.started()
                async for _ in events:
                    say({"changed": True})
            return
        with suppress(RuntimeError):  # it had started
            task_status.started()

    async def _list(self) -> None:
        found: list[dict[str, Any]] = []
        cursor = None
        try:
            for _ in range(PAGES):
                page = await self._client.list_tools(cursor=cursor)
                found += [listed(tool) for tool in page.tools]
                cursor = page.next_cursor
                if cursor is None or len(found) > TOOLS:
                    break
        except Exception as error:  # noqa: BLE001 - whatever a server makes the SDK raise
            say({"tools": None, "error": reason(error)})
            return
        say({"tools": found[:TOOLS]})

    async def _call(self, id: int, tool: str, arguments: dict[str, Any]) -> None:
        text, failed = "cancelled", True
        with anyio.CancelScope() as self._scopes[id]:
            try:
                answer = await self._client.call_tool(tool, arguments)
                text, failed = shown(answer), answer.is_error
            except Exception as error:  # noqa: BLE001 - the same
                text = reason(error)
                if self._remote and not await self._is_alive():  # or it was, and forgot this session
                    self._end(text)  # another session may find the server, this one does not
                if self.gone.is_set():
                    return
        del self._scopes[id]
        if len(text.encode()) > self._most:
            text, failed = f"it printed more than {self._most} bytes", True
        say({"id": id, "text": text, "error": failed})

    async def _cancel(self, id: int) -> None:
        """The server is told; one that does not answer any more is ended, with all it does."""
        if scope := self._scopes.get(id):
            if not await self._is_alive():
                self._end("it does not answer any more")
            scope.cancel()

    async def _is_alive(self) -> bool:
        with anyio.move_on_after(ALIVE_S), suppress(Exception):
            await self._client.list_tools()
            return True
        return False


def listed(tool: types.Tool) -> dict[str, Any]:
    hints = tool.annotations
    return {
        "name": tool.name,
        "description": tool.description or tool.title or tool.name,
        "schema": tool.input_schema,
        "read_only": bool(hints and hints.read_only_hint),
        "destructive": not (hints and hints.destructive_hint is False),
    }


def shown(answer: types.CallToolResult) -> str:
    """What of a result can be printed."""
    lines = [part(content) for content in answer.content]
    if answer.structured_content is not None and not any(
        isinstance(c, types.TextContent) for c in answer.content
    ):
        lines.append(json.dumps(answer.structured_content, ensure_ascii=False))
    return "".join(line if line.endswith("\n") else line + "\n" for line in lines)


def part(content: object) -> str:
    match content:
        case types.TextContent():
            return content.text
        case types.ImageContent() | types.AudioContent():
            return f"[{content.type}: {content.mime_type}, {size(content.data)} bytes]"
        case types.ResourceLink():
            return f"[resource: {content.uri}, {content.mime_type or 'of an unknown type'}]"
        case types.EmbeddedResource(resource=types.TextResourceContents() as resource):
            return resource.text
        case types.EmbeddedResource(resource=types.BlobResourceContents() as resource):
            kind = resource.mime_type or "of an unknown type"
            return f"[resource: {resource.uri}, {kind}, {size(resource.blob)} bytes]"
        case _:
            return f"[{type(content).__name__}]"


def size(base64: str) -> int:
    return len(base64.rstrip("=")) * 3 // 4


def reason(error: BaseException) -> str:
    """In one line; of a group, what was first."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    said = " ".join(str(error).split()) or type(error).__name__
    return said if isinstance(error, MCPError) else f"{type(error).__name__}: {said}"


def say(line: dict[str, Any]) -> None:
    sys.stdout.buffer.write(json.dumps(line).encode() + b"\n")
    sys.stdout.buffer.flush()


async def main() -> int:
    logging.getLogger().addHandler(logging.NullHandler())
    lines = asyncio.StreamReader(limit=LINE_BYTES)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    host = Host(json.loads(await lines.readline()))
    try:
        await host.run(lines)
    except BaseException as error:  # noqa: BLE001 - the broad handler of this process
        if not host.gone.is_set():
            host.why = reason(error)
    if host.why:
        print(host.why, file=sys.stderr)
    return 1 if host.gone.is_set() or host.why else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))

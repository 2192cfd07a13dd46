"""The host of one MCP session, in its cage: an MCP client on one side, the daemon on the other.

The daemon (aiosd.tools.mcp.sessions) writes JSON lines on its standard input: first what the server is, then
orders: {"id", "method", "params", "output"} for a call, {"cancel": ID}, {"list": true}, and {"ask": N,
"answer"} for what a server asked. It answers with {"id", "text", "error", "files", "structured",
"quarrel"}, {"tools", "resources", "prompts"} or {"tools": null, "error"}, and says {"ready": true},
{"changed": true}, {"id", "progress"} and {"ask": N, ...} (aiosd.tools.mcp.asks). It ends when its input
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
from mcp.client.subscriptions import ListenNotSupportedError, SubscriptionLost

from aiosd.syscall import schemas
from aiosd.tools.mcp import content, mend
from aiosd.tools.mcp.asks import Asks
from aiosd.tools.mcp.catalogue import catalogue
from aiosd.tools.mcp.hosted import hosted
from aiosd.tools.mcp.lines import say

LINE_BYTES = 64 << 20
ALIVE_S = 3.0  # for an answer to whether it still answers
GARBAGE = 1000  # lines that are no MCP, of one session
GARBAGE_CHARS = 200  # of the first such line that are shown
PROGRESS_S = 0.2  # between two reports of one call


class Host:
    def __init__(self, about: dict[str, Any]) -> None:
        self._most, self._remote = about["output_bytes"], "url" in about
        self._scopes: dict[int, anyio.CancelScope] = {}
        self._garbage = 0
        self.gone = anyio.Event()
        self.why = ""
        self._asks = Asks(about.get("roots", []), self._scopes)
        transport = hosted(about) if self._remote else stdio_client(server_of(about))
        self._client = Client(
            self._watched(transport),
            message_handler=self._heed,
            cache=None,
            elicitation_callback=self._asks.elicit,
            sampling_callback=self._asks.sample,
            list_roots_callback=self._asks.list_roots,
        )

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
                elif "ask" in order:
                    self._asks.answer(order["ask"], order["answer"])
                else:
                    tasks.start_soon(self._call, order)
            tasks.cancel_scope.cancel()

    async def _end_with_server(self, tasks: anyio.abc.TaskGroup) -> None:
        await self.gone.wait()
        tasks.cancel_scope.cancel()

    def _end(self, why: str = "") -> None:
        self.why = self.why or why
        self.gone.set()

    @asynccontextmanager
    async def _watched(self, transport: Any) -> AsyncIterator[Any]:
        """The same transport, with what the server says mended. Its end is noticed also when nothing is
        asked."""
        async with transport as (read, write), anyio.create_task_group() as tasks:
            sender, receiver = anyio.create_memory_object_stream[Any](0)

            async def forward() -> None:
                async with sender:
                    async for message in read:
                        await sender.send(mend.message(message))
                    self._end()  # before those who wait hear of it

            tasks.start_soon(forward)
            yield receiver, write
            tasks.cancel_scope.cancel()

    async def _heed(self, message: object) -> None:
        if isinstance(message, Exception):
            self._garbage += 1
            if self._garbage == 1:
                print(
                    f"not MCP on its standard output: {mend.line_of(message)[:GARBAGE_CHARS]}",
                    file=sys.stderr,
                )
            if self._garbage > GARBAGE:
                self._end("it prints what is no MCP")
        elif isinstance(
            message,
            types.ToolListChangedNotification
            | types.ResourceListChangedNotification
            | types.PromptListChangedNotification,
        ):
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
        try:
            say(await catalogue(self._client))
        except Exception as error:  # noqa: BLE001 - whatever a server makes the SDK raise
            say({"tools": None, "error": reason(error)})

    async def _call(self, order: dict[str, Any]) -> None:
        id, shown, failed, quarrel = order["id"], content.Shown(["cancelled"]), True, ""
        with anyio.CancelScope() as self._scopes[id]:
            try:
                shown, failed, quarrel = await self._ask(order)
            except Exception as error:  # noqa: BLE001 - the same
                shown = content.Shown([reason(error)])
                if self._remote and not await self._is_alive():  # or it was, and forgot this session
                    self._end(shown.text.strip())  # another session may find the server, this one does not
                if self.gone.is_set():
                    return
        del self._scopes[id]
        if shown.size > self._most:
            shown, failed = content.Shown([f"it printed more than {self._most} bytes"]), True
        beside = {"files": shown.files, "structured": shown.structured, "quarrel": quarrel}
        say({"id": id, "text": shown.text, "error": failed, **beside})

    async def _ask(self, order: dict[str, Any]) -> tuple[content.Shown, bool, str]:
        """The answer, whether it is an error, and how it quarrels with the schema that the server gave
        for it."""
        params = order["params"]
        match order["method"]:
            case "resources/read":
                read = await self._client.read_resource(params["uri"])
                return content.resource(mend.said(part) for part in read.contents), False, ""
            case "prompts/get":
                got = mend.said(await self._client.get_prompt(params["name"], params["arguments"]))
                messages = json.dumps({"messages": content.messages(got.get("messages"))}, ensure_ascii=False)
                return content.Shown([messages]), False, ""
        answer = mend.said(
            await self._client.call_tool(
                params["name"], params["arguments"], progress_callback=ProgressReports(order["id"])
            )
        )
        failed = answer.get("isError") is True
        return content.result(answer), failed, "" if failed else quarrel(order.get("output"), answer)

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


class ProgressReports:
    """Passes reports of one call on, not too many of them."""

    def __init__(self, id: int) -> None:
        self._id, self._said_s = id, float("-inf")

    async def __call__(self, progress: float, total: float | None, message: str | None) -> None:
        now = anyio.current_time()
        if now >= self._said_s + PROGRESS_S or progress == total:
            self._said_s = now
            say({"id": self._id, "progress": mend.clean([progress, total, message])})


def server_of(about: dict[str, Any]) -> StdioServerParameters:
    """Its environment is the cage's and its own: nothing of this process."""
    program, *rest = about["command"]
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return StdioServerParameters(
        command=program, args=rest, env={**inherited, **about["env"]}, cwd=os.getcwd(),
        encoding_error_handler="replace",
    )  # fmt: skip


def quarrel(output: object, answer: dict[str, Any]) -> str:
    if not isinstance(output, dict):
        return ""
    if "structuredContent" not in answer:
        return "its result is not structured, though it has an output schema"
    why = schemas.quarrel(output, answer["structuredContent"])
    return f"its result does not fit its output schema: {why}" if why else ""


def reason(error: BaseException) -> str:
    """In one line; of a group, what was first."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    said = " ".join(str(error).split()) or type(error).__name__
    return said if isinstance(error, MCPError) else f"{type(error).__name__}: {said}"


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

"""`aiosctl mcp serve`: the tree as an MCP server over stdio, for the programs of one user.

It runs as that user and only reads and writes files of /aios: what he may do there is what its client may.
"""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import jsonschema
from jsonschema.exceptions import best_match
from mcp import MCPError, stdio_server, types
from mcp.server import Server, ServerRequestContext

from aiosd import __version__
from aiosd.syscall import schemas

SCHEME = "aios://"
NAME = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,64}")
READ = {  # what of an agent or a context is a resource
    "agents": ("state", "model", "context", "system", "tools", "usage", "log.jsonl"),
    "contexts": ("messages.jsonl", "state", "model", "tokens"),
}
KINDS = {"agents": "state", "contexts": "messages.jsonl"}  # the one that is listed
TEXT = {"type": "string"}
OWN = (
    types.Tool(
        name="agents",
        description="Lists your agents on this machine, with what they do now.",
        input_schema={"type": "object", "properties": {}, "additionalProperties": False},
        annotations=types.ToolAnnotations(read_only_hint=True),
    ),
    types.Tool(
        name="ask",
        description="Asks one of your agents and gives its answer.",
        input_schema={
            "type": "object",
            "required": ["agent", "message"],
            "properties": {"agent": TEXT, "message": TEXT},
            "additionalProperties": False,
        },
    ),
)
LATEST = 50  # requests of an agent among which one that failed is looked for
Context = ServerRequestContext[Any]


class Wrong(Exception):
    """The message is for the client."""


class Serve:
    """`agent`: through which tools are called; without one a call has no work folder, and no reason when it
    fails."""

    def __init__(self, root: Path, agent: str) -> None:
        self._root, self._agent = root, agent

    def server(self) -> Server[Any]:
        return Server(
            "aios",
            version=__version__,
            on_list_tools=self.list_tools,
            on_call_tool=self.call_tool,
            on_list_resources=self.list_resources,
            on_list_resource_templates=self.list_templates,
            on_read_resource=self.read_resource,
        )

    # tools

    async def list_tools(self, _: Context, __: object) -> types.ListToolsResult:
        own = {tool.name for tool in OWN}
        tools = list(OWN)
        for name in self._names("tools"):
            with suppress(OSError):  # it went meanwhile
                if name not in own and self._may_call(name):
                    tools.append(self._tool(name))
        return types.ListToolsResult(tools=tools)

    def _tool(self, name: str) -> types.Tool:
        function = json.loads(self._read(f"tools/{name}/schema.json"))["function"]
        waits = json.loads(self._read(f"tools/{name}/info"))["irreversible"]
        about = function["description"] + (" Waits until a person allows it." if waits else "")
        hints = types.ToolAnnotations(destructive_hint=waits)
        return types.Tool(
            name=name, description=about, input_schema=function["parameters"], annotations=hints
        )

    async def call_tool(self, _: Context, asked: types.CallToolRequestParams) -> types.CallToolResult:
        arguments = asked.arguments or {}
        try:
            text = await self._call(asked.name, arguments)
        except (Wrong, OSError) as error:
            text, failed = str(error), True
        else:
            failed = False
        return types.CallToolResult(content=[types.TextContent(text=text)], is_error=failed)

    async def _call(self, name: str, arguments: dict[str, Any]) -> str:
        own = next((tool for tool in OWN if tool.name == name), None)
        if own is None and not (NAME.fullmatch(name) and self._may_call(name)):
            raise Wrong(f"no tool {name[:64]!r} that you may call")
        schema = (own or self._tool(name)).input_schema
        judge = jsonschema.Draft202012Validator(schemas.reduced(schema))
        if wrong := best_match(judge.iter_errors(arguments)):
            raise Wrong("".join(f"{step}: " for step in wrong.absolute_path) + wrong.message[:500])
        if name == "agents":
            return "".join(f"{agent} {self._read(f'agents/{agent}/state')}" for agent in self._own("agents"))
        if name == "ask":
            return await self._ask(arguments["agent"], arguments["message"])
        if not self._agent:
            return await self._transaction(f"tools/{name}/call", arguments)
        body = {"name": name, "arguments": arguments}
        try:
            return await self._transaction(f"agents/{self._agent}/syscall/tool", body)
        except OSError as error:
            raise Wrong(self._reason(body) or self._logged(self._agent) or str(error)) from None

    async def _ask(self, agent: str, message: str) -> str:
        if not NAME.fullmatch(agent):
            raise Wrong(f"{agent[:64]!r} is no agent's name")
        body = {"messages": [{"role": "user", "content": message}]}
        try:
            answer = json.loads(await self._transaction(f"agents/{agent}/syscall/llm", body))
        except FileNotFoundError:
            raise Wrong(f"no agent {agent}; yours are {', '.join(self._own('agents')) or 'none'}") from None
        except OSError as error:
            raise Wrong(self._logged(agent) or str(error)) from None
        if "error" in answer:
            raise Wrong(answer["error"]["message"])
        said = answer["choices"][0]["message"]
        return said["content"] or json.dumps(said.get("tool_calls", ""), ensure_ascii=False)

    async def _transaction(self, path: str, body: dict[str, Any]) -> str:
        """A private one: who cancels this closes the file, and that cancels the request."""
        fd = os.open(self._root / path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            data = json.dumps(body, ensure_ascii=False).encode()
            while data:
                data = data[os.write(fd, data) :]
            answer = bytearray()
            while True:
                try:
                    if not (more := os.read(fd, 1 << 16)):
                        return answer.decode("utf-8", "replace")
                    answer += more
                except BlockingIOError:
                    await anyio.wait_readable(fd)
        finally:
            os.close(fd)

    def _reason(self, body: dict[str, Any]) -> str:
        """Why the newest such call through the agent failed."""
        folder = f"agents/{self._agent}/requests"
        ids = sorted((int(name) for name in self._names(folder) if name.isdecimal()), reverse=True)
        for id in ids[:LATEST]:
            with suppress(OSError, ValueError):
                if json.loads(self._read(f"{folder}/{id}/request")) == body and (
                    error := self._read(f"{folder}/{id}/error").strip()
                ):
                    return error
        return ""

    def _logged(self, agent: str) -> str:
        """What the agent's log says last."""
        with suppress(OSError, ValueError, IndexError, KeyError):
            return str(json.loads(self._read(f"agents/{agent}/log.jsonl").splitlines()[-1])["message"])
        return ""

    # resources

    async def list_resources(self, _: Context, __: object) -> types.ListResourcesResult:
        found = [
            types.Resource(
                uri=f"{SCHEME}{kind}/{name}/{file}", name=f"{kind[:-1]} {name}: {file}", mime_type=mime(file)
            )
            for kind, file in KINDS.items()
            for name in self._own(kind)
        ]
        return types.ListResourcesResult(resources=found)

    async def list_templates(self, _: Context, __: object) -> types.ListResourceTemplatesResult:
        found = [
            types.ResourceTemplate(
                uri_template=f"{SCHEME}{kind}/{{name}}/{file}",
                name=f"{kind[:-1]}'s {file}",
                mime_type=mime(file),
            )
            for kind, files in READ.items()
            for file in files
        ]
        return types.ListResourceTemplatesResult(resource_templates=found)

    async def read_resource(
        self, _: Context, asked: types.ReadResourceRequestParams
    ) -> types.ReadResourceResult:
        kind, _slash, rest = asked.uri.removeprefix(SCHEME).partition("/")
        name, _slash, file = rest.partition("/")
        if not asked.uri.startswith(SCHEME) or file not in READ.get(kind, ()) or not NAME.fullmatch(name):
            raise MCPError(types.INVALID_PARAMS, f"no resource {asked.uri[:200]}")
        try:
            text = self._read(f"{kind}/{name}/{file}")
        except OSError as error:
            raise MCPError(types.INVALID_PARAMS, f"{asked.uri}: {error.strerror}") from None
        content = types.TextResourceContents(uri=asked.uri, mime_type=mime(file), text=text)
        return types.ReadResourceResult(contents=[content])

    # files

    def _read(self, path: str) -> str:
        return (self._root / path).read_text()

    def _names(self, path: str) -> list[str]:
        try:
            return sorted(os.listdir(self._root / path))
        except OSError:
            return []

    def _own(self, kind: str) -> list[str]:
        return [name for name in self._names(kind) if os.access(self._root / kind / name, os.X_OK)]

    def _may_call(self, name: str) -> bool:
        return os.access(self._root / "tools" / name / "call", os.W_OK)  # X_OK: the mount is noexec


def mime(file: str) -> str:
    return "application/jsonl" if file.endswith(".jsonl") else "text/plain"


def serve(root: Path, agent: str) -> None:
    """Until its client closes the standard input."""
    anyio.run(_serve, Serve(root, agent).server())


async def _serve(server: Server[Any]) -> None:
    async with stdio_server() as (read, write):
        await server.run(read, write, server.create_initialization_options())

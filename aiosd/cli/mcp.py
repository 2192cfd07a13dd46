"""`aiosctl mcp serve`: the tree as an MCP server over stdio, for the programs of one user.

It runs as that user and only reads and writes files of /aios: what he may do there is what its client may.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import anyio
import jsonschema
from jsonschema.exceptions import best_match
from mcp import MCPError, stdio_server, types
from mcp.server import Server, ServerRequestContext

from aiosd import __version__
from aiosd.cli.transactions import Reporter, TransactionFailed, TreeClient
from aiosd.errors import in_words
from aiosd.syscall import schemas

SCHEME = "aios://"
NAME = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,64}")
READ = {  # what of an agent or a context is a resource
    "agents": ("state", "model", "context", "system", "tools", "usage", "log.jsonl"),
    "contexts": ("messages.jsonl", "state", "model", "tokens"),
}
KINDS = {"agents": "state", "contexts": "messages.jsonl"}  # the one that is listed
PROMPT = ".prompt."  # in the name of a tool that gives one of an MCP server
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
Context = ServerRequestContext[Any]


class Serve:
    """`agent`: through which tools are called; empty: one of this process."""

    def __init__(self, root: Path, agent: str) -> None:
        self._tree = TreeClient(root, agent)

    def server(self) -> Server[Any]:
        return Server(
            "aios",
            version=__version__,
            on_list_tools=self.list_tools,
            on_call_tool=self.call_tool,
            on_list_prompts=self.list_prompts,
            on_get_prompt=self.get_prompt,
            on_list_resources=self.list_resources,
            on_list_resource_templates=self.list_templates,
            on_read_resource=self.read_resource,
        )

    # tools

    def _callable(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Names of tools that can be called, each with its function. One that is not whole is none."""
        own = {tool.name for tool in OWN}
        for name in self._tree.names("tools"):
            with suppress(OSError, ValueError, KeyError, TypeError):
                if name not in own and self._tree.may_call(name):
                    function = self._tree.json(f"tools/{name}/schema.json")["function"]
                    if function["parameters"]:  # else its manifest is not there yet
                        yield name, function

    async def list_tools(self, _: Context, __: object) -> types.ListToolsResult:
        tools = list(OWN)
        for name, function in self._callable():
            with suppress(OSError, ValueError, KeyError):  # also what of one is no tool of MCP
                if PROMPT not in name:
                    tools.append(self._tool(name, function))
        return types.ListToolsResult(tools=tools)

    def _tool(self, name: str, function: dict[str, Any]) -> types.Tool:
        waits = self._tree.json(f"tools/{name}/info")["irreversible"]
        about = function["description"] + (" Waits until a person allows it." if waits else "")
        return types.Tool(
            name=function["name"],
            description=about,
            input_schema={**function["parameters"], "type": "object"},
            annotations=types.ToolAnnotations(destructive_hint=waits),
        )

    async def call_tool(self, context: Context, asked: types.CallToolRequestParams) -> types.CallToolResult:
        arguments, report = asked.arguments or {}, reporter(context)
        try:
            if own := next((tool for tool in OWN if tool.name == asked.name), None):
                judge(own.input_schema, arguments)
                text = await self._own(asked.name, arguments, report)
                return types.CallToolResult(content=[types.TextContent(text=text)])
            name, function = self._find(asked.name)
            judge(function["parameters"], arguments)
            return shown(await self._tree.call(name, arguments, report))
        except (TransactionFailed, OSError) as error:
            return types.CallToolResult(content=[types.TextContent(text=said_of(error))], is_error=True)

    def _find(self, asked: str) -> tuple[str, dict[str, Any]]:
        """By its name here, or the name that it is offered by. Raises TransactionFailed."""
        for name, function in self._callable():
            if asked in (name, function["name"]):
                return name, function
        raise TransactionFailed(f"no tool {asked[:64]!r} that you may call")

    async def _own(self, name: str, arguments: dict[str, Any], report: Reporter) -> str:
        if name == "agents":
            return "".join(
                f"{agent} {self._tree.read(f'agents/{agent}/state')}" for agent in self._mine("agents")
            )
        return await self._ask(arguments["agent"], arguments["message"], report)

    async def _ask(self, agent: str, message: str, report: Reporter) -> str:
        """The text of the answer, each piece of which is reported as it is made."""
        if not NAME.fullmatch(agent):
            raise TransactionFailed(f"{agent[:64]!r} is no agent's name")
        body = {"messages": [{"role": "user", "content": message}], "stream": True}
        text, calls = "", list[Any]()
        try:
            async with aclosing(self._tree.stream(f"agents/{agent}/syscall/llm", body)) as lines:
                async for line in lines:
                    said = json.loads(line)
                    if "error" in said:
                        raise TransactionFailed(said["error"]["message"])
                    delta = said["choices"][0]["delta"]
                    calls += delta.get("tool_calls", [])
                    if more := delta.get("content"):
                        text += more
                        await report(more)
        except FileNotFoundError:
            raise TransactionFailed(
                f"no agent {agent}; yours are {', '.join(self._mine('agents')) or 'none'}"
            ) from None
        except OSError as error:
            raise TransactionFailed(self._tree.logged(agent) or in_words(error)) from None
        return text or json.dumps(calls or "", ensure_ascii=False)

    # prompts

    async def list_prompts(self, _: Context, __: object) -> types.ListPromptsResult:
        return types.ListPromptsResult(prompts=[prompt(f) for name, f in self._callable() if PROMPT in name])

    async def get_prompt(
        self, context: Context, asked: types.GetPromptRequestParams
    ) -> types.GetPromptResult:
        try:
            name, function = self._find(asked.name)
            if PROMPT not in name:
                raise TransactionFailed(f"no prompt {asked.name[:64]!r}")
            arguments: dict[str, Any] = dict(asked.arguments or {})
            judge(function["parameters"], arguments)
            said = json.loads((await self._tree.call(name, arguments, reporter(context)))["output"])
        except (TransactionFailed, OSError, ValueError) as error:
            raise MCPError(types.INVALID_PARAMS, said_of(error)) from None
        messages = [
            types.PromptMessage(role=one["role"], content=types.TextContent(text=one["content"]))
            for one in said["messages"]
        ]
        return types.GetPromptResult(description=function["description"], messages=messages)

    # resources

    async def list_resources(self, _: Context, __: object) -> types.ListResourcesResult:
        found = [
            types.Resource(
                uri=f"{SCHEME}{kind}/{name}/{file}", name=f"{kind[:-1]} {name}: {file}", mime_type=mime(file)
            )
            for kind, file in KINDS.items()
            for name in self._mine(kind)
        ]
        for tool in self._tree.names("tools"):
            for file in self._tree.names(f"tools/{tool}/resources"):
                found.append(types.Resource(uri=f"{SCHEME}tools/{tool}/resources/{file}", name=file))
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
        kind, name, file = (asked.uri.removeprefix(SCHEME).split("/", 2) + ["", ""])[:3]
        known = file in READ.get(kind, ()) or (
            kind == "tools" and file.startswith("resources/") and NAME.fullmatch(file[len("resources/") :])
        )
        if not asked.uri.startswith(SCHEME) or not known or not NAME.fullmatch(name):
            raise MCPError(types.INVALID_PARAMS, f"no resource {asked.uri[:200]}")
        try:  # one of a tool asks its server
            data = await anyio.to_thread.run_sync((self._tree.root / kind / name / file).read_bytes)
        except OSError as error:
            raise MCPError(types.INVALID_PARAMS, f"{asked.uri}: {error.strerror}") from None
        return types.ReadResourceResult(contents=[contents(asked.uri, file, data)])

    def _mine(self, kind: str) -> list[str]:
        names, root = self._tree.names(kind), self._tree.root
        return [name for name in names if os.access(root / kind / name, os.X_OK) and name != self._tree.made]


def judge(schema: dict[str, Any], arguments: dict[str, Any]) -> None:
    """Raises TransactionFailed."""
    validator = jsonschema.Draft202012Validator(schemas.reduced(schema))
    if wrong := best_match(validator.iter_errors(arguments)):
        raise TransactionFailed(schemas.place(wrong.absolute_path) + wrong.message[:500])


def reporter(context: Context) -> Reporter:
    """Tells the client, where it asked for that, with a number that rises."""
    count = 0

    async def report(message: str) -> None:
        nonlocal count
        count += 1
        await context.session.report_progress(count, None, message)

    return report


def shown(said: dict[str, Any]) -> types.CallToolResult:
    """The result of a tool, with its data and structure."""
    content: list[types.ContentBlock] = [types.TextContent(text=said["output"])] if said["output"] else []
    for file in said.get("files", []):
        content.append(block(file))
    return types.CallToolResult(content=content, structured_content=said.get("structured"))


def block(file: dict[str, str]) -> types.ContentBlock:
    data, kind = file["data"], file["type"]
    if kind.startswith("image/"):
        return types.ImageContent(data=data, mime_type=kind)
    if kind.startswith("audio/"):
        return types.AudioContent(data=data, mime_type=kind)
    uri = f"{SCHEME}files/{file['name']}"
    return types.EmbeddedResource(resource=types.BlobResourceContents(uri=uri, mime_type=kind, blob=data))


def prompt(function: dict[str, Any]) -> types.Prompt:
    schema = function["parameters"]
    arguments = [
        types.PromptArgument(
            name=name, description=about.get("description"), required=name in schema.get("required", ())
        )
        for name, about in schema.get("properties", {}).items()
    ]
    return types.Prompt(name=function["name"], description=function["description"], arguments=arguments)


def contents(uri: str, file: str, data: bytes) -> types.TextResourceContents | types.BlobResourceContents:
    try:
        return types.TextResourceContents(uri=uri, mime_type=mime(file), text=data.decode())
    except UnicodeDecodeError:
        return types.BlobResourceContents(uri=uri, blob=base64.b64encode(data).decode())


def mime(file: str) -> str:
    return "application/jsonl" if file.endswith(".jsonl") else "text/plain"


def serve(root: Path, agent: str) -> None:
    """Until its client closes the standard input."""
    anyio.run(_serve, Serve(root, agent).server())


async def _serve(server: Server[Any]) -> None:
    async with stdio_server() as (read, write):
        await server.run(read, write, server.create_initialization_options())


def said_of(error: Exception) -> str:
    return in_words(error) if isinstance(error, OSError) else str(error)

"""Requests through /aios for a program that waits for many at once: private transactions, calls of tools
with all that comes of them. Only reads and writes files."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import anyio

from aiosd.errors import in_words

LATEST = 50  # requests of an agent among which a call is looked for
LOOK_S = 0.3  # between two looks at how far a call is

Reporter = Callable[[str], Awaitable[None]]


class TransactionFailed(Exception):
    """Why a call did, for people."""


class TreeClient:
    """The tree, as its user sees it. Calls of tools go through an agent: only then there are reasons and
    files."""

    def __init__(self, root: Path, agent: str) -> None:
        self.root, self._agent = root, agent
        self.made = ""  # the agent of this process

    @property
    def agent(self) -> str:
        """The one that was named, else one of this process, which ends with it; empty: there may be none."""
        if not self._agent:
            name = f"mcp-{os.getpid()}-{os.urandom(2).hex()}"
            with suppress(OSError):
                (self.root / "agents" / name).mkdir()
                (self.root / "agents" / name / "pid").write_text(f"{os.getpid()}\n")
                self._agent = self.made = name
        return self._agent

    def read(self, path: str) -> str:
        return (self.root / path).read_text()

    def json(self, path: str) -> Any:
        return json.loads(self.read(path))

    def names(self, path: str) -> list[str]:
        try:
            return sorted(os.listdir(self.root / path))
        except OSError:
            return []

    def may_call(self, tool: str) -> bool:
        return os.access(self.root / "tools" / tool / "call", os.W_OK)  # X_OK: the mount is noexec

    async def stream(self, path: str, body: dict[str, Any]) -> AsyncGenerator[bytes, None]:
        """The lines of the answer in a private transaction: who ends this early cancels the request."""
        fd = os.open(self.root / path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            data = json.dumps(body, ensure_ascii=False).encode()
            while data:
                data = data[os.write(fd, data) :]
            line = bytearray()
            while True:
                try:
                    if not (more := os.read(fd, 1 << 16)):
                        break
                except BlockingIOError:
                    await anyio.wait_readable(fd)
                    continue
                *whole, rest = (line + more).split(b"\n")
                for one in whole:
                    yield bytes(one) + b"\n"
                line = bytearray(rest)
            if line:
                yield bytes(line)
        finally:
            os.close(fd)

    async def text(self, path: str, body: dict[str, Any]) -> str:
        async with aclosing(self.stream(path, body)) as lines:
            return b"".join([line async for line in lines]).decode("utf-8", "replace")

    async def call(self, tool: str, arguments: dict[str, Any], report: Reporter) -> dict[str, Any]:
        """What requests/ID/response.json says of a call: output, files, structured. Raises
        TransactionFailed.
        """
        if not (agent := self.agent):
            return {"output": await self.text(f"tools/{tool}/call", arguments)}
        body = {"name": tool, "arguments": arguments}
        before = set(self.names(f"agents/{agent}/requests"))
        found: list[str] = []
        output, failed = "", ""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._follow, body, before, found, report)
            try:
                output = await self.text(f"agents/{agent}/syscall/tool", body)
            except OSError as error:
                failed = in_words(error)
            tasks.cancel_scope.cancel()
        id = found[0] if found else self._find(body, before)
        said: dict[str, Any] = {"output": output}
        if id:
            with suppress(OSError, ValueError):  # of one that was refused or removed there is none
                said = self.json(f"agents/{agent}/requests/{id}/response.json")
        if failed:
            raise TransactionFailed(said.get("error") or self.logged(agent) or failed)
        return said

    async def _follow(
        self, body: dict[str, Any], before: set[str], found: list[str], report: Reporter
    ) -> None:
        """Reports what the state of the call's request says, until it is over."""
        said = ""
        while True:
            await anyio.sleep(LOOK_S)
            if not found and (id := self._find(body, before)):
                found.append(id)
            with suppress(OSError):
                state = self.read(f"agents/{self._agent}/requests/{found[0]}/state").strip() if found else ""
                word, _, progress = state.partition(" ")
                if word == "running" and progress and progress != said:
                    said = progress
                    await report(progress)

    def _find(self, body: dict[str, Any], before: set[str]) -> str:
        """The request of such a call that was not there before."""
        folder = f"agents/{self._agent}/requests"
        new = sorted(
            (name for name in self.names(folder) if name.isdecimal() and name not in before), key=int
        )
        for id in new[-LATEST:]:
            with suppress(OSError, ValueError):
                if json.loads(self.read(f"{folder}/{id}/request")) == body:
                    return id
        return ""

    def logged(self, agent: str) -> str:
        """What the agent's log says last."""
        with suppress(OSError, ValueError, IndexError, KeyError):
            return str(json.loads(self.read(f"agents/{agent}/log.jsonl").splitlines()[-1])["message"])
        return ""

"""The way to a hosted server: streamable HTTP, with the headers that the configuration gives.

`${NAME}` in a header is the credential NAME, a file of the cage. A token of OAuth and the like comes from
a program of the administrator, which runs here as the session's user: at the start, and again when the
server refuses it.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx2
from mcp.client.streamable_http import streamable_http_client

CONNECT_S, READ_S = 30.0, 300.0
TOKEN_S = 30.0
UNAUTHORIZED = 401


class NoToken(Exception):
    """The program that makes tokens made none."""


class Token(httpx2.Auth):
    """The bearer token that a program prints."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self._command, self._env = command, env
        self._text = ""
        self._making = anyio.Lock()

    async def async_auth_flow(
        self, request: httpx2.Request
    ) -> AsyncGenerator[httpx2.Request, httpx2.Response]:
        used = await self._other_than("")
        request.headers["Authorization"] = f"Bearer {used}"
        response = yield request
        if response.status_code == UNAUTHORIZED:
            request.headers["Authorization"] = f"Bearer {await self._other_than(used)}"
            yield request

    async def _other_than(self, refused: str) -> str:
        async with self._making:
            if self._text == refused:
                self._text = await anyio.to_thread.run_sync(self._make)
            return self._text

    def _make(self) -> str:
        try:
            done = subprocess.run(
                self._command, capture_output=True, text=True, timeout=TOKEN_S, check=False,
                stdin=subprocess.DEVNULL, env=self._env,
            )  # fmt: skip
        except OSError as error:
            raise NoToken(f"token_command: {error.filename}: {error.strerror}") from None
        except subprocess.SubprocessError as error:
            raise NoToken(f"token_command: {error}") from None
        token = done.stdout.strip()
        if done.returncode or not token or not token.isprintable():
            said = done.stderr.strip().rpartition("\n")[2] or f"exit status {done.returncode}, and no token"
            raise NoToken(f"token_command: {said}")
        return token


@asynccontextmanager
async def hosted(about: dict[str, Any]) -> AsyncIterator[Any]:
    """The transport to about["url"]."""
    env = {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **about.get("env", {})}
    command = about.get("token_command")
    headers = {name: filled(text) for name, text in about.get("headers", {}).items()}
    async with (
        httpx2.AsyncClient(
            headers=headers,
            timeout=httpx2.Timeout(CONNECT_S, read=READ_S),
            auth=Token(command, env) if command else None,
        ) as client,
        streamable_http_client(about["url"], http_client=client) as streams,
    ):
        yield streams


def filled(text: str) -> str:
    """With the credentials that it names."""
    folder = Path(os.environ.get("CREDENTIALS_DIRECTORY", "/nonexistent"))
    return re.sub(r"\$\{([^}]*)\}", lambda named: (folder / named[1]).read_text().strip(), text)

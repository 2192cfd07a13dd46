"""The front: who asks, which dialect he speaks, and that all he has open ends with him. One event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Sequence
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from aiosd.gateway import keys, openai
from aiosd.gateway.client import Client
from aiosd.gateway.dialect import Dialect, Endpoint, HttpCall
from aiosd.gateway.keys import KnownKey
from aiosd.gateway.metrics import Metrics
from aiosd.gateway.openai_errors import refusal
from aiosd.gateway.refused import HttpRefused
from aiosd.gateway.sessions import UserSessions
from aiosd.host.notify import notify

log = logging.getLogger("aios-gateway")

DIALECTS = (openai.DIALECT,)
BODY_MOST = 4 << 20  # bytes, as limits.request_bytes of aiosd.toml(5)
CHECKED_S = 1.0  # that a key is taken for good: a revoked one works no longer
CHECKED_MOST = 4096
BODY_S = 60.0  # that a client has to send it
LOOPBACK = ("localhost", "127.0.0.1", "::1")
NO_STATUS = 499  # in the log: the client has gone before


class ClientGone(Exception):
    """Nobody waits for the response."""


class Front:
    def __init__(self, root: Path, sessions: UserSessions, hosts: Sequence[str]) -> None:
        self._root, self._sessions = root, sessions
        self._hosts = frozenset((*LOOPBACK, *map(str.lower, hosts)))
        self.metrics = Metrics()
        self._checked = OrderedDict[str, tuple[float, KnownKey]]()

    def application(self) -> Starlette:
        routes = [
            Route(endpoint.path, EndpointApp(self, dialect, endpoint), methods=[endpoint.method])
            for dialect in DIALECTS
            for endpoint in dialect.endpoints
        ]
        routes += [Route("/health", health), Route("/metrics", self._metrics)]
        return Starlette(routes=routes, exception_handlers={HTTPException: unrouted}, lifespan=self._lifespan)

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        tending = asyncio.create_task(self._sessions.end_idle())
        notify(READY=1)
        try:
            yield
        finally:
            notify(STOPPING=1)
            tending.cancel()
            self._sessions.close()

    async def client(self, request: Request) -> Client:
        """Who asks: the user of his key, or on the Unix socket the user himself. Raises HttpRefused."""
        connection, uid, word = request.state.socket, request.state.peer, bearer(request)
        if uid is not None and not word.startswith(keys.PREFIX):
            return Client(uid, "", lambda: self._sessions.of(uid, "", connection.fileno()))
        if uid is None and hostname(request) not in self._hosts:
            reason = "the Host of this request is not known here; --host NAME of aios-gateway makes it known"
            raise HttpRefused(403, reason, "unknown_host")
        key = await self._key(word)
        return Client(key.uid, key.agent, lambda: self._sessions.of(key.uid, word, None))

    async def _metrics(self, _: Request) -> Response:
        return PlainTextResponse(self.metrics.text(len(self._sessions)))

    async def _key(self, word: str) -> KnownKey:
        if not word:
            raise HttpRefused(
                401, "no key: send Authorization: Bearer KEY, from aiosctl key new", "missing_key"
            )
        now = time.monotonic()
        if (known := self._checked.get(word)) and known[0] > now - CHECKED_S:
            return known[1]
        self._checked.pop(word, None)
        try:
            key = await asyncio.to_thread(keys.check, self._root, word)
        except PermissionError:
            raise HttpRefused(
                401, "this key is none, or was revoked; aiosctl key new makes one", "invalid_key"
            ) from None
        except (OSError, ValueError, KeyError) as error:
            why = str(error) if await asyncio.to_thread(keys.runs, self._root) else keys.STOPPED
            raise HttpRefused(503, f"the key cannot be checked: {why}") from None
        self._checked[word] = now, key
        while len(self._checked) > CHECKED_MOST:
            self._checked.popitem(last=False)
        return key


class EndpointApp:
    """One endpoint of a dialect as an ASGI application."""

    def __init__(self, front: Front, dialect: Dialect, endpoint: Endpoint) -> None:
        self._front, self._dialect, self._endpoint = front, dialect, endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        self._front.metrics.begun()
        began_s, status, client = time.monotonic(), NO_STATUS, None

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            client = await self._front.client(request)
            call = HttpCall(
                client, await whole(request), request.headers, request.query_params, request.path_params
            )
            response = await unless_gone(self._endpoint.handle(call), receive)
            await response(scope, receive, noted)
        except HttpRefused as refused:
            if status != NO_STATUS:
                raise
            await self._dialect.refusal(refused)(scope, receive, noted)
        except ClientGone:
            pass
        finally:
            if client:
                client.close()
            self._front.metrics.ended(self._endpoint.path, status)
            log.info(
                "%s %s %s of uid %s in %.0f ms", request.method, self._endpoint.path, status,
                client.uid if client else "-", (time.monotonic() - began_s) * 1000,
                extra={"AIOS_UID": client.uid if client else ""},
            )  # fmt: skip


async def whole(request: Request) -> bytes:
    """The body. Raises HttpRefused, ClientGone."""
    try:
        async with asyncio.timeout(BODY_S):
            return await received(request)
    except TimeoutError:
        raise HttpRefused(408, f"the body did not come within {BODY_S:.0f} s") from None


async def received(request: Request) -> bytes:
    length = request.headers.get("content-length", "0")
    size = int(length) if length.isdecimal() else 0
    body, more = bytearray(), request.method not in ("GET", "HEAD")
    while more and max(size, len(body)) <= BODY_MOST:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        body += message.get("body", b"")
        more = message.get("more_body", False)
    if max(size, len(body)) > BODY_MOST:
        raise HttpRefused(413, f"a request has at most {BODY_MOST} bytes", "request_too_large")
    return bytes(body)


async def unless_gone(work: Awaitable[Response], receive: Receive) -> Response:
    """Do it, or stop at once when the client has gone."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.wait((task, gone))


async def disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def hostname(request: Request) -> str:
    """The name in the Host header. It tells a page of the Web whose name leads to 127.0.0.1."""
    host = request.headers.get("host", "").lower()
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


def bearer(request: Request) -> str:
    scheme, _, word = request.headers.get("authorization", "").partition(" ")
    return word.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "").strip()


async def health(_: Request) -> Response:
    return PlainTextResponse("ok\n")


async def unrouted(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return refusal(HttpRefused(error.status_code, f"{error.detail}: no such path or method here"))

"""The front: who asks, which dialect he speaks, and that all he has open ends with him. One event loop."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from functools import partial
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Match, Route
from starlette.types import Message, Receive, Scope, Send

import aiosd
from aiosd.gateway import aios, anthropic, keys, ollama, openai
from aiosd.gateway.aliases import Alias
from aiosd.gateway.allowance import Allowances
from aiosd.gateway.bodies import Bodies, ClientGone
from aiosd.gateway.client import UNLIMITED, Allowance, Client
from aiosd.gateway.description import description
from aiosd.gateway.dialect import Dialect, Endpoint, HttpCall
from aiosd.gateway.keys import KeyRing
from aiosd.gateway.metrics import Metrics
from aiosd.gateway.openai_errors import refusal
from aiosd.gateway.refused import HttpRefused
from aiosd.gateway.sessions import UserSessions
from aiosd.gateway.signs import Signs
from aiosd.host.notify import notify

log = logging.getLogger("aios-gateway")

DIALECTS = (anthropic.DIALECT, openai.DIALECT, ollama.DIALECT, aios.DIALECT)
LOOPBACK = ("localhost", "127.0.0.1", "::1")
NO_STATUS = 499  # in the log: the client has gone before


class Front:
    def __init__(
        self, root: Path, sessions: UserSessions, allowances: Allowances,
        hosts: Sequence[str], origins: Sequence[str], aliases: Sequence[Alias],
    ) -> None:  # fmt: skip
        """`hosts`: further names of this machine; `origins`: of the pages of the Web that may use it."""
        self._sessions, self._keys, self._allowances = sessions, KeyRing(root), allowances
        self._origins, self._aliases = origins, aliases
        self._hosts = frozenset((*LOOPBACK, *map(str.lower, hosts)))
        self.metrics, self.bodies = Metrics(), Bodies()

    def application(self) -> Starlette:
        routes: list[Route] = [
            HeaderRoute(
                endpoint.header,
                endpoint.path,
                EndpointApp(self, dialect, endpoint),
                methods=[endpoint.method],
            )
            for dialect in DIALECTS
            for endpoint in dialect.endpoints
        ]
        routes += [Route("/health", health), Route("/metrics", self._metrics), Route("/", ollama.running)]
        routes.append(Route("/openapi.json", describe))
        cors = Middleware(
            CORSMiddleware, allow_origins=self._origins, allow_methods=["*"], allow_headers=["*"],
        )  # fmt: skip
        return Starlette(
            routes=routes, exception_handlers={HTTPException: unrouted}, lifespan=self._lifespan,
            middleware=[cors] if self._origins else [],
        )  # fmt: skip

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
        self._check_page(request)
        connection, uid, word = request.state.socket, request.state.peer, bearer(request)
        if uid is not None and not word.startswith(keys.PREFIX):
            session = partial(self._sessions.of, uid, "", "", connection.fileno())
            return Client(uid, "", session, UNLIMITED, self._aliases)
        if uid is None and hostname(request) not in self._hosts:
            reason = "the Host of this request is not known here; --host NAME of aios-gateway makes it known"
            raise HttpRefused(403, reason, "unknown_host")
        key = await self._keys.of(word)
        allowance = Allowance(partial(self._allowances.check, key), partial(self._allowances.count, key))
        session = partial(self._sessions.of, key.uid, key.agent, word, None)
        return Client(key.uid, key.agent, session, allowance, self._aliases)

    def _check_page(self, request: Request) -> None:
        """A page of the Web may send simple requests anywhere, and a proxy may add a key to them."""
        origin = request.headers.get("origin", "")
        own = origin.partition("://")[2] == request.headers.get("host", "")
        if origin and not own and not {"*", origin} & {*self._origins}:
            reason = "pages from this Origin may not use the gateway; --cors-origin of aios-gateway lets them"
            raise HttpRefused(403, reason, "unknown_origin")

    async def _metrics(self, _: Request) -> Response:
        return PlainTextResponse(self.metrics.text(len(self._sessions)))


class HeaderRoute(Route):
    """A path that exists only for requests with this header; without a header as any other."""

    def __init__(self, header: str, path: str, endpoint: EndpointApp, methods: list[str]) -> None:
        super().__init__(path, endpoint, methods=methods)
        self._header = header.encode()

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if self._header and self._header not in dict(scope["headers"]):
            return Match.NONE, {}
        return super().matches(scope)


class EndpointApp:
    """One endpoint of a dialect as an ASGI application."""

    def __init__(self, front: Front, dialect: Dialect, endpoint: Endpoint) -> None:
        self._front, self._dialect, self._endpoint = front, dialect, endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        self._front.metrics.begun()
        began_s, status, client, signs = time.monotonic(), NO_STATUS, None, Signs(send)

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await signs.send(message)

        try:
            client = await self._front.client(request)
            response = await self._response(request, client)
            await response(scope, receive, noted)
        except HttpRefused as refused:
            if status != NO_STATUS:
                raise
            await self._dialect.refusal(refused)(scope, receive, noted)
        except RecursionError:  # the body could be read, and not be written again
            if status != NO_STATUS:
                raise
            deep = HttpRefused(400, "the JSON is nested too deeply", "invalid_json")
            await self._dialect.refusal(deep)(scope, receive, noted)
        except ClientGone:
            pass
        except Exception:
            if status != NO_STATUS:
                raise
            log.exception("%s %s", request.method, self._endpoint.path)
            failed = HttpRefused(500, "the gateway failed in this request; its log says why")
            await self._dialect.refusal(failed)(scope, receive, noted)
        finally:
            signs.end()
            if client:
                client.close()
            self._front.metrics.ended(self._endpoint.path, status)
            log.info(
                "%s %s %s of uid %s in %.0f ms", request.method, self._endpoint.path, status,
                client.uid if client else "-", (time.monotonic() - began_s) * 1000,
                extra={"AIOS_UID": client.uid if client else ""},
            )  # fmt: skip

    async def _response(self, request: Request, client: Client) -> Response:
        async with self._front.bodies.whole(request, client.uid) as body:
            call = HttpCall(client, body, request.headers, request.query_params, request.path_params)
            return await unless_gone(self._endpoint.handle(call), request.receive)


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
    """The key. As the password of a URL it comes from programs that know no keys."""
    scheme, _, word = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "basic":
        with contextlib.suppress(ValueError):
            return base64.b64decode(word).decode().partition(":")[2]
    return word.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "").strip()


async def describe(_: Request) -> Response:
    return JSONResponse(description(DIALECTS, aiosd.__version__))


async def health(_: Request) -> Response:
    return PlainTextResponse("ok\n")


async def unrouted(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    shaped = anthropic.DIALECT.refusal if anthropic.VERSION in request.headers else refusal
    return shaped(HttpRefused(error.status_code, f"{error.detail}: no such path or method here"))

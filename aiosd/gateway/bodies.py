"""The bodies of requests, with bounds on their size, their time, and on what all of them together take."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator

from starlette.requests import Request

from aiosd.gateway.refused import HttpRefused

BODY_MOST = 4 << 20  # bytes, as limits.request_bytes of aiosd.toml(5)
BODY_S = 60.0  # that a client has to send it
ALL_MOST, USER_MOST = 256 << 20, 64 << 20  # bytes of the requests that have no response yet
SMALL = 65536  # bytes that cannot have too many values
VALUES_MOST = 100_000  # of JSON, as for the daemon: nothing else goes on while Python makes them


class ClientGone(Exception):
    """Nobody waits for the response."""


class Bodies:
    def __init__(self) -> None:
        self._by_user = Counter[int]()
        self._all = 0

    @contextlib.asynccontextmanager
    async def whole(self, request: Request, uid: int) -> AsyncIterator[bytes]:
        """The body, which counts until the response begins. Raises HttpRefused, ClientGone."""
        size = size_of(request)
        if self._all + size > ALL_MOST or self._by_user[uid] + size > USER_MOST:
            raise HttpRefused(429, "too many large requests at once: try again", "too_many_bytes")
        self._take(uid, size)
        try:
            async with asyncio.timeout(BODY_S):
                body = await received(request)
        except TimeoutError:
            raise HttpRefused(408, f"the body did not come within {BODY_S:.0f} s") from None
        else:
            self._take(uid, len(body) - size)
            size = len(body)
            yield body
        finally:
            self._take(uid, -size)

    def _take(self, uid: int, size: int) -> None:
        self._all += size
        self._by_user[uid] += size
        if not self._by_user[uid]:
            del self._by_user[uid]


def size_of(request: Request) -> int:
    """How large the body may become. Raises HttpRefused."""
    chunked = "transfer-encoding" in request.headers
    if chunked and "content-length" in request.headers:  # a proxy may have believed the other one
        raise HttpRefused(400, "Content-Length and Transfer-Encoding exclude each other", "invalid_http")
    if request.method in ("GET", "HEAD"):
        return 0
    length = request.headers.get("content-length", "")
    size = int(length) if length.isdecimal() and len(length) < 20 else BODY_MOST
    if size > BODY_MOST:
        raise too_large()
    return size


async def received(request: Request) -> bytes:
    body, more = bytearray(), request.method not in ("GET", "HEAD")
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > BODY_MOST:
            raise too_large()
    if len(body) > SMALL and values_of(body) > VALUES_MOST:
        raise HttpRefused(400, f"the JSON has more than {VALUES_MOST} values", "invalid_json")
    return bytes(body)


def values_of(body: bytearray) -> int:
    """The most values that the JSON can have, not exactly above VALUES_MOST. It makes none of them."""
    rest = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    if (quotes := rest.count(b'"')) > 4 * (VALUES_MOST + 1):  # each value has two, and two more for its key
        return quotes // 4
    outside = b"".join(rest.split(b'"')[::2])
    return outside.count(b",") + outside.count(b"[") + outside.count(b"{")


def too_large() -> HttpRefused:
    return HttpRefused(413, f"a request has at most {BODY_MOST} bytes", "request_too_large")

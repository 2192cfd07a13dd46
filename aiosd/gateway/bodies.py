"""The bodies of requests, with bounds on their size, their time, and on what all of them together take."""

from __future__ import annotations

import asyncio
from collections import Counter

from starlette.requests import Request

from aiosd.gateway.refused import HttpRefused

BODY_MOST = 4 << 20  # bytes, as limits.request_bytes of aiosd.toml(5)
BODY_S = 60.0  # that a client has to send it
ALL_MOST, USER_MOST = 256 << 20, 64 << 20  # bytes of the requests that are coming in


class ClientGone(Exception):
    """Nobody waits for the response."""


class Bodies:
    def __init__(self) -> None:
        self._by_user = Counter[int]()
        self._all = 0

    async def whole(self, request: Request, uid: int) -> bytes:
        """Raises HttpRefused, ClientGone."""
        size = size_of(request)
        if self._all + size > ALL_MOST or self._by_user[uid] + size > USER_MOST:
            raise HttpRefused(429, "too many large requests at once: try again", "too_many_bytes")
        self._take(uid, size)
        try:
            async with asyncio.timeout(BODY_S):
                return await received(request)
        except TimeoutError:
            raise HttpRefused(408, f"the body did not come within {BODY_S:.0f} s") from None
        finally:
            self._take(uid, -size)

    def _take(self, uid: int, size: int) -> None:
        self._all += size
        self._by_user[uid] += size
        if not self._by_user[uid]:
            del self._by_user[uid]


def size_of(request: Request) -> int:
    """How large the body may become. Raises HttpRefused."""
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
    return bytes(body)


def too_large() -> HttpRefused:
    return HttpRefused(413, f"a request has at most {BODY_MOST} bytes", "request_too_large")

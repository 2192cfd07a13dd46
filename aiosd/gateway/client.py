"""What a dialect works with: the user of one HTTP request, and the answers to what he asks.

Raises HttpRefused throughout. The front calls `Client.close`, whatever happens: it ends all that the request
has open.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Never

from aiosd.gateway.aliases import Alias, meant
from aiosd.gateway.refused import HttpRefused, of_errno
from aiosd.gateway.sessions import Answered, Gone, SessionLink
from aiosd.gateway.spent import SpentTokens

CHUNK = 65536
PATIENCE_S = 10.0


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a user may still ask: `check` raises HttpRefused, `count` gets the tokens of each answer."""

    check: Callable[[], None]
    count: Callable[[int], None]


UNLIMITED = Allowance(lambda: None, lambda tokens: None)


class Reply:
    """The answer to a request. It is read as fast as it is taken. Closing it early cancels the request."""

    def __init__(self, file: int, first: bytes, spent: SpentTokens) -> None:
        os.set_blocking(file, False)
        self._file, self._first, self._loop = file, first, asyncio.get_running_loop()
        self._spent = spent
        self._waiting: asyncio.Future[None] | None = None
        self.ended = False

    async def pieces(self) -> AsyncIterator[bytes]:
        if self._first:
            self._spent.passed(self._first)
            yield self._first
        while data := await self._more():
            self._spent.passed(data)
            yield data
        self._end(whole=True)

    async def lines(self) -> AsyncIterator[bytes]:
        """Each with its newline."""
        rest = b""
        async for piece in self.pieces():
            *whole, rest = (rest + piece).split(b"\n")
            for line in whole:
                yield line + b"\n"
        if rest:
            yield rest

    async def whole(self) -> bytes:
        return b"".join([piece async for piece in self.pieces()])

    async def document(self) -> dict[str, Any]:
        """The answer as one JSON object."""
        found: dict[str, Any] = json.loads(await self.whole() or nothing())
        return found

    async def _more(self) -> bytes:
        while await self._ready():
            try:
                return os.read(self._file, CHUNK)
            except BlockingIOError:
                continue
            except OSError as error:
                raise of_errno(error.errno or 0, f"the answer broke off: {error.strerror}") from None
        return b""

    async def _ready(self) -> bool:
        """Wait until there is something to read; False: it was closed."""
        if self.ended:
            return False
        ready = self._waiting = self._loop.create_future()

        def wake() -> None:
            self._loop.remove_reader(self._file)  # at once: each further look would ask the daemon
            if not ready.done():
                ready.set_result(None)

        self._loop.add_reader(self._file, wake)
        try:
            await ready
        except asyncio.CancelledError:
            if not self.ended:
                self._loop.remove_reader(self._file)
            raise
        return not self.ended

    def close(self) -> None:
        self._end(whole=False)

    def _end(self, whole: bool) -> None:
        if self.ended:
            return
        self.ended = True
        self._loop.remove_reader(self._file)
        os.close(self._file)
        if self._waiting and not self._waiting.done():  # who reads reaches the end
            self._waiting.set_result(None)
        self._spent.end(whole)


async def first_of(lines: AsyncIterator[bytes]) -> asyncio.Future[bytes]:
    """The first line, or b"" at the end. It is waited for a while, so that a request that fails soon can have
    the status of an error. After that the response has to begin: the client may be waiting in a long queue.
    """
    first = asyncio.ensure_future(anext(lines, b""))
    try:
        await asyncio.wait((first,), timeout=PATIENCE_S)
    except asyncio.CancelledError:
        first.cancel()
        raise
    return first


async def together(first: bytes, streams: list[AsyncIterator[bytes]]) -> AsyncIterator[tuple[int, bytes]]:
    """The lines of all streams as they come, with the number of the stream. `first` is of the first one."""
    yield 0, first
    if len(streams) == 1:
        async for line in streams[0]:
            yield 0, line
        return
    coming: dict[asyncio.Future[bytes | None], int] = {}
    for i, stream in enumerate(streams):
        coming[asyncio.ensure_future(anext(stream, None))] = i
    try:
        while coming:
            done, _ = await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                i, found = coming.pop(task), task.result()
                if found is not None:
                    coming[asyncio.ensure_future(anext(streams[i], None))] = i
                    yield i, found
    finally:
        for task in coming:
            task.cancel()


def nothing() -> Never:
    raise HttpRefused(503, "aiosd has ended before the answer; ask again when it is back")


@dataclass(frozen=True, slots=True)
class Listed:
    """A name in a folder of the tree."""

    name: str
    open: bool  # whether the client may enter it
    uid: int
    changed_s: int


class Client:
    """The user of one HTTP request. `agent`: his key may use no other; empty: anything."""

    def __init__(
        self, uid: int, agent: str, session: Callable[[], Awaitable[SessionLink]],
        allowance: Allowance = UNLIMITED, aliases: Sequence[Alias] = (),
    ) -> None:  # fmt: skip
        self.uid, self.agent = uid, agent
        self._session, self._allowance, self._aliases = session, allowance, aliases
        self._ends: list[Callable[[], None]] = []

    def meant(self, model: object) -> object:
        """The model for which a name stands."""
        return meant(self._aliases, model)

    async def ask(self, path: str, body: bytes) -> Reply:
        """Ask a transaction file."""
        self._allowance.check()
        _, first, file = await self._call("ask", path, body)
        if file is None:
            raise HttpRefused(500, "the session gave no file")
        answer = Reply(file, first, SpentTokens(len(body), self._allowance.count))
        self._ends.append(answer.close)
        return answer

    async def read(self, path: str) -> bytes:
        return (await self._call("read", path))[1]

    async def list(self, path: str) -> list[Listed]:
        return [Listed(**entry) for entry in json.loads((await self._call("list", path))[1])]

    async def write(self, path: str, body: bytes) -> None:
        await self._call("write", path, body)

    async def make(self, path: str) -> None:
        await self._call("mkdir", path)

    async def owner(self, path: str) -> int:
        """The uid."""
        return int((await self._call("stat", path))[0]["uid"])

    async def remove(self, path: str) -> None:
        await self._call("rmdir", path)

    async def _call(self, operation: str, path: str, body: bytes = b"") -> Answered:
        for last in (False, True):  # the session may have been idle, or killed by its user
            try:
                session = await self._session()
                return await session.call(operation, path, body)
            except Gone:
                if last:
                    raise HttpRefused(503, "the session of this user ended; try again") from None
        raise AssertionError

    def at_end(self, do: Callable[[], None]) -> None:
        """Do it when the HTTP request ends, in whatever way."""
        self._ends.append(do)

    def close(self) -> None:
        for do in self._ends:
            do()

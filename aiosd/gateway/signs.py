"""Comments in a stream of server-sent events that is silent, so that no client or proxy takes it for dead."""

from __future__ import annotations

import asyncio

from starlette.types import Message, Send

SILENT_S = 10.0
SIGN = b": waiting\n\n"


class Signs:
    """An ASGI `send`. Each body message of a stream must be whole events. `end` must follow."""

    def __init__(self, send: Send) -> None:
        self._send, self._loop = send, asyncio.get_running_loop()
        self._one = asyncio.Lock()
        self._sent_s = 0.0
        self._tending: asyncio.Task[None] | None = None

    async def send(self, message: Message) -> None:
        async with self._one:
            await self._send(message)
            self._sent_s = self._loop.time()
            if message["type"] == "http.response.start" and streams(message):
                self._tending = self._loop.create_task(self._tend())
            elif message["type"] == "http.response.body" and not message.get("more_body"):
                self.end()

    async def _tend(self) -> None:
        while True:
            left_s = self._sent_s + SILENT_S - self._loop.time()
            if left_s > 0:
                await asyncio.sleep(left_s)
            else:
                await self.send({"type": "http.response.body", "body": SIGN, "more_body": True})

    def end(self) -> None:
        if self._tending:
            self._tending.cancel()


def streams(start: Message) -> bool:
    return any(
        name.lower() == b"content-type" and value.startswith(b"text/event-stream")
        for name, value in start["headers"]
    )

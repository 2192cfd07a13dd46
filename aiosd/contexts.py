"""Contexts: conversations that outlive requests. Messages are in the store; this knows which exist.

A context grows by a whole turn when its request is done, never by half of one. Any thread may call.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from aiosd.errors import BadRequest, BadValue, Exists, NotFound, OverQuota
from aiosd.spec import Message, message, read_json
from aiosd.store import Store


@dataclass(slots=True, eq=False)
class Context:
    name: str
    tokens: int = 0  # of the rendered conversation after its last turn; 0: not known yet
    worker: int | None = None  # where its KV was last


class Contexts:
    def __init__(self, store: Store, bytes_max: int) -> None:
        self._store, self._bytes_max = store, bytes_max
        self._lock = threading.Lock()
        self._by_name = {name: Context(name, tokens) for name, tokens in store.contexts()}

    def names(self) -> list[str]:
        return list(self._by_name)

    def find(self, name: str) -> Context | None:
        return self._by_name.get(name)

    def get(self, name: str) -> Context:
        try:
            return self._by_name[name]
        except KeyError:
            raise NotFound(f"no context {name}", f"mkdir contexts/{name} makes it") from None

    def add(self, name: str) -> Context:
        with self._lock:
            if name in self._by_name:
                raise Exists(f"context {name} exists")
            self._store.add_context(name)
            self._by_name[name] = Context(name)
            return self._by_name[name]

    def remove(self, name: str) -> None:
        with self._lock:
            self._store.remove_context(name)
            self._by_name.pop(name, None)

    def messages(self, context: Context) -> list[Message]:
        return self._store.messages(context.name)

    def append(self, context: Context, lines: str) -> None:
        """Messages as JSON lines: all of them, or none and a BadValue."""
        try:
            given = [
                message(read_json(line), f"line {i}") for i, line in enumerate(lines.split("\n"), 1) if line
            ]
        except BadRequest as error:
            raise BadValue(f"a message is one line of JSON with role and content: {error}") from None
        with self._lock:
            self.check(context)
            if self.size(context) + len(lines) > self._bytes_max:
                raise OverQuota(f"a context has at most {self._bytes_max} bytes", "begin a new one")
            self._store.append_messages(context.name, given)

    def size(self, context: Context) -> int:
        """Bytes of messages.jsonl."""
        return self._store.messages_bytes(context.name)

    def check(self, context: Context) -> None:
        """As Agents.check: the next context of that name is another one."""
        if self._by_name.get(context.name) is not context:
            raise NotFound(f"context {context.name} was removed")

    def clear(self, context: Context) -> None:
        with self._lock:
            self.check(context)
            self._store.clear_messages(context.name)
            context.tokens = 0

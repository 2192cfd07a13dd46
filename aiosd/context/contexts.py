"""Contexts: conversations that outlive requests. Messages are in the store; this knows which exist.

A context grows by a whole turn when its request is done, never by half of one. Any thread may call.
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from typing import Any

from aiosd.access.permissions import Permission, Permissions
from aiosd.database.store import Store
from aiosd.errors import BadRequest, BadValue, Exists, NotFound, OverQuota
from aiosd.syscall.chat import Chat, message
from aiosd.syscall.foreign import read_json
from aiosd.syscall.spec import Message, Spec


@dataclass(slots=True, eq=False)
class Context:
    name: str
    id: int  # of this context and no later one of the same name
    tokens: int = 0  # of the rendered conversation after its last turn; 0: not known yet
    model: str = ""  # of its last turn
    pinned: bool = False
    salt: str = ""  # its KV came from a user's file and is for its own requests only
    unfinished: str = ""  # JSON: an answer that a kv file was taken in the middle of
    worker: int | None = None  # that holds its KV


class Contexts:
    def __init__(self, store: Store, permissions: Permissions, bytes_max: int) -> None:
        self._store, self._permissions, self.bytes_max = store, permissions, bytes_max
        self._lock = threading.Lock()
        self._by_name = {row[0]: Context(*row) for row in store.contexts()}
        self._loops: dict[int, Context] = {}

    def __len__(self) -> int:
        return len(self._by_name)

    def names(self) -> list[str]:
        return list(self._by_name)

    def all(self) -> list[Context]:
        return list(self._by_name.values())

    def find(self, name: str) -> Context | None:
        return self._by_name.get(name)

    def by_id(self, id: int) -> Context | None:
        return self._loops.get(id) or next((context for context in self.all() if context.id == id), None)

    def begin_loop(self, request: int) -> None:
        """What keeps the KV of an agent's loop together while it goes on: it has no name and no messages."""
        self._loops[-request] = Context("", -request)

    def loop(self, request: int) -> Context | None:
        return self._loops.get(-request)

    def end_loop(self, request: int) -> Context | None:
        return self._loops.pop(-request, None)

    def with_loops(self) -> list[Context]:
        return [*self.all(), *list(self._loops.values())]

    def of(self, spec: Spec) -> Context | None:
        """The one a request was made for: a later one of the same name is another's conversation."""
        context = self._by_name.get(spec.context_name)
        return context if context is not None and context.id == spec.turn_of else None

    def owner(self, context: Context) -> tuple[int, bool]:
        """(uid, whether nobody else may continue it)"""
        at = self._permissions.get(f"/contexts/{context.name}") or Permission(0, 0, 0)
        return at.uid, not at.mode & 0o022

    def owns(self, uid: int, context: Context) -> bool:
        """KV, which `kv` files hold, is kept of turns by the context's own user: a guest's prompt has his
        agent's system prompt and tools in it, which are not for others to read."""
        return context.id < 0 or self.owner(context)[0] == uid

    def kv_owner(self, context: Context, uid: int) -> str:
        """Of a turn by that user: prefixes are shared within one user; a context of several, or from a
        file, has its own."""
        alone = context.id < 0 or self.owner(context) == (uid, True)  # a loop is its caller's alone
        return context.salt or (str(uid) if alone else f"context {context.id}")

    def whole(self, spec: Chat) -> list[Message]:
        """System prompt, the conversation so far, and what is asked now."""
        context = self.of(spec)
        messages = [*(self.messages(context) if context else []), *spec.messages]
        if spec.system and not any(m["role"] == "system" for m in messages):
            messages.insert(0, {"role": "system", "content": spec.system})
        return messages

    def get(self, name: str) -> Context:
        try:
            return self._by_name[name]
        except KeyError:
            raise NotFound(f"no context {name}", f"mkdir contexts/{name} makes it") from None

    def add(self, name: str) -> Context:
        with self._lock:
            self._check_free(name)
            self._by_name[name] = Context(name, self._store.add_context(name))
            return self._by_name[name]

    def fork(self, context: Context, name: str) -> Context:
        """Another one with the same messages; from here on each goes its own way."""
        with self._lock:
            self.check(context)
            self._check_free(name)
            id = self._store.fork_context(context.name, name)
            self._by_name[name] = Context(name, id, context.tokens, context.model)
            return self._by_name[name]

    def _check_free(self, name: str) -> None:
        if name in self._by_name:
            raise Exists(f"context {name} exists")

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
            self._check_size(self.size(context) + len(lines.encode()))
            self._store.append_messages(context.name, given)
            if context.unfinished:  # what it was an answer to is not the conversation any more
                self._set(context, {"unfinished": ""})

    def replace(self, context: Context, messages: list[Message], **facts: Any) -> None:
        """Another conversation takes its place, whole. `facts`: of Context, stored ones."""
        with self._lock:
            self.check(context)
            self._check_size(sum(len(json.dumps(m, ensure_ascii=False).encode()) + 1 for m in messages))
            self._store.replace_messages(context.name, messages)
            self._set(context, facts)

    def _check_size(self, size: int) -> None:
        if size > self.bytes_max:
            raise OverQuota(f"a context has at most {self.bytes_max} bytes", "begin a new one")

    def size(self, context: Context) -> int:
        """Bytes of messages.jsonl."""
        return self._store.messages_bytes(context.name)

    def check(self, context: Context) -> None:
        """As Agents.check: the next context of that name is another one."""
        if self._by_name.get(context.name) is not context:
            raise NotFound(f"context {context.name} was removed")

    def truncate(self, context: Context, count: int) -> None:
        """Keeps the first `count` messages."""
        with self._lock:
            self.check(context)
            self._store.truncate_messages(context.name, count)
            self._set(context, {"tokens": 0, "unfinished": ""})

    def set(self, context: Context, **facts: Any) -> None:
        with self._lock:
            self.check(context)
            self._set(context, facts)

    def _set(self, context: Context, facts: dict[str, Any]) -> None:
        self._store.save_context(context.name, facts)
        for key, value in facts.items():
            setattr(context, key, value)

"""Contexts: conversations that outlive requests. The table is here; the messages are in the store.

A context grows by a whole turn when its request is done, never by a part of one. Any thread may call.

Large: one short method for each fact and change of a context.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from dataclasses import dataclass
from typing import Any

from aiosd.access.permissions import Permission, Permissions
from aiosd.database.store import Store
from aiosd.errors import BadRequest, BadValue, Exists, NotFound, OverQuota
from aiosd.syscall.chat import Chat
from aiosd.syscall.foreign import read_json
from aiosd.syscall.messages import message
from aiosd.syscall.spec import Message, Spec


@dataclass(slots=True, eq=False)
class Context:
    name: str
    id: int  # no later context of the same name has it
    tokens: int = 0  # length of the rendered conversation after its last turn; 0: not known yet
    model: str = ""  # the model of its last turn
    pinned: bool = False
    salt: str = ""  # not empty: its KV came from a user's file, and no other context's requests may use it
    unfinished: str = ""  # JSON: the partial answer that its kv file held
    worker: int | None = None  # the worker that holds its KV


class Contexts:
    def __init__(self, store: Store, permissions: Permissions, bytes_max: int) -> None:
        self._store, self._permissions, self.bytes_max = store, permissions, bytes_max
        self._lock = threading.Lock()
        self._by_name = {row[0]: Context(*row) for row in store.contexts()}
        self._loops: dict[int, Context] = {}
        self._former = Counter[int]()  # accounts that a uid had before

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
        """Make the temporary context that keeps a loop's KV together. It has no name and no messages."""
        self._loops[-request] = Context("", -request)

    def loop(self, request: int) -> Context | None:
        return self._loops.get(-request)

    def end_loop(self, request: int) -> Context | None:
        return self._loops.pop(-request, None)

    def with_loops(self) -> list[Context]:
        return [*self.all(), *list(self._loops.values())]

    def of(self, spec: Spec) -> Context | None:
        """Return the context that the request was made for, never a later one of the same name."""
        context = self._by_name.get(spec.context_name)
        return context if context is not None and context.id == spec.turn_of else None

    def owner(self, context: Context) -> tuple[int, bool]:
        """Return (uid, whether only that user may continue the context)."""
        at = self._permissions.get(f"/contexts/{context.name}") or Permission(0, 0, 0)
        return at.uid, not at.mode & 0o022

    def owns(self, uid: int, context: Context) -> bool:
        """Whether the KV of this user's turns may be kept, and so reach `kv` files. Only the owner's: a
        guest's prompt contains the guest's system prompt and tools.
        """
        return context.id < 0 or self.owner(context)[0] == uid

    def kv_owner(self, context: Context, uid: int) -> str:
        """Return the name under which a turn of this user shares KV. A user shares it among his requests; a
        context of several users, or from a file, only within itself.
        """
        alone = context.id < 0 or self.owner(context) == (uid, True)  # a loop is its caller's alone
        user = f"{uid} {self._former[uid]}" if uid in self._former else f"{uid}"
        return context.salt or (user if alone else f"context {context.id}")

    def disown(self, uid: int) -> None:
        """The uid is another account now, which shares no KV with the former one."""
        self._former[uid] += 1

    def whole(self, spec: Chat) -> list[Message]:
        """Return the system prompt, the conversation so far, and the new messages."""
        context = self.of(spec)
        messages = [*(self.messages(context) if context else []), *spec.messages]
        if spec.system and (spec.leads or not any(m["role"] == "system" for m in messages)):
            messages.insert(0, {"role": "system", "content": spec.system})
        return messages

    def get(self, name: str) -> Context:
        try:
            return self._by_name[name]
        except KeyError:
            raise NotFound(f"no context {name}", f"mkdir contexts/{name}") from None

    def add(self, name: str) -> Context:
        with self._lock:
            self._check_free(name)
            self._by_name[name] = Context(name, self._store.add_context(name))
            return self._by_name[name]

    def fork(self, context: Context, name: str) -> Context:
        """Make a new context with the same messages. Later changes of one do not show in the other."""
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
        """Append messages given as JSON lines. A wrong line raises BadValue, and nothing is appended."""
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
            if context.unfinished:  # the partial answer belonged to the conversation as it was before
                self._set(context, {"unfinished": ""})

    def replace(self, context: Context, messages: list[Message], **facts: Any) -> None:
        """Replace the whole conversation. `facts`: new values for stored fields of Context."""
        with self._lock:
            self.check(context)
            self._check_size(sum(len(json.dumps(m, ensure_ascii=False).encode()) + 1 for m in messages))
            self._store.replace_messages(context.name, messages)
            self._set(context, facts)

    def _check_size(self, size: int) -> None:
        if size > self.bytes_max:
            raise OverQuota(f"a context has at most {self.bytes_max} bytes", "begin a new one")

    def size(self, context: Context) -> int:
        """Return the size of messages.jsonl in bytes."""
        return self._store.messages_bytes(context.name)

    def check(self, context: Context) -> None:
        """Raise NotFound if the context was removed, even if a new one has its name."""
        if self._by_name.get(context.name) is not context:
            raise NotFound(f"context {context.name} was removed")

    def truncate(self, context: Context, count: int) -> None:
        """Keep only the first `count` messages."""
        with self._lock:
            self.check(context)
            self._store.truncate_messages(context.name, count)
            self._set(context, {"tokens": 0, "unfinished": ""})

    def note(self, context: Context) -> str:
        self.check(context)
        return self._store.note(context.id)

    def set_note(self, context: Context, text: str) -> None:
        with self._lock:
            self.check(context)
            self._store.save_note(context.id, text)

    def set(self, context: Context, **facts: Any) -> None:
        with self._lock:
            self.check(context)
            self._set(context, facts)

    def _set(self, context: Context, facts: dict[str, Any]) -> None:
        self._store.save_context(context.name, facts)
        for key, value in facts.items():
            setattr(context, key, value)

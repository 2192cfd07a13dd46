"""contexts/NAME: a conversation."""

from __future__ import annotations

from functools import partial

from aiosd.access.caller import Caller
from aiosd.context.contexts import Context
from aiosd.fs.files import Control, Lines, Text, Value
from aiosd.fs.kvfile import KvFile
from aiosd.fs.tree import Folder, Table
from aiosd.kernel import Kernel

NOTE_BYTES = 1 << 20


def context_folder(kernel: Kernel, name: str) -> Folder | None:
    context = kernel.contexts.find(name)
    return context_files(kernel, context) if context else None


def context_files(kernel: Kernel, context: Context) -> Folder:
    contexts = kernel.contexts

    def lines() -> str:
        contexts.check(context)
        return "".join(line + "\n" for line in kernel.store.message_lines(context.name))

    def take_note(_: Caller, text: str) -> None:
        kernel.limits.check_disk(len(text))
        contexts.set_note(context, text)

    return Table(
        {
            "messages.jsonl": lambda: Lines(
                get=lines,
                bytes=partial(contexts.size, context),
                append=partial(contexts.append, context),
                clear=partial(contexts.truncate, context, 0),
            ),
            "tokens": lambda: Text(render=lambda: f"{context.tokens}\n"),
            "state": lambda: Text(render=lambda: f"{kernel.residency.state(context)}\n"),
            "model": lambda: Text(render=lambda: f"{context.model}\n"),
            "note": lambda: Value(
                get=partial(contexts.note, context), set=take_note, prose=True, most=NOTE_BYTES
            ),
            "ctl": lambda: Control(0o222, partial(kernel.context_objects.command, context)),
            "kv": lambda: KvFile(kernel=kernel, context=context),
        },
        0o700,
    )

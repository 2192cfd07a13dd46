"""keys/: API keys as folders, the file that makes one, and the file that says whose one is."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from aiosd.access.caller import Caller
from aiosd.access.keys import Key
from aiosd.errors import BadRequest, BadValue, NotAllowed, TooBig
from aiosd.fs.files import File, Handle, Opening, Text, encoded
from aiosd.fs.tree import Folder, Node, Table
from aiosd.kernel import Kernel
from aiosd.objects.keys import wanted

ASKED_MAX = 4096  # bytes of one write
OWN = "exec 3<>FILE; echo ... >&3; cat <&3"

Answer = Callable[[], dict[str, Any]]


class KeysFolder(Folder):
    """Everybody may write here, because rmdir asks the key's own user and not the group of those who make
    keys now. KeyObjects judges who revokes what.
    """

    mode = 0o777

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        mode = 0o666 if kernel.group is None else 0o660
        self._files: dict[str, Node] = {
            "new": Exchange(mode, partial(make, kernel), gid=kernel.group),
            "check": Exchange(0o666, partial(check, kernel)),
        }

    def names(self) -> Iterable[str]:
        return [*self._files, *self._kernel.keys.ids()]

    def listed(self, caller: Caller) -> Iterable[str]:
        return [*self._files, *self._kernel.key_objects.seen_by(caller)]

    def child(self, name: str) -> Node | None:
        key = self._kernel.keys.find(name)
        return key_folder(self._kernel, key) if key else self._files.get(name)

    def make(self, name: str, caller: Caller, mode: int) -> None:
        raise NotAllowed("mkdir makes no keys", "aiosctl key new, or write to keys/new")

    def remove(self, name: str, caller: Caller) -> None:
        self._kernel.key_objects.revoke(name, caller)


def key_folder(kernel: Kernel, key: Key) -> Folder:
    folder = Table({"info.json": lambda: Text(0o440, render=partial(info, key))}, 0o550, key.created_s)
    folder.uid, folder.gid = key.uid, kernel.admins
    return folder


def info(key: Key) -> str:
    facts = {"id": key.id, "name": key.name, "uid": key.uid, "user": key.user, "agent": key.agent or None,
             "expires": key.expires_s, "tokens_per_day": key.tokens_per_day, "created": key.created_s,
             "last_used": key.used_s or None}  # fmt: skip
    return json.dumps(facts, indent=2, ensure_ascii=False) + "\n"


def make(kernel: Kernel, opening: Opening, text: str) -> Answer:
    """A refusal comes with the write. The key is made by the read that tells it: else there would be one that
    nobody has.
    """
    if not opening.reads:
        raise NotAllowed("nobody could read the key", f"open the file to read and write: {OWN}")
    new = wanted(text)
    kernel.key_objects.check_new(opening.caller, new)
    return lambda: kernel.key_objects.make(opening.caller, new)


def check(kernel: Kernel, opening: Opening, text: str) -> Answer:
    facts = kernel.key_objects.check(opening.caller, text)
    return lambda: facts


class Exchange(File):
    """Each write is a whole question, and is refused when it is a bad one. Only the descriptor that it was
    written through reads the answer. Who opens the file only to read it finds nothing.
    """

    def __init__(self, mode: int, ask: Callable[[Opening, str], Answer], *, gid: int | None = None) -> None:
        super().__init__(mode, gid=gid)
        self.ask = ask

    def open(self, opening: Opening) -> Handle:
        return ExchangeHandle(self, opening)


class ExchangeHandle(Handle):
    def __init__(self, file: Exchange, opening: Opening) -> None:
        self._file, self._opening = file, opening
        self._lock = threading.Lock()
        self._answer: Answer | None = None
        self._data: bytes | None = None
        self._start = 0  # the file position at which the answer begins

    def write(self, data: bytes, offset: int) -> None:
        with self._lock:
            self._answer = self._data = None
            if len(data) > ASKED_MAX:
                raise TooBig(f"a question has at most {ASKED_MAX} bytes here")
            try:
                text = data.decode().strip()
            except UnicodeDecodeError as error:
                raise BadValue(f"byte {error.start} is not UTF-8 text") from None
            self._answer = self._file.ask(self._opening, text)
            self._start = offset + len(data)

    def read(self, size: int, offset: int) -> bytes:
        with self._lock:
            if self._data is None:
                if not self._opening.writes:
                    return b""
                if self._answer is None:
                    raise BadRequest("nothing was written here that has an answer", f"write first: {OWN}")
                self._data = encoded(json.dumps(self._answer()) + "\n")
            return self._data[max(0, offset - self._start) :][:size]

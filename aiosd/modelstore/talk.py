"""What the daemon and one puller say to each other about one source, and what became of the files.

Nothing that a puller says is trusted: names, sizes, digests and bounds are checked here.
aiosd.modelstore.pulls starts the puller, and names the files by their content after it has ended.
"""

from __future__ import annotations

import os
import re
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from aiosd.cores.launch import Process
from aiosd.cores.wire import Channel
from aiosd.errors import AiosError, ModelError, StoreFull, WireError, in_words
from aiosd.modelstore.facts import TEMPLATE_CHARS
from aiosd.modelstore.messages import (
    FROM_PULLER,
    AllGot,
    Fetch,
    FileKept,
    FilesFound,
    GotFile,
    HandFile,
    LookAt,
    ModelFacts,
    PullFailed,
    PullProgress,
    WantFile,
)  # fmt: skip
from aiosd.modelstore.store import FILE_NAME, ModelFile, ModelManifest, ModelStore, checked, told

FILES_MOST = 2048  # of one model
LOOK_S = 0.5  # how often the sizes of growing files are looked at
SPARE_BYTES = 64 << 20  # blocks that a file system may reserve behind a file, beside as many as it has
DIGEST = re.compile(r"(?:[0-9a-f]{64})?")


class Reporting(Protocol):
    def pulling(self, name: str, words: str) -> None:
        """It goes on; `words` say how far it is."""

    def check_size(self, manifest: ModelManifest, size: int, missing: int) -> None:
        """Whether there is room for a model of this size, of which `missing` bytes are still to come.
        Raises OverQuota, StoreFull."""


@dataclass(slots=True, eq=False)
class Growing:
    """A file that comes, or that was copied."""

    file: ModelFile
    path: Path
    digest: str = ""  # that it should have
    temporary: bool = False  # no file of the model


class PullerTalk:
    def __init__(
        self, store: ModelStore, manifest: ModelManifest, report: Reporting, cancelled: threading.Event
    ) -> None:
        self._store, self._manifest, self._report, self._cancelled = store, manifest, report, cancelled
        self.growing: dict[str, Growing] = {}
        self.over: AiosError | None = None  # a bound that the puller broke
        self._reserved = 0
        self._looked = False  # the puller has the model's main file, to tell what it is
        self._ended = False

    def hold(self, process: Process, fetch: Fetch | None) -> None:
        """Have the puller bring the files of a source, or only look at those that are there.

        Raises AiosError, OSError.
        """
        channel = process.connect(FROM_PULLER)
        try:
            threading.Thread(target=self._watch, args=(process,), daemon=True).start()
            if fetch is None:
                self._look(channel)
            else:
                channel.send(fetch)
            while (message := channel.receive()) is not None:
                if isinstance(message, ModelFacts) and self._looked:
                    self._learn(message.facts)
                    return
                self._heed(channel, message)
            raise ModelError("the process that pulls ended before the end", "pull again: it goes on")
        finally:
            self._ended = True
            channel.close()  # then the puller ends

    def _heed(self, channel: Channel, message: Any) -> None:
        match message:
            case FilesFound():
                self._found(message)
            case WantFile():
                self._hand(channel, message.name)
            case PullProgress():
                self._progress(message)
            case GotFile():
                self._got(channel, message.name)
            case AllGot():
                self._look(channel)
            case PullFailed():
                raise ModelError(clean(message.reason), clean(message.hint))
            case _:
                raise WireError(f"the puller sends {type(message).__name__} unasked")

    def _found(self, message: FilesFound) -> None:
        manifest = self._manifest
        manifest.revision, manifest.licence = clean(message.revision), clean(message.licence)
        for facts in message.files:
            file, digest, mark, temporary = judged(facts)
            if file.name in self.growing or len(self.growing) >= FILES_MOST:
                raise WireError(f"{file.name}: two files of one name, or more than {FILES_MOST} files")
            place = self._store.unfinished(manifest, mark)
            self.growing[file.name] = Growing(file, place, digest, temporary)
            self._reserved += file.size
            if not temporary:
                manifest.files.append(file)
        self._store.forget_others(manifest, {one.path for one in self.growing.values()})
        there = sum(min(one.file.size, size_of(one.path)) for one in self.growing.values())
        self._report.check_size(manifest, self._reserved, self._reserved - there)
        self._store.begin(manifest)

    def _hand(self, channel: Channel, name: str) -> None:
        one = self._asked(name)
        if one.digest and not one.temporary:
            one.file.digest = one.digest
            if self._store.has(self._manifest, one.file):
                del self.growing[name]
                channel.send(HandFile(name, 0, present=True))
                return
            one.file.digest = ""
        with told(one.path):
            opened = os.open(one.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            channel.send(HandFile(name, os.fstat(opened).st_size, present=False), opened)
        finally:
            os.close(opened)

    def _asked(self, name: str) -> Growing:
        if name not in self.growing:
            raise WireError(f"no file {name} was found")
        return self.growing[name]

    def _progress(self, message: PullProgress) -> None:
        """Show how much of the wheel is there, or of all files."""
        now = self._asked(message.name)
        files = [one for one in self.growing.values() if one.temporary == now.temporary]
        before = sum(one.file.size for one in files[: files.index(now)])
        total = sum(one.file.size for one in files)
        unpacks = not now.temporary and len(files) < len(self.growing)
        words = megabytes(before + message.done, total)
        self._report.pulling(self._manifest.name, f"unpacks {words}" if unpacks else words)

    def _got(self, channel: Channel, name: str) -> None:
        one = self._asked(name)
        if (size := size_of(one.path)) != one.file.size:
            raise ModelError(f"{name}: it is {size} of {one.file.size} bytes", "pull again: it goes on")
        if one.temporary:
            with told(one.path):
                checked(one.path, name, one.digest)
            channel.send(FileKept(name))

    def _look(self, channel: Channel) -> None:
        main = self._manifest.main or "config.json"
        file = next((one for one in self._manifest.files if one.name == main), None)
        if file is None:
            raise ModelError("no GGUF file and no config.json came", "choose another source")
        path = self.growing[main].path if main in self.growing else self._store.place(file)
        self._looked = True
        opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            channel.send(LookAt(main), opened)
        finally:
            os.close(opened)

    def _learn(self, facts: dict[str, Any]) -> None:
        kinds = {"architecture": str, "parameters": int, "context_length": int, "quantization": str,
                 "licence": str, "template": str}  # fmt: skip
        known = {key: facts[key] for key, kind in kinds.items() if type(facts.get(key)) is kind}
        self._manifest.facts = {
            key: clean(value, TEMPLATE_CHARS) if isinstance(value, str) else value
            for key, value in known.items()
        }  # fmt: skip
        self._manifest.licence = self._manifest.licence or str(self._manifest.facts.get("licence", ""))

    def _watch(self, process: Process) -> None:
        """End a puller that writes more than it announced, and one for which the disk gets too small."""
        while not self._ended:
            try:
                for one in list(self.growing.values()):
                    check_bound(one)
                self._report.check_size(self._manifest, self._reserved, 0)
            except (AiosError, OSError) as error:
                self.over = error if isinstance(error, AiosError) else StoreFull(in_words(error))
                process.kill()
                return
            self._cancelled.wait(LOOK_S)


def check_bound(one: Growing) -> None:
    """Raise ModelError if a file is, or takes, more than was announced."""
    with suppress(FileNotFoundError):
        at, most = one.path.stat(), one.file.size
        if at.st_size > most or at.st_blocks * 512 > 2 * most + SPARE_BYTES:
            raise ModelError(f"{one.file.name}: more than the {most} bytes that were announced")


def judged(facts: dict[str, Any]) -> tuple[ModelFile, str, str, bool]:
    """Check what a puller says of a file. Raises WireError, ModelError."""
    kinds = {"name": str, "size": int, "digest": str, "mark": str, "temporary": bool}
    if not isinstance(facts, dict) or {key: type(value) for key, value in facts.items()} != kinds:
        raise WireError("a file with other facts than it has")
    if not FILE_NAME.fullmatch(facts["name"]):
        raise ModelError(f"{facts['name'][:100]}: not a name for a file of a model", "choose another source")
    if facts["size"] < 0 or len(facts["mark"]) > 4096 or not DIGEST.fullmatch(facts["digest"]):
        raise WireError("a file with a wrong size, digest or mark")
    return ModelFile(facts["name"], facts["size"]), facts["digest"], facts["mark"], facts["temporary"]


def clean(text: str, most: int = 1000) -> str:
    """Text of a puller in which all is UTF-8, and which is not long."""
    return text[:most].encode("utf-8", "replace").decode()


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def megabytes(done: int, total: int) -> str:
    return f"{done // 10**6}/{-(-total // 10**6)} MB"

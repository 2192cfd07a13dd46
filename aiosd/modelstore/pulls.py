"""The pulls that run: each in a thread, which has a puller download and judges what comes.

Nothing that a puller says is trusted: names, sizes and bounds are checked here, and a file gets its name in
the store after the puller has ended and its content was hashed. Knows no models and no users:
aiosd.objects.pulls decides who may pull and what a pulled model becomes.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from aiosd.cores.launch import Process
from aiosd.cores.wire import Channel
from aiosd.errors import AiosError, Busy, ModelError, StoreFailed, StoreFull, WireError, in_words
from aiosd.modelstore import local
from aiosd.modelstore.facts import TEMPLATE_CHARS
from aiosd.modelstore.launch import PullLauncher
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
from aiosd.modelstore.source import ModelSource, alternatives
from aiosd.modelstore.store import FILE_NAME, ModelFile, ModelManifest, ModelStore, checked, told

log = logging.getLogger(__name__)

AT_ONCE = 4  # others wait
USERS_MOST = 2  # of a user who is no administrator
QUEUED_MOST = 64
FILES_MOST = 2048  # of one model
END_S = 2.0  # for a puller to end by itself
LOOK_S = 0.5  # how often the sizes of growing files are looked at


class PullEvents(Protocol):
    def pulling(self, name: str, words: str) -> None:
        """It goes on; `words` say how far it is."""

    def check_size(self, manifest: ModelManifest, size: int, missing: int) -> None:
        """Whether there is room for a model of this size, of which `missing` bytes are still to come.
        Raises OverQuota, StoreFull."""

    def pulled(self, manifest: ModelManifest) -> None:
        """The model is whole, and is to be committed."""

    def failed(self, manifest: ModelManifest) -> None: ...


class Pulls:
    def __init__(self, store: ModelStore, launch: PullLauncher, credentials: str, workers_uid: int) -> None:
        """`credentials`: the folder of the administrator's secrets."""
        self.store = store
        self._launch, self._credentials, self.workers_uid = launch, credentials, workers_uid
        self.events: PullEvents
        self._lock = threading.Lock()
        self._running: dict[str, Pull] = {}
        self._numbers: set[int] = set()  # of pullers
        self.slots = threading.BoundedSemaphore(AT_ONCE)
        self.stopping = False

    def report_to(self, events: PullEvents) -> None:
        self.events = events

    def runs(self, name: str) -> bool:
        return name in self._running

    def start(self, manifest: ModelManifest, trusted: bool) -> None:
        """`trusted`: the administrator's token and the files of this machine may be used.

        Raises Busy, StoreFailed."""
        with self._lock:
            if self.stopping or len(self._running) >= QUEUED_MOST:
                raise Busy(f"{len(self._running)} pulls wait or run", "try again when some have ended")
            if manifest.name in self._running:
                raise Busy(f"a pull of {manifest.name} runs", "echo cancel > its ctl ends it")
            same = [pull for pull in self._running.values() if pull.manifest.uid == manifest.uid]
            if not trusted and len(same) >= USERS_MOST:
                raise Busy(f"{len(same)} pulls of yours wait or run", "try again when one has ended")
            self.store.begin(manifest)
            pull = self._running[manifest.name] = Pull(self, manifest, trusted)
        self.events.pulling(manifest.name, "")
        pull.thread.start()

    def cancel(self, name: str) -> bool:
        """Return whether there was one. What it has downloaded stays for the next."""
        pull = self._running.get(name)
        if pull is None:
            return False
        pull.end()
        pull.thread.join()
        return True

    def stop(self) -> None:
        """End all. They go on at the next start."""
        with self._lock:
            self.stopping = True
            pulls = list(self._running.values())
        for pull in pulls:
            pull.end()
        for pull in pulls:
            pull.thread.join()

    def ended(self, pull: Pull) -> None:
        with self._lock:
            self._running.pop(pull.manifest.name, None)

    def puller(self) -> tuple[int, Process]:
        """Start a puller; release its number when it has ended. Raises OSError."""
        with self._lock:
            number = next(n for n in range(AT_ONCE + 1) if n not in self._numbers)
            self._numbers.add(number)
        try:
            return number, self._launch(number, self._credentials)
        except BaseException:
            self.release(number)
            raise

    def release(self, number: int) -> None:
        with self._lock:
            self._numbers.discard(number)


class Pull:
    """One model that is being pulled."""

    def __init__(self, pulls: Pulls, manifest: ModelManifest, trusted: bool) -> None:
        self._pulls, self._store, self.manifest, self._trusted = pulls, pulls.store, manifest, trusted
        self.thread = threading.Thread(target=self._run, name=f"pull-{manifest.name}", daemon=True)
        self._cancelled = threading.Event()
        self._over: AiosError | None = None  # a bound that the puller broke
        self._process: Process | None = None
        self._growing: dict[
            str, tuple[ModelFile, Path, str]
        ] = {}  # name → file, place, digest that it should have
        self._temporary: set[str] = set()
        self._reserved = 0
        self._looked = False  # the puller has the model's main file, to tell what it is

    def end(self) -> None:
        self._cancelled.set()
        if process := self._process:
            process.kill()

    # the thread

    def _run(self) -> None:
        manifest = self.manifest
        why: list[str] = []
        whole = False
        try:
            while not self._pulls.slots.acquire(timeout=LOOK_S):
                if self._cancelled.is_set():
                    raise ModelError("the pull was cancelled")
            try:
                for source in alternatives(manifest.source):
                    if source.is_local and not self._trusted:
                        continue
                    if whole := self._try(source, why):
                        break
            finally:
                self._pulls.slots.release()
        except (AiosError, OSError) as error:
            why.append(in_words(error))
        finally:
            if not self._pulls.stopping and not whole:
                self._fail(why)
            self._pulls.ended(self)

    def _fail(self, why: list[str]) -> None:
        cancelled = self._cancelled.is_set()
        self.manifest.error = "the pull was cancelled; pull goes on" if cancelled else "; then ".join(why)
        with suppress(StoreFailed):  # the disk is full: the next start tries again
            self._store.begin(self.manifest)
        self._pulls.events.failed(self.manifest)

    def _try(self, source: ModelSource, why: list[str]) -> bool:
        """Return whether the model is whole. Add the reason to `why` where another source may do."""
        manifest = self.manifest
        manifest.files, manifest.used = [], str(source)
        self._growing, self._temporary, self._reserved, self._looked = {}, set(), 0, False
        try:
            self._local(source) if source.is_local else self._remote(source)
            for file, path, digest in self._growing.values():
                if file.name not in self._temporary:
                    self._check_cancelled()
                    self._pulls.events.pulling(manifest.name, "checks")
                    self._store.keep(manifest, file, path, digest or source.digest)
            manifest.pulled_s = time.time()
            self._pulls.events.pulled(manifest)
        except (WireError, ModelError, OSError) as error:
            self._check_cancelled()
            if self._over:
                raise self._over from None
            why.append(f"{source}: {in_words(error)}" if manifest.source != str(source) else in_words(error))
            log.info("pull of %s from %s: %s", manifest.name, source, in_words(error))
            return False
        return True

    def _check_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise ModelError("the pull was cancelled")

    # files of this machine

    def _local(self, source: ModelSource) -> None:
        manifest, events = self.manifest, self._pulls.events
        found = local.find(source, manifest.name, self._pulls.workers_uid)
        manifest.files = [file for file, _ in found]
        size = sum(file.size for file in manifest.files if not file.place)
        events.check_size(manifest, size, size)
        self._store.begin(manifest)
        done, total = 0, manifest.size
        for file, path in found:
            if file.place:
                continue
            at = path.stat()
            target = self._store.unfinished(manifest, f"{path} {at.st_size} {at.st_mtime_ns}")
            with told(target):
                for copied in local.copy(path, target):
                    self._check_cancelled()
                    events.pulling(manifest.name, megabytes(done + copied, total))
            done += file.size
            self._growing[file.name] = file, target, ""
        self._converse(None)

    # a puller

    def _remote(self, source: ModelSource) -> None:
        self._converse(source)

    def _converse(self, source: ModelSource | None) -> None:
        """Have a puller bring the files of the source, or only look at those that are there."""
        number, process = self._pulls.puller()
        self._process = process
        channel: Channel | None = None
        try:
            self._check_cancelled()
            channel = process.connect(FROM_PULLER)
            threading.Thread(target=self._watch, args=(process,), daemon=True).start()
            if source is None:
                self._look(channel)
            else:
                channel.send(Fetch(str(source), self._trusted))
            while (message := channel.receive()) is not None:
                if isinstance(message, ModelFacts) and self._looked:
                    self._learn(message.facts)
                    return
                self._heed(channel, message)
            raise ModelError("the process that pulls ended before the end", "pull again: it goes on")
        finally:
            self._process = None
            if channel:
                channel.close()  # then it ends by itself
            try:
                process.wait(END_S if channel and not self._cancelled.is_set() else 0)
            except TimeoutError:
                process.kill()
                process.wait()
            process.close()
            self._pulls.release(number)

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
        manifest = self.manifest
        manifest.revision, manifest.licence = clean(message.revision), clean(message.licence)
        for facts in message.files:
            file, digest, mark, temporary = judged(facts)
            if file.name in self._growing or len(self._growing) >= FILES_MOST:
                raise WireError(f"{file.name}: two files of one name, or more than {FILES_MOST} files")
            self._growing[file.name] = file, self._store.unfinished(manifest, mark), digest
            self._reserved += file.size
            if temporary:
                self._temporary.add(file.name)
            else:
                manifest.files.append(file)
        self._store.forget_others(manifest, {path for _, path, _ in self._growing.values()})
        there = sum(min(file.size, size_of(path)) for file, path, _ in self._growing.values())
        self._pulls.events.check_size(manifest, self._reserved, self._reserved - there)
        self._store.begin(manifest)

    def _hand(self, channel: Channel, name: str) -> None:
        file, path, digest = self._asked(name)
        if digest and name not in self._temporary:
            file.digest = digest
            if self._store.has(self.manifest, file):
                del self._growing[name]
                channel.send(HandFile(name, 0, present=True))
                return
            file.digest = ""
        with told(path):
            opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            channel.send(HandFile(name, os.fstat(opened).st_size, present=False), opened)
        finally:
            os.close(opened)

    def _asked(self, name: str) -> tuple[ModelFile, Path, str]:
        if name not in self._growing:
            raise WireError(f"no file {name} was found")
        return self._growing[name]

    def _progress(self, message: PullProgress) -> None:
        """Show how much of the wheel is there, or of all files."""
        self._asked(message.name)
        one = message.name in self._temporary
        files = [file for file, _, _ in self._growing.values() if (file.name in self._temporary) == one]
        before = (file.size for file in files[: [file.name for file in files].index(message.name)])
        total = sum(file.size for file in files)
        verb = "unpacks " if self._temporary and not one else ""
        self._pulls.events.pulling(self.manifest.name, verb + megabytes(sum(before) + message.done, total))

    def _got(self, channel: Channel, name: str) -> None:
        file, path, digest = self._asked(name)
        if size_of(path) != file.size:
            raise ModelError(f"{name}: it is {size_of(path)} of {file.size} bytes", "pull again: it goes on")
        if name in self._temporary:
            with told(path):
                checked(path, name, digest)
            channel.send(FileKept(name))

    def _look(self, channel: Channel) -> None:
        main = self.manifest.main or "config.json"
        file = next((one for one in self.manifest.files if one.name == main), None)
        if file is None:
            raise ModelError("no GGUF file and no config.json came", "choose another source")
        path = self._growing[main][1] if main in self._growing else self._store.place(file)
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
        self.manifest.facts = {
            key: clean(value, TEMPLATE_CHARS) if isinstance(value, str) else value
            for key, value in known.items()
        }  # fmt: skip
        self.manifest.licence = self.manifest.licence or str(self.manifest.facts.get("licence", ""))

    def _watch(self, process: Process) -> None:
        """End a puller that writes more than it announced, and one for which the disk gets too small."""
        while self._process is process:
            try:
                for file, path, _ in list(self._growing.values()):
                    if size_of(path) > file.size:
                        raise ModelError(f"{file.name}: more than the {file.size} bytes that were announced")
                self._pulls.events.check_size(self.manifest, self._reserved, 0)
            except (AiosError, OSError) as error:
                self._over = error if isinstance(error, AiosError) else StoreFull(in_words(error))
                process.kill()
                return
            self._cancelled.wait(LOOK_S)


def judged(facts: dict[str, Any]) -> tuple[ModelFile, str, str, bool]:
    """Check what a puller says of a file. Raises WireError, ModelError."""
    kinds = {"name": str, "size": int, "digest": str, "mark": str, "temporary": bool}
    if not isinstance(facts, dict) or {key: type(value) for key, value in facts.items()} != kinds:
        raise WireError("a file with other facts than it has")
    if not FILE_NAME.fullmatch(facts["name"]):
        raise ModelError(f"{facts['name'][:100]}: not a name for a file of a model", "choose another source")
    if facts["size"] < 0 or len(facts["mark"]) > 4096:
        raise WireError("a file of less than no bytes")
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

"""The pulls that run: each in a thread, which has a puller download (aiosd.modelstore.talk).

A file gets its name in the store after the puller has ended and its content was hashed. Knows no models and
no users: aiosd.objects.pulls decides who may pull and what a pulled model becomes.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from typing import Protocol

from aiosd.cores.launch import Process
from aiosd.errors import AiosError, Busy, ModelError, StoreFailed, WireError, in_words
from aiosd.modelstore import local
from aiosd.modelstore.launch import PullLauncher
from aiosd.modelstore.messages import Fetch
from aiosd.modelstore.source import ModelSource, alternatives
from aiosd.modelstore.store import ModelManifest, ModelStore, told
from aiosd.modelstore.talk import LOOK_S, Growing, PullerTalk, Reporting, megabytes

log = logging.getLogger(__name__)

AT_ONCE = 4  # others wait
USERS_MOST = 2  # of a user who is no administrator
QUEUED_MOST = 64
END_S = 2.0  # for a puller to end by itself


class PullEvents(Reporting, Protocol):
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
        self._process: Process | None = None

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
        talk = PullerTalk(self._store, manifest, self._pulls.events, self._cancelled)
        try:
            if source.is_local:
                self._copy(source, talk)
            self._converse(talk, None if source.is_local else Fetch(str(source), self._trusted))
            for one in talk.growing.values():
                if not one.temporary:
                    self._check_cancelled()
                    self._pulls.events.pulling(manifest.name, "checks")
                    self._store.keep(manifest, one.file, one.path, one.digest or source.digest)
            manifest.pulled_s = time.time()
            self._pulls.events.pulled(manifest)
        except (WireError, ModelError, OSError) as error:
            self._check_cancelled()
            if talk.over:
                raise talk.over from None
            why.append(f"{source}: {in_words(error)}" if manifest.source != str(source) else in_words(error))
            log.info("pull of %s from %s: %s", manifest.name, source, in_words(error))
            return False
        return True

    def _check_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise ModelError("the pull was cancelled")

    def _copy(self, source: ModelSource, talk: PullerTalk) -> None:
        """Copy files of this machine."""
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
            talk.growing[file.name] = Growing(file, target)

    def _converse(self, talk: PullerTalk, fetch: Fetch | None) -> None:
        number, process = self._pulls.puller()
        self._process = process
        try:
            self._check_cancelled()
            talk.hold(process, fetch)
        finally:
            self._process = None
            try:
                process.wait(0 if self._cancelled.is_set() else END_S)
            except TimeoutError:
                process.kill()
                process.wait()
            process.close()
            self._pulls.release(number)

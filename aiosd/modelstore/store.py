"""The folder of pulled models. Only the daemon writes here.

    blobs/sha256-HEX      contents, each once; never changed
    manifests/NAME.json   what a model is: its files, source, owner. What stands here is so
    names/NAME/           links to the contents under the files' own names, for workers, as the manifest says
    partial/NAME/         files that a pull has not finished, and its manifest; the next pull goes on there

A manifest comes into place by rename, after what it names. `sweep` removes what no manifest names, and at the
start completes what a killed daemon began. Any thread may call.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import pwd
import re
import shutil
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from aiosd.errors import ConfigError, ModelError, StoreFailed, StoreFull, in_words

log = logging.getLogger(__name__)

BLOB = "sha256-"
MANIFEST = "manifest.json"  # no name of an unfinished file
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,199}")
FIRST_PART = re.compile(r".*-00001-of-\d{5}\.gguf")
OTHER_PART = re.compile(r".*-\d{5}-of-\d{5}\.gguf")


@dataclass(slots=True)
class ModelFile:
    name: str
    size: int
    digest: str = ""  # sha256; empty: not here yet, or in place
    place: str = ""  # the path of a file that is served where it is


@dataclass(slots=True)
class ModelManifest:
    name: str
    source: str  # as it was asked for
    uid: int  # whose quota it counts in
    began_s: float  # when the pull began; names it
    error: str = ""  # why the pull failed
    used: str = ""  # the source that it came from, of several
    revision: str = ""
    licence: str = ""
    pulled_s: float = 0.0
    files: list[ModelFile] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)  # architecture, parameters, … as its files say

    def dump(self) -> bytes:
        return json.dumps(asdict(self), ensure_ascii=False, indent=1).encode()

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def main(self) -> str:
        """The file that a worker loads; empty: the folder with config.json."""
        names = [file.name for file in self.files if file.name.endswith(".gguf")]
        if any(file.name == "config.json" for file in self.files) or not names:
            return ""
        first = [name for name in names if FIRST_PART.fullmatch(name)]
        return (first or sorted(name for name in names if not OTHER_PART.fullmatch(name)) or names)[0]


class ModelStore:
    def __init__(self, folder: Path, workers_uid: int) -> None:
        """`workers_uid`: the user of the workers, which must read here. Raises ConfigError."""
        self.folder = folder
        self._readers = None if workers_uid in (0, os.geteuid()) else pwd.getpwuid(workers_uid).pw_gid
        self._blobs, self._manifests = folder / "blobs", folder / "manifests"
        self._names, self._partial = folder / "names", folder / "partial"
        self._lock = threading.RLock()
        self._whole: dict[str, ModelManifest] = {}
        self._pulls: dict[str, ModelManifest] = {}
        try:
            for path in (folder, self._blobs, self._names):
                path.mkdir(mode=0o700, exist_ok=True)
                self._open_to_workers(path, 0o750)
            for path in (self._manifests, self._partial):
                path.mkdir(mode=0o700, exist_ok=True)
            self._read()
            self.sweep()
            for manifest in self._whole.values():
                self._link(manifest)
        except OSError as error:
            raise ConfigError(f"{error.filename or folder}: {error.strerror}", f"ls -ld {folder}") from None

    def _open_to_workers(self, path: Path, mode: int) -> None:
        """Let the workers' group read, and nobody else: one user's models are not another's, and the hashes
        that name contents are known."""
        if self._readers is None:
            return
        try:
            os.chown(path, -1, self._readers)
            path.chmod(mode)
        except PermissionError:
            log.warning(
                "%s: workers cannot read pulled models, because this user is not in their group;"
                " run systemd-sysusers and restart aiosd", path,
            )  # fmt: skip

    def _read(self) -> None:
        for file in sorted(self._manifests.glob("*.json")):
            if manifest := read_manifest(file):
                self._whole[manifest.name] = manifest
        for file in sorted(self._partial.glob(f"*/{MANIFEST}")):
            manifest = read_manifest(file)
            whole = self._whole.get(manifest.name) if manifest else None
            if manifest and not (
                whole and whole.began_s == manifest.began_s
            ):  # else it was killed in `commit`
                self._pulls[manifest.name] = manifest

    # manifests

    def all(self) -> list[ModelManifest]:
        """Return the whole models."""
        with self._lock:
            return list(self._whole.values())

    def pulls(self) -> list[ModelManifest]:
        """Return the pulls that have not ended, or failed."""
        with self._lock:
            return list(self._pulls.values())

    def find(self, name: str) -> ModelManifest | None:
        return self._whole.get(name)

    def find_pull(self, name: str) -> ModelManifest | None:
        return self._pulls.get(name)

    def paths(self) -> dict[str, Path]:
        """Return what a worker loads of each model, and an empty path for one whose pull has not ended."""
        with self._lock:
            return dict.fromkeys(self._pulls, Path()) | {m.name: self.path(m) for m in self._whole.values()}

    def path(self, manifest: ModelManifest) -> Path:
        """What a worker loads."""
        return self._names / manifest.name / manifest.main

    def holds(self, path: Path, name: str) -> bool:
        """Whether a path is in the folder of this model."""
        return path.is_relative_to(self._names / name)

    def size(self, name: str) -> int:
        """Return the bytes of a model and of its pull, also those to come. Shared bytes count as its own."""
        with self._lock:
            whole, pull = self._whole.get(name), self._pulls.get(name)
            size = whole.size if whole else 0
            if pull and pull.error:
                return size + sum(entry.stat().st_size for entry in os.scandir(self._partial / name))
            return size + pull.size if pull else size

    def begin(self, manifest: ModelManifest) -> None:
        """Note a pull, or how far it is. Raises StoreFailed."""
        with self._lock, told(self._partial):
            folder = self._partial / manifest.name
            folder.mkdir(mode=0o700, exist_ok=True)
            write_whole(folder / MANIFEST, manifest.dump())
            self._pulls[manifest.name] = manifest

    def commit(self, manifest: ModelManifest) -> None:
        """The model is whole: from here on it is what the manifest says. Raises StoreFailed."""
        with self._lock, told(self._manifests):
            manifest.error = ""
            self._link(manifest)
            write_whole(self._manifests / f"{manifest.name}.json", manifest.dump())
            self._whole[manifest.name] = manifest
            self._pulls.pop(manifest.name, None)
            self.sweep()

    def remove(self, name: str) -> None:
        with self._lock, told(self._manifests):
            known = self._whole.pop(name, None), self._pulls.pop(name, None)
            if any(known):
                (self._manifests / f"{name}.json").unlink(missing_ok=True)
                sync(self._manifests)
                self.sweep()

    def _link(self, manifest: ModelManifest) -> None:
        """Make the folder of a model as its manifest says."""
        folder = self._names / manifest.name
        wanted = {file.name: file.place or f"../../blobs/{BLOB}{file.digest}" for file in manifest.files}
        folder.mkdir(mode=0o700, exist_ok=True)
        self._open_to_workers(folder, 0o750)
        there = {entry.name: os.readlink(entry.path) for entry in os.scandir(folder)}
        for name in there.keys() - wanted.keys():
            (folder / name).unlink()
        for name, target in wanted.items():
            if there.get(name) != target:
                new = folder / ".new"
                new.unlink(missing_ok=True)
                new.symlink_to(target)
                new.rename(folder / name)
        sync(folder)

    def sweep(self) -> None:
        with self._lock:
            manifests = [*self._whole.values(), *self._pulls.values()]
            kept = {f"{BLOB}{file.digest}" for one in manifests for file in one.files if file.digest}
            for entry in list(os.scandir(self._blobs)):
                if entry.name not in kept:
                    os.unlink(entry.path)
            for folder, known in ((self._names, self._whole), (self._partial, self._pulls)):
                for entry in list(os.scandir(folder)):
                    if entry.name not in known:
                        shutil.rmtree(entry.path)
            for left in self._manifests.glob("*.new"):
                left.unlink()

    # contents

    def has(self, manifest: ModelManifest, file: ModelFile) -> bool:
        """Take a content that the store has already, for a file of a pull."""
        with self._lock:
            there = bool(file.digest) and (self._blobs / f"{BLOB}{file.digest}").exists()
            if there:
                self.begin(manifest)
            return there

    def unfinished(self, manifest: ModelManifest, mark: str) -> Path:
        """Return the file of a pull whose content `mark` describes; an earlier pull may have begun it."""
        return (
            self._partial / manifest.name / hashlib.sha256(mark.encode("utf-8", "replace")).hexdigest()[:32]
        )

    def forget_others(self, manifest: ModelManifest, paths: Collection[Path]) -> None:
        """Remove what earlier pulls of this name began, except these files."""
        with told(self._partial):
            for entry in list(os.scandir(self._partial / manifest.name)):
                if entry.name != MANIFEST and Path(entry.path) not in paths:
                    os.unlink(entry.path)

    def keep(self, manifest: ModelManifest, file: ModelFile, path: Path, digest: str) -> None:
        """Name a finished file by its content. Nobody may have it open to write.

        Raises ModelError, StoreFailed."""
        with told(path):
            found = checked(path, file.name, digest)
            blob = self._blobs / f"{BLOB}{found}"
            with self._lock:
                file.digest, file.size = found, path.stat().st_size
                self.begin(manifest)  # before the content has its name, so that no sweep takes it
                if blob.exists():
                    path.unlink()
                    return
                with path.open("rb") as opened:
                    os.fsync(opened.fileno())
                path.chmod(0o400)
                self._open_to_workers(path, 0o440)
                path.rename(blob)
                sync(self._blobs)

    def place(self, file: ModelFile) -> Path:
        return Path(file.place) if file.place else self._blobs / f"{BLOB}{file.digest}"

    @property
    def free_bytes(self) -> int:
        space = os.statvfs(self.folder)
        return space.f_bavail * space.f_frsize


def checked(path: Path, name: str, digest: str) -> str:
    """Return the digest of a file. Remove it and raise ModelError if it is another than `digest`."""
    with path.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if digest and found != digest:
        path.unlink()
        raise ModelError(
            f"{name}: its sha256 is {found[:12]}… and should be {digest[:12]}…",
            "it was damaged on the way, or replaced at its source: pull again",
        )
    return found


def read_manifest(file: Path) -> ModelManifest | None:
    try:
        raw = json.loads(file.read_text())
        return ModelManifest(**{**raw, "files": [ModelFile(**one) for one in raw["files"]]})
    except (ValueError, TypeError, KeyError) as error:
        log.error("%s cannot be read: %s; its model is left aside", file, in_words(error))
        return None


def write_whole(path: Path, data: bytes) -> None:
    """Replace a file, so that a reader finds the old or the new one, also after a crash."""
    new = path.with_name(path.name + ".new")
    with new.open("wb") as writing:
        writing.write(data)
        writing.flush()
        os.fsync(writing.fileno())
    new.rename(path)
    sync(path.parent)


def sync(folder: Path) -> None:
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Raise StoreFailed for an OSError."""
    try:
        yield
    except OSError as error:
        place = error.filename or path
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreFull(
                f"{place}: the disk is full", "free some space, then pull again: it goes on"
            ) from None
        raise StoreFailed(f"{place}: {error.strerror}") from None

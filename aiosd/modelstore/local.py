"""Models of this machine: a folder or file to copy, and what a local Ollama has, which is served in place."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aiosd.cores.models import READ_BY_WORKERS, check_folder, out_of_sight
from aiosd.errors import ModelError
from aiosd.host.readable import Reader, first_closed
from aiosd.modelstore.source import ModelSource
from aiosd.modelstore.store import FILE_NAME, ModelFile

CHUNK = 8 << 20
OLLAMA = ("/usr/share/ollama/.ollama/models", "/var/lib/ollama", "/var/lib/ollama/.ollama/models",
          "/var/lib/ollama/models")  # fmt: skip
REGISTRY = "registry.ollama.ai"
MODEL = "application/vnd.ollama.image.model"
DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
PART = re.compile(r"(.*)-\d{5}-of-(\d{5})\.gguf")
MANIFEST_BYTES = 1 << 20
Found = list[tuple[ModelFile, Path]]


def find(source: ModelSource, name: str, workers_uid: int) -> Found:
    """Return the files of a model with their paths. Raises ModelError, OSError."""
    if source.kind == "ollama":
        return of_ollama(source, name, Reader.of(workers_uid))
    path = Path(source.name)
    try:
        return of_path(path)
    except ModelError as error:
        raise ModelError(str(error), out_of_sight(path, Reader.of(workers_uid)) or error.hint) from None


def of_path(path: Path) -> Found:
    check_folder(path, Reader.of(os.geteuid()))
    if path.is_dir():
        files = sorted({file for kind in READ_BY_WORKERS for file in path.glob(kind)})
    elif part := PART.fullmatch(path.name):
        files = sorted(path.parent.glob("*.gguf"))
        files = [one for one in files if (of := PART.fullmatch(one.name)) and of.groups() == part.groups()]
    else:
        files = [path]
    for file in files:
        if not FILE_NAME.fullmatch(file.name):
            raise ModelError(f"{file}: the name has other characters than A-Z a-z 0-9 . _ + -", "rename it")
        if not file.is_file():
            raise ModelError(f"{file}: not a file", "name a folder with config.json, or a .gguf file")
    return [(ModelFile(file.name, file.stat().st_size), file) for file in files]


def copy(source: Path, target: Path) -> Iterator[int]:
    """Copy a file, and yield how many bytes are done."""
    done = 0
    with source.open("rb") as reading, target.open("wb") as writing:
        while count := os.sendfile(writing.fileno(), reading.fileno(), None, CHUNK):
            done += count
            yield done


# Ollama


def of_ollama(source: ModelSource, name: str, worker: Reader) -> Found:
    stores = [Path(path) for path in (os.environ.get("OLLAMA_MODELS"), *OLLAMA) if path]
    stores.append(Path.home() / ".ollama/models")
    for store in stores:
        manifest = store / "manifests" / place(source)
        if not os.path.exists(manifest) and not closed(store):
            continue
        for reader in (Reader.of(os.geteuid()), worker):
            check_readable(manifest, store, reader)
        blob, size = read(manifest, store)
        check_readable(blob, store, worker)
        return [(ModelFile(f"{name}.gguf", size, place=str(blob)), blob)]
    there = ", ".join(sorted({str(store) for store in stores if store.exists()}))
    raise ModelError(
        f"{source}: no local Ollama has this model",
        f"ollama list; looked in {there}" if there else "there is no Ollama store; OLLAMA_MODELS names one",
    )


def place(source: ModelSource) -> Path:
    """Return where Ollama keeps the manifest of a model, below manifests/."""
    parts = source.name.split("/")
    if len(parts) == 1:
        parts = [REGISTRY, "library", *parts]
    elif len(parts) == 2:
        parts = [REGISTRY, *parts]
    return Path(*parts, source.version or "latest")


def closed(store: Path) -> bool:
    """Whether the daemon may not look into a store that is there."""
    try:
        os.stat(store / "manifests")
    except PermissionError:
        return True
    except OSError:
        pass
    return False


def check_readable(path: Path, store: Path, reader: Reader) -> None:
    """Raises ModelError."""
    try:
        shut = first_closed(reader, [path])
    except OSError as error:
        shut = Path(error.filename or path)
    if shut is None:
        return
    bits = "x" if shut in path.parents else "r"
    acl = f"setfacl -R -m u:{reader.name}:rX {shlex.quote(str(store))}"
    remedy = f"chmod a+{bits} {shlex.quote(str(shut))}, or {acl}"
    raise ModelError(f"{shut}: user {reader.name} may not read it", out_of_sight(path, reader) or remedy)


def read(manifest: Path, store: Path) -> tuple[Path, int]:
    """Return the model of a manifest of Ollama. Raises ModelError, OSError."""
    try:
        with manifest.open("rb") as file:
            layers: list[dict[str, Any]] = json.loads(file.read(MANIFEST_BYTES))["layers"]
        models = [layer for layer in layers if layer["mediaType"] == MODEL]
        digest = DIGEST.fullmatch(models[0]["digest"])
    except (ValueError, KeyError, TypeError, IndexError):
        raise ModelError(f"{manifest}: not the manifest of a model", "ollama pull it again") from None
    if digest is None or len(models) > 1:
        raise ModelError(f"{manifest}: a model of several files", "pull it from hf: instead")
    blob = store / "blobs" / f"sha256-{digest[1]}"
    with blob.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{blob}: not a GGUF file", "pull it from hf: instead")
    return blob, blob.stat().st_size

"""hf:ORG/REPO[@REVISION][:FILE or QUANT]: a repository of the Hugging Face hub, or of a server of its shape.

In the puller. Each file is asked for by HEAD before its bytes count as known, because the list of a gated
repository with its hashes is public, and its files are not.
"""

from __future__ import annotations

import re
from fnmatch import fnmatch
from typing import Any, Protocol

import httpx2
from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)  # fmt: skip

from aiosd.errors import ModelError
from aiosd.modelstore.source import ModelSource
from aiosd.modelstore.transfer import AGAIN, Receiver, RemoteFile, bring, unreachable

READ_BY_WORKERS = ("*.json", "*.safetensors", "*.jinja")
PREFERRED = ("Q4_K_M", "Q4_0", "Q4_1", "Q5_K_M", "Q8_0", "Q6_K", "F16", "BF16")
PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
QUANT = re.compile(r"(?:^|[.-])((?:I?Q\d\w*)|F16|BF16|F32|FP16)(?=[.-]|$)", re.IGNORECASE)
SHA256 = re.compile(r"[0-9a-f]{64}")
TOKEN_HINT = (
    "put a token of an account that may (huggingface.co/settings/tokens) into /etc/aios/credentials/hf-token,"
    " mode 0600, and pull again as root or a member of aios-admin"
)


class HubReceiver(Receiver, Protocol):
    def found(self, files: list[RemoteFile], licence: str, revision: str = "") -> None: ...


def pull(source: ModelSource, receiver: HubReceiver, token: str) -> None:
    """Raises ModelError."""
    api = HfApi(token=token or False)
    try:
        info = api.model_info(source.name, revision=source.version or None)
        revision = info.sha or source.version or "main"
        names = chosen(source, [one.rfilename for one in info.siblings or []])
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        files: list[tuple[str, RemoteFile]] = []
        for path in names:
            url = hf_hub_url(source.name, path, revision=revision, endpoint=api.endpoint)
            files.append((url, remote(source.name, url, path, token)))
        receiver.found([file for _, file in files], licence(info), revision)
        for url, file in files:
            bring(url, file, receiver, headers)
    except GatedRepoError:
        where = f"{api.endpoint}/{source.name}"
        raise ModelError(
            f"{source.name} is gated: its owner gives it to accounts that accept its terms",
            f"accept them at {where}, then {TOKEN_HINT}",
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"no repository {source.name} at {api.endpoint}",
            f"check the name; if it is private, {TOKEN_HINT}",
        ) from None
    except RevisionNotFoundError:
        raise ModelError(f"{source.name} has no revision {source.version}", "leave @REVISION out") from None
    except EntryNotFoundError:
        raise ModelError(f"{source.name}: a file went away while it was pulled", "pull again") from None
    except HfHubHTTPError as error:
        raise ModelError(f"{api.endpoint}: {first_line(error)}", AGAIN) from None
    except httpx2.HTTPError as error:
        raise unreachable(api.endpoint, error) from None


def remote(repository: str, url: str, path: str, token: str) -> RemoteFile:
    at = get_hf_file_metadata(url, token=token or False)
    if at.size is None or at.etag is None:
        raise ModelError(f"{path}: the hub says neither size nor hash of it", "is HF_ENDPOINT a hub?")
    is_lfs = SHA256.fullmatch(at.etag) is not None  # else its etag is git's hash
    return RemoteFile(
        path.rpartition("/")[2],
        at.size,
        at.etag if is_lfs else "",
        f"{repository} {path} {at.etag}",
        git_hash="" if is_lfs else at.etag,
    )


def chosen(source: ModelSource, names: list[str]) -> list[str]:
    """Return the files of the model that a worker reads. Raises ModelError."""
    ggufs = [name for name in names if name.endswith(".gguf") and "mmproj" not in name.lower()]
    if source.file in names:
        return with_parts(source.file, ggufs)
    quants = by_quant(ggufs)
    if source.file:
        wanted = source.file.upper()
        if wanted in quants:
            return with_parts(quants[wanted], ggufs)
        there = ", ".join(sorted(quants)) or ", ".join(sorted(names)[:20]) or "no files"
        raise ModelError(f"{source.name} has no file and no quantisation {source.file}", f"it has: {there}")
    top = [name for name in names if "/" not in name]
    if "config.json" in top and any(name.endswith(".safetensors") for name in top):
        return [name for name in top if any(fnmatch(name, kind) for kind in READ_BY_WORKERS)]
    for quant in (*PREFERRED, *sorted(quants)):
        if quant in quants:
            return with_parts(quants[quant], ggufs)
    if len(ggufs) == 1:
        return ggufs
    if ggufs:
        raise ModelError(f"{source.name} has several models", f"name a file: {', '.join(sorted(ggufs)[:20])}")
    raise ModelError(
        f"{source.name} has no GGUF file, and no config.json with safetensors", "choose another repository"
    )


def by_quant(ggufs: list[str]) -> dict[str, str]:
    """Return the first file of each quantisation."""
    found: dict[str, str] = {}
    for name in sorted(ggufs):
        bare = PART.sub(r"\1.gguf", name.rpartition("/")[2]).removesuffix(".gguf")
        if quants := QUANT.findall(bare):
            found.setdefault(str(quants[-1]).upper(), name)
    return found


def with_parts(name: str, ggufs: list[str]) -> list[str]:
    """Return a file with its other parts, if it is one of several."""
    if (part := PART.fullmatch(name)) is None:
        return [name]
    return sorted(
        one for one in ggufs if (of := PART.fullmatch(one)) and (of[1], of[3]) == (part[1], part[3])
    )


def licence(info: Any) -> str:
    named = next((tag.partition(":")[2] for tag in info.tags or [] if tag.startswith("license:")), "")
    return str(named)[:100]


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

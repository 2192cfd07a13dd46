"""One file over HTTP, into a file that the daemon handed out: it goes on where it ended, its end is checked.

aiosd.modelstore.hub and wheel use it, in the puller. The client is huggingface_hub's for both, which honours
the proxy variables. Its own http_get keeps 10 MB in memory before it writes, and loses them at a cut.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO, Protocol

import httpx2
from huggingface_hub import get_session
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils._http import hf_raise_for_status

from aiosd.errors import ModelError

NETWORK_FILE = "/etc/aios/pull.env"
AGAIN = "pull again: it goes on where it ended"
TIMEOUT_S = 30.0
GIT_HASH = re.compile(r"[0-9a-f]{40}")
TRIES = 5  # without a byte in between
PAUSES_S = (0.0, 0.5, 1.0, 2.0, 4.0)  # before the next


@dataclass(slots=True)
class RemoteFile:
    name: str
    size: int
    digest: str  # sha256; empty: unknown
    mark: str  # changes with the content
    temporary: bool = False
    git_hash: str = ""  # sha1 of a small file, as git has it; the daemon is not told

    def facts(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "git_hash"}


class Receiver(Protocol):
    def want(self, name: str) -> tuple[int, int]: ...
    def progress(self, name: str, done: int) -> None: ...
    def got(self, name: str, *, wait: bool = False) -> None: ...


def bring(url: str, file: RemoteFile, receiver: Receiver, headers: dict[str, str]) -> None:
    """Download what the store lacks of a file. Raises ModelError, HfHubHTTPError."""
    fd, have = receiver.want(file.name)
    if fd < 0:
        return
    with os.fdopen(fd, "r+b") as opened:
        download(url, opened, file, have, lambda done: receiver.progress(file.name, done), headers)
        check_git(opened, file)
    receiver.got(file.name, wait=file.temporary)


def download(
    url: str,
    opened: BinaryIO,
    file: RemoteFile,
    have: int,
    progress: Callable[[int], None],
    headers: dict[str, str],
) -> None:
    failures, why = 0, ""
    while have < file.size or not file.size:
        if failures == TRIES:
            words = f"{file.name}: it ended after {have} of {file.size} bytes{why and ': '}{why}"
            raise ModelError(words, AGAIN)
        time.sleep(PAUSES_S[failures])
        failures, before = failures + 1, have
        try:
            for done in chunks(url, opened, file, have, headers):
                progress(done)
        except HfHubHTTPError as error:
            if error.response.status_code < httpx2.codes.INTERNAL_SERVER_ERROR:
                raise
            why = f"status {error.response.status_code}"
        except httpx2.ConnectError as error:
            raise unreachable(url, error) from None
        except httpx2.HTTPError as error:
            why = str(error) or type(error).__name__
        have = opened.tell()
        if have != before:
            failures = 0
        if not file.size:
            break
    if have > file.size:  # of an earlier content, which no honest source gives the same mark
        opened.truncate(0)
        raise ModelError(f"{file.name}: more than the {file.size} bytes that were announced", "pull again")


def check_git(opened: BinaryIO, file: RemoteFile) -> None:
    """Raise ModelError if a small file is another than git says."""
    if not GIT_HASH.fullmatch(file.git_hash):
        return
    opened.seek(0)
    found = hashlib.sha1(b"blob %d\0" % file.size + opened.read()).hexdigest()
    if found != file.git_hash:
        opened.truncate(0)
        words = f"{file.name}: git's hash is {found[:12]}… and should be {file.git_hash[:12]}…"
        raise ModelError(words, "it was damaged on the way, or replaced at its source: pull again")


def chunks(url: str, opened: BinaryIO, file: RemoteFile, have: int, headers: dict[str, str]) -> Iterator[int]:
    """Write what comes, and yield how many bytes are there."""
    wanted = {**headers, "Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    opened.seek(have)
    with get_session().stream(
        "GET", url, headers=wanted, follow_redirects=True, timeout=TIMEOUT_S
    ) as response:
        hf_raise_for_status(response)
        if have and response.status_code != httpx2.codes.PARTIAL_CONTENT:
            opened.seek(0)  # a server without ranges gives the whole file
            opened.truncate()
        for chunk in response.iter_raw():
            opened.write(chunk)
            opened.flush()
            yield opened.tell()
            if opened.tell() > file.size:
                return


def unreachable(url: str, error: httpx2.HTTPError) -> ModelError:
    with suppress(AttributeError, RuntimeError):  # it may have been redirected
        url = str(error.request.url)
    host = re.sub(r"^\w+://(?:[^/@]*@)?([^/:]+).*$", r"\1", url)
    return ModelError(
        f"{host} cannot be reached: {str(error) or type(error).__name__}",
        f"check the network; proxies and mirrors stand in {NETWORK_FILE}, see aios-model(7)",
    )

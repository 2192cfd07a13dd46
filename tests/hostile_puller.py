"""A puller that was taken over: what it does is in HOSTILE."""

from __future__ import annotations

import os
import socket
import sys
import time

from aiosd.cores.wire import Channel
from aiosd.modelstore.messages import (
    TO_PULLER,
    AllGot,
    Fetch,
    FilesFound,
    GotFile,
    HandFile,
    ModelFacts,
    PullFailed,
    PullProgress,
    WantFile,
)

FILE = {"name": "m.gguf", "size": 10, "digest": "", "mark": "m", "temporary": False}


def main() -> None:
    channel = Channel(socket.socket(fileno=int(sys.argv[2])), TO_PULLER)
    assert isinstance(channel.receive(), Fetch)
    what = os.environ["HOSTILE"]
    if what == "a name with a slash":
        channel.send(FilesFound([{**FILE, "name": "../../escaped.gguf"}], "", ""))
    elif what == "another type":
        channel.send(FilesFound([{**FILE, "size": "10"}], "", ""))
    elif what == "a digest with a slash":
        channel.send(FilesFound([{**FILE, "digest": "../../manifests/m.json"}], "", ""))
    elif what == "half a surrogate pair":
        channel.send(PullFailed("\ud800 reason", "\udfff hint"))
    elif what == "a file that was not found":
        channel.send(WantFile("m.gguf"))
    elif what == "facts before files":
        channel.send(ModelFacts({"architecture": "x"}))
    else:
        channel.send(FilesFound([FILE], "", ""))
        channel.send(WantFile("m.gguf"))
        assert isinstance(channel.receive(), HandFile)
        file = channel.take_file()
        assert file is not None
        if what == "endless":
            os.truncate(file, 1 << 30)
            time.sleep(60)
        os.write(file, b"0123456789")
        if what == "half":
            os.truncate(file, 5)
        channel.send(PullProgress("m.gguf", 10))
        channel.send(GotFile("m.gguf"))
        channel.send(AllGot())
        if what == "a change after the end":
            channel.receive()
            channel.send(ModelFacts({"architecture": "x", "parameters": "many"}))
            while True:
                os.pwrite(file, b"changed!!!", 0)
    channel.receive()
    time.sleep(60)


main()

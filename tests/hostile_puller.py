"""A puller that was taken over: what it does is in HOSTILE."""

from __future__ import annotations

import os
import socket
import sys
import time

from aiosd.cores.wire import Channel
from aiosd.modelstore.messages import TO_PULLER, All, Facts, Fetch, Found, Got, Hand, Progress, Want

FILE = {"name": "m.gguf", "size": 10, "digest": "", "mark": "m", "temporary": False}


def main() -> None:
    channel = Channel(socket.socket(fileno=int(sys.argv[2])), TO_PULLER)
    assert isinstance(channel.receive(), Fetch)
    what = os.environ["HOSTILE"]
    if what == "a name with a slash":
        channel.send(Found([{**FILE, "name": "../../escaped.gguf"}], "", ""))
    elif what == "another type":
        channel.send(Found([{**FILE, "size": "10"}], "", ""))
    elif what == "a file that was not found":
        channel.send(Want("m.gguf"))
    elif what == "facts before files":
        channel.send(Facts({"architecture": "x"}))
    else:
        channel.send(Found([FILE], "", ""))
        channel.send(Want("m.gguf"))
        assert isinstance(channel.receive(), Hand)
        file = channel.take_file()
        assert file is not None
        if what == "endless":
            os.truncate(file, 1 << 30)
            time.sleep(60)
        os.write(file, b"0123456789")
        if what == "half":
            os.truncate(file, 5)
        channel.send(Progress("m.gguf", 10))
        channel.send(Got("m.gguf"))
        channel.send(All())
        if what == "a change after the end":
            channel.receive()
            channel.send(Facts({"architecture": "x", "parameters": "many"}))
            while True:
                os.pwrite(file, b"changed!!!", 0)
    channel.receive()
    time.sleep(60)


main()

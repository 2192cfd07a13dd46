"""A daemon that was taken over: it connects to aios-privileged and says what it is told. Needs only Python.

    attacker.py SOCKET [TARGET]

Each line of its input is {"say": {…}}, with "file" a path that goes along, or "memfd" text that goes along
sealed. What comes back is printed, a line each. It serves the tree: a folder with `access`, `tools` and
`file`, which anybody may write. With TARGET, `tools` is a link to there at every other look.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import stat
import struct
import sys
import threading
from contextlib import suppress
from typing import Any

SEALS = 0xF  # seal, shrink, grow, write
HEADER = struct.Struct("<IIQQIIII")  # of fuse_kernel.h, as all below
LOOKUP, FORGET, GETATTR, SETATTR, READLINK, OPEN, WRITE, STATFS, RELEASE = 1, 2, 3, 4, 5, 14, 16, 17, 18
INIT, OPENDIR, RELEASEDIR, INTERRUPT, BATCH_FORGET = 26, 27, 29, 36, 42
SILENT = (FORGET, INTERRUPT, BATCH_FORGET)
FOLDER, LINK, FILE = stat.S_IFDIR | 0o755, stat.S_IFLNK | 0o777, stat.S_IFREG | 0o666
ROOT, TOOLS, LINKED = 1, 2, 5


class Tree:
    def __init__(self, target: str) -> None:
        self._target = target
        self._looks = 0
        self._modes = {ROOT: FOLDER, TOOLS: FOLDER, 3: FOLDER, 4: FILE, LINKED: LINK}
        self._names = {b"tools": TOOLS, b"access": 3, b"file": 4}

    def serve(self, fuse: int) -> None:
        while data := read(fuse):
            _, operation, unique, node, *_ = HEADER.unpack_from(data)
            if operation in SILENT:
                continue
            try:
                answer, failed = self._answer(operation, node, data[HEADER.size :]), 0
            except OSError as error:
                answer, failed = b"", -(error.errno or errno.EIO)
            os.write(fuse, struct.pack("<IiQ", 16 + len(answer), failed, unique) + answer)

    def _answer(self, operation: int, node: int, body: bytes) -> bytes:
        if operation == INIT:
            return struct.pack("<IIIIHHIIHHI28x", 7, 31, 1 << 16, 0, 12, 9, 1 << 16, 1, 0, 0, 0)
        if operation == LOOKUP:
            name = body.rstrip(b"\0")
            if name not in self._names:
                raise OSError(errno.ENOENT, "")
            found = self._names[name]
            if found == TOOLS and self._target:
                self._looks += 1
                found = LINKED if self._looks % 2 else TOOLS
            return struct.pack("<QQQQII", found, 1, 0, 0, 0, 0) + self._attributes(found)
        if operation in (GETATTR, SETATTR):
            return struct.pack("<QII", 0, 0, 0) + self._attributes(node)
        if operation == READLINK:
            return self._target.encode()
        if operation in (OPEN, OPENDIR):
            return struct.pack("<QII", 1, 1, 0)
        if operation == WRITE:
            return struct.pack("<II", struct.unpack_from("<QQI", body)[2], 0)
        if operation == STATFS:
            return bytes(80)
        if operation in (RELEASE, RELEASEDIR):
            return b""
        raise OSError(errno.ENOSYS, "")

    def _attributes(self, node: int) -> bytes:
        return struct.pack("<6Q10I", node, 0, 0, 0, 0, 0, 0, 0, 0, self._modes[node], 1, 0, 0, 0, 4096, 0)


def read(fuse: int) -> bytes:
    """A request; none when the tree was unmounted."""
    try:
        return os.read(fuse, 1 << 20)
    except OSError:
        return b""


def say(sock: socket.socket, line: dict[str, Any]) -> None:
    text = line["say"]
    body = text.encode() if isinstance(text, str) else json.dumps(text).encode()
    files = [os.open(line["file"], os.O_RDONLY)] if "file" in line else []
    if "memfd" in line:
        files = [os.memfd_create("program", os.MFD_ALLOW_SEALING)]
        os.write(files[0], line["memfd"].encode())
        fcntl.fcntl(files[0], fcntl.F_ADD_SEALS, SEALS)
    frame = struct.pack("<I", len(body)) + body
    if files:
        socket.send_fds(sock, [frame[:1]], files * line.get("times", 1))
        frame = frame[1:]
    sock.sendall(frame)


def hear(sock: socket.socket, target: str) -> None:
    buffer = bytearray()
    while True:
        try:
            data, files, _, _ = socket.recv_fds(sock, 1 << 16, 4)
        except ConnectionResetError:  # with something of ours unread
            data = b""
        if not data:
            print(json.dumps({"is": "End"}), flush=True)
            return
        for fuse in files:
            threading.Thread(target=Tree(target).serve, args=(fuse,), daemon=True).start()
        buffer += data
        while len(buffer) >= 4 and len(buffer) >= (size := 4 + struct.unpack_from("<I", buffer)[0]):
            print(bytes(buffer[4:size]).decode(), flush=True)
            del buffer[:size]


def main() -> None:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(sys.argv[1])
    target = sys.argv[2] if len(sys.argv) > 2 else ""
    threading.Thread(target=hear, args=(sock, target), daemon=True).start()
    for line in sys.stdin:
        with suppress(BrokenPipeError, ConnectionResetError):
            say(sock, json.loads(line))


if __name__ == "__main__":
    main()

"""A user's session: this process becomes the user and does the front's calls on the tree with his rights.

Systemd starts it as root for each connection of the front to aios-session.socket: its standard input. It does
not believe the front who the user is: it looks itself at the key, or at the user's own connection. So a front
that was taken over can act only as those who came to it. The main thread reads the calls. Others do them,
because a call may block.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import json
import os
import pwd
import re
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from aiosd.client import Files, explained, patiently
from aiosd.gateway import keys, wire
from aiosd.gateway.wire import Head

THREADS = 8
CALLS_MOST = 32  # taken and not answered
PATH_MOST = 512  # bytes
READ_MOST = 8 << 20  # bytes of a file
FIRST = 65536  # bytes of an answer that are there at once
UCRED = struct.Struct("iII")  # pid, uid, gid
PR_SET_NO_NEW_PRIVS = 38
LIBC = ctypes.CDLL(None, use_errno=True)

Done = tuple[Head, bytes, int | None]  # what an operation answers: facts, bytes, a descriptor


LIFE_S = 300.0  # then the front has to show a key or a connection again
FOR_ALL = ("list agents", "list models")  # what a key of one agent may do beside using the agent
FACTS = re.compile(r"models/[^/]+/info\.json")


class Unknown(Exception):
    """This is nobody as whom the session may act. The message is for him."""


def user_of(connection: int, address: str) -> int:
    """The uid at the other end of an accepted connection to the gateway's own socket.

    Who connects to a listener gets a socket whose peer is the listener, and in a mount namespace of his own
    he can bind it to the gateway's address before. But a listener has a name, and a client of HTTP has none.
    """
    with socket.socket(fileno=connection) as sock:
        look = select.poll()
        look.register(sock, select.POLLHUP)
        if look.poll(0):
            raise Unknown("who made this connection has gone")
        if sock.family != socket.AF_UNIX or sock.getsockname() != address or sock.getpeername():
            raise Unknown("this is no connection to the gateway's socket")
        _, uid, _ = UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))
    return int(uid)


def become(uid: int) -> None:
    """For ever: this process has no other identity and no capability afterwards."""
    if uid == 0:
        raise Unknown("the gateway never acts as root: use the files, or a user's account")
    try:
        account = pwd.getpwuid(uid)
    except KeyError:
        raise Unknown(f"uid {uid} has no account on this machine") from None
    os.initgroups(account.pw_name, account.pw_gid)
    os.setresgid(account.pw_gid, account.pw_gid, account.pw_gid)
    os.setresuid(uid, uid, uid)
    if LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs")
    os.umask(0o077)
    os.chdir("/")


class Forbidden(PermissionError):
    """The key may not do this, though its user may."""


class UserSession:
    def __init__(self, sock: socket.socket, root: Path, address: str) -> None:
        self._sock, self._root, self._address = sock, root, address
        self._messages = wire.Messages()
        self._agent, self._until_s = "", 0.0
        self._answering = threading.Lock()
        self._room = threading.Semaphore(CALLS_MOST)
        self._operations: dict[str, Callable[[Path, bytes], Done]] = {
            "ask": ask, "read": read, "list": entries, "write": write, "mkdir": make, "rmdir": remove,
            "stat": stat_of,
        }  # fmt: skip

    def run(self) -> None:
        """Until the front closes the connection."""
        known = False
        with ThreadPoolExecutor(THREADS) as threads:
            while received := self._receive():
                data, files = received
                for head, body in self._messages.add(data):
                    if known:
                        self._room.acquire()
                        threads.submit(self._do, head, body)
                    elif not (known := self._begin(head, files)):
                        return
                for file in files:
                    os.close(file)

    def _receive(self) -> tuple[bytes, list[int]] | None:
        data, files, _, _ = socket.recv_fds(self._sock, wire.RECEIVED, 1, socket.MSG_CMSG_CLOEXEC)
        return (data, files) if data else None

    def _begin(self, head: Head, files: list[int]) -> bool:
        """Become the user, or say why not."""
        try:
            if files:
                uid = user_of(files.pop(), self._address)
            else:
                key = keys.check(self._root, str(head.get("key", "")))
                uid, self._agent = key.uid, key.agent
            become(uid)
            self._until_s = time.monotonic() + LIFE_S
        except Unknown as error:
            self._answer({"errno": errno.EACCES, "reason": str(error)})
            return False
        except (OSError, ValueError, KeyError) as error:
            self._answer(
                {"errno": getattr(error, "errno", None) or errno.EACCES, "reason": f"the key: {error}"}
            )
            return False
        print(f"acts for the user with uid {uid}", file=sys.stderr)
        self._answer({"uid": uid})
        return True

    def _do(self, head: Head, body: bytes) -> None:
        files, path = Files(self._root, verbose=False), self._root
        try:
            path = inside(self._root, str(head.get("path", "")))
            self._permit(str(head.get("op")), str(head["path"]), body)
            facts, data, file = self._operations[str(head.get("op"))](path, body)
        except Forbidden as error:
            self._answer({"n": head.get("n"), "errno": error.errno, "reason": error.strerror})
        except OSError as error:
            error.filename = error.filename or str(path)
            if error.errno in (errno.ENOENT, errno.EROFS) and not keys.runs(self._root):
                error = OSError(errno.ESHUTDOWN, keys.STOPPED)
            self._answer({"n": head.get("n"), "errno": error.errno, "reason": explained(files, error)})
        except KeyError:
            self._answer({"n": head.get("n"), "errno": errno.ENOSYS, "reason": "there is no such operation"})
        else:
            self._answer({"n": head.get("n"), **facts}, data, file)
        finally:
            self._room.release()

    def _permit(self, operation: str, path: str, body: bytes) -> None:
        """The front is not believed that it keeps to a key's agent, or ends in time. Raises OSError."""
        if time.monotonic() > self._until_s:
            raise OSError(errno.ESHUTDOWN, "this session is over")
        if not self._agent:
            return
        own, looks = f"agents/{self._agent}", operation in ("read", "list", "stat")
        if looks and (path == own or path.startswith(own + "/")):
            return
        if operation in ("ask", "write") and path.startswith(f"{own}/syscall/"):
            self._keep_to_agent(path, body)
        elif f"{operation} {path}" not in FOR_ALL and not (operation == "read" and FACTS.fullmatch(path)):
            raise Forbidden(errno.EACCES, f"this key may use only agent {self._agent}")

    def _keep_to_agent(self, path: str, body: bytes) -> None:
        """A request to the agent may name other things that its user may use. Raises OSError."""
        try:
            asked = json.loads(body.decode())
        except (ValueError, RecursionError):
            asked = None
        if not isinstance(asked, dict):
            raise OSError(errno.EINVAL, "a request with this key is a JSON object")
        for key in ("context", "model"):
            if asked.get(key):
                raise Forbidden(errno.EACCES, f"this key may use only its agent's {key}: leave {key} out")
        if Path(path).name == "tool":
            tools = self._root / f"agents/{self._agent}/tools"
            if asked.get("name") not in read(tools, b"")[1].decode().split():
                raise Forbidden(errno.EACCES, f"this key may use only what is in agents/{self._agent}/tools")

    def _answer(self, head: Head, body: bytes = b"", file: int | None = None) -> None:
        with (
            self._answering,
            suppress(BrokenPipeError, ConnectionResetError),
        ):  # the front is gone
            try:
                message = memoryview(wire.packed(head | {"file": file is not None}, body))
                sent = socket.send_fds(self._sock, [message], [] if file is None else [file])
                self._sock.sendall(message[sent:])
            finally:
                if file is not None:
                    os.close(file)


def inside(root: Path, path: str) -> Path:
    """A path of the tree. The user's own rights decide the rest."""
    size = len(path.encode("utf-8", "replace"))
    if not 0 < size <= PATH_MOST or path.startswith("/") or not path.isprintable():
        raise OSError(errno.EINVAL, "this is no path of the tree")
    if ".." in path.split("/"):
        raise OSError(errno.EINVAL, "a path may not have ..")
    return root / path


def ask(path: Path, body: bytes) -> Done:
    """Write a request to a transaction of its own. Give its descriptor, and what there is of the answer.

    The first look at it puts the request into the queue. This may take a while, and may be refused.
    """
    file = patiently(lambda: begun(path, body))
    try:
        poll = select.poll()
        poll.register(file, select.POLLIN)
        first = os.read(file, FIRST) if poll.poll(0) else b""
    except BaseException:
        os.close(file)
        raise
    return {}, first, file


def begun(path: Path, body: bytes) -> int:
    file = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    try:
        put(file, body)
    except BaseException:
        os.close(file)
        raise
    return file


def put(file: int, body: bytes) -> None:
    left = memoryview(body)
    while left:
        left = left[os.write(file, left) :]


def read(path: Path, _: bytes) -> Done:
    file = patiently(lambda: os.open(path, os.O_RDONLY | os.O_NONBLOCK))
    with open(file, "rb", buffering=0) as opened:
        parts, left = [], READ_MOST
        while left and (part := opened.read(min(left, FIRST))):
            parts.append(part)
            left -= len(part)
    return {}, b"".join(parts), None


def write(path: Path, body: bytes) -> Done:
    def whole() -> None:
        file = os.open(path, os.O_WRONLY)
        try:
            put(file, body)
        finally:
            os.close(file)

    patiently(whole)
    return {}, b"", None


def entries(path: Path, _: bytes) -> Done:
    """What is in a folder: the name, whether the user may enter it, and of whom and when it is."""
    found = []
    for name in sorted(patiently(lambda: os.listdir(path))):
        with suppress(OSError):  # it went meanwhile
            status = os.stat(path / name, follow_symlinks=False)
            open_ = os.access(path / name, os.X_OK)
            found.append(
                {"name": name, "open": open_, "uid": status.st_uid, "changed_s": int(status.st_mtime)}
            )
    return {}, json.dumps(found).encode(), None


def make(path: Path, _: bytes) -> Done:
    patiently(lambda: os.mkdir(path, 0o700))
    return {}, b"", None


def remove(path: Path, _: bytes) -> Done:
    patiently(lambda: os.rmdir(path))
    return {}, b"", None


def stat_of(path: Path, _: bytes) -> Done:
    status = patiently(lambda: os.stat(path, follow_symlinks=False))
    return {"mode": status.st_mode, "uid": status.st_uid, "gid": status.st_gid}, b"", None


def main() -> None:
    parser = argparse.ArgumentParser("aios-session", description="Serves one user of aios-gateway(8).")
    parser.add_argument("--root", type=Path, default=Path("/aios"))
    parser.add_argument(
        "--address", default="/run/aios-gateway/gateway.sock", help="the gateway's own socket"
    )
    given = parser.parse_args()
    with socket.socket(fileno=0) as sock, suppress(ConnectionResetError, wire.Malformed):
        UserSession(sock, given.root, given.address).run()


if __name__ == "__main__":
    main()

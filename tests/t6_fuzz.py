"""Fuzz raw system calls as three users at once. Afterwards the daemon works and leaks nothing.

In the suite 20,000 calls; for longer: .venv/bin/python -m tests.t6_fuzz --calls 1000000
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import fcntl
import json
import mmap
import os
import random
import select
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import random_model
from tests.running import REPOSITORY, Daemon, wait_until

pytestmark = [pytest.mark.mount, pytest.mark.root]
USERS = (62001, 62002, 62003)
CONFIG = """
[quota]
agents = 30
contexts = 30
queued_requests = 60
open_files = 60
pending_bytes = 4000000
"""
FIXED = [
    "README",
    "version",
    "status",
    "metrics",
    "events.jsonl",
    "models",
    "models/random",
    "models/random/llm",
    "models/random/ctl",
    "models/random/info.json",
    "workers/0/ctl",
    "workers/0/stats",
    "scheduler",
    "scheduler/policy",
    "scheduler/quantum",
    "scheduler/queue",
    "scheduler/trace.json",
    "tools/calc/call",
    "tools/calc/schema.json",
    "tools/shell/call",
    "access/pending",
    "access/audit.jsonl",
    "agents",
    "contexts",
    "..",
    "agents/../..",
    "nothing",
    ".",
]
OF_AGENT = [
    ".",
    "ctl",
    "state",
    "model",
    "context",
    "nice",
    "system",
    "params.json",
    "usage",
    "log.jsonl",
    "syscall",
    "syscall/llm",
    "syscall/llm",
    "syscall/tool",
    "tools",
    "max_steps",
    "requests",
    "requests/new",
    "requests/latest",
    "requests/latest/response",
    "requests/latest/state",
    "requests/latest/ctl",
    "requests/1",
    "requests/99999999999999999999/state",
]
OF_CONTEXT = [".", "messages.jsonl", "tokens", "state", "model", "note", "ctl", "kv", "kv"]
LINES = r"""hello|{"prompt":"x","max_tokens":2}|{"prompt":"x","max_tokens":2,"context":"cx1"}|[]||
pause|resume|reset|
cancel all|evict|evict disk|fork cx2|truncate 0|pin|cx1|cy1|cz1|5|-20|random|{"role":"user","content":"hi"}|
{"max_tokens":1}|fifo|../../etc/passwd|calc shell|{"name":"calc","arguments":{"expression":"1+1"}}|
{"expression":"2*3"}|{"name":"shell","arguments":{"command":"id"}}|{"command":"id"}"""
WORDS = [line.strip("\n").encode() + b"\n" for line in LINES.split("|")]
WORDS += [b"", b"{", b'{"prompt":"x","max_tokens":2}', b"\0" * 100, b"\xff\xfe", b"x" * 70_000]
FLAGS = (os.O_NONBLOCK, os.O_APPEND, os.O_TRUNC, os.O_CREAT, os.O_EXCL, os.O_DIRECTORY, os.O_SYNC)
CALL_S = 2.0  # no call may take longer; an alarm interrupts waiting calls


class Slow(Exception):
    pass


class User:
    """One process with one uid, which makes random system calls."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.rng, self.me = root, random.Random(seed), "xyz"[seed % 3]
        self.fds: list[int] = []
        self.errors: Counter[str] = Counter()
        self.slowest = 0.0
        names = [name for name in dir(self) if name.startswith("do_")]
        self.calls: list[Callable[[], Any]] = [getattr(self, name) for name in names]
        self.libc = ctypes.CDLL(None, use_errno=True)

    def path(self) -> str:
        r = self.rng
        kind = r.random()
        if kind < 0.5:
            tail = f"agents/a{self.number()}/{r.choice(OF_AGENT)}"
        elif kind < 0.75:
            tail = f"contexts/c{self.number()}/{r.choice(OF_CONTEXT)}"
        elif kind < 0.95:
            tail = r.choice(FIXED)
        else:
            tail = "".join(chr(r.choice([47, 46, 97, 0x20AC, 10, 92])) for _ in range(r.randrange(300)))
        return str(self.root / tail.lstrip("/"))

    def number(self) -> str:
        """Choose a path, mostly of the process's own objects."""
        return f"{self.me if self.rng.random() < 0.8 else self.rng.choice('xyz')}{self.rng.randrange(3)}"

    def fd(self) -> int:
        if not self.fds or self.rng.random() < 0.02:
            return self.rng.randrange(200, 400)  # a descriptor that is not open
        return self.rng.choice(self.fds)

    def data(self) -> bytes:
        if self.rng.random() < 0.1:
            return self.rng.randbytes(self.rng.randrange(3000))
        return self.rng.choice(WORDS)

    def do_open(self) -> None:
        flags = self.rng.choice((os.O_RDONLY, os.O_WRONLY, os.O_RDWR))
        for flag in (
            os.O_NONBLOCK,
            os.O_APPEND,
            os.O_TRUNC,
            os.O_CREAT,
            os.O_EXCL,
            os.O_DIRECTORY,
            os.O_SYNC,
        ):
            flags |= flag if self.rng.random() < 0.2 else 0
        self.fds.append(os.open(self.path(), flags | os.O_CLOEXEC, 0o600))

    do_open2 = do_open3 = do_open4 = do_open

    def do_close(self) -> None:
        fd = self.fd()
        if fd in self.fds:
            self.fds.remove(fd)
        os.close(fd)

    do_close2 = do_close3 = do_close

    def do_write(self) -> None:
        os.write(self.fd(), self.data())

    do_write2 = do_write3 = do_write

    def do_whole(self) -> None:
        """Use a whole file, which reaches more code than single calls."""
        with open(self.path(), "wb", buffering=0) as file:
            file.write(self.data())

    do_whole2 = do_whole3 = do_whole

    def do_read(self) -> None:
        os.read(self.fd(), self.rng.choice((0, 1, 100, 1 << 20)))

    do_read2 = do_read

    def do_pread(self) -> None:
        os.pread(self.fd(), 100, self.rng.choice((0, 5, 1 << 31, (1 << 63) - 200)))

    def do_pwrite(self) -> None:
        os.pwrite(self.fd(), self.data(), self.rng.choice((0, 5, 1 << 31, (1 << 63) - 80_000)))

    def do_lseek(self) -> None:
        os.lseek(self.fd(), self.rng.choice((-1, 0, 7, 1 << 62)), self.rng.randrange(5))

    def do_truncate(self) -> None:
        os.truncate(self.path(), self.rng.choice((0, 1, 1 << 40)))

    def do_ftruncate(self) -> None:
        os.ftruncate(self.fd(), self.rng.choice((0, 1, 1 << 40)))

    def do_mkdir(self) -> None:
        kind = self.rng.choice(("agents/a", "contexts/c", "models/m"))
        os.mkdir(self.root / f"{kind}{self.number()}", self.rng.choice((0o700, 0o700, 0o7777, 0)))

    do_mkdir2 = do_mkdir

    def do_mkdir_anywhere(self) -> None:
        os.mkdir(self.path())

    def do_rmdir(self) -> None:
        os.rmdir(self.path())

    def do_unlink(self) -> None:
        os.unlink(self.path())

    def do_rename(self) -> None:
        os.rename(self.path(), self.path())

    def do_link(self) -> None:
        os.link(self.path(), self.path())

    def do_symlink(self) -> None:
        os.symlink("/etc/passwd", self.path())

    def do_mknod(self) -> None:
        os.mknod(self.path(), self.rng.choice((stat.S_IFREG, stat.S_IFIFO, stat.S_IFCHR)) | 0o600)

    def do_chmod(self) -> None:
        os.chmod(self.path(), self.rng.randrange(0o10000))

    def do_chown(self) -> None:
        os.chown(self.path(), self.rng.choice((-1, 0, *USERS)), self.rng.choice((-1, *USERS)))

    def do_utime(self) -> None:
        os.utime(self.path(), None)

    def do_stat(self) -> None:
        os.stat(self.path())

    def do_fstat(self) -> None:
        os.fstat(self.fd())

    def do_statvfs(self) -> None:
        os.statvfs(self.path())

    def do_access(self) -> None:
        os.access(self.path(), self.rng.randrange(8))

    def do_list(self) -> None:
        os.listdir(self.path())

    def do_readlink(self) -> None:
        os.readlink(self.path())

    def do_xattrs(self) -> None:
        name = self.rng.choice(("user.x", "security.capability", "system.posix_acl_access", "trusted.y"))
        self.rng.choice(
            (
                lambda p: os.getxattr(p, name),
                lambda p: os.setxattr(p, name, self.data()[:1000]),
                os.listxattr,
                lambda p: os.removexattr(p, name),
            )
        )(self.path())

    def do_ioctl(self) -> None:
        """Make an ioctl. The kernel writes as many bytes as the command's number says."""
        fcntl.ioctl(self.fd(), self.rng.getrandbits(32), bytearray(1 << 14), True)

    def do_fcntl(self) -> None:
        fcntl.fcntl(self.fd(), fcntl.F_SETFL, self.rng.choice((0, os.O_NONBLOCK, os.O_APPEND)))

    def do_lock(self) -> None:
        fcntl.flock(self.fd(), self.rng.choice((fcntl.LOCK_SH, fcntl.LOCK_EX, fcntl.LOCK_UN)) | fcntl.LOCK_NB)

    def do_posix_lock(self) -> None:
        fcntl.lockf(self.fd(), self.rng.choice((fcntl.LOCK_SH, fcntl.LOCK_UN)) | fcntl.LOCK_NB, 10)

    def do_mmap(self) -> None:
        with suppress(ValueError):
            mmap.mmap(self.fd(), 4096, mmap.MAP_SHARED, mmap.PROT_READ).close()

    def do_fallocate(self) -> None:
        os.posix_fallocate(self.fd(), 0, 1 << 20)

    def do_fsync(self) -> None:
        os.fsync(self.fd())

    def do_sendfile(self) -> None:
        os.sendfile(self.fd(), self.fd(), 0, 1000)

    def do_copy_range(self) -> None:
        os.copy_file_range(self.fd(), self.fd(), 1000)

    def do_dup(self) -> None:
        self.fds.append(os.dup(self.fd()))

    def do_poll(self) -> None:
        poll = select.poll()
        poll.register(self.fd(), select.POLLIN | select.POLLOUT)
        poll.poll(1)

    def do_epoll(self) -> None:
        with select.epoll() as epoll:
            epoll.register(self.fd(), select.EPOLLIN)
            epoll.poll(0.001)

    def do_fork(self) -> None:
        if self.rng.random() < 0.1:
            pid = os.fork()
            if pid == 0:  # the child does not inherit the alarm
                os._exit(0)  # closes its copies of all descriptors
            os.waitpid(pid, 0)

    def run(self, calls: int) -> None:
        armed = False

        def alarm(*_: object) -> None:
            if armed:
                raise Slow

        signal.signal(signal.SIGALRM, alarm)
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)  # interrupts a waiting call
        for _ in range(calls):
            if len(self.fds) > 40:
                os.close(self.fds.pop(0))
            call = self.rng.choice(self.calls)
            began = time.monotonic()
            try:
                try:
                    armed = True
                    call()
                finally:
                    armed = False
            except Slow:
                self.errors["EINTR"] += 1
            except OSError as error:
                self.errors[errno.errorcode.get(error.errno or 0, "?")] += 1
            except (ValueError, OverflowError):  # Python's own refusal
                self.errors["python"] += 1
            self.slowest = max(self.slowest, time.monotonic() - began)
        signal.setitimer(signal.ITIMER_REAL, 0)


def state_of(daemon: Daemon) -> dict[str, int]:
    assert daemon.process is not None
    process = psutil.Process(daemon.process.pid)
    return {"fds": process.num_fds(), "threads": process.num_threads()}


def fuzz(folder: Path, model: Path, calls: int, seed: int) -> dict[str, Any]:
    daemon = Daemon(folder, model, CONFIG).start()
    try:
        for path in (*[folder.parents[i] for i in range(3)], folder):
            path.chmod(0o755)
        warm = "agents/warm/syscall/llm"
        daemon.sh(f"mkdir agents/warm; echo hi > {warm}; cat {warm}; rmdir agents/warm")
        before = state_of(daemon)
        walk = [sys.executable, "-m", "tests.t6_fuzz", "--walk", daemon.root, "--calls", calls // len(USERS)]
        users = [
            subprocess.Popen(
                [str(word) for word in (*walk, "--uid", uid, "--seed", seed + i)],
                cwd=REPOSITORY, stdout=subprocess.PIPE,
            )
            for i, uid in enumerate(USERS)
        ]  # fmt: skip
        told = [json.loads(user.communicate(timeout=60 + calls / 100)[0]) for user in users]
        assert [user.returncode for user in users] == [0] * len(USERS)
        for agent in (daemon.root / "agents").iterdir():
            daemon.write(f"agents/{agent.name}/ctl", "cancel all")
        for waiting in (daemon.root / "access/pending").iterdir():  # waiting calls of `shell`
            with suppress(OSError):  # it was decided meanwhile
                daemon.write(f"access/pending/{waiting.name}/decision", "deny")
        wait_until(lambda: daemon.read("scheduler/queue").count("\n") == 1, "the queue to be empty", 60)
        for kind in ("agents", "contexts"):
            for thing in (daemon.root / kind).iterdir():
                assert sorted(os.listdir(thing))
                thing.rmdir()
            assert os.listdir(daemon.root / kind) == []
        wait_until(lambda: state_of(daemon)["fds"] <= before["fds"] + 2, "descriptors to be given back")
        daemon.sh("mkdir agents/last; echo hi > agents/last/syscall/llm")
        assert daemon.sh("cat agents/last/syscall/llm").returncode == 0
        after = state_of(daemon)
        assert daemon.stop() == 0
        log = daemon.log.read_text()
        assert "Traceback" not in log, log[-5000:]
        return {"before": before, "after": after, "users": told}
    finally:
        daemon.clean()


def test_twenty_thousand_calls_leave_the_daemon_whole(tmp_path: Path, random_llama: Path) -> None:
    result = fuzz(tmp_path, random_llama, 20_000, seed=1)
    for user in result["users"]:
        assert user["slowest_s"] < CALL_S
        assert "EIO" not in user["errors"] or user["errors"]["EIO"] < 50, "only failed requests are EIO"
        assert len(user["errors"]) > 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--walk", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--uid", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.walk:
        os.setgroups([])
        os.setresgid(*[options.uid] * 3)
        os.setresuid(*[options.uid] * 3)
        user = User(options.walk, options.seed)
        user.run(options.calls)
        print(json.dumps({"slowest_s": user.slowest, "errors": user.errors}))
        return
    with tempfile.TemporaryDirectory() as scratch:
        model = random_model.make(Path(scratch) / "random")
        print(json.dumps(fuzz(Path(scratch) / "fuzz", model, options.calls, options.seed), indent=1))


if __name__ == "__main__":
    main()

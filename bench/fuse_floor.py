"""The lower bound for bench.fs: fusepy alone, with the least work that a file system can do.

`python -m bench.fuse_floor MOUNT [least]` serves /status, which is one line, and /agents/a/syscall/llm, which
returns the bytes written to the open file. It checks, stores, schedules and waits for nothing. With `least`,
libfuse tells the kernel which calls do not exist, so the kernel does not send them. Without it, fusepy
answers these calls.

`python -m bench.fuse_floor MOUNT MODEL` lets a worker process of aiosd answer with one token. The reading
thread asks the worker and waits: the lower bound of a transaction with a model. /status is then the median
time from the order to the answer, in seconds.
"""

from __future__ import annotations

import errno
import itertools
import stat
import statistics
import sys
import time
from typing import Any

import fuse

from aiosd.config.config import EngineConfig
from aiosd.cores import wire
from aiosd.cores.launch import Child
from aiosd.syscall.sampling import Sampling

FOLDERS = ("/", "/agents", "/agents/a", "/agents/a/syscall")
FILES = ("/status", "/agents/a/syscall/llm")


class Floor(fuse.Operations):  # type: ignore[misc]  # untyped
    use_ns = True

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._open: dict[int, bytes] = {}

    def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
        if path in FOLDERS:
            return {"st_mode": stat.S_IFDIR | 0o755, "st_nlink": 2}
        if path in FILES:
            return {"st_mode": stat.S_IFREG | 0o666, "st_nlink": 1}
        raise fuse.FuseOSError(errno.ENOENT)

    def open(self, path: str, info: Any) -> int:
        info.fh = next(self._numbers)
        info.direct_io = 1
        self._open[info.fh] = b"state running\n"
        return 0

    def write(self, path: str, data: bytes, offset: int, info: Any) -> int:
        self._open[info.fh] = data
        return len(data)

    def read(self, path: str, size: int, offset: int, info: Any) -> bytes:
        data, self._open[info.fh] = self._open[info.fh], b""
        return data

    def release(self, path: str, info: Any) -> int:
        del self._open[info.fh]
        return 0


class Least(Floor):
    """Without these calls. flush is missing too, which aiosd has."""

    flush = getxattr = listxattr = opendir = releasedir = access = None


class Worked(Floor):
    """Serves one client at a time."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self._asked = 0  # the open file that was written and not read yet
        self._took: list[float] = []
        self._sampling = wire.plain(Sampling(max_tokens=1))
        self._channel = Child(0, {}, ()).connect()
        e = EngineConfig()
        self._channel.send(
            wire.Load(
                model, "cpu", 1.0, "", [], e.dtype, e.kv_bytes, e.max_running, e.prefill_tokens, e.threads,
                e.deterministic, e.quantization,
            )
        )  # fmt: skip
        assert isinstance(self._channel.receive(), wire.Ready)

    def open(self, path: str, info: Any) -> int:
        super().open(path, info)
        if path == "/status":
            self._open[info.fh] = b"%f\n" % statistics.median(self._took or [0])
        return 0

    def write(self, path: str, data: bytes, offset: int, info: Any) -> int:
        self._asked = info.fh
        return super().write(path, data, offset, info)

    def read(self, path: str, size: int, offset: int, info: Any) -> bytes:
        data = super().read(path, size, offset, info)
        if self._asked != info.fh:
            return data
        self._asked = 0
        began = time.perf_counter()
        prompt = [{"role": "user", "content": data.decode()}]
        self._channel.send(wire.Submit(info.fh, prompt, [], [], self._sampling, "0", [], 0))
        while not isinstance(said := self._channel.receive(), wire.Step):
            pass
        self._took.append(time.perf_counter() - began)
        self._open[info.fh] = b""
        return said.outputs[0].text.encode() or b"?"


def made(kind: str) -> Floor:
    if kind == "least":
        return Least()
    return Worked(kind) if kind else Floor()


if __name__ == "__main__":
    floor = made("".join(sys.argv[2:]))
    fuse.FUSE(floor, sys.argv[1], foreground=True, raw_fi=True, allow_other=True, default_permissions=True)

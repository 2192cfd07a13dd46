"""The floor that bench.fs measures aiosd against: fusepy alone, with the least a file system can do.

`python -m bench.fuse_floor MOUNT [least]` serves /status, which reads as a line, and /agents/a/syscall/llm,
which gives back what was written to the open file. Nothing is checked, stored, scheduled or waited for. With
`least`, libfuse is told which calls there are not, and tells the kernel not to ask; else fusepy answers them.
"""

from __future__ import annotations

import errno
import itertools
import stat
import sys
from typing import Any

import fuse

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
    """flush too, which aiosd has."""

    flush = getxattr = listxattr = opendir = releasedir = access = None


if __name__ == "__main__":
    floor = Least() if sys.argv[2:] == ["least"] else Floor()
    fuse.FUSE(floor, sys.argv[1], foreground=True, raw_fi=True, allow_other=True, default_permissions=True)

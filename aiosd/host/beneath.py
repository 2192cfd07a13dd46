"""Opens files beneath a folder, and follows no link on the way.

A path that was checked may name another file when it is used; a descriptor does not change. openat2(2) is not
used, because systemd's RestrictSUIDSGID= refuses it to the daemon.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aiosd.host.ownership import check_owner

STEP = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def open_beneath(folder: int, path: str, flags: int) -> int:
    """A descriptor. Raises OSError: ELOOP or ENOTDIR for a link, EXDEV for a path that leads out."""
    *steps, name = path.split("/")
    if not name or any(step in ("", "..") for step in (*steps, name)):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), path)
    at = os.dup(folder)
    try:
        for step in steps:
            below = os.open(step, STEP, dir_fd=at)
            os.close(at)
            at = below
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
    finally:
        os.close(at)


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def open_owned(folder: Path, name: str) -> int:
    """A regular file in a folder that nobody else may change, nor the file. Raises OSError, ValueError."""
    with opened(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) as at:
        check_owner(folder, os.fstat(at))
        file = open_beneath(at, name, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for a writer
    status = os.fstat(file)
    try:
        check_owner(folder / name, status)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{folder / name} is no regular file")
    except ValueError:
        os.close(file)
        raise
    return file

"""openat2(2), which Python lacks: opens what lies beneath a folder, and follows no link on the way.

A path that is checked and then used again may mean another file by then; a descriptor stays what it was.
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aiosd.host.ownership import check_owner

SYS_OPENAT2 = 437  # on all architectures, as all system calls since Linux 5.1
NO_XDEV, NO_MAGICLINKS, NO_SYMLINKS, BENEATH = 0x01, 0x02, 0x04, 0x08
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
LIBC = ctypes.CDLL(None, use_errno=True)


class How(ctypes.Structure):
    """struct open_how"""

    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def open_beneath(folder: int, path: str, flags: int, resolve: int = 0) -> int:
    """A descriptor. Raises OSError: ELOOP for a link on the way, EXDEV for a path that leads out."""
    how = How(flags | os.O_CLOEXEC, 0, resolve | NO_MAGICLINKS | NO_SYMLINKS | BENEATH)
    name = os.fsencode(path)
    fd = LIBC.syscall(SYS_OPENAT2, folder, name, ctypes.byref(how), ctypes.c_size_t(ctypes.sizeof(how)))
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return int(fd)


@contextmanager
def opened(path: Path, flags: int = FOLDER) -> Iterator[int]:
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

"""Look into folders in which users may mount something, and never ask what is mounted there.

A file system of a user's may not answer. Nothing, not even SIGKILL, ends a process that waits for it, nor
the daemon while one of its threads waits. So a folder is entered by a descriptor of its place (O_PATH),
which asks nobody, and what is known without asking (AT_STATX_DONT_SYNC) says which mount it is on.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from typing import NamedTuple

from aiosd.host.mount import libc

AT_NO_AUTOMOUNT, AT_EMPTY_PATH, AT_STATX_DONT_SYNC = 0x800, 0x1000, 0x4000
AT_SYMLINK_NOFOLLOW = 0x100
FLAGS = AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT | AT_EMPTY_PATH | AT_STATX_DONT_SYNC
WANTED = 0x1 | 0x400 | 0x1000  # STATX_TYPE, STATX_BLOCKS, STATX_MNT_ID
PLACE = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class SomethingMounted(OSError):
    """A folder or file is on another mount than the folder above it."""

    def __init__(self, name: str) -> None:
        super().__init__(errno.EXDEV, "something is mounted there", name)


class Statx(ctypes.Structure):
    """struct statx of <linux/stat.h>, as far as it is used."""

    _fields_ = (
        ("ids", ctypes.c_uint32 * 7),
        ("mode", ctypes.c_uint16),
        ("inode", ctypes.c_uint64 * 2),
        ("blocks", ctypes.c_uint64),
        ("times", ctypes.c_uint64 * 9),
        ("device", ctypes.c_uint32 * 4),
        ("mount", ctypes.c_uint64),
        ("spare", ctypes.c_uint64 * 13),
    )


class Entry(NamedTuple):
    is_folder: bool
    disk_bytes: int
    mount: tuple[int, int, int]  # of its device and of the mount itself


def look(at: int, name: str = "") -> Entry:
    """What has that name in the folder, or the folder itself. Raises OSError."""
    found = Statx()
    if libc.statx(at, os.fsencode(name), FLAGS, WANTED, ctypes.byref(found)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)
    mount = (found.device[2], found.device[3], found.mount)
    return Entry(stat.S_ISDIR(found.mode), found.blocks * 512, mount)


def enter(at: int, name: str) -> int:
    """Open a folder in a folder. Raises SomethingMounted, OSError."""
    place = os.open(name, PLACE, dir_fd=at)
    try:
        if look(place).mount != look(at).mount:
            raise SomethingMounted(name)
        return os.open(".", FOLDER, dir_fd=place)  # what is mounted there from now on is not entered
    finally:
        os.close(place)

"""The tree as sandboxes see it. No path in the tree is looked up for a sandbox.

The daemon serves the tree, so it may answer a name in it with a link to anywhere. Therefore a sandbox binds
the tree as a whole. The mounts over `tools` and `access` are made by descriptor beforehand, in a mount
namespace of the thread that starts the sandboxes. The namespace ends with the thread.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from aiosd.errors import Denied, in_words
from aiosd.host.beneath import open_beneath
from aiosd.host.mount import EMPTY_PATH, MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_RDONLY, SYS_MOVE_MOUNT, check
from aiosd.host.proc import device_of

SYS_OPEN_TREE, SYS_MOUNT_SETATTR = 428, 442
OPEN_TREE_CLONE, AT_EMPTY_PATH = 1, 0x1000
TO_EMPTY_PATH = 0x40  # of move_mount(2)
MOUNT_ATTR_RDONLY = 1
MS_REC, MS_SLAVE = 1 << 14, 1 << 19
CLONE_NEWNS = 0x20000
LIBC = ctypes.CDLL(None, use_errno=True)
FOLDER = os.O_PATH | os.O_DIRECTORY


class MountAttr(ctypes.Structure):
    """struct mount_attr"""

    _fields_ = tuple((name, ctypes.c_uint64) for name in ("set", "clr", "propagation", "userns"))


class Sealed:
    """Used by one thread, which starts all sandboxes."""

    def __init__(self, mount: Path) -> None:
        self._mount = mount
        self._device = device_of(mount)
        self._built = False

    def options(self) -> list[str]:
        """Options of bubblewrap. Raises Denied: the daemon does not serve the tree as it should."""
        try:
            if not self._built:
                self._build()
            if device_of(self._mount) != self._device:
                raise OSError(f"{self._mount} is another mount now")
        except OSError as error:
            raise Denied(
                f"the tree cannot be shown to tools: {in_words(error)}", "systemctl restart aiosd"
            ) from None
        return ["--bind", str(self._mount), "/aios"]

    def _build(self) -> None:
        check(LIBC.unshare(CLONE_NEWNS))
        check(LIBC.mount(b"none", b"/", None, MS_REC | MS_SLAVE, None))
        root = os.open(self._mount, FOLDER | os.O_CLOEXEC)
        try:
            hide(root, "access")
            make_read_only(root, "tools")
        finally:
            os.close(root)
        self._built = True


def hide(root: int, name: str) -> None:
    """Mount an empty folder over the name."""
    folder = open_beneath(root, name, FOLDER)
    try:
        flags = MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC
        place = f"/proc/thread-self/fd/{folder}".encode()
        check(LIBC.mount(b"tmpfs", place, b"tmpfs", flags, b"mode=755,size=4k"))
    finally:
        os.close(folder)


def make_read_only(root: int, name: str) -> None:
    folder = open_beneath(root, name, FOLDER)
    try:
        copy = check(LIBC.syscall(SYS_OPEN_TREE, folder, b"", OPEN_TREE_CLONE | os.O_CLOEXEC | AT_EMPTY_PATH))
        try:
            wanted = MountAttr(MOUNT_ATTR_RDONLY, 0, 0, 0)
            size = ctypes.c_size_t(ctypes.sizeof(wanted))
            check(LIBC.syscall(SYS_MOUNT_SETATTR, copy, b"", AT_EMPTY_PATH, ctypes.byref(wanted), size))
            check(LIBC.syscall(SYS_MOVE_MOUNT, copy, b"", folder, b"", EMPTY_PATH | TO_EMPTY_PATH))
        finally:
            os.close(copy)
    finally:
        os.close(folder)

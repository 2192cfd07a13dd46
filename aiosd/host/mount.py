"""Mounting: from a folder to a /dev/fuse descriptor, and clean away again.

Root mounts by mount(2); an ordinary user through the set-uid fusermount, which hands the descriptor back over
a socket. The descriptor is served elsewhere (libfuse.py), so a privileged mounter can stand in for this file.
"""

from __future__ import annotations

import array
import ctypes
import errno
import os
import shutil
import socket
import subprocess
from contextlib import ExitStack, suppress
from pathlib import Path

from aiosd.errors import ConfigError
from aiosd.host import proc

DEAD = (errno.ENOTCONN, errno.ECONNABORTED)  # nobody serves this mount any more
MNT_DETACH = 2
MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
libc = ctypes.CDLL(None, use_errno=True)


def open_fuse(folder: Path, shared: bool) -> int:
    """Mounts and gives the descriptor; `shared` lets other users in. Raises ConfigError with the remedy."""
    if not os.path.exists("/dev/fuse"):
        raise ConfigError(
            "/dev/fuse: no such device", "modprobe fuse, or give the container --device /dev/fuse"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}", "name another folder with --mount") from None
    if os.geteuid() == 0:
        return _mount_as_root(folder, shared)
    return _mount_by_fusermount(folder, shared)


def _mount_as_root(folder: Path, shared: bool) -> int:
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    data = f"fd={fd},rootmode=40000,user_id=0,group_id=0,default_permissions" + (
        ",allow_other" if shared else ""
    )
    flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
    if libc.mount(b"aiosd", bytes(folder), b"fuse.aiosd", flags, data.encode()):
        error = ctypes.get_errno()
        os.close(fd)
        raise ConfigError(f"{folder}: cannot mount: {os.strerror(error)}")
    return fd


def _mount_by_fusermount(folder: Path, shared: bool) -> int:
    program = _fusermount()
    options = "fsname=aiosd,subtype=aiosd,default_permissions,nosuid,nodev" + (
        ",allow_other" if shared else ""
    )
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        done = subprocess.run(
            [program, "-o", options, "--", str(folder)],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
            stderr=subprocess.PIPE,
        )
        if done.returncode:
            raise ConfigError(
                f"{folder}: {os.fsdecode(done.stderr.strip())}",
                "look at /dev/fuse (crw-rw-rw-) and fusermount (set-uid root)",
            )
        _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(4))
    fds = array.array("i", ancillary[0][2])
    os.set_inheritable(fds[0], False)
    return fds[0]


def _fusermount() -> str:
    program = shutil.which("fusermount3") or shutil.which("fusermount")
    if program is None:
        raise ConfigError("fusermount is not installed", "apt install fuse3")
    return program


def others_allowed() -> bool:
    """Whether a mount of ours may be shared with other users."""
    if os.geteuid() == 0:
        return True
    try:
        lines = Path("/etc/fuse.conf").read_bytes().splitlines()
        return any(line.strip() == b"user_allow_other" for line in lines)
    except OSError:
        return False


def unmount(folder: Path) -> None:
    """Detaches at once; clients that hold files open get ENOTCONN. No error when nothing is mounted."""
    if os.geteuid() == 0:
        libc.umount2(bytes(folder), MNT_DETACH)
    else:
        subprocess.run([_fusermount(), "-u", "-z", "--", str(folder)], stderr=subprocess.DEVNULL, check=False)


def clear_stale(folder: Path) -> None:
    """Takes away what a killed daemon left: a mount that nobody serves. Any other one is an error."""
    try:
        if not is_mounted(folder):
            return
        os.stat(folder)
        # a stat may be answered from the kernel's cache for a second, a read is not
        who = os.fsdecode((folder / "status").read_bytes()).partition("pid ")[2].partition("\n")[0].strip()
    except FileNotFoundError:  # another file system
        who = ""
    except OSError as error:
        if error.errno in DEAD:
            unmount(folder)
            return
        raise ConfigError(f"{folder}: {error.strerror}", "name another folder with --mount") from None
    raise ConfigError(
        f"{folder} is mounted already" + (f" by aiosd with pid {who}" if who else ""),
        "stop that one, or name another folder with --mount",
    )


def remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def is_mounted(folder: Path) -> bool:
    """Whether something is mounted at the folder: then it is on another mount than the folder above it.

    The file system that is mounted there is not asked, as it may hang or be dead. Raises OSError.
    """
    with ExitStack() as undo:
        try:
            there = _look_at(undo, folder)
        except (FileNotFoundError, NotADirectoryError):
            return False
        above = _look_at(undo, os.path.dirname(os.readlink(f"/proc/self/fd/{there}")))
        return proc.mount_id(there) != proc.mount_id(above)


def _look_at(undo: ExitStack, folder: str | Path) -> int:
    descriptor = os.open(folder, os.O_PATH | os.O_CLOEXEC)
    undo.callback(os.close, descriptor)
    return descriptor

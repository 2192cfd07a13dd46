"""Mounting: from a folder to a /dev/fuse descriptor, and clean away again.

Root mounts by itself; an ordinary user through the set-uid fusermount, which hands the descriptor back over
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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from aiosd.errors import ConfigError
from aiosd.host import proc

DEAD = (errno.ENOTCONN, errno.ECONNABORTED)  # nobody serves this mount any more
MNT_DETACH = 2
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
SYS_MOVE_MOUNT, SYS_FSOPEN, SYS_FSCONFIG, SYS_FSMOUNT = 429, 430, 431, 432  # on all architectures
CLOEXEC = 1  # of fsopen(2) and fsmount(2)
SET_FLAG, SET_STRING, CREATE = 0, 1, 6  # of fsconfig(2)
ATTRIBUTES = 2 | 4 | 8  # of fsmount(2): nosuid, nodev, noexec
EMPTY_PATH, BENEATH = 0x004, 0x200  # of move_mount(2)
AT_FDCWD = -100
GUARD = ("tmpfs", "aiosd")  # type and source
libc = ctypes.CDLL(None, use_errno=True)


def check_place(folder: Path) -> None:
    """Raises ConfigError for a folder that is used: the tree would hide its files from the whole machine."""
    try:
        used = not is_mounted(folder) and bool(os.listdir(folder))
    except (FileNotFoundError, PermissionError):  # it will be made, or root looks at it
        return
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}", "name another folder with daemon.mount") from None
    if used:
        raise ConfigError(
            f"{folder} has files, which the tree would hide",
            "name an empty folder with daemon.mount or --mount",
        )


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
    with _new_tree(folder, shared) as (fd, tree):
        _attach(tree, folder)
    return fd


def replace(folder: Path) -> int:
    """Mount a new tree in place of the one that is mounted at the folder. Return its descriptor.

    The new tree goes beneath the old one, and then the old one is detached: no moment is without a tree.
    Linux before 6.5 cannot do this. There, the folder below is seen for the time of two system calls.
    Raises ConfigError.
    """
    with _new_tree(folder, shared=True) as (fd, tree):
        try:
            _attach(tree, folder, BENEATH)
            unmount(folder)
        except OSError:
            if is_tree(folder):
                unmount(folder)
            _attach(tree, folder)
    return fd


@contextmanager
def _new_tree(folder: Path, shared: bool) -> Iterator[tuple[int, int]]:
    """Give the descriptor to serve and a mount of it that is not attached to a folder yet. The mount is
    closed at the end, and the descriptor too if the block fails. Raises ConfigError.
    """
    values = {"source": "aiosd", "subtype": "aiosd", "rootmode": "40000", "user_id": "0", "group_id": "0"}
    with ExitStack() as failed, ExitStack() as undo:
        try:
            fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
            failed.callback(os.close, fd)
            made = check(libc.syscall(SYS_FSOPEN, b"fuse", CLOEXEC))
            undo.callback(os.close, made)
            for key, value in {**values, "fd": str(fd)}.items():
                check(libc.syscall(SYS_FSCONFIG, made, SET_STRING, key.encode(), value.encode(), 0))
            for flag in (b"default_permissions", *([b"allow_other"] if shared else [])):
                check(libc.syscall(SYS_FSCONFIG, made, SET_FLAG, flag, None, 0))
            check(libc.syscall(SYS_FSCONFIG, made, CREATE, None, None, 0))
            tree = check(libc.syscall(SYS_FSMOUNT, made, CLOEXEC, ATTRIBUTES))
            undo.callback(os.close, tree)
            yield fd, tree
        except OSError as error:
            raise ConfigError(
                f"{folder}: cannot mount: {error.strerror}",
                "mounting takes CAP_SYS_ADMIN and /dev/fuse; a container gets them by --cap-add SYS_ADMIN "
                "--device /dev/fuse",
            ) from None
        failed.pop_all()


def _attach(tree: int, folder: Path, how: int = 0) -> None:
    check(libc.syscall(SYS_MOVE_MOUNT, tree, b"", AT_FDCWD, bytes(folder), EMPTY_PATH | how))


def check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def guard(folder: Path) -> None:
    """Cover the folder, unless something covers it, with an empty one in which nobody can make a file.

    It stays when the tree is unmounted. Otherwise root could write files into the bare folder, and the next
    tree would hide them. Raises ConfigError.
    """
    check_place(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not is_mounted(folder):
            kind, source = (word.encode() for word in GUARD)
            flags = MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC
            check(libc.mount(source, bytes(folder), kind, flags, b"mode=755,size=4k,nr_inodes=2"))
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}", "name another folder with daemon.mount") from None


def is_guard(folder: Path) -> bool:
    return _mounted(folder) == GUARD


def is_tree(folder: Path) -> bool:
    """Whether a tree of aiosd is mounted there, also one that nobody serves."""
    return _mounted(folder) == ("fuse.aiosd", "aiosd")


def _mounted(folder: Path) -> tuple[str, str]:
    """Return type and source of the mount that the folder is on. Its server is not asked. Raises OSError."""
    with ExitStack() as undo:
        number = str(proc.mount_id(_look_at(undo, folder)))
    for line in proc.lines("/proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        if before.split(" ", 1)[0] == number:
            kind, source, _ = after.split(" ", 2)
            return kind, source
    return "", ""


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
        if not is_mounted(folder) or is_guard(folder):
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

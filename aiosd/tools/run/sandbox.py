"""The cage of one tool call: the bubblewrap command line and the system calls that are refused in it.

Namespaces of its own for everything, no capabilities, no new privileges, no network but that of
aiosd.tools.run.network where its manifest says so; the system read-only, /tmp, /dev and /proc its own, and
one work folder to write to. The caller's uid stays his, so that the kernel's file modes hold inside. Decides
nothing and starts nothing: aiosd.tools.run.runner does.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from aiosd.host import libraries
from aiosd.host.beneath import open_owned
from aiosd.host.mount import is_mounted
from aiosd.tools.manifest import Manifest

with libraries.needed("seccomp"):
    import pyseccomp

BWRAP = "/usr/bin/bwrap"

TMP_BYTES = 64 << 20
PROCESSES = 64  # of one call, threads too
FILES = 256
WORK = "/work"
CREDENTIALS = "/run/credentials"
HIDDEN = tuple(
    word for name in ("/aios/access", "/aios/keys") for word in ("--tmpfs", name, "--remount-ro", name)
)
# Ways to look into or act on what is outside, to hold memory that is nobody's, or that only an attack on the
# kernel needs
REFUSED = tuple(
    """
    ptrace process_vm_readv process_vm_writev process_madvise pidfd_getfd kcmp
    mount umount2 pivot_root move_mount open_tree fsopen fsconfig fsmount fspick mount_setattr
    unshare setns chroot
    bpf perf_event_open userfaultfd io_uring_setup io_uring_enter io_uring_register
    add_key request_key keyctl
    kexec_load kexec_file_load init_module finit_module delete_module
    memfd_create memfd_secret shmget msgget
    open_by_handle_at name_to_handle_at quotactl acct swapon swapoff reboot sethostname setdomainname
    settimeofday clock_settime adjtimex clock_adjtime personality
    """.split()  # noqa: SIM905 - as words, not as fifty quoted lines
)
SOCKETS = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK)  # a network namespace holds
NEWUSER = 0x10000000  # CLONE_NEWUSER of clone(2)
FAMILIES = 64  # these, and not, for one, the AF_VSOCK by which a virtual machine speaks to its host


@dataclass(frozen=True)
class Cage:
    """What of the outside one call sees."""

    manifest: Manifest
    work: Path | None  # None: an empty one that is gone with the call
    tree: Sequence[str] = ()  # options that show it at /aios; none: it is not there
    credentials: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    def command(
        self,
        environment: int,
        seccomp: int,
        program: int | None,
        hosts: int | None = None,
        gate: int | None = None,
        credentials: Mapping[str, int] = MappingProxyType({}),
    ) -> list[str]:
        """Descriptors that the child inherits. With `hosts`, its /etc/hosts, it keeps the network it has; the
        program starts when `gate` can be read."""
        m = self.manifest
        return [
            BWRAP, "--args", str(environment), "--unshare-user", "--unshare-all", *no_more_users(),
            "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--seccomp", str(seccomp),
            "--hostname", "aios",
            *(("--share-net",) if hosts else ()), *(("--block-fd", str(gate)) if gate else ()),
            "--ro-bind", "/usr", "/usr", "--ro-bind", "/etc", "/etc", *links(),
            *(("--ro-bind-data", str(hosts), "/etc/hosts") if hosts else ()),
            "--proc", "/proc", "--remount-ro", "/proc",  # root may write to /proc/sys without a capability
            "--dev", "/dev", *tmpfs("/dev/shm"), "--remount-ro", "/dev", *tmpfs("/tmp"),
            *(("--bind", str(self.work), WORK) if self.work else tmpfs(WORK)),
            *(option for path in m.read for option in ("--ro-bind-try", path, path)),
            *(option for path in m.write for option in ("--bind-try", path, path)),
            *self.tree,
            *(("--perms", "0555", "--ro-bind-data", str(program), self._program) if program else ()),
            *(o for name, fd in credentials.items() for o in secret(fd, f"{CREDENTIALS}/{name}")),
            "--remount-ro", "/", "--chdir", WORK, "--",
            "/usr/bin/prlimit", f"--as={m.address_bytes or m.memory_bytes}", f"--data={m.memory_bytes}",
            f"--cpu={m.cpu_s}", f"--nproc={PROCESSES}",
            f"--fsize={m.memory_bytes}", f"--nofile={FILES}", "--core=0", "--",
            *("/tool/" + part[2:] if part.startswith("./") else part for part in m.command),
        ]  # fmt: skip

    @property
    def _program(self) -> str:
        return "/tool/" + next(part[2:] for part in self.manifest.command if part.startswith("./"))

    def open_program(self) -> int | None:
        """The file beside the manifest: opened here, as its folder may not be the caller's to see."""
        for part in self.manifest.command:
            if part.startswith("./"):
                return open_owned(self.manifest.folder, part[2:])
        return None

    def environment(self) -> bytes:
        """Options of bubblewrap, in a file: a command line is everybody's to see, and its own environment, in
        which LD_PRELOAD would have a library run before there is a cage, is none. Raises ValueError."""
        base = {"PATH": "/usr/bin:/bin", "HOME": WORK, "LANG": "C.UTF-8", "AIOS": "/aios"}
        reached = {"AIOS_NETWORK": " ".join(self.manifest.network)} if self.manifest.network else {}
        given = {"CREDENTIALS_DIRECTORY": CREDENTIALS} if self.credentials else {}
        all_of_it = {**base, **reached, **given, **self.manifest.env}
        if any("\0" in word for word in chain(all_of_it, all_of_it.values())):
            raise ValueError("a NUL in its environment")  # it would be further options
        return "".join(f"--setenv\0{key}\0{value}\0" for key, value in all_of_it.items()).encode()


class ShownTree(Protocol):
    """The mounted tree, as sandboxes see it: read-only below `tools`, with nothing below `access` and `keys`.

    A tool may not decide about calls, nor make a tool that would see more than it sees itself, nor a key that
    would have more rights than a tool, and longer.
    """

    def options(self) -> list[str]:
        """Options of bubblewrap; none where nothing is mounted. Raises Denied."""
        ...


class OwnTree:
    """The tree that this process serves itself, by its paths."""

    def __init__(self, mount: Path) -> None:
        self._mount = mount

    def options(self) -> list[str]:
        mount = str(self._mount)
        if not is_mounted(self._mount):
            return []
        return ["--bind", mount, "/aios", "--ro-bind", f"{mount}/tools", "/aios/tools", *HIDDEN]


def no_more_users() -> tuple[str, ...]:
    """Where bubblewrap can say so: in a container of which /proc/sys is read-only seccomp alone does."""
    return () if os.statvfs("/proc/sys/user").f_flag & os.ST_RDONLY else ("--disable-userns",)


def secret(fd: int, path: str) -> list[str]:
    return ["--perms", "0400", "--ro-bind-data", str(fd), path]


def tmpfs(path: str) -> list[str]:
    return ["--size", str(TMP_BYTES), "--tmpfs", path]


@cache
def links() -> list[str]:
    """/bin and its like, as they are here."""
    found = []
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        path = Path("/", name)
        if path.is_symlink():
            found += ["--symlink", os.readlink(path), str(path)]
        elif path.is_dir():
            found += ["--ro-bind", str(path), str(path)]
    return found


@cache
def seccomp_filter() -> bytes:
    """The BPF program of REFUSED, each EPERM; a name that this machine has no number for is left out.

    clone(2) is refused what unshare(2) is, a user namespace; the flags of clone3(2) cannot be seen from here,
    so it is not there, as on an old kernel, and libraries use the other.
    """
    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    rules.add_rule(pyseccomp.ERRNO(1), "clone", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, NEWUSER, NEWUSER))
    rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "clone3")
    for name in REFUSED:
        with suppress(OSError, ValueError):
            rules.add_rule(pyseccomp.ERRNO(1), name)
    for family in set(range(FAMILIES)) - set(SOCKETS):
        rules.add_rule(pyseccomp.ERRNO(1), "socket", pyseccomp.Arg(0, pyseccomp.EQ, family))
    rules.add_rule(pyseccomp.ERRNO(1), "socket", pyseccomp.Arg(0, pyseccomp.GE, FAMILIES))
    file = os.memfd_create("seccomp")
    try:
        with os.fdopen(os.dup(file), "r+b") as opened:
            rules.export_bpf(opened)
        os.lseek(file, 0, os.SEEK_SET)
        return os.read(file, 1 << 20)
    finally:
        os.close(file)

"""Files of /proc. They hold names that any user chose, so any bytes but NUL.

Text is decoded as Python decodes names of files (os.fsdecode), so a path from here can be opened. Lines end
at a newline and fields at a blank; str.splitlines() and str.split() would also end them inside a name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

SPECIAL = re.compile(rb"[ \t\n\\#]")
SELF = Path("/proc/self")
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
DESCRIPTORS = 4096  # of a process that are looked at
NAMED = 1024  # where a file of one path is looked for: each process of a user may ask for it at each close
LOOKS_MOST = 64  # of these, those with one path: a process may open a file of that name on any file system
ESCAPED = re.compile(r"\\([0-7]{3})")  # blank, tab, newline, backslash and # in proc_pid_mounts(5)


@dataclass(frozen=True, slots=True)
class MountPoint:
    folder: Path
    kind: str
    options: tuple[str, ...]


def text(file: str | Path) -> str:
    """The whole file. Raises OSError."""
    return os.fsdecode(Path(file).read_bytes())


def lines(file: str | Path) -> list[str]:
    """Its lines, without their newlines. Raises OSError."""
    return text(file).removesuffix("\n").split("\n")


def mounts(proc: Path = SELF) -> Iterator[MountPoint]:
    """The mounts of a process's namespace. Raises OSError."""
    for line in lines(proc / "mounts"):
        _, folder, kind, options, *_ = line.split(" ")
        yield MountPoint(Path(unescaped(folder)), kind, tuple(options.split(",")))


def holds_mounts(folder: Path, proc: Path = SELF) -> bool:
    """Whether something is mounted at the folder or below it. No file system is asked, as one may hang. The
    folders above it are not a stranger's. Raises OSError."""
    above = os.fsencode(os.path.realpath(folder.parent))
    named = SPECIAL.sub(lambda byte: b"\\%03o" % byte[0][0], os.path.join(above, os.fsencode(folder.name)))
    table = (proc / "mounts").read_bytes()
    return any(b" " + named + end in table for end in (b" ", b"/"))


def unescaped(name: str) -> str:
    return ESCAPED.sub(lambda octal: chr(int(octal[1], 8)), name)


def stat(pid: int) -> list[str]:
    """The fields of proc_pid_stat(5) from the third on. The second is a name, in which anything may stand.
    Raises OSError."""
    return text(f"/proc/{pid}/stat").rpartition(")")[2].split()


def facts(data: bytes) -> dict[bytes, bytes]:
    """The lines `KEY: VALUE` of a file. The first line of a key counts, because the kernel's own lines come
    before those that may hold anything."""
    found: dict[bytes, bytes] = {}
    for line in data.split(b"\n"):
        key, colon, value = line.partition(b":")
        if colon:
            found.setdefault(key, value.strip())
    return found


def mount_id(descriptor: int) -> int:
    """The number of the mount that an open file is on. Raises OSError."""
    return int(facts((SELF / f"fdinfo/{descriptor}").read_bytes())[b"mnt_id"])


# A process by a descriptor of its folder, which stays the same process's when the number is given again


@contextmanager
def opened(pid: int | str) -> Iterator[int]:
    """Raises OSError."""
    folder = os.open(f"/proc/{pid}", FOLDER)
    try:
        yield folder
    finally:
        os.close(folder)


def content(folder: int, name: str) -> bytes:
    """Raises OSError."""
    with open(os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder), "rb") as file:
        return file.read()


def devices_of_mounts(folder: int) -> dict[bytes, bytes]:
    """MAJOR:MINOR by the number of each mount that the process sees. Raises OSError."""
    words = (line.split(b" ", 3) for line in content(folder, "mountinfo").split(b"\n") if line)
    return {number: device for number, _, device, _ in words}


def device_of(mount: Path) -> bytes:
    """MAJOR:MINOR of the file system that is mounted there for this thread. Its server is not asked.
    Raises OSError."""
    file = os.open(mount, os.O_PATH | os.O_CLOEXEC)
    try:
        with opened("thread-self") as thread:
            number = facts(content(thread, f"fdinfo/{file}"))[b"mnt_id"]
            return devices_of_mounts(thread)[number]
    except KeyError:
        raise FileNotFoundError(f"{mount} is no mount") from None
    finally:
        os.close(file)


def files_on(folder: int, device: bytes, ends: bytes = b"") -> Iterator[int]:
    """The open files of the process that are on a device and whose path ends so: for each its access mode,
    such as O_RDONLY. Raises OSError."""
    looks = 0
    mounts = {number for number, there in devices_of_mounts(folder).items() if there == device}
    at = os.open("fdinfo", FOLDER, dir_fd=folder)
    try:
        with os.scandir(at) as entries:
            for entry in islice(entries, NAMED if ends else DESCRIPTORS):
                with suppress(OSError):  # it was closed meanwhile
                    if ends:  # the path costs a tenth of the facts
                        path = os.readlink(os.fsencode(f"fd/{entry.name}"), dir_fd=folder)
                        looks += path.endswith(ends)
                        if not path.endswith(ends) or looks > LOOKS_MOST:
                            continue
                    about = facts(content(at, entry.name))
                    flags = int(about[b"flags"], 8)
                    if about[b"mnt_id"] in mounts and not flags & os.O_PATH:
                        yield flags & os.O_ACCMODE
    finally:
        os.close(at)

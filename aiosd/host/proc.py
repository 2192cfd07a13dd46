"""Files of /proc. They hold names that any user chose, so any bytes but NUL.

Text is decoded as Python decodes names of files (os.fsdecode), so a path from here can be opened. Lines end
at a newline and fields at a blank; str.splitlines() and str.split() would also end them inside a name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SPECIAL = re.compile(rb"[ \t\n\\#]")
SELF = Path("/proc/self")
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


def mount_id(descriptor: int) -> int:
    """The number of the mount that an open file is on. Raises OSError."""
    about = dict(line.split(":\t", 1) for line in lines(SELF / f"fdinfo/{descriptor}") if ":\t" in line)
    return int(about["mnt_id"])

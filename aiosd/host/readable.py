"""What another user may read: judged from owner, mode and POSIX ACL, because workers are another user.

What a security module or a mount namespace hides is not seen here; the worker itself says it. Any thread may
call.
"""

from __future__ import annotations

import os
import pwd
import stat
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

READ, PASS = 4, 1  # bits of a mode; PASS is x of a folder
# Tags of an ACL's entries: see acl(5) and the kernel's posix_acl_xattr.h.
OWNER, USER, OWNING_GROUP, GROUP, MASK, OTHER = 1, 2, 4, 8, 16, 32
ENTRY = struct.Struct("<HHI")  # tag, permission bits, id


@dataclass(frozen=True)
class Reader:
    uid: int
    name: str
    groups: frozenset[int]

    @classmethod
    def of(cls, uid: int) -> Reader:
        try:
            user = pwd.getpwuid(uid)
        except KeyError:
            return cls(uid, f"uid {uid}", frozenset())
        return cls(uid, user.pw_name, frozenset(os.getgrouplist(user.pw_name, user.pw_gid)))

    def may(self, path: Path, want: int) -> bool:
        """Raises OSError where this process itself cannot look."""
        if self.uid == os.geteuid():
            return os.access(path, want, effective_ids=True)  # 4 and 1 are also R_OK and X_OK
        at = os.stat(path)
        return self.uid == 0 or allows(entries(path, at.st_mode), at, self, want)


def first_closed(reader: Reader, files: Iterable[Path]) -> Path | None:
    """The first file that the reader may not read, or the first folder on the way that he may not pass.

    Raises OSError where this process itself cannot look.
    """
    passed: set[Path] = set()
    for file in files:
        for path in (file.absolute(), Path(os.path.realpath(file))):  # a link's target has a way of its own
            for folder in reversed(path.parents):
                if folder not in passed and not reader.may(folder, PASS):
                    return folder
                passed.add(folder)
        want = READ | PASS if file.is_dir() else READ
        if not reader.may(file, want):
            return file
    return None


def entries(path: Path, mode: int) -> list[tuple[int, int, int]]:
    """The ACL of a file as (tag, bits, id). A file without one has what its mode says."""
    try:
        return list(ENTRY.iter_unpack(os.getxattr(path, "system.posix_acl_access")[4:]))
    except OSError:
        bits = stat.S_IMODE(mode)
        return [(OWNER, bits >> 6 & 7, 0), (OWNING_GROUP, bits >> 3 & 7, 0), (OTHER, bits & 7, 0)]


def allows(acl: list[tuple[int, int, int]], at: os.stat_result, reader: Reader, want: int) -> bool:
    """The access check of acl(5)."""
    by_tag = {tag: bits for tag, bits, _ in acl}
    mask = by_tag.get(MASK, 7)
    if reader.uid == at.st_uid:
        return by_tag[OWNER] & want == want
    for tag, bits, id in acl:
        if tag == USER and id == reader.uid:
            return bits & mask & want == want
    if groups := list(_of_groups(acl, at, reader)):
        return any(bits & mask & want == want for bits in groups)
    return by_tag[OTHER] & want == want


def _of_groups(acl: list[tuple[int, int, int]], at: os.stat_result, reader: Reader) -> Iterator[int]:
    for tag, bits, id in acl:
        group = at.st_gid if tag == OWNING_GROUP else id
        if tag in (OWNING_GROUP, GROUP) and group in reader.groups:
            yield bits

"""Permissions of every kind of file for owner, group, other and root, on the real mount with real uids.

One table says what the modes of the tree mean for each role; every cell of it is tried.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.running import REPOSITORY, Daemon

pytestmark = [pytest.mark.mount, pytest.mark.root]
OWNER, MEMBER, OTHER, GROUP = 63001, 63002, 63003, 63100
# role -> uid, gid, supplementary groups, and which three bits of a mode are its own
ROLES: dict[str, tuple[int, int, list[int], int]] = {
    "owner": (OWNER, OWNER, [], 6),
    "group": (MEMBER, MEMBER, [GROUP], 3),
    "other": (OTHER, OTHER, [], 0),
}
# how an object is shared -> mode of its folder, and what is added to the modes in it
SHARED = {"private": (0o700, 0), "read": (0o750, 0o040), "use": (0o770, 0o070), "world": (0o777, 0o077)}
OBJECTS = ("agents/matrix", "contexts/matrix", "tools/matrix", "access/groups/matrix")
BESIDE = ["status", "README", "scheduler/policy", "scheduler/queue", "models/tiny/llm", "workers/0/ctl"]
BESIDE += ["tools/calc/call", "tools/calc/limit", "tools/calc/info", "access/audit.jsonl", "access/pending"]
BESIDE += ["access/rules", "access/owners", "requests"]
REFUSED = {errno.EACCES, errno.EPERM}


def walk(folder: Path) -> Iterator[Path]:
    """All paths below, except requests, whose modes cannot change."""
    yield folder
    for entry in sorted(os.listdir(folder)):
        path = folder / entry
        if entry == "requests":
            continue
        if stat.S_ISDIR(path.lstat().st_mode):
            yield from walk(path)
        else:
            yield path


def attempt(action: Any) -> bool:
    """Whether the call is allowed. It may still fail for another reason."""
    try:
        action()
    except OSError as error:
        return error.errno not in REFUSED
    return True


def kind(path: Path) -> str:
    if path.name in OBJECTS:
        return "object"
    return "folder" if stat.S_ISDIR(path.lstat().st_mode) else "file"


def tried(path: Path, kind: str) -> dict[str, bool]:
    """The rights of the running role on a path."""

    def opened(flags: int) -> bool:
        return attempt(lambda: os.close(os.open(path, flags | os.O_NONBLOCK)))

    found = {"search": os.access(path.parent, os.X_OK)}
    if kind == "file":
        found |= {"read": opened(os.O_RDONLY), "write": opened(os.O_WRONLY)}
    else:
        found["list"] = attempt(lambda: os.listdir(path))
    if kind != "folder":
        found["chmod"] = attempt(lambda: os.chmod(path, stat.S_IMODE(path.stat().st_mode)))
    return found


def expected(path: Path, root: Path, role: str) -> dict[str, bool]:
    """The expected rights: the path's bits for this role, if it may pass all folders above."""
    _, _, _, shift = ROLES[role]

    def bits(of: Path) -> int:
        status = of.lstat()
        own = shift if status.st_uid == OWNER else 0  # what is root's is everybody's by its last bits
        return stat.S_IMODE(status.st_mode) >> own & 7

    above = [p for p in path.parents if p.is_relative_to(root) and p != root]
    through = all(bits(p) & 1 for p in above)
    mine = through and role == "owner" and path.lstat().st_uid == OWNER
    found = {"search": through}
    if kind(path) == "file":
        found |= {"read": through and bool(bits(path) & 4), "write": through and bool(bits(path) & 2)}
    else:
        found["list"] = through and bool(bits(path) & 4)
    return found if kind(path) == "folder" else {**found, "chmod": mine}


def as_role(role: str, paths: list[Path]) -> dict[str, dict[str, bool]]:
    uid, gid, groups, _ = ROLES[role]
    done = subprocess.run(
        [sys.executable, "-m", "tests.t5_matrix", json.dumps([uid, gid, groups]),
         *(f"{kind(path)}:{path}" for path in paths)],
        cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=100,
    )  # fmt: skip
    found: dict[str, dict[str, bool]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("shared", SHARED)
def test_every_file_does_for_every_role_what_its_mode_says(aios: Daemon, shared: str) -> None:
    root = aios.root
    folder, added = SHARED[shared]
    objects = [root / name for name in OBJECTS]
    try:
        for made in objects:
            made.mkdir()
            for path in walk(made):
                plain = stat.S_IMODE(path.lstat().st_mode)
                given = plain | (plain >> 6 & 7) * 0o11 & added if path != made else folder
                os.chmod(path, given)
                os.chown(path, OWNER, GROUP)
        paths = [p for made in objects for p in walk(made)]
        paths += [root / name for name in BESIDE]
        wrong = []
        for role in ROLES:
            found = as_role(role, paths)
            for path in paths:
                want = expected(path, root, role)
                if found[str(path)] != want:
                    wrong.append((role, str(path.relative_to(root)), found[str(path)], want))
        assert not wrong
        assert all(all(tried(path, kind(path)).values()) for path in paths), "root may everything"
    finally:
        for made in objects:
            if made.exists():
                made.rmdir()


TRY = """
for act in rmdir mkdir; do $act "$1" 2>/dev/null && echo yes || echo no; done
"""


def test_only_permitted_users_make_and_remove_objects(aios: Daemon) -> None:
    """agents/ and contexts/ are sticky: each user makes objects, and nobody removes another user's."""
    path = aios.root / "agents/sticky"
    path.mkdir()
    os.chown(path, OWNER, GROUP)
    os.chmod(path, 0o777)
    for role, answers in (("group", ["no", "no"]), ("other", ["no", "no"]), ("owner", ["yes", "yes"])):
        uid, gid, groups, _ = ROLES[role]
        more = ["--groups", str(groups[0])] if groups else ["--clear-groups"]
        done = subprocess.run(
            ["setpriv", "--reuid", str(uid), "--regid", str(gid), *more, "sh", "-c", TRY, "sh", str(path)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.stdout.split() == answers, role
    path.rmdir()


if __name__ == "__main__":
    uid, gid, groups = json.loads(sys.argv[1])
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    told = (argument.partition(":") for argument in sys.argv[2:])
    print(json.dumps({path: tried(Path(path), kind_) for kind_, _, path in told}))

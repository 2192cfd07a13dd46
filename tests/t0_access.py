"""The one function that compares uid, gid and mode bits, against the kernel's own rules."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from aiosd.access.caller import Caller
from aiosd.access.permissions import EXECUTE, READ, WRITE, Permission, Permissions, may
from aiosd.database.store import Store


def caller(uid: int, gid: int) -> Caller:
    return Caller(uid, gid, pid=1 << 29)  # no such process, so only the main group is known


@pytest.mark.parametrize(
    ("uid", "gid", "mode", "want", "allowed"),
    [
        (5, 50, 0o400, READ, True),
        (5, 50, 0o077, READ, False),  # only the owner's bits count for the owner, even if others have more
        (6, 50, 0o040, READ, True),
        (6, 50, 0o407, READ, False),
        (6, 51, 0o004, READ, True),
        (6, 51, 0o770, READ, False),
        (5, 50, 0o200, WRITE | EXECUTE, False),
        (0, 0, 0o000, WRITE, True),
        (0, 0, 0o000, EXECUTE, False),
        (0, 0, 0o001, EXECUTE, True),
    ],
)
def test_the_first_class_that_fits_decides(uid: int, gid: int, mode: int, want: int, allowed: bool) -> None:
    assert may(caller(uid, gid), Permission(5, 50, mode), want) is allowed


def test_supplementary_groups_are_those_of_the_process_now() -> None:
    me = Caller(12345, 12345, os.getpid()).with_groups()
    assert set(os.getgroups()) == me.groups
    assert may(me, Permission(1, 12345, 0o040), READ)


def test_owners_and_modes_survive_a_restart_and_end_with_their_object(tmp_path: Path) -> None:
    store = Store(tmp_path, {})
    known = Permissions(store)
    known.set("/agents/a", Permission(1, 2, 0o700))
    known.change("/agents/a", Permission(1, 2, 0o700), gid=9, mode=0o750)
    known.set("/agents/a/nice", Permission(1, 2, 0o600))
    known.set("/agents/ab", Permission(1, 2, 0o600))
    assert Permissions(store).get("/agents/a") == Permission(1, 9, 0o750)
    assert known.count("/agents", 1) == 2
    known.forget("/agents/a")
    again = Permissions(store)
    assert again.get("/agents/a") is None
    assert again.get("/agents/a/nice") is None
    assert again.get("/agents/ab") is not None
    store.close()


def test_groups_matter_while_they_decide_about_names_in_requests(tmp_path: Path) -> None:
    store = Store(tmp_path, {})
    known = Permissions(store)
    known.set("/contexts/private", Permission(1, 2, 0o700))
    known.set("/models/open", Permission(1, 2, 0o755))
    known.set("/agents/shared", Permission(1, 2, 0o750))
    assert known.by_group == 0, "the kernel itself judges who opens an agent's files"
    known.set("/contexts/shared", Permission(1, 2, 0o770))
    known.set("/models/closed", Permission(1, 2, 0o705))
    assert Permissions(store).by_group == known.by_group == 2
    known.change("/models/closed", Permission(1, 2, 0o705), mode=0o700)
    known.forget("/contexts/shared")
    assert Permissions(store).by_group == known.by_group == 0
    store.close()

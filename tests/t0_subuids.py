"""All uids that are lent to a user count as that user."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from aiosd.host import subuids
from aiosd.host.subuids import SubUids


def owners(folder: Path, text: bytes) -> SubUids:
    (folder / "subuid").write_bytes(text)
    return SubUids(folder / "subuid")


def test_a_lent_uid_is_its_owners(tmp_path: Path) -> None:
    name = pwd.getpwuid(os.getuid()).pw_name.encode()
    lent = owners(tmp_path, name + b":100000:65536\n4242:200000:10\n")
    assert {lent.of(100000), lent.of(165535)} == {os.getuid()}
    assert lent.of(200009) == 4242
    assert [lent.of(uid) for uid in (0, 99999, 165536, 199999, 200010)] == [0, 99999, 165536, 199999, 200010]


def test_the_uids_of_an_unknown_user_are_one_users(tmp_path: Path) -> None:
    lent = owners(tmp_path, b"nobody-of-this-name:100000:10\n")
    assert {lent.of(100003), lent.of(100009)} == {100000}


@pytest.mark.parametrize(
    "line", [b"", b"a", b"a:b:c", b"a:1", b"a:1:", b":", b"\xff\xfe:1:x", b"a:" + b"9" * 5000 + b":1"]
)
def test_a_line_that_is_none_is_passed_over(line: bytes, tmp_path: Path) -> None:
    lent = owners(tmp_path, line + b"\n4242:200000:10\n")
    assert (lent.of(200000), lent.of(1)) == (4242, 1)


def test_without_the_file_each_is_his_own(tmp_path: Path) -> None:
    assert SubUids(tmp_path / "none").of(100000) == 100000


def test_a_new_range_is_seen_and_who_was_counted_stays_the_same(tmp_path: Path) -> None:
    lent = owners(tmp_path, b"")
    assert lent.of(200001) == 200001
    (tmp_path / "subuid").write_bytes(b"4242:200000:10\n")
    assert (lent.of(200001), lent.of(200002)) == (200001, 4242)


def test_no_more_than_a_bound_of_the_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subuids, "BYTES_MOST", 16)
    lent = owners(tmp_path, b"4242:200000:10\n4243:300000:10\n")
    assert (lent.of(200001), lent.of(300001)) == (4242, 300001)

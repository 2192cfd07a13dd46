"""Work folders are measured without asking what is mounted in them."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from aiosd.host.beneath import opened
from aiosd.host.unasked import FOLDER, SomethingMounted, enter, look
from aiosd.tools.run.measuring import DEEPEST, ENTRY_BYTES, Look, Survey, size, why_not

ENOUGH = 1 << 30


def test_a_mount_is_not_entered() -> None:
    with opened(Path("/"), FOLDER) as root, pytest.raises(SomethingMounted):
        enter(root, "proc")


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc")
    with opened(tmp_path, FOLDER) as at:
        with pytest.raises(NotADirectoryError):
            enter(at, "link")
        assert not look(at, "link").is_folder


def test_empty_files_and_folders_count(tmp_path: Path) -> None:
    (tmp_path / "work/below").mkdir(parents=True)
    for i in range(10):
        (tmp_path / f"work/below/{i}").touch()
    (tmp_path / "work" / os.fsdecode(b"\xff")).write_bytes(b"x" * 100_000)
    with opened(tmp_path, FOLDER) as at:
        used = size(at, "work", ENOUGH)
        assert 11 * ENTRY_BYTES + 100_000 <= used < 20 * ENTRY_BYTES + 110_000
        assert 3 * ENTRY_BYTES < size(at, "work", 3 * ENTRY_BYTES) < used  # no further than enough


def test_very_deep_folders_count_as_too_much(tmp_path: Path) -> None:
    (tmp_path / "/".join(["d"] * (DEEPEST + 5))).mkdir(parents=True)
    assert "more than" in why_not(Look(str(tmp_path), "d", ENOUGH, 0))
    assert not why_not(Look(str(tmp_path / "d" / "d" / "d" / "d" / "d"), "d", ENOUGH, 0))
    assert not why_not(Look(str(tmp_path), "gone", ENOUGH, 0))


def test_users_take_turns(tmp_path: Path) -> None:
    """One who has asked for many looks is not looked at again before all others."""
    (tmp_path / "work").mkdir()
    told: list[tuple[int, str]] = []
    done = threading.Event()

    def tell(id: int, why: str) -> None:
        told.append((id, why))
        if len(told) == 7:
            done.set()

    survey, wanted = Survey(tell), Look(str(tmp_path), "work", ENOUGH, 0)
    for id in range(6):
        survey.ask(1, id, wanted)
    survey.ask(2, 100, wanted)
    survey.start()
    assert done.wait(60)
    assert told[:2] == [(0, ""), (100, "")]
    assert told[2:] == [(id, "") for id in range(1, 6)]

"""A database that is missing, empty, damaged or another one stops the start, and nothing is deleted."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from aiosd.database.store import Store
from aiosd.errors import StoreFailed
from aiosd.kernel import Kernel
from aiosd.scheduler.handler import Source
from tests.running import wait_until
from tests.t2_scheduler import ME

DATABASE = ("aios.db", "aios.db-wal", "aios.db-shm")


def made(folder: Path) -> None:
    store = Store(folder, {})
    for i in range(200):
        store.add_agent(f"a{i}", {"system": "x" * 500})
    store.close()


def gone(folder: Path) -> None:
    for name in DATABASE:
        (folder / name).unlink(missing_ok=True)


def emptied(folder: Path) -> None:
    gone(folder)
    (folder / "aios.db").touch()


def overwritten(folder: Path) -> None:
    """The second half of the file is zeros, as some file systems leave it after a power cut."""
    file = folder / "aios.db"
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.truncate(size // 2 // 4096 * 4096)
        opened.truncate(size)


def no_database(folder: Path) -> None:
    (folder / "aios.db").write_bytes(b"hello" * 4000)


def fresh(folder: Path) -> None:
    other = folder.with_name("other")
    Store(other, {}).close()
    gone(folder)
    shutil.copy(other / "aios.db", folder)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (gone, "missing or empty"),
        (emptied, "missing or empty"),
        (overwritten, "damaged"),
        (no_database, "damaged"),
        (fresh, "not the database that this state folder was used with"),
    ],
)
def test_a_start_names_the_fault_and_the_remedy(
    tmp_path: Path, harm: Callable[[Path], None], said: str
) -> None:
    state = tmp_path / "state"
    made(state)
    backup = tmp_path / "backup"
    shutil.copytree(state, backup)
    harm(state)
    for _ in range(2):  # a start that fails changes nothing
        with pytest.raises(StoreFailed, match=said) as refused:
            Store(state, {})
        assert "backup" in refused.value.hint
    gone(state)
    shutil.copy(backup / "aios.db", state)
    store = Store(state, {})
    assert len(store.agents()) == 200
    store.close()


def test_a_state_from_before_there_were_numbers_gets_one(tmp_path: Path) -> None:
    made(tmp_path)
    (tmp_path / "state-id").unlink()
    with sqlite3.connect(tmp_path / "aios.db") as db:
        db.execute("DELETE FROM counters WHERE name='state'")
    db.close()
    made_again = Store(tmp_path, {})
    made_again.close()
    assert (tmp_path / "state-id").exists()
    Store(tmp_path, {}).close()


def test_work_folders_stay_when_there_never_was_an_agent(
    make_kernel: Callable[..., Kernel], tmp_path: Path
) -> None:
    work = tmp_path / "state/work/1000/7"
    work.mkdir(parents=True)
    make_kernel()
    assert work.is_dir()


def test_a_work_folder_of_an_agent_that_is_gone_goes(
    make_kernel: Callable[..., Kernel], tmp_path: Path
) -> None:
    kernel = make_kernel()
    kernel.agents.add("a")
    kernel.stop()
    work = tmp_path / "state/work/1000"
    for number in (1, 7):
        (work / str(number)).mkdir(parents=True)
    make_kernel().start()
    wait_until(lambda: [path.name for path in work.iterdir()] == ["1"], "the removal")


def test_rows_that_cannot_be_read_are_named_and_left_aside(
    make_kernel: Callable[..., Kernel], caplog: pytest.LogCaptureFixture
) -> None:
    kernel = make_kernel()
    good, bad = kernel.agents.add("good"), kernel.agents.add("bad")
    for agent in (good, bad):
        kernel.admission.submit(ME, Source(f"/agents/{agent.name}/syscall/llm", agent), b"hi")
    kernel.stop()
    with sqlite3.connect(kernel.store.folder / "aios.db") as db:
        db.execute("UPDATE agents SET settings='{' WHERE name='bad'")
        db.execute("UPDATE requests SET spec='[]' WHERE agent='bad'")
        (number,) = db.execute("SELECT id FROM requests WHERE agent='bad'").fetchone()
    db.close()
    again = make_kernel()
    assert again.agents.get("bad").settings.paused
    assert [request.agent for request in again.store.unfinished()] == ["good"]
    with pytest.raises(StoreFailed, match=f"request {number} "):
        again.store.request(number)
    assert "agent bad" in caplog.text
    assert f"request {number} (a row of requests) cannot be read" in caplog.text


def test_a_message_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path, {})
    store.add_context("talk")
    store.append_messages("talk", [{"role": "user", "content": "x"}])
    with sqlite3.connect(tmp_path / "aios.db") as db:
        db.execute("UPDATE messages SET body='{'")
    db.close()
    with pytest.raises(StoreFailed, match="a message of context talk cannot be read"):
        store.messages("talk")
    store.close()

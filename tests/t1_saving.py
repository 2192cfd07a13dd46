"""How ended requests reach the store: a real store, no worker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from aiosd.access.permissions import Permissions
from aiosd.context.contexts import Contexts
from aiosd.database.store import Store
from aiosd.errors import StoreFull
from aiosd.handlers.table import SPECS
from aiosd.scheduler.saving import Saving
from aiosd.syscall.chat import GREEDY, Chat
from aiosd.syscall.request import Request, State
from tests.running import wait_until


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path, SPECS)
    yield store
    store.close()


@pytest.fixture
def told() -> list[int]:
    return []


@pytest.fixture
def saving(store: Store, told: list[int]) -> Saving:
    contexts = Contexts(store, Permissions(store), 1 << 20)
    return Saving(store, contexts, 100, lambda request: told.append(request.id))


def ended(store: Store, id: int, text: str = "fig") -> Request:
    request = Request(id, 0, "", "/models/m/llm", Chat(({"role": "user", "content": "?"},), GREEDY, "m"))
    store.add_request(request)
    request.state, request.finished_s, request.text = State.DONE, 1.0, text
    return request


def stored(store: Store, id: int) -> State:
    request = store.request(id)
    assert request is not None
    return request.state


def test_a_request_saved_soon_is_found_at_once_and_stored_later(
    store: Store, saving: Saving, told: list[int]
) -> None:
    made = [ended(store, id) for id in (1, 2, 3)]
    for request in made:
        saving.add(request)
    saving.soon()
    assert [saving.find(id) for id in (1, 2, 3)] == made
    assert stored(store, 1) is State.QUEUED
    saving.start()
    wait_until(lambda: told == [1, 2, 3], "all to be told")
    assert {stored(store, id) for id in (1, 2, 3)} == {State.DONE}
    assert saving.find(1) is None
    saving.stop()


def test_a_stop_stores_what_is_left(store: Store, saving: Saving, told: list[int]) -> None:
    saving.start()
    saving.add(ended(store, 1))
    saving.soon()
    saving.stop()
    assert stored(store, 1) is State.DONE
    assert told == [1]


def test_a_request_that_cannot_be_stored_blocks_no_other(
    store: Store, saving: Saving, caplog: pytest.LogCaptureFixture
) -> None:
    saving.add(ended(store, 1, "half a pair: \ud800"))
    saving.add(ended(store, 2))
    saving.save()
    assert stored(store, 2) is State.DONE
    assert "request 1" in caplog.text
    assert saving.find(1) is None


def test_a_request_that_met_a_full_disk_is_stored_with_the_next(
    store: Store, saving: Saving, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise StoreFull("the disk is full", "free some space")

    saving.add(ended(store, 1))
    with monkeypatch.context() as full:
        full.setattr(store, "finish_request", refuse)
        saving.save()
    assert saving.find(1) is not None
    saving.add(ended(store, 2))
    saving.save()
    assert stored(store, 1) is stored(store, 2) is State.DONE

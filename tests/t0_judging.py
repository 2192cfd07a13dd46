"""Judges of schemas: they stay, one that is ended is replaced, and users take turns."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import psutil
import pytest

from aiosd.errors import Busy
from aiosd.host import subuids
from aiosd.syscall import grammar, judging
from aiosd.syscall.judging import JUDGES, Court
from tests.running import together, wait_until

SLOW = json.dumps({"allOf": [{"type": "string", "pattern": f".*a{i}.*"} for i in range(26)]})
MODULE = "aiosd.syscall.grammar"


def new(i: int) -> str:
    return json.dumps({"type": "object", "properties": {f"p{i}": {"type": "string"}}})


def judges() -> set[int]:
    children = psutil.Process().children()
    return {
        child.pid
        for child in children
        if child.status() != psutil.STATUS_ZOMBIE and MODULE in child.cmdline()
    }


def test_a_new_schema_costs_no_new_process() -> None:
    court = Court(MODULE)
    before = judges()
    assert court.verdict(new(0)) == ""
    [judge] = judges() - before
    assert [court.verdict(new(i)) for i in range(1, 50)] == [""] * 49
    assert judges() - before == {judge}
    assert "no value" in (court.verdict('{"enum": []}') or "")


def test_a_schema_that_takes_too_long_ends_its_judge_and_no_other_schema() -> None:
    court = Court(MODULE)
    before = judges()
    assert court.verdict(SLOW) is None
    assert court.verdict(new(0)) == ""
    assert len(judges() - before) == 1


def test_a_judge_that_is_killed_is_replaced() -> None:
    court = Court(MODULE)
    before = judges()
    court.verdict(new(0))
    [judge] = judges() - before
    psutil.Process(judge).kill()
    assert court.verdict(new(1)) == ""
    assert judges() - before - {judge}


@pytest.mark.slow
def test_who_asks_for_very_much_delays_nobody_else() -> None:
    court, ended = Court(MODULE), list[int]()
    many = 3

    def slow() -> None:
        with judging.of(1000):
            assert court.verdict(SLOW) is None
            ended.append(1)

    threads = [threading.Thread(target=slow) for _ in range(many)]
    for thread in threads:
        thread.start()
    wait_until(lambda: court.held(1000) == 1, "the first to be judged")
    with judging.of(1001):
        assert [court.verdict(new(i)) for i in range(20)] == [""] * 20
    assert len(ended) < many
    assert court.held(1000) < JUDGES
    for thread in threads:
        thread.join()


def test_who_waits_no_longer_finds_the_verdict_when_asking_again() -> None:
    court = Court(MODULE)
    with judging.of(1000, 0.0), pytest.raises(judging.Later):
        court.verdict(SLOW)
    wait_until(lambda: court.held(1000) == 1, "the schema to be judged")
    wait_until(lambda: court.held(1000) == 0, "the verdict")
    with judging.of(1000, 0.0):
        assert court.verdict(SLOW) is None


def test_one_person_has_no_more_questions_open_than_a_bound(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also not with many uids: subuid(5) lends them to one user."""
    (tmp_path / "subuid").write_text("1000:200000:10\n")
    monkeypatch.setattr(subuids, "_subuids", subuids.SubUids(tmp_path / "subuid"))
    court = Court(MODULE)
    for number in range(judging.OPEN_MOST):
        with judging.of(200000 + number % 10 if number else 1000, 0.0), pytest.raises(judging.Later):
            court.verdict(new(number) if number else SLOW)
    with judging.of(1000), pytest.raises(Busy, match="64 new schemas of yours"):
        court.verdict(new(64))
    assert court.held(1000) == 1
    with judging.of(1001):
        assert court.verdict(new(64)) == ""


def test_many_at_once_are_all_judged() -> None:
    court, said = Court(MODULE), list[str | None]()

    def ask(uid: int, i: int) -> None:
        with judging.of(uid):
            said.append(court.verdict(new(100 * uid + i)))

    together(*(lambda uid=uid, i=i: ask(uid, i) for uid in range(4) for i in range(10)))
    assert said == [""] * 40
    assert court.held(0) == 0


def test_a_schema_that_was_seen_costs_nothing() -> None:
    grammar.refused.cache_clear()
    grammar.refused(new(7))
    hits = grammar.refused.cache_info().hits
    grammar.refused(new(7))
    assert grammar.refused.cache_info().hits == hits + 1

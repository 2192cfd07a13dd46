"""Policies are pure and their answers are checked: whatever one says, nobody is lost."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiosd import policy
from aiosd.errors import BadValue
from aiosd.policies import Functions, Job, fifo, rr
from aiosd.policies.placement import Seat, place
from aiosd.policy import POLICIES, Chooser


def job(id: int, queued_s: float = 0.0, slice_tokens: int = 0) -> Job:
    return Job(id, 0, "a", 0, queued_s, slice_tokens, slice_tokens, None)


JOBS = st.lists(
    st.builds(job, st.integers(1, 50), st.floats(0, 9), st.integers(0, 99)),
    unique_by=lambda j: j.id,
    max_size=9,
)


@given(JOBS, JOBS, st.integers(1, 99), st.sampled_from(sorted(POLICIES)))
def test_every_policy_answers_with_an_id_it_was_shown(
    waiting: list[Job], running: list[Job], quantum: int, name: str
) -> None:
    picked = POLICIES[name].pick(waiting, running, 10.0)
    assert (picked is None) == (not waiting)
    assert picked is None or picked in {j.id for j in waiting}
    yields = POLICIES[name].preempt(waiting, running, quantum, 10.0)
    assert yields is None or yields in {j.id for j in running}


def test_fifo_takes_who_came_first_and_never_preempts() -> None:
    assert fifo.pick([job(5), job(2), job(9)], [], 0) == 2
    assert fifo.preempt([job(5)], [job(1, slice_tokens=999)], 1, 0) is None


def test_rr_takes_who_waits_longest_and_preempts_a_spent_quantum_only() -> None:
    assert rr.pick([job(5, 3.0), job(2, 4.0)], [], 9) == 5
    running = [job(1, slice_tokens=7), job(2, slice_tokens=12), job(3, slice_tokens=10)]
    assert rr.preempt([job(5)], running, 10, 9) == 2
    assert rr.preempt([job(5)], running, 20, 9) is None
    assert rr.preempt([], running, 10, 9) is None


def test_a_job_goes_where_its_kv_is_else_to_the_least_loaded() -> None:
    seats = [Seat(0, 3), Seat(1, 1), Seat(2, 1)]
    assert place(seats, 0) == 0
    assert place(seats, 7) == 1
    assert place(seats, None) == 1
    assert place([], 0) is None


def boom(*_: object) -> int:
    raise ZeroDivisionError


@pytest.mark.parametrize("answer", [lambda *_: 99, lambda *_: None, lambda *_: "x", boom])
def test_a_bad_policy_is_answered_by_fifo_and_said_once(
    answer: object, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(policy.POLICIES, "bad", Functions(answer, answer))  # type: ignore[arg-type]
    chooser = Chooser("bad")
    ready = {7: job(7), 4: job(4)}
    running: Sequence[Job] = [job(1)]
    assert chooser.pick(ready, running) == 4
    assert chooser.pick(ready, running) == 4
    assert chooser.preempt(ready, running, 1) is None
    assert sum("fifo decides" in r.message for r in caplog.records) == 1


def test_an_unknown_policy_is_refused_and_the_old_one_stays() -> None:
    chooser = Chooser("rr")
    with pytest.raises(BadValue, match="no policy"):
        chooser.switch("best")
    assert chooser.name == "rr"

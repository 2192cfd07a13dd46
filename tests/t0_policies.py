"""Policies are pure, and the scheduler checks their answers, so that no faulty policy loses a request."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiosd.config import config
from aiosd.errors import BadValue
from aiosd.policies import Job, Policy, View, edf, fair, fifo, las, priority, residence, rr
from aiosd.policies.interception import Away
from aiosd.policies.interception import place as place_kv
from aiosd.policies.placement import Seat, place
from aiosd.policies.residence import Full, Resident
from aiosd.scheduler.chooser import BUILT_IN, Chooser, read_all
from aiosd.scheduler.ledger import OUTPUT_WEIGHT, Ledger
from aiosd.syscall.chat import Chat
from aiosd.syscall.request import Request
from aiosd.syscall.sampling import Sampling
from aiosd.syscall.toolcall import ToolCall
from tests.manual import blocks

NOWHERE = Path("/nonexistent")


def job(id: int, queued_s: float = 0.0, slice_tokens: int = 0, **facts: object) -> Job:
    plain = Job(id, 0, f"a{id}", 0, queued_s, slice_tokens, slice_tokens, None)
    return replace(plain, **facts)  # type: ignore[arg-type]


def view(
    waiting: Sequence[Job],
    running: Sequence[Job] = (),
    now: float = 10.0,
    quantum: int = 10,
    users: Mapping[int, float] | None = None,
    agents: Mapping[tuple[int, str], float] | None = None,
) -> View:
    return View(waiting, running, now, quantum, users or {}, agents or {})


class Ranks(Protocol):
    @property
    def rank(self) -> Callable[[View, Job], Any]: ...


def first(policy: Ranks, seen: View) -> int | None:
    """The id of the job that starts next."""
    best = min(seen.waiting, key=lambda job: policy.rank(seen, job), default=None)
    return best.id if best else None


JOBS = st.lists(
    st.builds(
        Job,
        id=st.integers(1, 50),
        uid=st.integers(0, 3),
        agent=st.sampled_from("abc"),
        nice=st.integers(-20, 19),
        queued_s=st.floats(0, 9),
        served_tokens=st.integers(0, 99),
        slice_tokens=st.integers(0, 99),
        deadline_s=st.none() | st.floats(0, 99),
    ),
    unique_by=lambda j: j.id,
    max_size=9,
)


@given(JOBS, JOBS, st.integers(1, 99), st.sampled_from(sorted(BUILT_IN)))
def test_every_policy_answers_with_an_id_it_was_shown(
    waiting: list[Job], running: list[Job], quantum: int, name: str
) -> None:
    seen = view(waiting, running, quantum=quantum, users={0: 5.0, 1: 7.0}, agents={(0, "a"): 300.0})
    picked = first(BUILT_IN[name], seen)
    assert (picked is None) == (not waiting)
    assert picked is None or picked in {j.id for j in waiting}
    yields = BUILT_IN[name].preempt(seen)
    assert yields is None or yields in {j.id for j in running}
    assert yields is None or waiting


def test_fifo_runs_the_first_job_and_never_preempts() -> None:
    assert first(fifo, view([job(5), job(2), job(9)])) == 2
    assert fifo.preempt(view([job(5)], [job(1, slice_tokens=999)], quantum=1)) is None


def test_rr_runs_the_longest_waiting_job_and_preempts_only_a_spent_quantum() -> None:
    assert first(rr, view([job(5, 3.0), job(2, 4.0)])) == 5
    running = [job(1, slice_tokens=7), job(2, slice_tokens=12), job(3, slice_tokens=10)]
    assert rr.preempt(view([job(5)], running)) == 2
    assert rr.preempt(view([job(5)], running, quantum=20)) is None
    assert rr.preempt(view([], running)) is None


def test_priority_takes_the_lowest_nice_and_ageing_saves_the_others() -> None:
    assert first(priority, view([job(1, 9.0), job(2, 9.0, nice=-5)])) == 2
    patient = job(1, 0.0, nice=19)
    assert first(priority, view([patient, job(2, 99.0)], now=100.0)) == 1
    low = job(3, nice=5, slice_tokens=1)
    assert priority.preempt(view([job(4, 10.0)], [low])) == 3, "a better one at once"
    assert priority.preempt(view([job(4, 10.0, nice=6)], [low])) is None
    assert priority.preempt(view([job(4, 0.0, nice=6)], [low], now=100.0)) is None
    spent = replace(low, slice_tokens=10)
    assert priority.preempt(view([job(4, 0.0, nice=6)], [spent], now=100.0)) == 3, (
        "aged, at the quantum's end"
    )


def test_las_runs_the_least_served_run_and_ageing_saves_the_long_one() -> None:
    long, short = job(1, 10.0, agent="long"), job(2, 10.0, agent="short")
    got = {(0, "long"): 5000.0, (0, "short"): 15.0}
    assert first(las, view([long, short], agents=got)) == 2
    assert first(las, view([replace(long, queued_s=-200.0), short], agents=got)) == 1
    running = replace(long, slice_tokens=10)
    assert las.preempt(view([short], [running], agents=got)) == 1
    assert las.preempt(view([short], [replace(running, slice_tokens=9)], agents=got)) is None
    assert las.preempt(view([short], [running], agents={(0, "long"): 16.0, (0, "short"): 15.0})) is None


def test_fair_runs_the_least_served_user_then_his_least_served_agent() -> None:
    mine, his = job(1, 10.0, uid=1), job(2, 10.0, uid=2)
    assert first(fair, view([mine, his], users={1: 50.0, 2: 49.0})) == 2
    other = job(3, 10.0, uid=2, agent="fresh")
    assert first(fair, view([his, other], users={2: 49.0}, agents={(2, "a2"): 900.0})) == 3
    running = replace(mine, slice_tokens=10)
    assert fair.preempt(view([his], [running], users={1: 50.0, 2: 49.0})) == 1
    assert fair.preempt(view([his], [running], users={1: 49.0, 2: 50.0})) is None


def test_edf_takes_the_earliest_deadline_that_can_be_met_and_still_serves_the_others() -> None:
    soon, later, missed, none = (
        job(i, deadline_s=d) for i, d in enumerate([12.0, 15.0, 5.0, None], 1)
    )  # fmt: skip
    assert first(edf, view([none, missed, later, soon])) == 1
    assert first(edf, view([none, missed, later])) == 2
    assert first(edf, view([none, missed])) == 3, "then in order of arrival"
    assert edf.preempt(view([soon], [later, none])) == 4
    assert edf.preempt(view([later], [soon])) is None


def request(uid: int, nice: int = 0) -> Request:
    return Request(1, uid, "a", "/x", Chat((), Sampling(), "m", nice=nice))


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(1, 64)), max_size=200), st.integers(1, 64))
def test_fair_keeps_two_backlogged_users_within_the_papers_bound(
    arrivals: list[tuple[int, int]], batch: int
) -> None:
    """VTC theorem 4.4: while both wait, |W_1 - W_2| <= 2 max(w_p L_input, w_q M), M tokens in a batch."""
    ledger, bound = Ledger(), 2 * max(64.0, OUTPUT_WEIGHT * batch)
    users = {0: request(0), 1: request(1)}
    for uid in users:
        ledger.arrive(users[uid], 0.0)
    waiting = [job(1, uid=0), job(2, uid=1)]
    for _, length in arrivals:
        picked = first(fair, view(waiting, users=ledger.tokens.users))
        uid = next(j.uid for j in waiting if j.id == picked)
        ledger.charge(users[uid], input_tokens=length)
        ledger.charge(users[uid], output_tokens=batch)
        assert abs(ledger.tokens.users[0] - ledger.tokens.users[1]) <= bound


def test_a_user_back_from_idling_does_not_get_what_he_missed() -> None:
    ledger = Ledger()
    ledger.arrive(request(1), 0.0)
    ledger.charge(request(1), output_tokens=500)
    ledger.arrive(request(2), 0.0)
    assert ledger.tokens.users[2] == ledger.tokens.users[1]


def test_nice_is_a_weight_and_a_long_idle_agent_begins_a_new_run() -> None:
    ledger = Ledger()
    ledger.charge(request(1, nice=0), output_tokens=100)
    ledger.charge(request(2, nice=-3), output_tokens=100)
    assert ledger.tokens.users[2] < ledger.tokens.users[1] * 0.6
    ledger.leave(request(1), 0.0)
    ledger.arrive(request(1), 10.0)
    assert ledger.tokens.agents[1, "a"] == 100
    ledger.leave(request(1), 10.0)
    ledger.arrive(request(1), 100.0)
    assert (1, "a") not in ledger.tokens.agents


def test_a_job_goes_where_its_kv_is_else_to_the_least_loaded() -> None:
    seats = [Seat(0, 3), Seat(1, 1), Seat(2, 1)]
    assert place(seats, 0) == 0
    assert place(seats, 7) == 1
    assert place(seats, None) == 1
    assert place([], 0) is None


def boom(*_: object) -> int:
    raise ZeroDivisionError


@pytest.mark.parametrize("answer", [lambda *_: 99, lambda *_: "x", boom])
def test_fifo_replaces_a_bad_policy_with_one_log_message(
    answer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(BUILT_IN, "bad", Policy(boom, answer))
    chooser = Chooser("bad", NOWHERE)
    seen = view([job(7), job(4)], [job(1)])
    assert [j.id for j in chooser.order(seen, 1)] == [4]
    assert [j.id for j in chooser.order(seen, 9)] == [4, 7]
    assert chooser.preempt(seen) is None
    assert sum("fifo decides" in r.message for r in caplog.records) == 1


LIFO = "def rank(view, job): return -job.id\ndef preempt(view): return None\n"


def test_administrators_policies_are_used_when_nobody_else_can_write_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tmp_path.chmod(0o755)
    for name, text in {
        "lifo": LIFO, "open": LIFO, "broken": "def rank(", "half": "def rank(view, job): ...", "fifo": LIFO,
    }.items():  # fmt: skip
        (tmp_path / f"{name}.py").write_text(text)
        (tmp_path / f"{name}.py").chmod(0o666 if name == "open" else 0o644)
    assert list(read_all(tmp_path)) == ["lifo"]
    said = " ".join(r.message for r in caplog.records)
    for why in ("chmod go-w", "never closed", "must define rank", "built-in policy has this name"):
        assert why in said
    chooser = Chooser("lifo", tmp_path)
    assert chooser.order(view([job(1), job(2)]), 1)[0].id == 2
    (tmp_path / "lifo.py").unlink()
    chooser.load(tmp_path)
    assert chooser.name == "fifo"
    (tmp_path / "lifo.py").write_text(LIFO)
    tmp_path.chmod(0o777)
    assert read_all(tmp_path) == {}
    if os.geteuid() == 0:
        tmp_path.chmod(0o755)
        os.chown(tmp_path / "lifo.py", 4242, 4242)
        assert read_all(tmp_path) == {}


def test_an_unknown_policy_is_refused_and_the_old_one_stays() -> None:
    chooser = Chooser("rr", NOWHERE)
    with pytest.raises(BadValue, match="no policy"):
        chooser.switch("best")
    assert chooser.name == "rr"


def test_kv_of_a_waiting_agent_goes_where_it_wastes_least() -> None:
    calc = Away(expected_s=0.02, bytes=1 << 20, others_bytes=4 << 20, recompute_s=0.5, move_s=0.01, used=0.95)
    assert place_kv(calc) == "keep"
    person = replace(calc, expected_s=60.0)
    assert place_kv(person) == "host"
    assert place_kv(replace(person, used=0.3)) == "keep"  # there is room enough
    assert place_kv(replace(person, recompute_s=0.001)) == "drop"


@given(st.builds(Away, *[st.floats(0, 1e6), st.integers(0, 1 << 40), st.integers(0, 1 << 40)],
                 st.floats(0, 1e6), st.floats(0, 1e6), st.floats(0, 1)))  # fmt: skip
def test_kv_of_a_waiting_agent_always_has_a_place(away: Away) -> None:
    assert place_kv(away) in ("keep", "host", "drop")
    assert place_kv(replace(away, expected_s=0.0)) == "keep"


def test_the_example_of_aios_policy_7_loads_and_keeps_its_word(tmp_path: Path) -> None:
    example, steady = blocks("aios-policy.7", "python")
    (tmp_path / "batch.py").write_text(example.text)
    (tmp_path / "steady.py").write_text(steady.text)
    (configured,) = blocks("aios-policy.7", "toml")
    (tmp_path / "aiosd.toml").write_text(configured.text)
    chooser = Chooser(config.load(tmp_path / "aiosd.toml").scheduler.policy, tmp_path)
    batch, other = job(1, agent="batch-1", slice_tokens=1), job(2, agent="ada")
    waiting = view(waiting=[batch, other])
    assert [found.id for found in chooser.order(waiting, 2)] == [2, 1]
    assert chooser.preempt(view(waiting=[other], running=[batch])) == 1
    assert chooser.preempt(view(waiting=[batch], running=[other])) is None
    assert chooser.preempt(view(waiting=[other], running=[job(3, agent="bob")])) is None
    lately, before = resident("lately", idle_s=10.0), resident("before", idle_s=700.0)
    assert chooser.leave(full(lately)) == ["lately"], "the built-in rule"
    chooser.switch("steady")
    assert chooser.leave(full(lately, before)) == ["before"]
    assert chooser.leave(full(lately)) == []


def resident(model: str, **facts: Any) -> Resident:
    usual = {"bytes": 10, "rank": 1, "pinned": False, "requests": 0, "idle_s": 100.0, "served_s": 500.0}
    return Resident(model, **{**usual, "load_s": 1.0, **facts})


def full(*residents: Resident, bytes: int = 10, free: int = 0, rank: int = 1, waited_s: float = 9.0) -> Full:
    return Full("wanted", bytes, free, rank, waited_s, residents)


def test_the_longest_idle_models_leave_and_no_more_than_it_takes() -> None:
    old, new = resident("old", idle_s=90.0), resident("new", idle_s=5.0)
    assert residence.leave(full(new, old)) == ["old"]
    assert residence.leave(full(new, old, bytes=15)) == ["old", "new"]
    assert residence.leave(full(new, resident("small", bytes=1, idle_s=90.0))) == ["new"]
    assert residence.leave(full(new, old, free=10)) == [], "there is room"
    assert residence.leave(full(new, old, bytes=50)) == [], "it would be in vain"
    assert residence.leave(full(resident("pinned", pinned=True))) == []


def test_a_model_stays_four_times_as_long_as_its_load_took_and_a_busy_one_for_a_turn() -> None:
    def goes(waited_s: float = 9.0, rank: int = 1, **facts: Any) -> bool:
        return bool(residence.leave(full(resident("x", **facts), waited_s=waited_s, rank=rank)))

    assert not goes(served_s=1.9, load_s=0.1)
    assert goes(served_s=2.1, load_s=0.1)
    assert not goes(served_s=39.0, load_s=10.0)
    assert not goes(requests=1, served_s=29.0)
    assert goes(requests=1, served_s=31.0)
    assert not goes(requests=1, served_s=31.0, waited_s=1.0)
    assert not goes(requests=1, served_s=1e6, rank=0), "a user's own model waits"
    assert not goes(idle_s=59.0, rank=0)
    assert goes(idle_s=61.0, rank=0)
    assert goes(requests=1, served_s=5.0) is False
    assert residence.leave(full(resident("users", requests=1, rank=0, served_s=5.0))) == ["users"]


@pytest.mark.parametrize("answer", ["['pinned']", "['gone']", "1 / 0", "7"])
def test_a_policy_that_lets_the_wrong_models_leave_is_replaced(tmp_path: Path, answer: str) -> None:
    text = f"from aiosd.policies.fair import preempt, rank\ndef leave(full):\n    return {answer}\n"
    (tmp_path / "bad.py").write_text(text)
    chooser = Chooser("bad", tmp_path)
    assert chooser.leave(full(resident("pinned", pinned=True), resident("idle"))) == ["idle"]


def test_a_policy_that_lets_too_few_models_leave_lets_none_leave(tmp_path: Path) -> None:
    text = "from aiosd.policies.fair import preempt, rank\ndef leave(full):\n    return ['idle']\n"
    (tmp_path / "few.py").write_text(text)
    assert Chooser("few", tmp_path).leave(full(resident("idle"), bytes=11)) == []


def call(uid: int) -> Request:
    return Request(1, uid, "a", "/x", ToolCall("shell", "{}", (0,)))


def test_a_free_place_of_a_tool_goes_to_who_has_fewer_seconds_and_tokens_do_not_count() -> None:
    ledger = Ledger()
    ledger.charge(request(2), output_tokens=1000)  # a user of a model is no user of tools yet
    ledger.arrive(call(1), 0.0)
    ledger.charge_call(call(1), 8.0)
    ledger.arrive(call(2), 0.0)
    waiting = [job(1, uid=1), job(2, uid=2)]
    assert first(fair, view(waiting, users=ledger.users_of_calls([]))) == 1, "a newcomer starts at the level"
    assert first(fair, view(waiting, users=ledger.users_of_calls([call(1)]))) == 2, "a running call counts"
    ledger.charge_call(call(1), 2.0)
    assert first(fair, view(waiting, users=ledger.users_of_calls([]))) == 2

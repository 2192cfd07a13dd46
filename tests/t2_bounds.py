"""Quotas of users and agents, at one time and per minute; and very long queues."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from aiosd.access.caller import Caller
from aiosd.access.permissions import Permission
from aiosd.agents import lifetime
from aiosd.config.config import UNBOUNDED, Config, Quota
from aiosd.errors import BadRequest, BadValue, Busy, NotFound, OverQuota
from aiosd.fs.burden import CROWD, THREADS_MOST, Burden
from aiosd.fs.files import Opening
from aiosd.fs.transaction import Transaction
from aiosd.host import subuids, usage
from aiosd.host.subuids import owner
from aiosd.scheduler import delivery
from aiosd.scheduler.handler import Source
from aiosd.scheduler.ledger import Buckets
from aiosd.scheduler.limits import Quotas
from aiosd.syscall import grammar, judging
from aiosd.syscall.request import Request, State
from aiosd.syscall.spec import Spec
from aiosd.syscall.toolcall import ToolCall
from aiosd.tools.run.runner import CALLS_MOST
from tests.running import REPOSITORY, wait_until
from tests.t2_scheduler import LONG_S, ME, MakeKernel, ask, ended

EVE = Caller(4242, 4242, os.getpid())


def test_a_users_table_wins_over_his_groups_and_the_most_generous_group_over_the_default() -> None:
    root = pwd.getpwuid(0).pw_name
    tables = {
        ("user", root): {"contexts": 7},
        ("user", "nobody-of-this-name"): {"contexts": 1},
        ("group", "4242"): {"contexts": 5, "running_requests": 2},
        ("group", "4243"): {"contexts": 6, "running_requests": 0},
        ("agent", "ada"): {"tokens_per_minute": 0, "queued_requests": 3},
    }
    quotas = Quotas(Config(quota=Quota(contexts=9, running_requests=4), quotas=tables))
    assert quotas.of(Caller(0, 4242, 1)).contexts == 7
    assert quotas.of(EVE).contexts == 5
    assert quotas.of(EVE).running_requests == 2
    both = quotas.of(Caller(1, 4242, 1, frozenset({4243})))
    assert (both.contexts, both.running_requests) == (6, UNBOUNDED)
    assert quotas.of(Caller(1, 1, 1)) == Quota(contexts=9, running_requests=4, tokens_per_minute=UNBOUNDED)
    assert quotas.of_agent("ada") == {"tokens_per_minute": UNBOUNDED, "queued_requests": 3}
    assert quotas.of_agent("bob") == {}


def test_a_bucket_fills_evenly_and_can_be_overdrawn() -> None:
    buckets = Buckets()
    buckets.spend("ada", 5)  # before the first question about her bound
    assert buckets.left("ada", 60, 0.0) == 60
    buckets.spend("ada", 90)
    assert buckets.left("ada", 60, 10.0) == -20
    assert buckets.left("ada", 60, 35.0) == 5
    assert buckets.left("ada", 60, 900.0) == 60
    buckets.forget("ada")
    assert buckets.left("ada", 120, 900.0) == 120


def test_tokens_a_minute_are_refused_at_admission_and_what_runs_goes_on(make_kernel: MakeKernel) -> None:
    kernel = make_kernel("[quota]\ntokens_per_minute = 50\n[quota.agent.a2]\ntokens_per_minute = 20\n")
    kernel.start()
    first = ask(kernel, "x" * 30, max_tokens=40)
    assert ended(first).state is State.DONE
    with pytest.raises(Busy, match="you have used the 50 tokens") as refused:
        ask(kernel, "x")
    assert "try again in" in refused.value.hint
    agent = kernel.agents.add("a2")
    source = Source("/agents/a2/syscall/llm", agent)
    request = kernel.admission.submit(EVE, source, b'{"prompt":"xx","max_tokens":9,"ignore_eos":true}')
    assert ended(request).state is State.DONE
    with pytest.raises(Busy, match="agent a2 has used the 20"):
        kernel.admission.check(EVE, source, 1)


def test_a_user_at_his_running_bound_waits_and_others_pass(make_kernel: MakeKernel) -> None:
    kernel = make_kernel(f"[quota.user.{ME.uid}]\nrunning_requests = 2\n")
    kernel.start()
    mine = [ask(kernel, f"mine {i}", max_tokens=300) for i in range(5)]
    wait_until(lambda: sum(r.state is State.RUNNING for r in mine) == 2, "two to run", LONG_S)
    agent = kernel.agents.add("eve")
    body = b'{"prompt":"x","max_tokens":3}'
    hers = kernel.admission.submit(EVE, Source("/agents/eve/syscall/llm", agent), body)
    assert ended(hers).state is State.DONE
    assert sum(r.state is State.RUNNING for r in mine) <= 2
    assert [ended(r).state for r in mine] == [State.DONE] * 5


def test_queued_requests_of_an_agent(make_kernel: MakeKernel) -> None:
    kernel = make_kernel("[quota.agent.a0]\nqueued_requests = 1\n")
    ask(kernel, "x")
    agent = kernel.agents.get("a0")
    with pytest.raises(Busy, match="1 requests of agent a0"):
        kernel.admission.submit(ME, Source("/agents/a0/syscall/llm", agent), b"y")
    ask(kernel, "of another agent")


def test_one_person_never_takes_the_last_places_of_the_queue(
    make_kernel: MakeKernel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also not with many uids: subuid(5) lends them to one user."""
    (tmp_path / "subuid").write_text("4242:200000:10\n")
    monkeypatch.setattr(subuids, "_subuids", subuids.SubUids(tmp_path / "subuid"))
    kernel = make_kernel("[limits]\nqueued_requests = 16\n")
    source = Source("/models/random/llm", target="random")

    def write(uid: int) -> int:
        count = 0
        try:
            while count < 20:
                kernel.admission.submit(Caller(uid, uid, os.getpid()), source, b"x")
                count += 1
        except Busy as error:
            assert "kept for other users" in str(error)
        return count

    assert [write(uid) for uid in (4242, 200001, 200002, 5001, 5002, 5003)] == [8, 0, 0, 4, 2, 1]
    assert write(4242) == 0
    for request in list(kernel.scheduler.unfinished()):
        if request.uid == 5001:
            kernel.ending.cancel(request)
    assert write(5004) == 3
    for _ in range(16 - len(kernel.scheduler.unfinished())):  # root has no share, but the bound
        kernel.admission.submit(Caller(0, 0, os.getpid()), source, b"x")
    with pytest.raises(Busy, match="16 requests wait"):
        kernel.admission.submit(Caller(0, 0, os.getpid()), source, b"x")


def test_pending_bytes_are_those_of_memory_and_of_one_person(
    make_kernel: MakeKernel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "subuid").write_text("4242:200000:10\n")
    monkeypatch.setattr(subuids, "_subuids", subuids.SubUids(tmp_path / "subuid"))
    kernel = make_kernel("[limits]\npending_bytes = 100000\n[quota]\npending_bytes = 20000\n")
    source, pending = Source("/models/random/llm", target="random"), kernel.scheduler.queue.pending_bytes
    body = b'{"prompt": "x", "stop": [' + b'"a",' * 9 + b'"a"]}'
    for uid in (4242, 200001):
        kernel.limits.reserve(Caller(uid, uid, 0), len(body))
        kernel.admission.submit(Caller(uid, uid, os.getpid()), source, body)
    assert pending[4242] > 2 * (len(body) + 10 * 64)
    assert pending.keys() == {4242}
    for uid in (1001, 1002, 1003, 1004):
        kernel.limits.reserve(Caller(uid, uid, 0), 19_000)
    with pytest.raises(Busy):  # half of what others leave
        kernel.limits.reserve(Caller(1005, 1005, 0), 15_000)
    kernel.limits.reserve(Caller(1005, 1005, 0), 5_000)
    for request in list(kernel.scheduler.unfinished()):
        kernel.ending.cancel(request)
    assert 4242 not in pending


def test_the_place_in_a_queue_is_the_policys(make_kernel: MakeKernel) -> None:
    kernel = make_kernel("[scheduler]\npolicy = 'priority'\nquantum = 1000\n[engine]\nmax_running = 1\n")
    kernel.start()
    running = ask(kernel, "x", max_tokens=600)
    wait_until(lambda: bool(running.tokens), "a token", LONG_S)
    late, soon = ask(kernel, "y", max_tokens=1), ask(kernel, "z", max_tokens=1)
    agent = kernel.agents.add("low")
    kernel.agents.change(agent, nice=5)
    last = kernel.admission.submit(ME, Source("/agents/low/syscall/llm", agent), b"w")
    wait_until(lambda: kernel.scheduler.position(last) is not None, "the forecast")
    places = [kernel.scheduler.position(r) for r in (running, late, soon, last)]
    assert [p and p[0] for p in places] == [None, 0, 1, 2]
    assert all(p is None or p[1] >= 0 for p in places)


def test_a_long_queue_is_served_whole_and_new_short_runs_are_seen_at_once(make_kernel: MakeKernel) -> None:
    """The queue is longer than the window that a policy sees."""
    kernel = make_kernel("[scheduler]\npolicy = 'las'\n[engine]\nmax_running = 4\n")
    kernel.start()
    many = [ask(kernel, f"{i}", max_tokens=3) for i in range(150)]
    assert [ended(r).state for r in many] == [State.DONE] * 150


def test_a_policy_that_does_not_exist_is_no_reload(make_kernel: MakeKernel) -> None:
    with pytest.raises(BadValue, match="no policy 'best'"):
        make_kernel("[scheduler]\npolicy = 'best'\n")


def test_who_submits_a_slow_schema_stops_nobody_elses_request(make_kernel: MakeKernel) -> None:
    """Whatever the schema is called in the JSON, and whether or not a write judged it before."""
    kernel = make_kernel()
    kernel.start()
    source = Source("/models/random/llm", target="random")
    slow = {"allOf": [{"type": "string", "pattern": f".*a{i}.*b"} for i in range(26)]}
    named = {"type": "json_schema", "json_schema": {"name": "slow", "schema": slow}}
    body = json.dumps({"prompt": "x", "response_format": named}).replace("format", r"f\u006frmat", 1).encode()

    def write() -> None:
        with judging.of(EVE.uid):
            assert ended(kernel.admission.submit(EVE, source, body)).state is State.FAILED

    thread = threading.Thread(target=write)
    thread.start()
    wait_until(lambda: grammar.COURT.held(EVE.uid) == 1, "the schema to be judged")
    mine = kernel.admission.submit(ME, source, b'{"prompt": "x", "max_tokens": 1}')
    assert grammar.COURT.held(EVE.uid) == 1
    thread.join()
    assert ended(mine).state is State.DONE


def test_a_name_that_is_taken_away_while_its_request_is_judged_is_not_used(
    make_kernel: MakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = make_kernel()
    kernel.start()
    agent = kernel.agents.add("eve")
    source, judge = Source("/agents/eve/syscall/llm", agent), kernel.handlers["llm"].judge
    kernel.context_objects.add("talk", EVE)
    kernel.agents.change(agent, context="talk")

    def judged(caller: Caller, source: Source, body: bytes) -> Spec:
        found = judge(caller, source, body)
        kernel.permissions.set("/contexts/talk", Permission(ME.uid, ME.gid, 0o700))
        return found

    monkeypatch.setattr(kernel.handlers["llm"], "judge", judged)
    request = ended(kernel.admission.submit(EVE, source, b"x"))
    assert (request.state, request.error.split(";")[0]) == (State.FAILED, "you may not continue context talk")


def test_writes_of_slow_schemas_keep_others_from_the_file_for_a_part_of_the_time(
    make_kernel: MakeKernel,
) -> None:
    kernel = make_kernel()
    source, began = Source("/models/random/llm", target="random"), time.monotonic()
    for i in range(5):
        slow = {"allOf": [{"type": "string", "pattern": f".*a{i}.*b{j}"} for j in range(26)]}
        named = {"type": "json_schema", "json_schema": {"name": "slow", "schema": slow}}
        kernel.admission.look(EVE, source, json.dumps({"prompt": "x", "response_format": named}).encode())
    assert time.monotonic() - began < 2.5  # 5 s, were each verdict waited for
    bad = {"type": "json_schema", "json_schema": {"name": "none", "schema": {"enum": []}}}
    body = json.dumps({"prompt": "x", "response_format": bad}).encode()
    with pytest.raises(BadRequest, match="no value"):
        kernel.admission.look(ME, source, body)


def test_a_write_does_not_wait_for_a_submission_through_the_same_open_file(make_kernel: MakeKernel) -> None:
    """The kernel would let all writes to the file wait, also those of others."""
    kernel = make_kernel()
    file = Transaction(admission=kernel.admission, source=Source("/models/random/llm", target="random"))
    handle = file.open(Opening(Caller(4243, 4243, os.getpid()), os.O_RDWR, "/models/random/llm"))
    slow = {"allOf": [{"type": "string", "pattern": f".*c{j}.*b"} for j in range(26)]}
    named = {"type": "json_schema", "json_schema": {"name": "slow", "schema": slow}}
    handle.write(json.dumps({"prompt": "x", "response_format": named}).encode() + b" ", 0)
    thread = threading.Thread(target=handle.readable)
    thread.start()
    wait_until(lambda: grammar.COURT.held(4243) == 1, "the schema to be judged")
    with pytest.raises(Busy, match="another thread submits"):
        handle.write(b"x", 0)
    assert grammar.COURT.held(4243) == 1
    thread.join()


def test_one_person_never_takes_the_last_threads_of_the_daemon(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "subuid").write_text("4242:200000:10\n")
    monkeypatch.setattr(subuids, "_subuids", subuids.SubUids(tmp_path / "subuid"))
    monkeypatch.setattr(usage, "tasks_most", lambda: 2000)
    burden = Burden()

    def enter(uid: int) -> int:
        count = 0
        with suppress(Busy):
            while count < 2000:
                burden.enter(uid)
                count += 1
        return count

    assert [enter(uid) for uid in (4242, 200001, 5001, 5002)] == [750, 0, 375, 187]
    burden.leave(200001)
    assert enter(4242) == 0
    assert enter(5003) == CROWD
    assert enter(0) == 2000  # root has no bound


def test_the_unit_of_the_daemon_has_tasks_for_more_than_the_tree() -> None:
    unit = (REPOSITORY / "units/aiosd.service").read_text()
    assert int(unit.partition("TasksMax=")[2].split()[0]) >= THREADS_MOST + 4096


@pytest.fixture
def lent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """EVE's uid and some that are lent to her."""
    (tmp_path / "subuid").write_text(f"{EVE.uid}:200000:300\n")
    monkeypatch.setattr(subuids, "_subuids", subuids.SubUids(tmp_path / "subuid"))
    return [EVE.uid, *range(200000, 200300)]


def test_lent_uids_give_no_more_service(make_kernel: MakeKernel, lent: list[int]) -> None:
    """Policies see people, and so do the quotas of tokens, of running and of waiting requests."""
    eves = "running_requests = 3\nqueued_requests = 9\ntokens_per_minute = 1000"
    kernel = make_kernel(f"[quota.user.{EVE.uid}]\n{eves}\n")
    source, queue = Source("/models/random/llm", target="random"), kernel.scheduler.queue

    def write(uid: int) -> Request:
        return kernel.admission.submit(Caller(uid, uid, os.getpid()), source, b"x")

    hers, mine = [write(uid) for uid in lent[:9]], write(5001)
    with pytest.raises(Busy, match="9 requests of yours"):
        write(lent[9])
    for request in hers[:3]:
        queue.start(request, 0)
        queue.ledger.charge(request, output_tokens=400)
    assert queue.held_back == {EVE.uid}
    shown = queue.ready("random").shown(0.0, queue.held_back, lambda jobs, n: jobs[:n])
    assert [job.id for job in shown] == [mine.id]
    assert queue.ledger.tokens.users == {EVE.uid: 2400.0, 5001: 0.0}
    for request in hers:
        kernel.ending.cancel(request)
    with pytest.raises(Busy, match="you have used the 1000 tokens"):
        write(lent[20])


def test_lent_uids_give_no_more_objects(
    make_kernel: MakeKernel, lent: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = make_kernel("[quota]\nagents = 3\ncontexts = 3\ntools = 3\nkv_bytes = 100\n")
    for objects in (kernel.agent_objects, kernel.context_objects, kernel.tool_objects):
        for i, uid in enumerate(lent[:3]):
            objects.add(f"a{i}", Caller(uid, uid, os.getpid()))
        with pytest.raises(OverQuota, match="your quota of 3"):
            objects.add("a3", Caller(lent[3], lent[3], os.getpid()))
        objects.remove("a0")
        objects.add("a3", Caller(lent[3], lent[3], os.getpid()))
    kernel.kv_budget.reserve(Caller(lent[1], 1, 1), 60)
    with pytest.raises(OverQuota):
        kernel.kv_budget.reserve(Caller(lent[2], 1, 1), 60)
    monkeypatch.setattr(lifetime, "PROCESSES_MAX", 2)
    processes = [subprocess.Popen(["sleep", "60"], user=uid) for uid in lent[1:4]]
    try:
        for process in processes[:2]:
            agent = kernel.agents.add(f"of{process.pid}")
            kernel.agent_objects._lifetimes.bind(agent, process.pid, lifetime.started_of(process.pid))
        agent, last = kernel.agents.get("a1"), processes[2].pid
        with pytest.raises(OverQuota, match="2 processes already"):
            kernel.agent_objects._lifetimes.bind(agent, last, lifetime.started_of(last))
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_one_person_never_takes_the_last_places_of_tools(make_kernel: MakeKernel, lent: list[int]) -> None:
    kernel = make_kernel()
    for name in ("a", "b"):
        kernel.tool_objects.add(name, EVE)
    tools, running = {tool.name: tool for tool in kernel.tools.all()}, list[Request]()

    def start(uid: int, tool: str) -> int:
        count = 0
        while owner(uid) not in kernel.calls.crowding(tools[tool], running) and count < CALLS_MOST:
            running.append(Request(len(running), uid, "", "", ToolCall(tool)))
            count += 1
        return count

    assert tools["calc"].limit == 4
    assert [start(uid, "calc") for uid in (EVE.uid, lent[5], 5001)] == [3, 0, 3]
    assert [start(uid, "a") for uid in (EVE.uid, lent[5], 5001)] == [123, 0, 62]
    assert start(lent[7], "b") == 0
    assert start(0, "calc") == CALLS_MOST  # root has no share, but the bounds of all


def test_requests_of_a_removed_agent_are_gone_at_once_and_deleted_one_by_one(make_kernel: MakeKernel) -> None:
    """Whoever removes an agent with very long requests keeps nobody waiting. A kill may come between."""
    kernel = make_kernel()
    agent = kernel.agents.add("eve")
    source = Source("/agents/eve/syscall/llm", agent)
    hers = [kernel.admission.submit(EVE, source, b"x" * 1000) for _ in range(3)]
    other = ask(kernel, "mine")
    for request in hers[1:]:
        kernel.ending.cancel(request)
    kernel.agent_objects.remove("eve")
    assert hers[0].state is State.CANCELLED
    for request in hers:
        with pytest.raises(NotFound):
            kernel.admission.get(request.id)
    assert [request.id for request in kernel.store.unfinished()] == [other.id]
    assert kernel.store.gone_agents() == [agent.id]  # the sweeping has not started
    kernel.stop()
    kernel = make_kernel()
    kernel.start()
    wait_until(lambda: kernel.store.gone_agents() == [], "the sweeping")
    assert kernel.store._rows("SELECT id FROM requests WHERE agent_id=?", agent.id) == []
    assert ended(kernel.admission.get(other.id)).state is State.DONE
    with pytest.raises(NotFound):
        kernel.admission.get(hers[1].id)


def test_answers_that_take_too_much_memory_end(
    make_kernel: MakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "LARGE_BYTES", 50_000)
    kernel = make_kernel("[quota]\npending_bytes = 200000\n")
    kernel.start()
    assert ended(ask(kernel, "x", max_tokens=60)).state is State.DONE
    assert ended(ask(kernel, "x", max_tokens=15, logprobs=20)).state is State.DONE
    request = ended(ask(kernel, "x", max_tokens=60, logprobs=20))
    assert (request.state, request.error.split(":")[0]) == (
        State.FAILED, "your requests and their answers take too many bytes",
    )  # fmt: skip
    assert 15 < len(request.tokens) < 60
    assert not kernel.scheduler.queue.pending_bytes

"""Contexts with real worker processes: the places of their KV, which never change a token."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from aiosd.access.caller import Caller
from aiosd.access.permissions import Permission
from aiosd.context import kvfile
from aiosd.context.contexts import Context
from aiosd.cores import snapshot
from aiosd.database.health import MARKER
from aiosd.database.store import Store
from aiosd.errors import AiosError, BadRequest, BadSnapshot, Busy, Denied, OverQuota
from aiosd.handlers.embed.spec import Embed
from aiosd.handlers.table import SPECS
from aiosd.handlers.tokenize.spec import Tokenize
from aiosd.kernel import Kernel
from aiosd.scheduler.handler import Source
from aiosd.syscall.chat import GREEDY, Chat, Loop
from aiosd.syscall.request import Request, State
from aiosd.syscall.toolcall import ToolCall
from tests.running import wait_until
from tests.t2_scheduler import LONG_S, ME, MakeKernel, ask, ended

EVE = Caller(4242, 4242, os.getpid())
DRAWN = {"temperature": 1.0, "seed": 5, "max_tokens": 40}
PENALISED = {"frequency_penalty": 0.4, "repetition_penalty": 1.2, "min_p": 0.01, "logit_bias": {"100": 2}}


def begin(kernel: Kernel, name: str = "talk", mode: int = 0o700) -> Context:
    kernel.context_objects.add(name, ME)
    kernel.permissions.set(f"/contexts/{name}", Permission(ME.uid, ME.gid, mode))
    return kernel.contexts.get(name)


def turn(kernel: Kernel, text: str, context: str = "talk", **params: object) -> Request:
    request = ended(ask(kernel, text, context, **{**DRAWN, **params}))
    assert request.state is State.DONE, request.error
    return request


def state(kernel: Kernel, context: Context) -> str:
    return kernel.residency.state(context)


def command(kernel: Kernel, context: Context, line: str, caller: Caller = ME) -> None:
    verb, _, argument = line.partition(" ")
    kernel.context_objects.command(context, caller, verb, argument)


def conversation(kernel: Kernel, between: Callable[[Context], None], name: str = "talk") -> list[list[int]]:
    context = begin(kernel, name)
    tokens = []
    for text in ("tell me something long please", "and more of it", "and the end"):
        tokens.append(turn(kernel, text, name).tokens)
        between(context)
    return tokens


def taken(kernel: Kernel, context: Context) -> int:
    export = kvfile.Export(kernel.kv_files, context)
    export.came.result(LONG_S)
    return export.file()


def test_kv_goes_down_tier_by_tier_and_comes_back_with_the_same_tokens(make_kernel: MakeKernel) -> None:
    kernel = make_kernel()
    kernel.start()
    expected = conversation(kernel, lambda context: None, "undisturbed")
    seen = []

    def down(tiers: list[str], context: Context) -> None:
        assert state(kernel, context) == "resident"
        for tier in tiers:
            command(kernel, context, f"evict {tier}")
            assert state(kernel, context) == tier
            seen.append(tier)

    for n, tiers in enumerate((["host"], ["disk"], ["host", "disk"], ["cold"], ["disk", "cold"])):
        assert conversation(kernel, partial(down, tiers), f"c{n}") == expected
    assert len(seen) == 21
    assert not list(kernel.residency.swap._folder.glob("*.new"))


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "tiers"), [
    ("kv_bytes = 80000", {"host"}),
    ("kv_bytes = 80000\nhost_kv_bytes = 0", {"disk"}),
    ("kv_bytes = 80000\nhost_kv_bytes = 0\ndisk_kv_bytes = 0", {"cold"}),
])  # fmt: skip
def test_budgets_move_the_least_recently_used(make_kernel: MakeKernel, engine: str, tiers: set[str]) -> None:
    """The model's KV takes 512 bytes for each token. A worker holds 156 tokens, four conversations need
    more."""

    def run(kernel: Kernel) -> tuple[list[Context], list[list[int]]]:
        kernel.start()
        contexts = [begin(kernel, f"c{i}") for i in range(4)]
        turns = [(c, f"{c.name} asks {r}") for r in range(2) for c in contexts]
        return contexts, [turn(kernel, text, c.name, max_tokens=9).tokens for c, text in turns]

    small = make_kernel(f"[engine]\n{engine}\n")
    contexts, tokens = run(small)
    wait_until(lambda: {state(small, c) for c in contexts[:2]} == tiers, "the budget")
    assert state(small, contexts[3]) == "resident"
    small.stop()
    ample = make_kernel("")
    for context in contexts:
        ample.context_objects.remove(context.name)
    assert run(ample)[1] == tokens


def test_a_fork_goes_its_own_way_from_the_same_past(make_kernel: MakeKernel) -> None:
    kernel = make_kernel()
    kernel.start()
    first = begin(kernel)
    turn(kernel, "the beginning of all things " * 3)
    command(kernel, first, "fork other")
    other = kernel.contexts.get("other")
    assert state(kernel, other) == "resident"
    assert kernel.permissions.get("/contexts/other") == Permission(ME.uid, ME.gid, 0o700)
    a, b = turn(kernel, "go left"), turn(kernel, "go left", "other")
    assert a.tokens == b.tokens
    assert min(a.usage.cached_tokens, b.usage.cached_tokens) > 90
    c, d = turn(kernel, "and then", max_tokens=5), turn(kernel, "or else", "other", max_tokens=5)
    assert len({c.usage.prompt_tokens, d.usage.prompt_tokens}) == 2
    for tier in ("host", "disk"):
        turn(kernel, "again", max_tokens=3)
        command(kernel, first, f"evict {tier}")
        command(kernel, first, f"fork {tier}")
        assert state(kernel, kernel.contexts.get(tier)) == tier
        command(kernel, first, "evict cold")
        assert turn(kernel, "once more", tier).usage.cached_tokens > 60
        kernel.context_objects.remove(tier)
    assert not list(kernel.residency.swap._folder.iterdir())


def test_mode_bits_decide_about_the_commands_of_a_context(make_kernel: MakeKernel) -> None:
    kernel = make_kernel()
    context = begin(kernel, mode=0o700)
    for line in ("fork mine", "truncate 0", "pin", "evict"):
        with pytest.raises(Denied):
            command(kernel, context, line, EVE)
    kernel.permissions.set("/contexts/talk", Permission(ME.uid, EVE.gid, 0o750))
    command(kernel, context, "fork mine", EVE)
    assert kernel.permissions.get("/contexts/mine") == Permission(EVE.uid, EVE.gid, 0o700)
    with pytest.raises(Denied):
        command(kernel, context, "truncate 0", EVE)
    for bad in ("fork", "fork .x", "fork a/b", "truncate", "truncate -1", "truncate x", "evict moon", "sing"):
        with pytest.raises(AiosError):
            command(kernel, context, bad)


def test_kv_is_shared_within_a_user_and_with_nobody_else(make_kernel: MakeKernel) -> None:
    """A user could learn from the time of an answer which KV was found, so nothing of another user's is
    found."""
    kernel = make_kernel()
    kernel.start()
    begin(kernel)
    secret = "my secret is long enough to fill some blocks of sixteen tokens each"
    assert turn(kernel, secret, "").usage.cached_tokens == 0
    assert turn(kernel, secret, "").usage.cached_tokens > 48
    agent = kernel.agents.add("eves")
    kernel.agents.change(agent, params={"max_tokens": 2})
    probe = kernel.admission.submit(EVE, Source("/agents/eves/syscall/llm", agent), secret.encode())
    assert ended(probe).usage.cached_tokens == 0
    shared = begin(kernel, "shared", 0o777)
    assert turn(kernel, secret, shared.name).usage.cached_tokens == 0, "a shared context has its own"


def test_truncating_and_pinning(make_kernel: MakeKernel) -> None:
    kernel = make_kernel()
    kernel.start()
    context = begin(kernel)
    first = turn(kernel, "one")
    turn(kernel, "two")
    command(kernel, context, "pin")
    command(kernel, context, "truncate 0")
    assert (kernel.contexts.messages(context), context.tokens) == ([], 0)
    assert turn(kernel, "one").tokens == first.tokens
    command(kernel, context, "truncate 1")
    assert [m["content"] for m in kernel.contexts.messages(context)] == ["one"]
    assert kernel.store.contexts()[0][4] is True
    command(kernel, context, "unpin")
    assert not context.pinned


@pytest.mark.slow
def test_a_killed_worker_makes_contexts_cold_and_no_token_changes(make_kernel: MakeKernel) -> None:
    kernel = make_kernel()
    kernel.start()
    expected = conversation(kernel, lambda context: None, "undisturbed")

    def kill(context: Context) -> None:
        os.kill(kernel.pool.workers()[0].process.pid, signal.SIGKILL)
        wait_until(lambda: state(kernel, context) == "cold", "the death")

    assert conversation(kernel, kill) == expected


@pytest.mark.slow
def test_the_next_daemon_finds_kv_on_disk(make_kernel: MakeKernel) -> None:
    before = make_kernel()
    before.start()
    context = begin(before)
    turn(before, "remember this for a long, long time")
    command(before, context, "evict disk")
    begin(before, "other")
    before.stop()
    (before.store.folder / "kv" / "999.kv").write_bytes(b"of a context that is gone")
    after = make_kernel()
    after.start()
    again = after.contexts.get("talk")
    assert state(after, again) == "disk"
    assert [f.name for f in (after.store.folder / "kv").iterdir()] == [f"{again.id}.kv"]
    assert turn(after, "and?").usage.cached_tokens == 48
    assert state(after, again) == "resident"


def test_a_damaged_file_on_disk_costs_time_and_no_token(make_kernel: MakeKernel) -> None:
    kernel = make_kernel()
    kernel.start()
    expected = conversation(kernel, lambda context: None, "undisturbed")

    def damage(context: Context) -> None:
        command(kernel, context, "evict disk")
        with (kernel.store.folder / "kv" / f"{context.id}.kv").open("r+b") as file:
            file.seek(-7, os.SEEK_END)
            file.write(b"x")

    assert conversation(kernel, damage) == expected


@pytest.mark.slow
def test_a_live_context_goes_to_another_machine_in_the_middle_of_an_answer(
    make_kernel: MakeKernel, slow_llama: Path, tmp_path: Path
) -> None:
    """Another state folder and other worker processes stand for another machine."""
    here = make_kernel("", slow_llama)
    here.start()
    context = begin(here)
    turn(here, "the first turn, which is over")
    running = ask(here, "the second one", "talk", logprobs=2, **{**DRAWN, **PENALISED, "max_tokens": 200})
    wait_until(lambda: len(running.tokens) > 20, "tokens", LONG_S)
    file = taken(here, context)
    expected = ended(running)
    assert expected.state is State.DONE
    config = replace(here.config, daemon=replace(here.config.daemon, state=str(tmp_path / "elsewhere")))
    there = Kernel(config, Path(here.models.all()[0].path))
    there.start()
    try:
        wait_until(lambda: bool(there.models.all()[0].info), "the model", LONG_S)
        copy = begin(there, "copy")
        there.kv_files.restore(copy, file)
        assert state(there, copy) == "host"
        assert there.contexts.messages(copy)[0]["content"] == "the first turn, which is over"
        agent = there.agents.add("goes-on")
        source = Source("/agents/goes-on/syscall/llm", agent)
        resumed = ended(there.admission.submit(ME, source, b'{"context":"copy","resume":true,"stream":true}'))
        assert resumed.state is State.DONE, resumed.error
        assert (resumed.tokens, resumed.text) == (expected.tokens, expected.text)
        made = len(resumed.logprobs)
        assert 0 < made < 180
        assert resumed.logprobs == expected.logprobs[-made:]
        assert resumed.usage.cached_tokens > 60
        assert there.contexts.messages(copy) == here.contexts.messages(context)
        assert not copy.unfinished
        with pytest.raises(BadRequest, match="nothing to resume"):
            there.admission.judge(ME, source, b'{"context":"copy","resume":true}')
    finally:
        there.stop()
        os.close(file)


@pytest.mark.slow
def test_a_cold_context_has_a_kv_file_too(make_kernel: MakeKernel) -> None:
    kernel = make_kernel()
    kernel.start()
    context, other = begin(kernel), begin(kernel, "other")
    turn(kernel, "hello")
    command(kernel, context, "evict cold")
    kernel.kv_files.restore(other, taken(kernel, context))
    assert kernel.contexts.messages(other) == kernel.contexts.messages(context)
    assert turn(kernel, "and?").tokens == turn(kernel, "and?", "other").tokens


def altered(file: int, change: Callable[[bytearray], object], sealed: bool) -> int:
    data = bytearray(os.pread(file, os.fstat(file).st_size, 0))
    change(data)
    new = os.memfd_create("altered")
    os.write(new, data)
    if sealed:
        snapshot.seal(new)
    return new


def test_hostile_files_are_refused_with_the_reason_and_change_nothing(make_kernel: MakeKernel) -> None:
    kernel = make_kernel()
    kernel.start()
    context, target = begin(kernel), begin(kernel, "target")
    turn(kernel, "some conversation that fills a block")
    file = taken(kernel, context)
    size = os.fstat(file).st_size
    identity = kernel.models.all()[0].info["identity"].encode()

    def swap(old: bytes, new: bytes) -> Callable[[bytearray], object]:
        def change(data: bytearray) -> None:
            assert old in data
            data[:] = data.replace(old, new, 1)

        return change

    cases: list[tuple[Callable[[bytearray], object], bool, str]] = [
        (lambda d: d.clear(), False, "not a kv file"),
        (lambda d: d.__delitem__(slice(size - 5, size)), False, "bytes instead of"),
        (lambda d: d.extend(b"more"), False, "bytes instead of"),
        (lambda d: d.__setitem__(size - 9, d[size - 9] ^ 1), False, "checksum"),
        (swap(b'"model":"', b'"mODEL":"'), True, "header of the file is damaged"),
        (swap(b'"prompt":"', b'"prompt":"9e999'), True, "header of the file is damaged"),
        (swap(b'"shape":[', b'"shape":[' + b"9" * 50), True, "header of the file is damaged"),
        (swap(identity, b"0" * len(identity)), True, "not loaded here"),
        (swap(b'"layout":"fused', b'"layout":"other'), True, "another layout"),
        (swap(b'"aios_kv":"1"', b'"aios_kv":"9"'), True, "version"),
        (swap(b'"I32"', b'"F32"'), True, "other tensors"),
        (swap(b'"role": "user', b'"role": "evil'), True, "role"),
        (swap(b'"unfinished": null', b'"unfinished": 1234'), True, "malformed"),
        (swap(b'"kv.0"', b'"kv.7"'), True, "other tensors"),
        (swap(b'"F32"', b'"I32"'), True, "not have the shape"),
        (swap(b'"prompt":"', b'"prompt":"9'), True, "longer than the tokens"),
    ]
    for change, sealed, why in cases:
        bad = altered(file, change, sealed)
        with pytest.raises(BadSnapshot, match=why):
            kernel.kv_files.restore(target, bad)
        os.close(bad)
    rng = random.Random(1)
    for _ in range(200):
        bad = altered(file, lambda d: d.__setitem__(rng.randrange(len(d)), rng.randrange(256)), False)
        if os.pread(bad, size, 0) != os.pread(file, size, 0):
            with pytest.raises(BadSnapshot):
                kernel.kv_files.restore(target, bad)
        os.close(bad)
    assert (kernel.contexts.messages(target), state(kernel, target)) == ([], "cold")
    # a fault that only a worker can find costs only the KV
    poisoned = altered(file, lambda d: d.__setitem__(slice(size - 4, size), b"\xff" * 4), True)
    kernel.kv_files.restore(target, poisoned)
    assert turn(kernel, "well?", "target").tokens == turn(kernel, "well?").tokens


@pytest.mark.slow
def test_kv_from_a_file_stays_with_its_context(make_kernel: MakeKernel) -> None:
    """A forged file can spoil the answers of its own context, but of no other, not even the same user's."""
    kernel = make_kernel()
    kernel.start()
    context, target = begin(kernel), begin(kernel, "target")
    honest = turn(kernel, "a question of many, many words", max_tokens=9)
    file = taken(kernel, context)
    command(kernel, context, "truncate 0")
    command(kernel, context, "evict cold")
    os.kill(kernel.pool.workers()[0].process.pid, signal.SIGKILL)
    header = snapshot.read(file)
    forged = altered(
        file,
        lambda d: d.__setitem__(slice(header.kv[0].start, len(d)), bytes(len(d) - header.kv[0].start)),
        True,
    )
    kernel.kv_files.restore(target, forged)
    turn(kernel, "more", "target", max_tokens=3)
    assert turn(kernel, "a question of many, many words", max_tokens=9).tokens == honest.tokens


@pytest.mark.parametrize("tokens", ["{}", '""', "null", "[1.5]", "[true]", '["1"]', "5"])
def test_an_unfinished_answer_has_numbers_for_tokens(tokens: str) -> None:
    unfinished = f'{{"request":{{"prompt":"x"}},"system":"","text":"","model":"","tokens":{tokens}}}'
    with pytest.raises(BadSnapshot, match="malformed"):
        kvfile.judged(f'{{"messages":[],"unfinished":{unfinished}}}'.encode())


def test_an_answer_is_resumed_once_and_only_by_its_own_model(
    make_kernel: MakeKernel, slow_llama: Path
) -> None:
    kernel = make_kernel("", slow_llama)
    kernel.start()
    context, target = begin(kernel), begin(kernel, "target")
    agent = kernel.agents.add("asks")
    source = Source("/agents/asks/syscall/llm", agent)
    kernel.agents.change(agent, system="you are a pirate", params={"ignore_eos": True, "max_tokens": 250})
    body = b'{"prompt":"go on and on","context":"talk"}'
    running = kernel.admission.submit(ME, source, body)
    wait_until(lambda: len(running.tokens) > 20, "tokens", LONG_S)
    file = taken(kernel, context)
    expected = ended(running)
    kernel.agents.change(agent, system="")
    kernel.kv_files.restore(target, file)
    resume = b'{"context":"target","resume":true}'
    dropped = kernel.admission.submit(ME, source, resume)
    kernel.ending.cancel(dropped)
    assert ended(dropped).state is State.CANCELLED, "and the unfinished answer is still there"
    again = kernel.admission.submit(ME, source, resume)
    twice = ended(kernel.admission.submit(ME, source, resume))
    assert ended(again).tokens == expected.tokens, "with the system prompt it began with"
    assert twice.state is State.FAILED
    kernel.kv_files.restore(target, file)
    kernel.contexts.append(target, '{"role":"user","content":"wait"}\n')
    with pytest.raises(BadRequest, match="nothing to resume"):
        kernel.admission.judge(ME, source, resume)
    kernel.kv_files.restore(target, file)
    target.unfinished = target.unfinished.replace(kernel.models.all()[0].info["identity"], "another")
    with pytest.raises(BadRequest, match="did not begin the unfinished answer"):
        kernel.admission.judge(ME, source, resume)


def test_a_guests_prompt_is_not_in_the_owners_kv_file(make_kernel: MakeKernel, slow_llama: Path) -> None:
    kernel = make_kernel("", slow_llama)
    kernel.start()
    context = begin(kernel, mode=0o777)
    turn(kernel, "hello all", max_tokens=4)
    vocabulary = Tokenizer.from_file(str(kernel.models.all()[0].path / "tokenizer.json"))
    secret = " ".join(map(str, vocabulary.encode("code is 4711").ids))
    agent = kernel.agents.add("guest")
    kernel.agents.change(agent, system="the code is 4711", params={"max_tokens": 300, "ignore_eos": True})
    source = Source("/agents/guest/syscall/llm", agent)
    guest = kernel.admission.submit(EVE, source, b'{"prompt":"what now?","context":"talk"}')
    wait_until(lambda: len(guest.tokens) > 5, "tokens", LONG_S)
    files = [taken(kernel, context)]
    assert ended(guest).state is State.DONE
    files.append(taken(kernel, context))
    for file in files:
        header = snapshot.read(file)
        place = header.tensors["tokens"]
        tokens = memoryview(os.pread(file, place.bytes, place.start)).cast("i").tolist()
        assert secret not in " ".join(map(str, tokens))
        assert b'"unfinished": null' in snapshot.about(file, header)


def test_a_request_belongs_to_the_context_it_was_made_for(make_kernel: MakeKernel) -> None:
    """A context that is removed and made again by another user is another conversation."""
    kernel = make_kernel()
    kernel.start()
    context = begin(kernel)
    agent = kernel.agents.add("held")
    kernel.agent_objects.pause(agent, True)
    source = Source("/agents/held/syscall/llm", agent)
    held = kernel.admission.submit(ME, source, b'{"prompt":"mine","context":"talk"}')
    kernel.contexts.remove("talk")  # as if it happened during the request's admission
    begin(kernel)
    assert turn(kernel, "another's").state is State.DONE, "it does not wait for the old one's turn"
    kernel.agent_objects.pause(agent, False)
    assert ended(held).state is State.FAILED
    assert "context was removed" in held.error
    assert len(kernel.contexts.messages(kernel.contexts.get("talk"))) == 2
    assert context.id != kernel.contexts.get("talk").id


def test_reading_kv_costs_no_quota_afterwards(make_kernel: MakeKernel) -> None:
    kernel = make_kernel()
    kernel.start()
    context = begin(kernel)
    turn(kernel, "hello")
    before = kernel.residency.bytes(context)
    os.close(taken(kernel, context))
    assert kernel.residency.bytes(context) == before
    assert state(kernel, context) == "resident"


def test_bounds_of_kv_and_of_moments(make_kernel: MakeKernel, slow_llama: Path) -> None:
    kernel = make_kernel("[quota]\nkv_bytes = 2000000\n", slow_llama)
    kernel.start()
    context = begin(kernel)
    turn(kernel, "x" * 80)
    with pytest.raises(OverQuota, match="2000000"):
        kernel.kv_budget.check(ME, 1900000)
    kernel.kv_budget.check(EVE, 2000000)
    with pytest.raises(OverQuota):
        kernel.kv_budget.check(EVE, 2000001)
    running = ask(kernel, "y", "talk", max_tokens=500)
    file = taken(kernel, context)
    with pytest.raises(Busy, match="is running"):
        command(kernel, context, "evict")
    with pytest.raises(Busy, match="turn going on"):
        kernel.kv_files.restore(context, file)
    kernel.ending.cancel(running)


def test_a_conversation_too_long_fails_or_loses_its_oldest_turns(make_kernel: MakeKernel) -> None:
    kernel = make_kernel()
    kernel.start()
    context = begin(kernel)
    kernel.contexts.append(context, '{"role":"system","content":"be brief"}\n')
    for i in range(8):
        kernel.contexts.append(
            context,
            f'{{"role":"user","content":"turn {i} {"x" * 120}"}}\n{{"role":"assistant","content":"yes"}}\n',
        )
    failed = ended(ask(kernel, "now?", "talk", max_tokens=4))
    assert failed.state is State.FAILED
    assert "1024" in failed.error
    cut = turn(kernel, "now?", truncation="auto", max_tokens=4)
    assert 600 < cut.usage.prompt_tokens <= 1020
    assert len(kernel.contexts.messages(context)) == 19, "the messages themselves all stay"


def test_a_state_folder_of_the_first_version_is_taken_over(tmp_path: Path) -> None:
    Store(tmp_path, SPECS).close()
    (tmp_path / MARKER).unlink()
    db = sqlite3.connect(tmp_path / "aios.db")
    db.executescript(
        "DROP TABLE notes; DROP TABLE keys; DROP TABLE stays;"
        "DROP TABLE accounts; DROP TABLE counters; DROP TABLE pins; DROP TABLE grants; DROP TABLE contexts;"
        "DROP INDEX requests_by_parent;"
        "ALTER TABLE requests DROP COLUMN parent; ALTER TABLE requests DROP COLUMN parked;"
        "ALTER TABLE requests DROP COLUMN family;"
        "CREATE TABLE contexts (name TEXT PRIMARY KEY, tokens INTEGER NOT NULL DEFAULT 0);"
        "INSERT INTO contexts VALUES ('old', 7); INSERT INTO messages VALUES ('old', 1, '{}');"
        "PRAGMA user_version=1"
    )
    db.close()
    store = Store(tmp_path, SPECS)
    assert [row[:3] for row in store.contexts()] == [("old", 1, 7)]
    assert store.messages("old") == [{}]
    assert store.add_context("new") == 2


def test_requests_of_an_earlier_version_are_taken_over(tmp_path: Path) -> None:
    """Version 6 stored all kinds in one form, with a tool's name in the field of the model."""
    Store(tmp_path, SPECS).close()
    (tmp_path / MARKER).unlink()
    sampling = {**asdict(GREEDY), "stop": []}
    said = [{"role": "user", "content": '{"x": 1}'}]
    common = {
        "messages": said, "sampling": sampling, "model": "m", "context": "", "context_id": 0, "system": "",
        "tools": [], "decoded": [], "tool_choice": "auto", "schema": "", "nice": 3, "deadline_s": None,
        "json": False, "stream": False, "operation": "llm", "steps": 0, "resume": False, "groups": [],
    }  # fmt: skip
    old = [
        common,
        {**common, "steps": 4, "groups": [5, 6], "context": "c", "context_id": 2},
        {**common, "operation": "tool", "model": "tools/calc", "groups": [5]},
        {**common, "operation": "embed", "json": True},
        {**common, "operation": "tokenize", "json": True},
    ]
    db = sqlite3.connect(tmp_path / "aios.db")
    for spec in old:
        columns = "uid, agent, agent_id, file, state, spec, submitted_s"
        values = 0, "", 0, "", "queued", json.dumps(spec), 1
        db.execute(f"INSERT INTO requests ({columns}) VALUES (?,?,?,?,?,?,?)", values)
    db.commit()
    db.executescript(
        "DROP TABLE notes; DROP TABLE keys; DROP TABLE stays; DROP TABLE accounts; DROP TABLE counters;"
        "ALTER TABLE requests DROP COLUMN family; PRAGMA user_version=6"
    )
    db.close()
    store = Store(tmp_path, SPECS)
    chat = Chat(tuple(said), GREEDY, "m", nice=3)
    assert [request.spec for request in store.unfinished()] == [
        chat,
        Loop(tuple(said), GREEDY, "m", nice=3, steps=4, groups=(5, 6), context="c", context_id=2),
        ToolCall("calc", '{"x": 1}', (5,), nice=3),
        Embed('{"x": 1}', "m", nice=3, json=True),
        Tokenize('{"x": 1}', "m", nice=3, json=True),
    ]
    assert store.reserve_numbers(1) == 6
    store.close()


def test_a_note_is_of_its_context_alone_and_lasts(tmp_path: Path) -> None:
    store = Store(tmp_path, {})
    id = store.add_context("talk")
    store.save_note(id, "é")
    fork = store.fork_context("talk", "fork")
    store.close()
    store = Store(tmp_path, {})
    assert (store.note(id), store.note(fork)) == ("é", "")
    store.remove_context("talk")
    assert (store.note(id), store.note(store.add_context("talk"))) == ("", "")
    store.close()


def test_a_requests_own_system_prompt_leads_and_is_not_kept(make_kernel: MakeKernel) -> None:
    kernel = make_kernel()
    kernel.start()
    context = begin(kernel)
    kernel.contexts.append(context, '{"role":"system","content":"before"}\n')
    body = b'{"prompt":"hi","system":"now","context":"talk","max_tokens":2}'
    request = ended(kernel.admission.submit(ME, Source("/models/random/llm", target="random"), body))
    assert request.state is State.DONE
    assert isinstance(request.spec, Chat)
    assert [m["content"] for m in kernel.contexts.whole(request.spec)][:2] == ["now", "before"]
    assert [m["role"] for m in kernel.contexts.messages(context)] == ["system", "user", "assistant"]

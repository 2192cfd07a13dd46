"""events.jsonl and metrics on the real mount: which user sees which event; the official parser reads the
metrics."""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from aiosd.access.caller import Caller
from aiosd.access.permissions import Permission
from aiosd.events import Events
from tests.running import Daemon, wait_until
from tests.t5_users import ALICE, BOB, as_user

pytestmark = [pytest.mark.mount, pytest.mark.root]


def opened(pid: int, name: str) -> bool:
    links = Path(f"/proc/{pid}/fd").iterdir()
    with suppress(FileNotFoundError):  # closed meanwhile
        return any(os.readlink(link).endswith(name) for link in links)
    return False


@contextmanager
def listening(aios: Daemon, uid: int) -> Iterator[list[dict[str, Any]]]:
    """The lines that a `cat` of this user prints while the block runs; complete after the block."""
    found: list[dict[str, Any]] = []
    command = ["setpriv", "--reuid", str(uid), "--regid", str(uid), "--clear-groups", "cat", "events.jsonl"]
    with subprocess.Popen(command, cwd=aios.root, stdout=subprocess.PIPE) as reader:
        wait_until(lambda: opened(reader.pid, "/events.jsonl"), "the reader")  # sees no earlier events
        yield found
        time.sleep(0.5)
        reader.terminate()
        assert reader.stdout is not None
        found += map(json.loads, reader.stdout.read().splitlines())


def test_users_see_their_own_events_and_those_of_readable_objects(aios: Daemon) -> None:
    with listening(aios, ALICE) as alices, listening(aios, BOB) as bobs, listening(aios, 0) as roots:
        script = "mkdir agents/ev contexts/ev; echo 'Repeat: mango' > agents/ev/syscall/llm"
        assert as_user(aios, ALICE, f"{script}; cat agents/ev/syscall/llm").stdout == "mango\n"
        assert as_user(aios, BOB, "echo 'Repeat: secret' > models/tiny/llm; cat models/tiny/llm").stdout
    with listening(aios, BOB) as shared:
        (aios.root / "agents/ev").chmod(0o755)
        as_user(aios, ALICE, "echo 'Repeat: plum' > agents/ev/syscall/llm; cat agents/ev/syscall/llm")
    as_user(aios, ALICE, "rmdir agents/ev contexts/ev")
    mine = [e for e in alices if e["event"] == "request"]
    assert [e["state"] for e in mine] == ["queued", "running", "done"]
    assert {e["agent"] for e in mine} == {"ev"}
    made = [(e["event"], e["state"]) for e in alices if e["event"] in ("agent", "context")]
    assert made == [("agent", "made"), ("context", "made")]
    assert [e["state"] for e in bobs] == ["queued", "running", "done"]
    assert {e["agent"] for e in bobs} == {""}
    assert len(roots) == len(alices) + len(bobs)
    assert [e["state"] for e in shared] == ["queued", "running", "done"]


def test_the_past_of_an_agent_is_not_for_the_next_owner_of_its_name(aios: Daemon) -> None:
    command = ["setpriv", "--reuid", str(BOB), "--regid", str(BOB), "--clear-groups", "bash", "-c"]
    script = "exec 3<events.jsonl; echo open; read; mkdir agents/ev; timeout 1 cat <&3; rmdir agents/ev"
    with subprocess.Popen(
        [*command, script], cwd=aios.root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as bob:
        assert bob.stdout
        assert bob.stdout.readline() == "open\n"
        ask = "mkdir agents/ev; echo 'Repeat: fig' > agents/ev/syscall/llm; cat agents/ev/syscall/llm"
        assert as_user(aios, ALICE, f"{ask}; rmdir agents/ev").stdout == "fig\n"
        seen = bob.communicate("\n", timeout=20)[0]
    assert [json.loads(line)["state"] for line in seen.splitlines()] == ["made"]


def test_readers_of_an_object_see_its_end(aios: Daemon) -> None:
    as_user(
        aios, ALICE, "mkdir -m 755 contexts/ev agents/ev; chmod 755 contexts/ev agents/ev; mkdir agents/own"
    )
    with listening(aios, BOB) as bobs:
        assert as_user(aios, ALICE, "rmdir contexts/ev agents/ev agents/own").stderr == ""
    assert [(e["event"], e["state"]) for e in bobs] == [("context", "removed"), ("agent", "removed")]


def test_a_forked_context_is_made(aios: Daemon) -> None:
    with listening(aios, ALICE) as seen:
        script = "mkdir contexts/ev; echo fork twig > contexts/ev/ctl; rmdir contexts/ev contexts/twig"
        assert as_user(aios, ALICE, script).stderr == ""
    states = [(e["context"], e["state"]) for e in seen]
    assert states == [("ev", "made"), ("twig", "made"), ("ev", "removed"), ("twig", "removed")]


def test_events_of_an_ended_object_are_not_for_the_next_owner_of_its_name() -> None:
    owners: dict[str, Permission] = {}
    events, bob = Events(owners), Caller(BOB, BOB, 0)  # type: ignore[arg-type]
    path = "/agents/a"
    owners[path] = Permission(ALICE, ALICE, 0o700)
    events.emit("agent", path, ALICE, state="made")
    events.forget(path, owners.pop(path))
    events.emit("request", path, ALICE, state="failed")  # late
    events.forget(path)
    owners[path] = Permission(BOB, BOB, 0o700)
    assert events.since(0, bob)[0] == ""
    events.emit("agent", path, BOB, state="made")
    text, at = events.since(0, bob)
    assert [json.loads(line)["state"] for line in text.splitlines()] == ["made"]
    events.forget(path, owners[path])
    owners[path] = Permission(ALICE, ALICE, 0o700)
    assert events.since(0, bob) == (text, at)


def test_an_event_wakes_no_reader_who_may_not_see_it() -> None:
    class Nobody:
        def get(self, path: str) -> None:
            return None

    events, woken = Events(Nobody()), []  # type: ignore[arg-type]
    alice, bob = Caller(ALICE, ALICE, 0), Caller(BOB, BOB, 0)
    unwatch = events.watch(lambda: woken.append("alice"), alice)
    events.watch(lambda: woken.append("bob"), bob)
    events.emit("request", "/agents/a", ALICE, state="queued")
    assert woken == ["alice"]
    events.emit("worker", state="ready")
    assert sorted(woken) == ["alice", "alice", "bob"]
    unwatch()
    events.emit("request", "/agents/a", ALICE, state="done")
    assert woken.count("alice") == 2
    events.watch(lambda: woken.append("again"), alice)
    unwatch()  # a second call does nothing
    events.emit("request", "/agents/a", ALICE, state="done")
    assert woken.count("again") == 1
    lines, after = events.since(0, alice)
    assert (len(lines.splitlines()), after) == (4, 4)


def test_a_reader_far_behind_gets_all_in_pieces() -> None:
    class Nobody:
        def get(self, path: str) -> None:
            return None

    events = Events(Nobody())  # type: ignore[arg-type]
    for n in range(1000):
        events.emit("request", "/agents/a", ALICE if n % 3 else BOB, n=n)
    got, at = [], 0
    while at < 1000:
        text, at = events.since(at, Caller(ALICE, ALICE, 0))
        got += [json.loads(line)["n"] for line in text.splitlines()]
    assert got == [n for n in range(1000) if n % 3]


def test_it_can_be_polled_and_read_without_blocking(aios: Daemon) -> None:
    fd = os.open(aios.root / "events.jsonl", os.O_RDONLY | os.O_NONBLOCK)
    poll = select.epoll()
    poll.register(fd, select.EPOLLIN)
    try:
        with pytest.raises(BlockingIOError):
            os.read(fd, 4096)
        assert poll.poll(0.1) == []
        (aios.root / "contexts/polled").mkdir()
        assert poll.poll(5)
        assert json.loads(os.read(fd, 4096))["context"] == "polled"
        (aios.root / "contexts/polled").rmdir()
        wait_until(lambda: b"removed" in os.read(fd, 4096), "the next line")
    finally:
        poll.close()
        os.close(fd)


def test_metrics_are_what_prometheus_reads(aios: Daemon) -> None:
    aios.sh("mkdir agents/m; echo hi > agents/m/syscall/llm; cat agents/m/syscall/llm; rmdir agents/m")
    text = aios.read("metrics")
    families = {family.name: family for family in text_string_to_metric_families(text)}
    samples = {(s.name, *s.labels.values()): s.value for f in families.values() for s in f.samples}
    assert samples["aios_requests_total", "done"] >= 1
    assert samples["aios_model_ready", "tiny"] == 1
    assert samples["aios_worker_kv_bytes_limit", "0", "tiny"] > 1 << 29
    assert 0 < samples["process_resident_memory_bytes",] < 1 << 30
    assert families["aios_requests"].type == "counter"
    assert all(family.documentation and family.samples for family in families.values())

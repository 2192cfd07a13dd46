"""The trace: spans that do not overlap, in the format of Chrome's viewer, and the picture of it."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

from aiosd.cli.plot import plot
from aiosd.scheduler import trace
from aiosd.syscall.chat import Chat
from aiosd.syscall.request import Request, State
from aiosd.syscall.sampling import Sampling
from tests.running import wait_until
from tests.t2_scheduler import LONG_S, MakeKernel, ask, ended


def test_a_request_is_in_one_span_at_a_time(tmp_path: Path) -> None:
    now = 1000.0
    recorded = trace.Trace(lambda: now)
    request = Request(7, 1, "ada", "/x", Chat((), Sampling(), "m"))
    for name in ("queued", "prefill", "decode", "preempted", "prefill"):
        recorded.enter(request, name)
        now += 1.5
    recorded.decodes(request)
    recorded.decodes(request)
    now += 1
    going = json.loads(trace.document(recorded.spans()))["traceEvents"]
    recorded.leave(request)
    recorded.leave(request)
    events = json.loads(trace.document(recorded.spans()))["traceEvents"]
    assert going == events
    assert events[0]["args"]["name"] == "7 ada (uid 1)"
    spans = [(e["name"], e["ts"] / 1e6, e["dur"] / 1e6) for e in events[1:]]
    assert spans == [
        ("queued", 1000.0, 1.5), ("prefill", 1001.5, 1.5), ("decode", 1003.0, 1.5),
        ("preempted", 1004.5, 1.5), ("prefill", 1006.0, 1.5), ("decode", 1007.5, 1.0),
    ]  # fmt: skip
    for suffix in ("svg", "png"):
        plot({"traceEvents": events}, tmp_path / f"out.{suffix}")
    assert "7 ada" in (tmp_path / "out.svg").read_text() or (tmp_path / "out.svg").stat().st_size > 5000
    plot({"traceEvents": []}, tmp_path / "empty.svg")
    now += trace.KEPT_S + 10
    assert recorded.spans() == []


def test_preempted_requests_show_as_such(make_kernel: MakeKernel) -> None:
    kernel = make_kernel("[scheduler]\npolicy = 'rr'\nquantum = 8\n[engine]\nmax_running = 1\n")
    kernel.start()
    both = [ask(kernel, "x", max_tokens=400), ask(kernel, "y", max_tokens=400)]
    wait_until(lambda: any(s.ended_s for s in kernel.scheduler.spans()), "spans", LONG_S)
    assert [ended(r).state for r in both] == [State.DONE] * 2
    spans = sorted(kernel.scheduler.spans(), key=lambda s: s.began_s)
    for request in both:
        mine = [s for s in spans if s.request == request.id]
        assert [mine[0].name, mine[-1].name] == ["queued", "decode"]
        assert sum(s.name == "preempted" for s in mine) == request.preemptions >= 1
        assert all(a.ended_s <= b.began_s for a, b in pairwise(mine))
    running = [s for s in spans if s.name in ("prefill", "decode")]
    assert all(a.ended_s <= b.began_s + 0.25 for a, b in pairwise(running)), "one place"

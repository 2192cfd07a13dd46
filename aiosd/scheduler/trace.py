"""Record what each request did when: spans for scheduler/trace.json, in the format of Chrome's trace viewer.

A request is in one span at a time: queued, prefill, decode, preempted (by the policy), swapped (KV memory was
full). Only the newest SPANS are kept. The caller holds the scheduler's lock.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from aiosd.syscall.request import Request

SPANS = 50_000
KEPT_S = 600.0


@dataclass(slots=True)
class Span:
    """One phase of a request. It holds no reference to the request, whose text may be long and private."""

    request: int
    uid: int
    agent: str
    model: str
    name: str
    began_s: float
    worker: int | None
    ended_s: float = 0.0


class Trace:
    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._open: dict[int, Span] = {}
        self._ended: deque[Span] = deque(maxlen=SPANS)

    def enter(self, request: Request, name: str) -> None:
        """Begin a span of the request, and end the one before."""
        self.leave(request)
        self._open[request.id] = Span(
            request.id, request.uid, request.agent, request.spec.target, name, self._clock(), request.worker
        )

    def decodes(self, request: Request) -> None:
        """Note that a token came: the first one ends the prefill."""
        span = self._open.get(request.id)
        if span is not None and span.name == "prefill":
            self.enter(request, "decode")

    def leave(self, request: Request) -> None:
        span = self._open.pop(request.id, None)
        if span is not None:
            span.ended_s = self._clock()
            self._ended.append(span)
            while self._ended[0].ended_s < span.ended_s - KEPT_S:
                self._ended.popleft()

    def spans(self) -> list[Span]:
        """Return the spans of the last KEPT_S. A span that goes on is shown as ending now."""
        now = self._clock()
        going = [replace(s, ended_s=now) for s in self._open.values()]
        return [s for s in self._ended if s.ended_s > now - KEPT_S] + going


def document(spans: list[Span]) -> str:
    """Make the JSON: one row for each request, times in microseconds."""
    events: list[dict[str, Any]] = []
    for s in {s.request: s for s in spans}.values():
        facts: dict[str, object] = {"name": f"{s.request} {s.agent or s.model} (uid {s.uid})"}
        events.append({"ph": "M", "name": "thread_name", "pid": 1, "tid": s.request, "args": facts})
    for s in sorted(spans, key=lambda s: s.began_s):
        facts = {"uid": s.uid, "agent": s.agent, "model": s.model}
        facts |= {} if s.worker is None else {"worker": s.worker}
        events.append(
            {"ph": "X", "name": s.name, "cat": "request", "pid": 1, "tid": s.request,
             "ts": round(s.began_s * 1e6), "dur": round((s.ended_s - s.began_s) * 1e6), "args": facts}
        )  # fmt: skip
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n"

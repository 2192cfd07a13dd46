"""Ask the policy where an agent's KV waits while the agent's tools run, and move it there.

The policy gets measured values: how long a tool's calls took, how fast a model reads prompts, how fast KV
moved. Lost KV is recomputed, so a wrong guess costs time and never a token. Any thread may call.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable

from aiosd.context.contexts import Context
from aiosd.context.residency import Residency
from aiosd.cores.pool import Pool, Worker
from aiosd.policies.interception import Away, place
from aiosd.syscall.request import Request
from aiosd.tools.catalog import Tools

log = logging.getLogger(__name__)

PERSON_S = 60.0  # a guess: how long a person takes to decide
TOOL_S = 1.0  # a guess for a tool that was never called
READ_PER_S = 1000.0  # prompt tokens; a guess before the first measurement
MOVED_PER_S = 2e9  # bytes; a guess before the first measurement
NEW = 0.2  # the weight of a new measurement


class Interception:
    def __init__(self, pool: Pool, residency: Residency, tools: Tools) -> None:
        self._pool, self._residency, self._tools = pool, residency, tools
        self._lock = threading.Lock()
        self._read_per_s: dict[str, float] = {}  # by model
        self._moved_per_s = MOVED_PER_S
        self.chosen = {"keep": 0, "host": 0, "drop": 0}

    def away(self, context: Context, calls: Iterable[Request], running: Iterable[Request]) -> None:
        """Choose where the KV waits during these calls. `running`: the requests on the same worker."""
        worker = self._pool.find(context.worker)
        if worker is None:
            return

        choice = place(self._view(context, worker, calls, running))
        with self._lock:
            self.chosen[choice] += 1
        if choice == "host":
            began = time.monotonic()
            size = self._residency.bytes(context)
            saved = self._residency.save(context, worker, evict=True)
            saved.add_done_callback(lambda _: self._moved(size, time.monotonic() - began))
            context.worker = None
        elif choice == "drop":
            self._residency.drop(context)

    def read(self, request: Request, tokens: int) -> None:
        """Measure how fast the model computed the `tokens` of a prompt that were not cached."""
        if request.started_s is None or tokens <= 0:
            return
        rate = tokens / max(time.time() - request.started_s, 1e-3)
        with self._lock:
            before = self._read_per_s.get(request.spec.target, rate)
            self._read_per_s[request.spec.target] = (1 - NEW) * before + NEW * rate

    def _moved(self, size: int, took_s: float) -> None:
        with self._lock:
            self._moved_per_s = (1 - NEW) * self._moved_per_s + NEW * size / max(took_s, 1e-3)

    def _view(
        self, context: Context, worker: Worker, calls: Iterable[Request], running: Iterable[Request]
    ) -> Away:
        per_token = int(worker.model.info.get("kv_bytes_per_token", 0))
        size = context.tokens * per_token
        total = worker.stats.get("kv_bytes_total", 0)
        return Away(
            expected_s=max((self._expected_s(call) for call in calls), default=0.0),
            bytes=size,
            others_bytes=sum(r.usage.prompt_tokens + len(r.tokens) for r in running) * per_token,
            recompute_s=context.tokens / self._read_per_s.get(worker.model.name, READ_PER_S),
            move_s=size / self._moved_per_s,
            used=worker.stats.get("kv_bytes_used", 0) / total if total else 0.0,
        )

    def _expected_s(self, call: Request) -> float:
        tool = self._tools.of(call.queue)
        if tool is None or call.state.final:
            return 0.0
        mean_s = tool.busy_s / tool.calls if tool.calls else min(TOOL_S, tool.manifest.timeout_s)
        return mean_s + (PERSON_S if call.decide_by_s is not None else 0.0)

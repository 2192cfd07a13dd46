"""The daemon's state for Prometheus: the text exposition format, version 0.0.4."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from aiosd.kernel import Kernel

Sample = tuple[Mapping[str, str], float]


def exposition(kernel: Kernel) -> str:
    scheduler, pool = kernel.scheduler, kernel.pool
    (running, waiting), counters = scheduler.load, scheduler.counters
    workers = [({"worker": str(w.id), "model": w.model.name}, w) for w in pool.workers()]
    models = [({"model": m.name}, m) for m in kernel.models.all()]
    process, swap = psutil.Process(), kernel.residency.swap
    counters_: list[tuple[str, str, list[Sample]]] = [
        ("aios_requests", "Requests that ended, by their last state.",
         [({"state": s}, counters[s]) for s in ("done", "failed", "cancelled")]),
        ("aios_requests_admitted", "Requests accepted.", alone(counters["admitted"])),
        ("aios_preemptions", "Requests that had to yield.", alone(counters["preemptions"])),
        ("aios_loop_kv", "Decisions about the KV of agents that waited for tools.",
         [({"choice": choice}, n) for choice, n in kernel.interception.chosen.items()]),
        ("aios_generated_tokens", "Tokens of answers.", alone(counters["tokens"])),
        ("aios_tool_cpu_seconds", "CPU time of tool calls.", alone(kernel.calls.cpu_s)),
        ("aios_scheduler_busy_seconds", "Time spent on deciding.", alone(scheduler.busy_s)),
        ("aios_worker_restarts", "Workers that died.", alone(pool.restarts)),
        ("aios_model_requests", "Requests that ended.", [(m, model.requests) for m, model in models]),
        ("aios_model_prompt_tokens", "Tokens of prompts.", [(m, model.prompt_tokens) for m, model in models]),
        ("aios_model_completion_tokens", "Tokens of answers, by model.",
         [(m, model.completion_tokens) for m, model in models]),
        ("process_cpu_seconds", "CPU time of the daemon.", alone(time.process_time())),
    ]  # fmt: skip
    gauges: list[tuple[str, str, list[Sample]]] = [
        ("aios_requests_running", "Requests that run.", alone(running)),
        ("aios_requests_waiting", "Requests that wait.", alone(waiting)),
        ("aios_agents", "Agents.", alone(len(kernel.agents))),
        ("aios_contexts", "Contexts.", alone(len(kernel.contexts))),
        ("aios_model_ready", "1 if the model answers.", [(m, model.state == "ready") for m, model in models]),
        ("aios_worker_ready", "1 if it answers.", [(w, worker.state == "ready") for w, worker in workers]),
        ("aios_worker_kv_bytes", "KV in use.",
         [(w, worker.stats.get("kv_bytes_used", 0)) for w, worker in workers]),
        ("aios_worker_kv_bytes_limit", "Room for KV.",
         [(w, worker.stats.get("kv_bytes_total", 0)) for w, worker in workers]),
        ("aios_swapped_kv_bytes", "KV of contexts that left the workers.",
         [({"tier": tier}, swap.used(tier)) for tier in ("host", "disk")]),
        ("process_resident_memory_bytes", "Memory of the daemon.", alone(process.memory_info().rss)),
        ("process_open_fds", "Open files of the daemon.", alone(len(os.listdir("/proc/self/fd")))),
        ("process_start_time_seconds", "When the daemon started.", alone(kernel.started_s)),
    ]  # fmt: skip
    return "".join(
        [family(f"{name}_total", "counter", about, samples) for name, about, samples in counters_]
        + [family(name, "gauge", about, samples) for name, about, samples in gauges]
    )


def alone(value: float) -> list[Sample]:
    return [({}, value)]


def family(name: str, kind: str, about: str, samples: Iterable[Sample]) -> str:
    """One metric family. Label values are names of objects, which contain no character to escape."""
    lines = [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
    for labels, value in samples:
        shown = ",".join(f'{key}="{text}"' for key, text in labels.items())
        lines.append(f"{name}{{{shown}}} {float(value)!r}" if shown else f"{name} {float(value)!r}")
    return "\n".join(lines) + "\n"

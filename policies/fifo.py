"""First in, first out; no job yields. Replaces every policy that fails."""

from __future__ import annotations

from aiosd.policies import Job, View


def rank(view: View, job: Job) -> int:
    return job.id


def preempt(view: View) -> int | None:
    return None

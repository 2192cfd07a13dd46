"""First in, first out; no job yields. The fallback of every other policy."""

from __future__ import annotations

from aiosd.policies import Job, View


def rank(view: View, job: Job) -> int:
    return job.id


def preempt(view: View) -> int | None:
    return None

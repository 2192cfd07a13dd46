"""First in, first out; nobody yields. The fallback of every other policy."""

from __future__ import annotations

from aiosd.policies import View


def pick(view: View) -> int | None:
    return min((job.id for job in view.waiting), default=None)


def preempt(view: View) -> int | None:
    return None

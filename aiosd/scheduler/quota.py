"""How much each user and agent may have: from [quota], its tables for some, and what was used of a rate.

A user's own table decides; else the most generous of his groups'; else [quota] itself. An agent's table
bounds it besides. Any thread may ask; Buckets are the scheduler's, under its lock.
"""

from __future__ import annotations

import grp
import pwd
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from typing import Any

from aiosd.access.caller import Caller
from aiosd.config.config import Config, Quota

UNBOUNDED = 1 << 62
RATES = ("running_requests", "tokens_per_minute")  # 0 means that there is no bound


class Quotas:
    def __init__(self, config: Config) -> None:
        self._default = config.quota
        self._by_uid = self._numbers(config, "user", lambda name: pwd.getpwnam(name).pw_uid)
        self._by_gid = self._numbers(config, "group", lambda name: grp.getgrnam(name).gr_gid)
        self._of = lru_cache(1024)(self._made)  # asked several times a request
        self._by_agent = {
            name: {key: bound(key, value) for key, value in table.items()}
            for (kind, name), table in config.quotas.items()
            if kind == "agent"
        }
        self.asks_groups = bool(self._by_gid)

    @staticmethod
    def _numbers(config: Config, wanted: str, number: Callable[[str], int]) -> dict[int, Any]:
        """Names of users and groups as ids, once: asking for a name may take a network."""
        found = {}
        for (kind, name), table in config.quotas.items():
            if kind == wanted:
                with suppress(KeyError):  # nobody of that name here
                    found[int(name) if name.isdecimal() else number(name)] = table
        return found

    def of(self, caller: Caller) -> Quota:
        """Zeros that mean no bound are a large number here."""
        return self._of(caller.uid, caller.groups | {caller.gid} if self._by_gid else frozenset())

    def _made(self, uid: int, groups: frozenset[int]) -> Quota:
        tables = [self._by_gid[g] for g in groups if g in self._by_gid]
        chosen: dict[str, int] = {}
        for table in tables:
            for key, value in table.items():
                chosen[key] = max(chosen.get(key, 0), bound(key, value))
        chosen |= self._by_uid.get(uid, {})
        quota = replace(self._default, **chosen)
        return replace(quota, **{key: bound(key, getattr(quota, key)) for key in RATES})

    def running(self, caller: Caller, agent: str) -> tuple[int, int]:
        """How many requests of the user, and of the agent, may run at once."""
        return self.of(caller).running_requests, self.of_agent(agent).get("running_requests", UNBOUNDED)

    def of_agent(self, name: str) -> dict[str, int]:
        return self._by_agent.get(name, {})


def bound(key: str, value: int) -> int:
    return UNBOUNDED if key in RATES and value == 0 else value


class Buckets:
    """Token buckets: a minute's worth to begin with, filled again evenly. Spending may overdraw one."""

    def __init__(self) -> None:
        self._left: dict[object, tuple[float, float]] = {}  # tokens and when that was

    def left(self, who: object, per_minute: int, now: float) -> float:
        tokens, at = self._left.get(who, (float(per_minute), now))
        tokens = min(float(per_minute), tokens + (now - at) * per_minute / 60)
        self._left[who] = (tokens, now)
        return tokens

    def forget(self, who: object) -> None:
        """There is no bound, or no more. Needs no lock."""
        self._left.pop(who, None)

    def spend(self, who: object, tokens: int) -> None:
        """Of those that were asked about: the others have no bound."""
        if known := self._left.get(who):
            left, at = known
            self._left[who] = (left - tokens, at)
